"""Probes on planted features, BDHs run with other depths than they were trained with, and the script on runs."""

import dataclasses
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import t
from torch import nn

from training import UserError, fit
from interpretability import probe
from interpretability.common.depth import run_with_levels
from interpretability.probe import Pass, accuracies, chance, choose_levels, collect, draw
from models.baselines import ViTConfig
from models.vision_bdh import pre_ln_config, v1_config, v2_config, v2_softmax_config, v3_config
from tests.inspecting import BDH, VIT, check_error, train_masked, with_large_weights
from tests.pictures import check_picture
from training.runs import Run

SCRIPT = "interpretability/probe.py"
CONFIGS = {
    "v1": v1_config(**BDH),
    "v2": v2_config(**BDH),
    "softmax": v2_softmax_config(**BDH),
    "true_pre": pre_ln_config(**BDH),
    "class_token": v2_config(pool="cls", **BDH),
    "scaled_pre": v3_config(**BDH),
    "own_weights": v2_config(shared=False, **BDH),
    "hybrid": v2_config(blocks_before=1, blocks_after=1, **BDH),
}
FIXED = ("scaled_pre", "own_weights")  # cannot run more levels


def first_levels(weights, n_layer):
    """The weights of the first n_layer levels, where each has its own, and their norms."""
    own = ("encoder", "encoder_v", "decoder")
    norms = {f"level_norms.{level}" for level in range(n_layer + 1)}
    return {
        name: value[:n_layer] if name in own and value.ndim == {"decoder": 3}.get(name, 4) else value
        for name, value in weights.items()
        if not name.startswith("level_norms") or name.rpartition(".")[0] in norms
    }


def built_with(name, model, n_layer):
    """A model whose configuration has n_layer levels, with the weights of this one."""
    other = dataclasses.replace(CONFIGS[name], n_layer=n_layer).build().eval()
    other.load_state_dict(first_levels(model.state_dict(), n_layer))
    return other


@pytest.fixture
def images():
    return torch.randn(40, 3, 8, 8)


# ---------------------------------------------------------------------------- depth


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_other_depths_are_the_model_built_so(name, images):
    """Bit for bit; and afterwards it is what it was, also after an exception."""
    model = with_large_weights(CONFIGS[name].build())
    before, config = model(images), model.config
    for n_layer in (1, 2, 3) if name in FIXED else (1, 2, 3, 4, 7):
        with run_with_levels(model, n_layer):
            logits = model(images)
        assert torch.equal(logits, built_with(name, model, n_layer)(images))
        assert torch.equal(logits, before) == (n_layer == 3)
    with pytest.raises(ZeroDivisionError), run_with_levels(model, 1):
        _ = 1 / 0
    assert model.config is config and torch.equal(model(images), before)
    with pytest.raises(ValueError, match="n_layer"), run_with_levels(model, 4 if name in FIXED else 0):
        pass
    assert model.config is config


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_what_is_collected(name, images):
    """Read-outs and depths from one pass are those of passes of their own."""
    model = with_large_weights(CONFIGS[name].build())
    n_levels = 3 if name in FIXED else 6
    batches = [(images[:30], torch.arange(30)), (images[30:], torch.arange(30, 40))]
    found = collect(model, batches, n_levels)
    assert np.array_equal(found.labels, np.arange(40)) and len(found.features) == n_levels + 1
    assert all(each.shape == (40, 16) for each in found.features)
    expected = [built_with(name, model, n_layer)(images).argmax(1).numpy() for n_layer in range(1, n_levels + 1)]
    assert np.array_equal(found.depth, expected) and len(np.unique(expected)) > 1
    assert np.array_equal(found.readout[-1], model(images).argmax(1).numpy()) and len(found.readout) == 3
    if name != "scaled_pre":
        assert np.array_equal(found.readout, found.depth[:3])


def test_fixed_depth(capsys):
    for config in (*(CONFIGS[name] for name in FIXED), ViTConfig(mlp_dim=32, **VIT)):
        model = config.build()
        assert choose_levels(model, 3, None) == choose_levels(model, 3, 3) == 3
        assert capsys.readouterr().out.count("at most its 3 levels") == 2
        with pytest.raises(UserError, match="--max-levels 4: the model has 3 levels, and"):
            choose_levels(model, 3, 4)
    model = CONFIGS["v2"].build()
    assert [choose_levels(model, 3, n) for n in (None, 3, 5)] == [6, 3, 5] and not capsys.readouterr().out
    with pytest.raises(UserError, match="has 3 levels, and runs with fewer"):
        choose_levels(model, 3, 2)


@torch.no_grad()
def test_vit_has_a_read_out_and_no_other_depth(images):
    torch.manual_seed(3)
    model, short = (ViTConfig(mlp_dim=32, **(VIT | dict(n_layer=n))).build().eval() for n in (3, 1))
    for weight in (model.heads.head.weight, model.encoder.layers[0].self_attention.out_proj.weight):
        nn.init.normal_(weight, std=3.0)  # so that the classes depend on the image
    short.load_state_dict(model.state_dict(), strict=False)
    found = collect(model, [(images, torch.zeros(len(images)))], 3)
    assert found.depth is None and np.array_equal(found.readout[-1], model(images).argmax(1).numpy())
    assert np.array_equal(found.readout[0], short(images).argmax(1).numpy()) and len(np.unique(found.readout)) > 1


# ---------------------------------------------------------------------------- probes


def planted(rng, n, noise, n_classes=4):
    """Classes that lie apart at level 1 and not at level 0; the model's words are wrong at level 1, half right at 2."""
    labels = rng.permutation(np.arange(n) % n_classes)
    centres = 10 * np.eye(n_classes, 6)
    features = [
        rng.normal(size=(n, 6)),
        1e4 + centres[labels] * [1, 1, 1e-3, 1e3, 1, 1] + noise * rng.normal(size=(n, 6)),
    ]
    readout = np.stack([(labels + 1) % n_classes, np.where(np.arange(n) < n // 2, labels, (labels + 1) % n_classes)])
    return Pass(features, labels, readout, None)


def test_planted_classes_are_found_and_noise_is_not():
    rng = np.random.default_rng()
    train, test = planted(rng, 400, 1e-3), planted(rng, 1000, 1e-3)
    table = accuracies(train, test).set_index(["method", "level"])
    assert table.accuracy["linear_probe", 1] == table.accuracy["knn", 1] == 1
    for method in ("linear_probe", "knn"):
        assert abs(table.accuracy[method, 0] - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 1000)
    assert table.accuracy["readout", 1] == 0 and table.accuracy["readout", 2] == 0.5
    assert "run_with_levels" not in table.index.get_level_values("method")
    for part in (train, test):
        part.labels = rng.permutation(part.labels)
    table = accuracies(train, test).set_index(["method", "level"])
    for method in ("linear_probe", "knn"):
        assert abs(table.accuracy[method, 1] - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 1000)


def test_intervals_are_wilsons_and_those_of_gains_are_paired():
    rng = np.random.default_rng()
    table = accuracies(planted(rng, 80, 1e-3), planted(rng, 100, 1e-3)).set_index(["method", "level"])
    row, z, n = table.loc["readout", 2], 1.959964, 100
    centre, half = (0.5 + z**2 / (2 * n)) / (1 + z**2 / n), z / (1 + z**2 / n) * np.sqrt(0.25 / n + (z / (2 * n)) ** 2)
    assert (row.low, row.high) == pytest.approx((centre - half, centre + half), abs=1e-6)
    assert (row.images, row.train_images) == (100, 80)
    half = t.ppf(0.975, 99) * np.sqrt(0.25 / 99)  # half of the images gain 1, the others nothing
    assert (row.gain, row.gain_low, row.gain_high) == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    assert table.gain[:, 0].isna().all() and np.isnan(table.gain["readout", 1])


def test_a_gain_is_over_the_level_below():
    rng = np.random.default_rng()
    test = planted(rng, 100, 1e-3)
    test.readout = np.stack([*test.readout, test.labels])  # 0, 0.5 and 1 of the images are right
    table = accuracies(planted(rng, 80, 1e-3), test).set_index(["method", "level"])
    assert table.gain["readout", 3] == pytest.approx(0.5)


def test_features_are_scaled_by_what_the_training_images_have():
    """In new images the second feature is far smaller than in those that the probe learned from, and means nothing."""
    rng = np.random.default_rng()
    labels = np.arange(40) % 2
    noise = np.where(labels == 1, 0.01, 1.0) * rng.choice([-1, 1], 40) * rng.uniform(0.5, 1.5, 40)
    known, new = (
        Pass([np.stack((2.0 * labels - 1, second), 1)], labels, np.empty((0, 40)), None)
        for second in (noise, 1e-3 * rng.normal(size=40))
    )
    assert accuracies(known, new, neighbours=3).set_index("method").accuracy["knn"] == 1


def test_a_probe_that_does_not_converge_is_named_and_warns_of_nothing(monkeypatch, capsys):
    rng = np.random.default_rng()
    monkeypatch.setattr(probe, "MAX_ITERATIONS", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accuracies(planted(rng, 200, 3), planted(rng, 40, 3))
    assert "linear probe: not converged in 2 steps at level 0, 1\n" in capsys.readouterr().out


def test_too_little_to_learn_from():
    rng = np.random.default_rng()
    test = planted(rng, 40, 1)
    with pytest.raises(UserError, match="10 training images are too few"):
        accuracies(planted(rng, 10, 1), test, neighbours=20)
    with pytest.raises(UserError, match="30 training images are too few"):
        accuracies(planted(rng, 30, 1, n_classes=1), test)


def test_near_neighbours_count_more_and_a_large_penalty_leaves_the_commonest_class():
    known = Pass([np.array([[0.0], [10], [11], [12]])], np.array([1, 0, 0, 0]), np.zeros((0, 4)), None)
    new = Pass([np.array([[0.1]])], np.array([1]), np.zeros((0, 1)), None)
    for penalty, linear in ((1e4, 0), (1e-4, 1)):
        table = accuracies(known, new, neighbours=3, penalty=penalty).set_index("method")
        assert table.accuracy.to_dict() == {"linear_probe": linear, "knn": 1}


def test_chance_is_the_commonest_class():
    assert chance(np.array([2, 0, 2, 2, 1])) == 0.6


# ---------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory, experiment_in):
    """Folders of a v2 of two levels and a ViT, trained on the made-up CIFAR-10."""
    trial = experiment_in(tmp_path_factory.mktemp("runs"), "bdh", model=dict(n_layer=2), epochs=3)
    vit = ViTConfig(n_layer=2, n_embd=8, n_head=2, mlp_dim=16, patch_size=8)
    trials = [trial, dataclasses.replace(trial, name="vit", model=vit)]
    for each in trials:
        fit(each)
    return [each.folder for each in trials]


def test_script(runs, call_script, data_dir, tmp_path, capsys):
    """The read-out at the last level is the model's accuracy; probes and deeper runs are in the table and figure."""
    assert call_script(SCRIPT, "--run", runs[0], "--data-dir", data_dir, "--output-dir", "out") == 0
    folder = tmp_path / "out" / "bdh_seed0"
    assert {path.name for path in folder.iterdir()} == {"probe.png", "probe.svg", "probe.csv"}
    check_picture(folder / "probe.png")
    table = pd.read_csv(folder / "probe.csv").set_index(["method", "level"])
    assert (table.images == 40).all() and (table.train_images == 192).all()
    levels = {method: list(rows.index.get_level_values("level")) for method, rows in table.groupby("method")}
    assert levels == {
        "linear_probe": [0, 1, 2, 3, 4],
        "knn": [0, 1, 2, 3, 4],
        "readout": [1, 2],
        "run_with_levels": [1, 2, 3, 4],
    }
    accuracy = Run(runs[0]).read_summary()["test"]["accuracy"]
    assert table.accuracy["readout", 2] == table.accuracy["run_with_levels", 2] == pytest.approx(accuracy)
    assert table.accuracy["linear_probe", 2] > 0.5  # the colours of the classes lie apart
    assert "linear_probe" in capsys.readouterr().out


def test_script_on_vit(runs, call_script, data_dir, tmp_path, capsys):
    flags = ["--run", runs[1], "--data-dir", data_dir, "--output-dir", "out", "--images", 30, "--train-images", 60]
    assert call_script(SCRIPT, *flags, "--tokens", "mean") == 0
    assert "at most its 2 levels: each level has its own weights" in capsys.readouterr().out
    mean = pd.read_csv(tmp_path / "out/vit_seed0/probe_tokens=mean.csv")  # beside those of other features
    assert set(mean.method) == {"linear_probe", "knn", "readout"} and set(mean.images) == {30}
    assert call_script(SCRIPT, *flags) == 0
    read = pd.read_csv(tmp_path / "out/vit_seed0/probe.csv").set_index(["method", "level"])
    assert read.accuracy["linear_probe", 0] < 0.3  # the class token is the same of all images
    assert mean.set_index(["method", "level"]).accuracy["linear_probe", 0] > 0.5


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--max-levels", 1], "the model has 2 levels"),
        (["--train-images", 5], "5 training images are too few"),
        (["--run", "none"], "none does not exist"),
    ],
)
def test_bad_input(runs, call_script, data_dir, tmp_path, capsys, flags, message):
    where = [] if "--run" in flags else ["--run", runs[0]]
    assert call_script(SCRIPT, *where, "--data-dir", data_dir, "--output-dir", "out", *flags) == 1
    check_error(capsys, message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--images", 0], "images = 0 must be at least 1"),
        (["--train-images", -1], "train_images = -1 must be at least 1"),
        (["--neighbours", 0], "neighbours = 0 must be at least 1"),
        (["--penalty", 0], "penalty = 0.0 must be a number above 0"),
        (["--penalty", "nan"], "penalty = nan must be a number above 0"),
    ],
)
def test_wrong_flags(call_script, capsys, flags, message):
    assert call_script(SCRIPT, *flags) == 2
    assert message in capsys.readouterr().err


def test_models_without_classes_are_refused(experiment, call_script, data_dir, capsys):
    run = train_masked(experiment)
    capsys.readouterr()
    assert call_script(SCRIPT, "--run", run, "--data-dir", data_dir) == 1
    check_error(capsys, "is a MaskedBDH, which has no logits")


def test_figure_draws_every_method_once():
    rows = [
        dict(method=method, level=level, accuracy=0.1 * level, low=0.1 * level - 0.05, high=0.1 * level + 0.05)
        for method, levels in (("linear_probe", range(5)), ("readout", (1, 2)), ("run_with_levels", range(1, 5)))
        for level in levels
    ]
    figure = draw(pd.DataFrame(rows), 2, 0.1, r"run $\frac$")
    figure.draw_without_rendering()  # fails if names from data are read as formulas
    (ax,) = figure.axes
    lines = {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}
    assert list(lines) == ["linear probe", "the model's own read-out", "the model run with this many levels"]
    assert np.allclose(lines["linear probe"].get_xydata(), [(k, 10 * k) for k in range(5)])
    assert {float(line.get_xdata()[0]) for line in ax.lines if line.get_linestyle() == ":"} == {2.0}
