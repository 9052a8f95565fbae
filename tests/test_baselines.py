"""The baselines: parameters, what each setting does to 32 x 32 images, ResNet-20 by its paper, timm's attention."""

import math
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models as torchvision_models

from training import ClassificationConfig, Experiment, RunOptions, fit
from interpretability.common.recorder import record
from models import CONFIG_CLASSES, build_config
from models.baselines import (
    BaselineConfig,
    deit_tiny,
    deit_tiny_config,
    efficientnet_b0,
    efficientnet_b0_config,
    mobilenetv2,
    mobilenetv2_config,
    resnet20,
    resnet20_config,
    vit_tiny,
    vit_tiny_config,
)
from training.runs import load_file

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = {
    mobilenetv2: torchvision_models.mobilenet_v2,
    efficientnet_b0: torchvision_models.efficientnet_b0,
    deit_tiny: lambda **fields: timm.create_model("deit_tiny_patch16_224", pretrained=False, img_size=32, **fields),
}
CONFIGS = [vit_tiny_config, deit_tiny_config, resnet20_config, mobilenetv2_config, efficientnet_b0_config]
HAVE_SETTINGS = [deit_tiny_config, mobilenetv2_config, efficientnet_b0_config]
SETTINGS = [(build, setting) for build in LIBRARY for setting in ("published", "fitted")]
ALL = [(vit_tiny, {}), (resnet20, {}), *((build, dict(setting=setting)) for build, setting in SETTINGS)]


@pytest.fixture(scope="module", autouse=True)
def single_thread(one_thread):
    """Tensors are small here."""


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def draw_weights(model, std=0.05):
    """Every parameter and every running statistic at random, so that all parts matter and none is at its start."""
    generator = torch.Generator().manual_seed(11)
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2.0, generator=generator)
        elif value.is_floating_point():
            value.normal_(0, std, generator=generator)
        if value.ndim == 1 and name.endswith("weight"):  # the factor of a norm
            value.add_(1)
    return model


# ---------------------------------------------------------------------------- parameters and shapes


@pytest.mark.parametrize("num_classes", [10, 100])
@pytest.mark.parametrize(
    "build, fields, counted",
    [
        (resnet20, {}, {10: 269_722, 100: 275_572}),  # the former is the count known for option A
        (vit_tiny, {}, {10: 5_362_762, 100: 5_380_132}),
        (deit_tiny, dict(setting="published"), {10: 5_489_482, 100: 5_506_852}),
        (deit_tiny, dict(setting="fitted"), {10: 5_362_762, 100: 5_380_132}),
        *((mobilenetv2, dict(setting=each), {10: 2_236_682, 100: 2_351_972}) for each in ("published", "fitted")),
        *((efficientnet_b0, dict(setting=each), {10: 4_020_358, 100: 4_135_648}) for each in ("published", "fitted")),
    ],
)
def test_parameters(build, fields, counted, num_classes):
    with torch.device("meta"):
        model = build(num_classes=num_classes, **fields)
        assert count(model) == counted[num_classes]
        if build in LIBRARY:
            patch = dict(patch_size=4) if (build, fields["setting"]) == (deit_tiny, "fitted") else {}
            assert count(model) == count(LIBRARY[build](num_classes=num_classes, **patch))


@pytest.mark.parametrize("build, fields", ALL)
def test_shapes_and_gradients(build, fields):
    """Every parameter learns, at another size of image too."""
    model = build(num_classes=7, img_size=64, **fields).train()
    logits = model(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 7)
    if build is vit_tiny:
        draw_weights(model)  # its head starts at zero
        logits = model(torch.randn(2, 3, 64, 64))
    logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.eval()(torch.randn(1, 3, 64, 64)).isfinite().all()


# ---------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "build, setting, grid",
    [
        (mobilenetv2, "published", 1),
        (mobilenetv2, "fitted", 4),
        (efficientnet_b0, "published", 1),
        (efficientnet_b0, "fitted", 4),
        (resnet20, None, 8),
        (deit_tiny, "published", 2),
        (deit_tiny, "fitted", 8),
    ],
)
def test_what_is_left_of_an_image_before_pooling(build, setting, grid):
    model = build(**({"setting": setting} if setting else {})).eval()
    last = {resnet20: "blocks", deit_tiny: "norm"}.get(build, "features")
    shapes = []
    getattr(model, last).register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    (shape,) = shapes
    assert shape[1:] == (1 + grid**2, 192) if build is deit_tiny else shape[2:] == (grid, grid)


def strides(model):
    return {name: each.stride for name, each in model.named_modules() if isinstance(each, nn.Conv2d)}


@pytest.mark.parametrize("build", LIBRARY)
def test_published_is_the_librarys_model(build):
    """The same modules, names, shapes and strides, from one seed the same weights, and the same logits."""
    torch.manual_seed(0)
    model = build(setting="published", num_classes=10).eval()
    torch.manual_seed(0)
    library = LIBRARY[build](num_classes=10).eval()
    assert repr(model) == repr(library) and strides(model) == strides(library)
    ours, theirs = model.state_dict(), library.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(draw_weights(model)(images), draw_weights(library)(images))


@pytest.mark.parametrize(
    "build, changed",
    [
        (mobilenetv2, ["features.0.0", "features.2.conv.1.0"]),
        (efficientnet_b0, ["features.0.0", "features.2.0.block.1.0"]),
    ],
)
def test_fitted_differs_in_two_strides_and_takes_the_same_weights(build, changed):
    published, fitted = build(setting="published"), build(setting="fitted")
    before, after = strides(published), strides(fitted)
    assert [name for name in before if before[name] != after[name]] == changed
    assert all((before[name], after[name]) == ((2, 2), (1, 1)) for name in changed)
    draw_weights(published).eval()
    fitted.load_state_dict(published.state_dict())
    stems = []
    for model in (published, fitted.eval()):
        model.features[0].register_forward_hook(lambda module, args, output: stems.append(output))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = [model(images) for model in (published, fitted)]
    assert torch.allclose(stems[0], stems[1][..., ::2, ::2], atol=1e-6)  # a stride of 2 leaves out every second pixel
    assert not torch.allclose(*logits, rtol=1e-2)


def test_the_fitted_deit_is_vit_tiny():
    """Weights moved from timm's names to torchvision's give the same logits: only the start differs."""
    deit, vit = draw_weights(deit_tiny(setting="fitted")).eval(), vit_tiny().eval()
    names = {
        "cls_token": "class_token",
        "pos_embed": "encoder.pos_embedding",
        "patch_embed.proj": "conv_proj",
        "blocks.": "encoder.layers.encoder_layer_",
        "norm1": "ln_1",
        "norm2": "ln_2",
        "attn.qkv.": "self_attention.in_proj_",
        "attn.proj": "self_attention.out_proj",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.3",
        "head.": "heads.head.",
    }
    moved = {}
    for name, value in deit.state_dict().items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        moved["encoder.ln." + name.removeprefix("norm.") if name.startswith("norm.") else name] = value
    vit.load_state_dict(moved)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(deit(images), vit(images), atol=1e-5)
        assert deit(images).std() > 0.1


@pytest.mark.parametrize("config", [mobilenetv2_config, efficientnet_b0_config])
def test_dropout_fields_arrive(config):
    model = config(dropout=0.35).build()
    assert [each.p for each in model.modules() if isinstance(each, nn.Dropout)] == [0.35]
    if config is efficientnet_b0_config:
        model = config(stochastic_depth_prob=0.5).build()
        skips = [each.p for each in model.modules() if type(each).__name__ == "StochasticDepth"]
        assert skips == [0.5 * block / 16 for block in range(16)]


# ---------------------------------------------------------------------------- ResNet-20


def reference_resnet20(weights, images, training):
    """Logits by He et al. 2016, section 4.2, from weights in the order in which the network uses them."""
    left = iter(weights)

    def convolve(x, stride):
        kernel, scale, shift, running_mean, running_var = (next(left) for _ in range(5))
        x = F.conv2d(x, kernel, stride=stride, padding=1)
        mean = x.mean((0, 2, 3)) if training else running_mean
        var = x.var((0, 2, 3), unbiased=False) if training else running_var
        mean, var, scale, shift = (each[:, None, None] for each in (mean, var, scale, shift))
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    x = convolve(images, 1).clamp(min=0)
    for stage, channels in enumerate((16, 32, 64)):
        for block in range(3):
            stride = 2 if stage > 0 and block == 0 else 1
            update = convolve(convolve(x, stride).clamp(min=0), 1)
            short = x.new_zeros(update.shape)
            short[:, : x.shape[1]] = x[..., ::stride, ::stride]
            x = (update + short).clamp(min=0)
            assert x.shape[1] == channels
    head, bias = left  # and nothing is left over
    return x.mean((2, 3)) @ head.T + bias


@pytest.mark.parametrize("size", [32, 27])
@pytest.mark.parametrize("training", [False, True])
def test_resnet20_by_its_paper(training, size):
    model = draw_weights(resnet20(num_classes=5).double(), std=0.15).train(training)
    weights = [value.clone() for value in model.state_dict().values() if value.is_floating_point()]
    images = torch.randn(4, 3, size, size, dtype=torch.float64)
    logits = model(images)
    assert torch.allclose(logits, reference_resnet20(weights, images, training), rtol=1e-10, atol=1e-12)
    assert logits.std() > 0.01


def test_resnet20_starts_from_he_initialisation():
    torch.manual_seed(0)
    for module in resnet20().modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            # the deviation of n draws is known to 1 / sqrt(2 n) of itself; 5 of these
            tolerance = 5 / math.sqrt(2 * module.weight.numel())
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=tolerance)
            assert module.bias is None


# ---------------------------------------------------------------------------- training


def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one(data_dir, tmp_path):
    """To the bit, with running statistics, dropout and skipped blocks, which no BDH has."""

    def experiment(folder, **options):
        train = ClassificationConfig(
            dataset="cifar10", epochs=2, batch_size=8, learning_rate=1e-3, weight_decay=0.05, train_limit=20
        )
        options = RunOptions(data_dir=data_dir, runs_dir=tmp_path / folder, device="cpu", **options)
        return Experiment("trial", efficientnet_b0_config(), train, options)

    whole, stopped = experiment("whole"), experiment("stopped", resume=True)
    fit(whole)
    shutil.copytree(whole.folder, stopped.folder)
    for name in ("last.pt", "summary.json"):  # as after the first epoch, whose checkpoint is previous.pt
        (stopped.folder / name).unlink()
    fit(stopped)
    ours, expected = (load_file(each.folder / "last.pt")["model"] for each in (stopped, whole))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    first = load_file(whole.folder / "previous.pt")["model"]
    assert not torch.equal(first["features.0.1.running_mean"], expected["features.0.1.running_mean"])


# ---------------------------------------------------------------------------- configs


@pytest.mark.parametrize("make", CONFIGS)
def test_a_config_survives_being_stored(make):
    config = make(num_classes=12, img_size=64)
    fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
    assert CONFIG_CLASSES[type(config).__name__] is type(config)
    assert build_config(type(config).__name__, fields) == config
    assert (config.num_classes, config.img_size, config.in_channels) == (12, 64, 3)
    assert isinstance(config, BaselineConfig)


@pytest.mark.parametrize(
    "make, fields, words",
    [
        *((make, dict(num_classes=0), "num_classes = 0 must be at least 1") for make in CONFIGS),
        *((make, dict(img_size=0), "img_size = 0 must be at least 1") for make in CONFIGS),
        *((make, dict(setting="fited"), "published, fitted") for make in HAVE_SETTINGS),
        (mobilenetv2_config, dict(dropout=1.0), "dropout = 1.0 must be at least 0 and below 1"),
        (efficientnet_b0_config, dict(dropout=-0.1), "dropout = -0.1"),
        (efficientnet_b0_config, dict(stochastic_depth_prob=1.5), "stochastic_depth_prob = 1.5"),
        (efficientnet_b0_config, dict(stochastic_depth_prob=math.nan), "stochastic_depth_prob = nan"),
        (deit_tiny_config, dict(img_size=40), "img_size = 40 is not a multiple of 16.*published"),
        (deit_tiny_config, dict(img_size=42, setting="fitted"), "img_size = 42 is not a multiple of 4.*fitted"),
        (vit_tiny_config, dict(img_size=30), "img_size = 30 is not a multiple of patch_size = 4"),
        (vit_tiny_config, dict(n_layer=0), "n_layer = 0 must be at least 1"),
        (vit_tiny_config, dict(dropout=1.0), "dropout = 1.0"),
        (vit_tiny_config, dict(n_head=5), "n_embd = 192 is not a multiple of n_head = 5"),
    ],
)
def test_fields_that_make_no_sense_are_refused(make, fields, words):
    with pytest.raises(ValueError, match=words):
        make(**fields)


def test_a_flag_of_another_model_is_refused():
    for make in (resnet20_config, deit_tiny_config):
        with pytest.raises(TypeError):
            make(dropout=0.1)
    with pytest.raises(TypeError):
        resnet20_config(setting="fitted")


def test_only_deit_needs_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    with pytest.raises(ImportError, match="pip install timm"):
        deit_tiny()
    for file in ("models/baselines.py", "interpretability/recorder.py"):
        runpy.run_path(str(ROOT / file))
    with torch.device("meta"):
        for make in CONFIGS:
            if make is not deit_tiny_config:
                make().build()


# ---------------------------------------------------------------------------- attention of timm's model


@pytest.fixture(params=["published", "fitted"])
def deit(request):
    return draw_weights(deit_tiny(setting=request.param)).eval()


def test_recording_a_deit_changes_nothing(deit):
    images = torch.randn(2, 3, 32, 32)

    def step():
        deit.zero_grad()
        logits = deit(images)
        logits.square().sum().backward()
        return logits, [parameter.grad.clone() for parameter in deit.parameters()]

    logits, gradients = step()
    with record(deit) as trace:
        recorded_logits, recorded_gradients = step()
    assert torch.equal(logits, recorded_logits)
    assert all(torch.equal(*pair) for pair in zip(gradients, recorded_gradients, strict=True))
    assert sorted(trace.inputs) == list(range(12))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in deit.modules())


def test_deit_scores(deit):
    """Against the layers followed from the tokens on, a head at a time in float64; and none of it left to the hooks."""
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), record(deit, levels=[0, 1, 2]) as trace:
        deit(images)
    weights = {name: value.double() for name, value in deit.state_dict().items()}
    norm = lambda x, name: F.layer_norm(x, (192,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)  # noqa: E731
    linear = lambda x, name: x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]  # noqa: E731
    side = deit.patch_embed.proj.stride[0]
    x = F.conv2d(images.double(), weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=side)
    x = torch.cat((weights["cls_token"].expand(2, -1, -1), x.flatten(2).mT), 1) + weights["pos_embed"]
    for level in range(3):
        qkv = linear(norm(x, f"blocks.{level}.norm1"), f"blocks.{level}.attn.qkv")
        heads, expected = [], []
        for head in range(3):
            q, k, v = (qkv[..., part * 192 + head * 64 :][..., :64] for part in range(3))
            scores = (q @ k.mT / 8).exp()
            expected.append(scores / scores.sum(-1, keepdim=True))
            heads.append(expected[-1] @ v)
        x = x + linear(torch.cat(heads, -1), f"blocks.{level}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"blocks.{level}.norm2"), f"blocks.{level}.mlp.fc1"))
        x = x + linear(hidden, f"blocks.{level}.mlp.fc2")
        expected = torch.stack(expected, 1)
        tokens = 1 + (32 // side) ** 2
        assert trace.scores(level).shape == (2, 3, tokens, tokens)
        assert torch.allclose(trace.scores(level).double(), expected, atol=2e-5)
        torch.testing.assert_close(trace.scores(level, patches_only=True), trace.scores(level)[:, :, 1:, 1:])
        assert expected.std() > 0.1 / tokens  # not uniform
    assert not trace.adapter.signed and trace.adapter.n_levels == 12


def test_a_convolutional_network_has_no_levels_to_record():
    with pytest.raises(TypeError, match="ResNet20 cannot be looked into"), record(resnet20()):
        pass


# ---------------------------------------------------------------------------- as a user meets them


def flags(data_dir, tmp_path, *more):
    return ["--data-dir", data_dir, "--runs-dir", tmp_path / "runs", "--device", "cpu", "--epochs", "1", *more]


def test_a_missing_timm_is_one_message_and_nothing_written(call_script, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)  # its import fails
    assert call_script("train_deit_tiny_cifar100.py", *flags(data_dir, tmp_path)) == 1
    assert "pip install timm" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_last_batch_of_one_image_is_one_message(call_script, data_dir, tmp_path, capsys):
    """120 images to train, 7 times 17 and one more."""
    more = flags(data_dir, tmp_path, "--train-limit", 150, "--batch-size", 17)
    assert call_script("train_mobilenetv2_cifar100.py", *more) == 1
    assert "--batch-size" in capsys.readouterr().err


def test_the_attention_of_a_trained_deit_is_drawn(call_script, data_dir, tmp_path, capsys):
    more = flags(data_dir, tmp_path, "--setting", "fitted", "--train-limit", 125, "--name", "deit")
    assert call_script("train_deit_tiny_cifar100.py", *more) == 0
    where = ["--run", tmp_path / "runs" / "deit" / "seed0", "--data-dir", data_dir, "--output-dir", tmp_path / "maps"]
    assert call_script("interpretability/visualize_attention.py", *where) == 0
    (picture,) = (tmp_path / "maps").glob("*/*.png")
    assert picture.stat().st_size > 15_000
