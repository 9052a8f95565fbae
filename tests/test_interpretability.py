"""The recorder on every family of models, and the script that draws what it sees."""

import dataclasses
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import nn

from interpretability.recorder import record
from interpretability.visualize_attention import attention_maps, draw, latest_run, show_levels, visualize
from models.baselines import vit_tiny
from models.bdh import BDH, BDHConfig
from models.vision_bdh import v2_config, vision_bdh_v1, vision_bdh_v2, vision_bdh_v2_softmax, vision_bdh_v3
from training import ClassificationConfig, Experiment, RunOptions, UserError, fit
from training.config import ROOT
from training.data import load_dataset
from training.runs import load_model

BDH_SIZES = dict(img_size=8, patch_size=2, n_layer=3, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4)  # 16 tokens
VIT_SIZES = dict(img_size=8, patch_size=2, n_layer=3, n_embd=16, n_head=2, mlp_dim=32)
BUILDERS = {
    "v1": lambda: vision_bdh_v1(**BDH_SIZES),
    "v2": lambda: vision_bdh_v2(**BDH_SIZES),
    "v2_softmax": lambda: vision_bdh_v2_softmax(**BDH_SIZES),
    "v3": lambda: vision_bdh_v3(**BDH_SIZES),
    "vit": lambda: vit_tiny(**VIT_SIZES),
}
SCRIPT = ROOT / "interpretability" / "visualize_attention.py"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=BUILDERS)
def model(request):
    """A small model with weights large enough for all parts to matter, in evaluation mode."""
    torch.manual_seed(3)
    model = BUILDERS[request.param]().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def images():
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def count_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# ---------------------------------------------------------------------------- recorder


@pytest.mark.parametrize("training", [False, True])
def test_outputs_do_not_change(model, images, training):
    """To the bit, gradients and dropout included; and the hooks are gone afterwards."""
    model.train(training)

    def step():
        torch.manual_seed(0)
        model.zero_grad()
        logits = model(images)
        logits.square().sum().backward()
        return logits, [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    logits, gradients = step()
    with record(model) as trace:
        recorded_logits, recorded_gradients = step()
        assert count_hooks(model) > 0
    assert torch.equal(logits, recorded_logits)
    assert all(torch.equal(*pair) for pair in zip(gradients, recorded_gradients, strict=True))
    assert sorted(trace.inputs) == [0, 1, 2] and count_hooks(model) == 0
    assert not any(x.requires_grad for x in trace.inputs.values())


def test_hooks_go_after_an_exception(model, images):
    with pytest.raises(ZeroDivisionError), record(model):
        assert count_hooks(model) > 0
        _ = model(images), 1 / 0
    assert count_hooks(model) == 0


def test_only_chosen_levels_are_kept(model, images):
    with torch.no_grad(), record(model) as everything, record(model, levels=[2, 0]) as trace:
        model(images)
    assert sorted(trace.inputs) == [0, 2]
    assert all(torch.equal(trace.inputs[level], everything.inputs[level]) for level in (0, 2))
    assert not torch.equal(trace.inputs[0], trace.inputs[2])
    with pytest.raises(LookupError, match="level 1 was not recorded"):
        trace.scores(1)
    for level in (-1, 3):
        with pytest.raises(ValueError, match="between 0 and 2"), record(model, levels=[level]):
            pass
    assert count_hooks(model) == 0


def test_the_last_pass_counts(model, images):
    """Also after a pass that broke off between levels."""
    other = images.flip(0) * 0.5
    with torch.no_grad(), record(model) as expected:
        model(images)
    with torch.no_grad(), record(model) as trace:
        model(other)
        broken = model.encoder.layers[1] if hasattr(model, "heads") else model.attn
        handle = broken.register_forward_pre_hook(lambda *_: 1 / 0)
        if not hasattr(model, "heads"):
            model.use_fast_path = False  # which does not call attn
        with pytest.raises(ZeroDivisionError):
            model(other)
        handle.remove()
        if not hasattr(model, "heads"):
            model.use_fast_path = True
        model(images)
    assert all(torch.equal(trace.inputs[level], expected.inputs[level]) for level in range(3))


def test_scores_are_made_when_asked_for(images, monkeypatch):
    """One level at a time, so that memory never holds all of them."""
    model = vision_bdh_v2(**BDH_SIZES).eval()
    calls, real = [], model.attn.weights
    monkeypatch.setattr(model.attn, "weights", lambda q, k: calls.append(1) or real(q, k))
    with torch.no_grad(), record(model) as trace:
        model(images)
    assert not calls
    trace.scores(1)
    assert len(calls) == 1


def test_unknown_model():
    with pytest.raises(TypeError, match="Linear has no probe"), record(nn.Linear(2, 2)):
        pass


def layer_norm64(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def attention64(model, images, residual, norms, softmax):
    """Attention of every level (B, H, T, T), by the equations in numpy float64, one head and one pair at a time."""
    weights = {name: value.detach().double().numpy() for name, value in model.state_dict().items()}
    B, side, patch = len(images), 4, 2
    pixels = images.double().numpy().reshape(B, 3, side, patch, side, patch).transpose(0, 2, 4, 1, 3, 5)
    kernel = weights["patch_embed.weight"].reshape(16, -1)  # (D, 3 * patch * patch)
    x = pixels.reshape(B, side * side, -1) @ kernel.T + weights["patch_embed.bias"] + weights["pos_embed"]
    H, _, N = weights["encoder"].shape
    x = layer_norm64(x) if residual == "post" else x
    scores = []
    for level in range(3):
        x = layer_norm64(x) if residual == "pre" else x
        seen = x
        if residual == "scaled_pre":
            scale, shift = weights[f"level_norms.{level}.weight"], weights[f"level_norms.{level}.bias"]
            seen = (layer_norm64(x) * scale + shift) / math.sqrt(level + 1)
        update, heads = 0, []
        for head in range(H):
            x_sparse = np.maximum(seen @ weights["encoder"][head], 0)  # (B, T, N)
            q = np.empty_like(x_sparse)
            for pair in range(N // 2):
                angle = np.arange(side * side) * (2.0**16) ** (-2 * pair / N)
                even, odd = x_sparse[..., 2 * pair], x_sparse[..., 2 * pair + 1]
                q[..., 2 * pair] = even * np.cos(angle) - odd * np.sin(angle)
                q[..., 2 * pair + 1] = odd * np.cos(angle) + even * np.sin(angle)
            s = q @ q.transpose(0, 2, 1)
            if softmax:
                s = np.exp(s / math.sqrt(N))
                s /= s.sum(-1, keepdims=True)
            heads.append(s)
            a = layer_norm64(s @ seen) if norms else s @ seen
            y_sparse = np.maximum(a @ weights["encoder_v"][head], 0)
            update = update + (x_sparse * y_sparse) @ weights["decoder"][head * N : (head + 1) * N]
        x = x + (layer_norm64(update) if norms else update)
        x = layer_norm64(x) if residual == "post" else x
        scores.append(np.stack(heads, 1))
    return scores


@pytest.mark.parametrize(
    "name, residual, norms, softmax",
    [
        ("v1", "post", True, False),
        ("v2", "pre", True, False),
        ("v2_softmax", "pre", True, True),
        ("v3", "scaled_pre", False, False),
    ],
)
def test_bdh_scores(images, name, residual, norms, softmax):
    torch.manual_seed(7)
    model = BUILDERS[name]().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    with torch.no_grad(), record(model) as trace:
        model(images)
    expected = attention64(model, images, residual, norms, softmax)
    for level in range(3):
        scores = trace.scores(level)
        assert scores.shape == (3, 2, 16, 16) and not scores.requires_grad
        scale = np.abs(expected[level]).max()
        assert np.abs(scores.numpy() - expected[level]).max() < 2e-5 * scale
        assert torch.equal(trace.scores(level, patches_only=True), scores)  # there is no class token


def test_language_model_scores_are_masked():
    torch.manual_seed(0)
    model = BDH(BDHConfig(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4)).eval()
    with torch.no_grad(), record(model) as trace:
        model(torch.randint(0, 256, (2, 9)))
    scores = trace.scores(1)
    assert scores.shape == (2, 2, 9, 9) and scores.abs().max() > 0
    assert torch.equal(scores, scores.tril(-1))


def test_vit_weights_are_those_of_torch(images):
    """Against what its own attention module returns when asked for weights."""
    torch.manual_seed(7)
    model = BUILDERS["vit"]().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    returned = []

    def ask(module, args, kwargs):
        with torch.no_grad():
            x = args[0].clone()
            bare = type(module).forward(module, x, x, x, need_weights=True, average_attn_weights=False)
            returned.append(bare[1])

    handles = [block.self_attention.register_forward_pre_hook(ask, with_kwargs=True) for block in model.encoder.layers]
    with torch.no_grad(), record(model) as trace:
        model(images)
    for handle in handles:
        handle.remove()
    assert len(returned) == 3
    for level, expected in enumerate(returned):
        scores = trace.scores(level)
        assert scores.shape == (3, 2, 17, 17)
        assert torch.allclose(scores, expected, atol=1e-6)
        assert torch.equal(trace.scores(level, patches_only=True), scores[:, :, 1:, 1:])
    assert (returned[0] - returned[1]).abs().max() > 0.01  # levels can be told apart


# ---------------------------------------------------------------------------- pictures


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run on the digits, really trained for an epoch."""
    return fit_digits(tmp_path_factory.mktemp("work") / "runs", "tiny", n_layer=3)


def fit_digits(runs_dir, name, **model):
    sizes = dict(img_size=8, patch_size=2, in_channels=1, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4)
    train = ClassificationConfig(
        dataset="digits", epochs=1, batch_size=64, learning_rate=1e-3, weight_decay=0.05, seed=2
    )
    options = RunOptions(runs_dir=runs_dir, device="cpu")
    experiment = Experiment(name, v2_config(**(sizes | model)), train, options)
    fit(experiment)
    return experiment.folder


def read_png(path):
    """(height, width, 4) of a picture, which must show something."""
    pixels = imread(path)
    assert pixels.std() > 0.05
    return pixels


def test_script_from_another_folder(run, run_script, tmp_path):
    done = run_script(SCRIPT, "--run", run, "--patch", 1, 3, "--indices", 5, 0, "--output-dir", "maps", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "maps").iterdir()
    assert path.name == "attention_tiny_seed2_patch1-3.png" and path.name in done.stdout
    assert read_png(path).shape[1] > 1000


def test_maps_are_the_mean_over_heads_of_the_query(run):
    model, _ = load_model(run)
    images = torch.from_numpy(load_dataset("digits", None).test_images[[4, 9]])
    maps = attention_maps(model, images, (1, 3), 4)
    with torch.no_grad(), record(model) as trace:
        logits = model(images.float() / 127.5 - 1)
    assert sorted(maps.attention) == [0, 1, 2]
    for level, attention in maps.attention.items():
        expected = sum(trace.scores(level)[:, head, 1 * 4 + 3] for head in range(2)) / 2
        assert torch.allclose(attention.flatten(1), expected)
    assert torch.allclose(maps.probabilities, logits.softmax(-1)) and maps.signed


@pytest.mark.parametrize("name", BUILDERS)
def test_panels(name):
    """What matplotlib is given: which images, which levels, which scale; a class token is no patch."""
    model = BUILDERS[name]().eval()
    digits = load_dataset("digits", None)
    digits = dataclasses.replace(digits, test_images=np.repeat(digits.test_images, 3, axis=1))  # in colour
    chosen = [10, 11]  # among the first ten, training and test labels agree
    maps = attention_maps(model, torch.from_numpy(digits.test_images[chosen]), (0, 2), 4)
    figure = draw(maps, digits, chosen, (0, 2), 2, "title")
    panels = [ax for ax in figure.axes if ax.images and ax.images[0].get_array().shape == (4, 4)]
    photos = [ax for ax in figure.axes if ax.images and ax.images[0].get_array().shape[:2] == (8, 8)]
    assert len(panels) == 6 and len(photos) == 2
    for ax, index in zip(photos, chosen, strict=True):
        assert np.array_equal(ax.images[0].get_array(), digits.test_images[index].transpose(1, 2, 0))
        assert f"true: {digits.class_names[digits.test_labels[index]]}\n" in ax.get_title()
        assert ax.patches[0].get_xy() == (3.5, -0.5) and ax.patches[0].get_width() == 2
    predicted = [digits.class_names[label] for label in maps.probabilities.argmax(1)]
    assert [ax.get_title().split("predicted: ")[1].split(" (")[0] for ax in photos] == predicted
    order = [(image, level) for image in range(2) for level in range(3)]
    for ax, (image, level) in zip(panels, order, strict=True):
        picture, values = ax.images[0], maps.attention[level]
        assert np.array_equal(picture.get_array(), values[image].numpy())
        if maps.signed:
            limit = float(values[image].abs().max())
            assert picture.get_clim() == pytest.approx((-limit, limit))
        else:
            assert picture.get_clim() == pytest.approx((0, float(values.max())))
    assert maps.signed == (name not in ("v2_softmax", "vit"))
    assert ("Raw scores" in figure.get_suptitle()) == maps.signed


def test_levels_without_repeats():
    assert [show_levels(n) for n in (1, 2, 3, 6, 12)] == [[0], [0, 1], [0, 1, 2], [0, 3, 5], [0, 6, 11]]


@pytest.mark.parametrize("n_layer", [1, 2])
def test_few_levels(tmp_path, n_layer):
    run = fit_digits(tmp_path / "runs", "few", n_layer=n_layer, attention="softmax")
    path = visualize(run, tmp_path, images=1)
    assert path.name == "attention_few_seed2_patch2-2.png"  # the centre
    assert read_png(path).shape[1] < 400 * (n_layer + 2)


def test_colour_images(experiment, data_dir):
    trial = experiment(epochs=1)
    fit(trial)
    height = [read_png(visualize(trial.folder, trial.folder, images=n, data_dir=data_dir)).shape[0] for n in (1, 3)]
    assert height[1] > 2 * height[0]


def test_bad_input(run, tmp_path):
    for patch in ((4, 0), (0, 4), (-1, 0)):
        with pytest.raises(UserError, match="outside the grid of 4 x 4"):
            visualize(run, tmp_path, patch=patch)
    for indices in ([364], [0, -1]):
        with pytest.raises(UserError, match=f"no test image {indices[-1]}: the test set has 364"):
            visualize(run, tmp_path, indices=indices)
    for nothing in (dict(images=0), dict(indices=())):
        with pytest.raises(UserError, match="no image to draw"):
            visualize(run, tmp_path, **nothing)
    with pytest.raises(UserError, match="is no run"):
        visualize(tmp_path, tmp_path)
    assert not list(tmp_path.glob("*.png"))


def test_models_that_cannot_be_shown(run, tmp_path, monkeypatch):
    text = BDH(BDHConfig(n_layer=1, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4))
    for model, said in ((nn.Linear(2, 2), "Linear has no probe"), (text, "reads no images")):
        config = {"model_class": "BDHConfig", "config": {"model": {"n_layer": 1}, "train": {}}}
        monkeypatch.setattr("interpretability.visualize_attention.load_model", lambda _: (model, config))  # noqa: B023
        with pytest.raises(UserError, match=said):
            visualize(run, tmp_path)


def test_latest_run(tmp_path, run):
    """The one that was finished last; those without a summary or a checkpoint do not count."""
    with pytest.raises(UserError, match="no finished run"):
        latest_run(tmp_path / "runs")
    for age, name in enumerate(("b/seed0", "a/seed1", "c/seed0", "d/seed0")):
        shutil.copytree(run, tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name / "summary.json", (1e9 + age, 1e9 + age))
    (tmp_path / "runs/d/seed0/best.pt").unlink()
    (tmp_path / "runs/c/seed0/summary.json").unlink()
    assert latest_run(tmp_path / "runs") == tmp_path / "runs" / "a" / "seed1"


def test_errors_are_one_message(call_script, run, tmp_path, capsys):
    script = "interpretability/visualize_attention.py"
    (tmp_path / "config.json").write_text(json.dumps({"experiment": "x"}))
    (tmp_path / "file").touch()
    for flags, said in (
        (("--run", run, "--patch", 9, 0), "outside the grid"),
        (("--run", tmp_path), "is no run"),
        (("--run", run, "--output-dir", tmp_path / "file"), "file"),
    ):
        assert call_script(script, *flags) == 1
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and said in captured.err
    assert call_script(script, "--pach", 1, 2) == 2
