"""CKA and SVCCA against their definitions, features against the models, and the script on runs of every kind."""

import dataclasses
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from scipy.linalg import subspace_angles

from training import fit
from interpretability.common.features import images_per_pass, level_features
from interpretability.common.recorder import record
from interpretability.common.similarity import linear_cka, main_directions, svcca, unbiased_hsic
from interpretability.common.trained import TrainedRun
from interpretability.compare_representations import Similarity, draw, draw_images, draw_matrix, measure, number
from models.baselines import ViTConfig
from models.bdh import layer_norm
from models.bdh_unet import bdh_unet_config
from models.masked_bdh import MaskedBDHConfig
from models.vision_bdh import v1_config, v2_config
from tests.inspecting import BDH as SIZES
from tests.inspecting import VIT as VIT_SIZES
from tests.inspecting import check_error, train_masked, train_unet, with_large_weights
from tests.pictures import check_picture

SCRIPT = "interpretability/compare_representations.py"


@pytest.fixture
def rng():
    return np.random.default_rng()


def cka_of(*representations):
    return linear_cka(unbiased_hsic(representations))


def full_cka(x, y):
    """Kornblith et al. 2019, equation 2 of all images, which is biased by few."""
    x, y = x - x.mean(0), y - y.mean(0)
    return np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))


def counted_hsic(x, y):
    """The U-statistic of HSIC by its definition: a mean over all choices of different images. x, y: (n, F)."""
    k, m, images = x @ x.T, y @ y.T, range(len(x))
    pairs = np.mean([k[i, j] * m[i, j] for i, j in itertools.permutations(images, 2)])
    threes = np.mean([k[i, j] * m[i, q] for i, j, q in itertools.permutations(images, 3)])
    fours = np.mean([k[i, j] * m[q, r] for i, j, q, r in itertools.permutations(images, 4)])
    return pairs + fours - 2 * threes


# ---------------------------------------------------------------------------- CKA


def test_hsic_is_the_mean_over_all_choices_of_images(rng):
    """And CKA of one batch is the ratio."""
    x, y = rng.normal(size=(7, 4)) + 1, rng.normal(size=(7, 3)) - 2
    expected = np.array([[counted_hsic(a, b) for b in (x, y)] for a in (x, y)])
    assert np.allclose(unbiased_hsic([x, y]), expected, rtol=1e-9, atol=1e-12)
    ratio = expected[0, 1] / math.sqrt(expected[0, 0] * expected[1, 1])
    assert np.allclose(cka_of(x, y), [[1, ratio], [ratio, 1]], atol=1e-9)
    with pytest.raises(ValueError, match="at least 4 images, not 3"):
        unbiased_hsic([x[:3]])


def test_cka_over_batches_approaches_that_of_all_images(rng):
    """Where the mean of biased values over the same batches is far off."""
    x = rng.normal(size=(6400, 32))
    y = 0.5 * x + rng.normal(size=x.shape)
    batches = np.split(np.arange(len(x)), 400)
    hsic = sum(unbiased_hsic([x[batch].astype(np.float32), y[batch].astype(np.float32)]) for batch in batches)
    truth = full_cka(x, y)
    assert abs(linear_cka(hsic)[0, 1] - truth) < 0.03
    assert np.mean([full_cka(x[batch], y[batch]) for batch in batches]) > truth + 0.2


def test_what_cka_does_not_see(rng):
    """Rotations, a common scale and shifts; but it sees other linear maps."""
    x = rng.normal(size=(50, 6)) * np.arange(1, 7)
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    stretched = x * [100, 1, 1, 1, 1, 0.01]
    result = cka_of(x, 3e-3 * x @ rotation + 7, stretched, x)
    assert np.allclose(result[0, [0, 1, 3]], 1, atol=1e-9) and result[0, 2] < 0.9
    assert np.allclose(result, result.T) and (np.abs(result) <= 1 + 1e-12).all()


def test_features_that_are_all_the_same_have_no_likeness(rng):
    x = rng.normal(size=(20, 3))
    same = np.tile(rng.normal(size=5).astype(np.float32), (20, 1)) * (1 + 1e-7 * rng.normal(size=(20, 1)))
    assert np.array_equal(np.isnan(cka_of(x, same)), [[False, True], [True, True]])
    assert main_directions(same).shape == (20, 0) and np.isnan(svcca(main_directions(x), main_directions(same)))


# ---------------------------------------------------------------------------- SVCCA


def test_svcca_is_the_mean_cosine_of_the_angles_between_subspaces(rng):
    x = rng.normal(size=(60, 5))
    y = np.hstack([x[:, :2] @ rng.normal(size=(2, 4)) + 0.3 * rng.normal(size=(60, 4)), rng.normal(size=(60, 3))])
    a, b = main_directions(x, 1.0), main_directions(y, 1.0)
    assert a.shape == (60, 5) and b.shape == (60, 7) and np.allclose(a.T @ a, np.eye(5))
    expected = np.cos(subspace_angles(x - x.mean(0), y - y.mean(0))).mean()
    assert svcca(a, b) == pytest.approx(expected, abs=1e-9) and svcca(a, a) == pytest.approx(1)
    mapped = main_directions(x @ rng.normal(size=(5, 5)) + 3, 1.0)
    assert svcca(mapped, b) == pytest.approx(expected, abs=1e-6)
    assert cka_of(x, x * [9, 1, 1, 1, 1])[0, 1] < 0.95  # which CKA tells apart


def test_directions_explain_the_variance_asked_for(rng):
    x = (rng.normal(size=(40, 4)) * [10, 5, 2, 0.1]) @ np.linalg.qr(rng.normal(size=(4, 4)))[0]
    spectrum = np.linalg.eigvalsh(np.cov(x.T))[::-1]
    share = np.cumsum(spectrum) / spectrum.sum()
    for variance in (0.5, 0.9, 0.99, 1.0):
        kept = main_directions(x, variance)
        assert kept.shape[1] == (4 if variance == 1 else int((share < variance).sum()) + 1)
        assert share[kept.shape[1] - 1] >= variance - 1e-12
    wide = np.hstack([x, x])  # rank 4 of 8
    assert main_directions(wide, 1.0).shape[1] == 4


# ---------------------------------------------------------------------------- features


@pytest.fixture
def images():
    return torch.randn(5, 3, 8, 8)


def test_v1_and_v2_with_the_same_weights_have_the_same_features(images):
    """As they compute the same; without normalisation they differ."""
    v2 = with_large_weights(v2_config(**SIZES).build())
    v1 = v1_config(**SIZES).build().eval()
    v1.load_state_dict(v2.state_dict())
    pairs = list(zip(level_features(v1, images), level_features(v2, images), strict=True))
    assert len(pairs) == 4 and all(a.shape == (5, 16) and (a - b).abs().max() < 1e-3 for a, b in pairs)
    apart = zip(level_features(v1, images, "mean", False), level_features(v2, images, "mean", False), strict=True)
    assert all((a - b).abs().max() > 0.01 for a, b in list(apart)[1:])


@torch.no_grad()
def test_tokens_of_bdh(images):
    model = with_large_weights(v2_config(**SIZES).build())
    state = model.tokens(images)
    assert torch.equal(level_features(model, images, "mean", False)[-1], state.mean(1))
    assert torch.equal(level_features(model, images)[-1], layer_norm(state).mean(1))
    assert torch.equal(level_features(model, images, "all")[-1], layer_norm(state).flatten(1))
    embedded = layer_norm(model.embed(images)[0])
    assert torch.allclose(level_features(model, images)[0], embedded.mean(1), atol=1e-5)
    plain = level_features(model, images, "read", False)[-1]  # without a class token
    assert torch.allclose(model.head(layer_norm(plain)), model(images), atol=1e-5)


@pytest.mark.parametrize("fields", [{}, dict(residual="scaled_pre"), dict(blocks_after=1)], ids=str)
@torch.no_grad()
def test_a_weighted_mean_is_read_with_its_weights(fields, images):
    model = with_large_weights(v2_config(pool="seq", **SIZES, **fields).build())
    assert model.pool_query.abs().max() > 0
    read, mean = (level_features(model, images, tokens, False)[-1] for tokens in ("read", "mean"))
    with record(model, "state") as trace:
        last = model.tokens(images)
    state = trace.state(trace.levels[-1])
    assert torch.allclose(read, (model.pool_weights(last)[:, None] @ state)[:, 0], atol=1e-5)
    assert not torch.allclose(read, mean, atol=1e-2)
    if not fields:  # the head reads the stream itself
        assert torch.allclose(model.head(layer_norm(read)), model(images), atol=1e-5)


@pytest.mark.parametrize("config", [v2_config(pool="cls", **SIZES), ViTConfig(mlp_dim=32, **VIT_SIZES)])
@torch.no_grad()
def test_class_tokens_are_read_and_are_no_patches(config, images):
    model = with_large_weights(config.build())
    read, mean, everything = (level_features(model, images, tokens, False) for tokens in ("read", "mean", "all"))
    assert [len(each) for each in (read, mean, everything)] == [4, 4, 4]
    if hasattr(model, "heads"):
        logits = model.heads(model.encoder.ln(read[-1]))
    else:
        logits = model.head(layer_norm(read[-1]))
    assert torch.allclose(logits, model(images), atol=1e-5)
    assert everything[-1].shape == (5, 16 * 16)
    assert torch.allclose(everything[-1].view(5, 16, 16).mean(1), mean[-1], atol=1e-5)
    assert (read[0] - read[0][0]).abs().max() < 1e-5  # the same of all images


@torch.no_grad()
def test_masked_pretraining_sees_whole_images_and_unet_its_encoder(images):
    model = with_large_weights(MaskedBDHConfig(residual="pre", **SIZES).build())
    classifier = v2_config(**SIZES).build().eval()
    shared = {name: value for name, value in model.state_dict().items() if not name.startswith(("head", "mask"))}
    classifier.load_state_dict(shared, strict=False)
    for a, b in zip(level_features(model, images), level_features(classifier, images), strict=True):
        assert torch.equal(a, b)
    unet = with_large_weights(bdh_unet_config(**SIZES).build())
    states, _ = unet.encoder(images)
    assert torch.equal(level_features(unet, images)[-1], layer_norm(states[-1]).mean(1))


# ---------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory, experiment_in):
    """Folders of a v2 and a ViT on the made-up CIFAR-10, and of a v2 on the made-up CIFAR-100."""
    folder = tmp_path_factory.mktemp("runs")
    vit = ViTConfig(n_layer=2, n_embd=8, n_head=2, mlp_dim=16, patch_size=8)
    bdh = experiment_in(folder, "bdh", model=dict(n_layer=3), options={"keep_every": 1})
    trials = [
        bdh,
        dataclasses.replace(bdh, name="vit", model=vit),
        experiment_in(folder, "hundred", model=dict(num_classes=100), dataset="cifar100", epochs=1),
    ]
    for trial in trials:
        fit(trial)
    return [trial.folder for trial in trials]


def test_script_on_two_runs(runs, call_script, data_dir, tmp_path, capsys):
    """Every number of the table, computed from all 40 images at once."""
    assert (
        call_script(SCRIPT, "--run", runs[0], "--versus", runs[1], "--data-dir", data_dir, "--output-dir", "out") == 0
    )
    folder = tmp_path / "out" / "bdh_seed0" / "versus_vit_seed0"
    assert {path.name for path in folder.iterdir()} == {f"representations.{end}" for end in ("png", "svg", "csv")}
    assert str(folder / "representations.csv").endswith(capsys.readouterr().out.split()[-1])
    pixels = check_picture(folder / "representations.png")
    assert pixels.shape[0] > 1000  # three rows
    table = pd.read_csv(folder / "representations.csv")
    assert len(table) == (4 + 3) ** 2 and set(table.run_a) == {"bdh, seed 0", "vit, seed 0"}

    opened = [TrainedRun(run, data_dir, "cpu") for run in runs[:2]]
    pixels, _ = next(opened[0].batches(range(40)))
    features = [level.double().numpy() for run in opened for level in level_features(run.model, pixels)]
    assert np.allclose(table.cka.to_numpy().reshape(7, 7), cka_of(*features), atol=1e-4)
    directions = [main_directions(each) for each in features]
    expected = [[np.cos(subspace_angles(a, b)).mean() for b in directions] for a in directions]
    assert np.allclose(table.svcca.to_numpy().reshape(7, 7), expected, atol=1e-4)
    own = table[(table.run_a == table.run_b) & (table.level_a == table.level_b)]
    assert np.allclose(own.cka, 1) and np.allclose(own.svcca, 1) and (own.svcca_shuffled < 0.9).all()


def test_mini_batches_and_passes_do_not_change_what_is_measured(runs, data_dir, monkeypatch):
    """The numbers of images that fit a pass; and batches of 20 are those 20 images."""
    run = TrainedRun(runs[0], data_dir, "cpu")
    order = draw_images(run, 40, 20)
    assert sorted(order) == list(range(40)) and list(order) != sorted(order)
    assert np.array_equal(order, draw_images(run, 40, 20))
    measured = measure([run], order, batch_size=20)
    monkeypatch.setattr("interpretability.common.features.TOKENS_PER_PASS", 16 * 7)
    assert images_per_pass(16) == 7 and images_per_pass(1000) == 1
    again = measure([run], order, batch_size=20)
    assert np.allclose(measured.cka, again.cka, atol=1e-5) and np.allclose(measured.svcca, again.svcca, atol=1e-4)
    hsic = 0
    for batch in (order[:20], order[20:]):
        pixels, _ = next(run.batches(batch.tolist()))
        hsic += unbiased_hsic([level.numpy() for level in level_features(run.model, pixels)])
    assert np.allclose(measured.cka, linear_cka(hsic), atol=1e-5)
    assert not np.allclose(measured.cka, measure([run], order).cka, atol=1e-3)  # of one batch


def test_panels(runs, data_dir, rng):
    """A row for each run and one for the two: which values, and which levels they are said to be of."""
    opened = [TrainedRun(run, data_dir, "cpu") for run in runs[:2]]  # of 4 and 3 levels, the embedding counted
    cka, svcca_values = rng.uniform(size=(2, 7, 7))
    figure = draw(opened, Similarity(cka, svcca_values, svcca_values / 2, 40), "the mean over patches")
    panels = [ax for ax in figure.axes if ax.texts]
    rows, columns = (slice(0, 4), slice(4, 7), slice(0, 4)), (slice(0, 4), slice(4, 7), slice(4, 7))
    for k, ax in enumerate(panels):
        values = (cka, svcca_values)[k % 2][rows[k // 2], columns[k // 2]]
        assert np.array_equal(ax.images[0].get_array(), values)
        assert [text.get_text() for text in ax.texts] == [number(value) for value in values.flat]
        assert ax.get_ylabel() == f"level of {'ABA'[k // 2]}" and ax.get_xlabel() == f"level of {'ABB'[k // 2]}"
    assert len(panels) == 6 and [ax.get_title() for ax in panels[:2]] == ["linear CKA", "SVCCA (mean correlation)"]
    title = figure.get_suptitle()
    assert "A: bdh, seed 0\nB: vit, seed 0\n40 test images" in title
    assert f"at most {svcca_values.max() / 2:.2f}" in title.replace("\n", " ")


def test_one_run_and_a_checkpoint_of_it(runs, call_script, data_dir, tmp_path):
    first = runs[0] / "epoch_000.pt"
    here = ["--data-dir", data_dir, "--output-dir", "out"]
    assert call_script(SCRIPT, "--run", first, "--versus", runs[0], *here) == 0
    assert call_script(SCRIPT, "--run", runs[0], "--versus", first, *here) == 0  # neither replaces the other
    assert (tmp_path / "out/bdh_seed0/versus_bdh_seed0_epoch_000/representations.csv").is_file()
    table = pd.read_csv(tmp_path / "out/bdh_seed0/versus_bdh_seed0/representations_epoch_000.csv")
    assert set(table.run_a) == {"bdh, seed 0, epoch_000", "bdh, seed 0"}
    assert call_script(SCRIPT, "--run", runs[0], "--tokens", "read", *here) == 0
    check_picture(tmp_path / "out/bdh_seed0/representations_tokens=read.png")


def test_too_few_images_for_svcca(runs, call_script, data_dir, tmp_path, capsys):
    here = ["--run", runs[1], "--data-dir", data_dir, "--output-dir", "out"]
    assert call_script(SCRIPT, *here, "--images", 39, "--tokens", "read") == 0
    assert "no SVCCA: with 39 images, even noise of 8 features" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "out/vit_seed0/representations_tokens=read.csv")
    assert "svcca" not in table and (table.images == 39).all()
    assert table.cka.isna().sum() == 5  # level 0 of the class token with all three levels, both ways
    check_picture(tmp_path / "out/vit_seed0/representations_tokens=read.png")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--versus", 2], "hundred.* was trained on cifar100, not on cifar10: give another run"),
        (["--images", 3], "3 images are too few: CKA needs 4 or more"),
        (["--images", 0], "no images chosen"),
        (["--batch-size", 3], "--batch-size 3 is too small"),
        (["--versus", "none"], "none does not exist"),
    ],
)
def test_bad_input(runs, call_script, data_dir, tmp_path, capsys, flags, message):
    flags = [runs[2] if each == 2 else each for each in flags]
    assert call_script(SCRIPT, "--run", runs[0], "--data-dir", data_dir, "--output-dir", "out", *flags) == 1
    check_error(capsys, message)
    assert not (tmp_path / "out").exists()


def test_segmentation_and_pretraining(tmp_path, experiment, call_script, data_dir, capsys):
    unet, masked = train_unet(tmp_path, img_size=(16, 40), n_val=4), train_masked(experiment)
    for run, place in ((unet, tmp_path), (masked, data_dir)):
        capsys.readouterr()
        assert call_script(SCRIPT, "--run", run, "--data-dir", place, "--output-dir", "out") == 0
        assert ("no SVCCA" in capsys.readouterr().out) == (run is unet)
        table = pd.read_csv(tmp_path / f"out/{run.parent.name}_seed0/representations.csv")
        assert np.allclose(table.cka[[0, 3]], 1) and len(table) == 4


# ---------------------------------------------------------------------------- cells


def test_numbers_in_cells():
    values = [1.0, 0.9951, 0.994, 0.5, 0.0, -0.004, -0.1, math.nan]
    assert list(map(number, values)) == ["1", "1", ".99", ".50", ".00", ".00", "-.10", "\N{EN DASH}"]


@pytest.mark.parametrize("side, shown", [(15, 225), (16, 0)])
def test_numbers_where_they_fit(side, shown):
    ax = Figure().subplots()
    draw_matrix(ax, np.full((side, side), 0.5))
    assert len(ax.texts) == shown and len(ax.get_xticks()) == (side if shown else 4)
