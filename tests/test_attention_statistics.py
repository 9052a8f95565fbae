"""attention_statistics.py: planted maps, every statistic against numpy and SciPy, models, the script on runs."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.stats import entropy, t

from training import fit
from interpretability.attention_statistics import STATISTICS, TRAINED, UNTRAINED, measure, statistics_of, tabulate
from interpretability.common.recorder import record
from interpretability.common.trained import TrainedRun
from models.baselines import ResNet20Config, ViTConfig
from models.vision_bdh import v2_config, v4_config
from tests.inspecting import BDH, VIT, check_error, with_large_weights
from tests.pictures import check_picture

SCRIPT = "interpretability/attention_statistics.py"
GRID, T = (3, 4), 12
PLACES = np.array([(row, column) for row in range(3) for column in range(4)])
CONFIGS = {
    "v2": v2_config(**BDH),
    "v4": v4_config(**BDH),
    "softmax": v2_config(attention="softmax", **BDH),
    "class_token": v2_config(pool="cls", **BDH),
    "vit": ViTConfig(mlp_dim=32, **VIT),
}

# ---------------------------------------------------------------------------- maps


def of_maps(*heads, before=None):
    """Statistics of one image with these maps (T, T), by name: (heads,)."""
    p = torch.from_numpy(np.stack(heads))[None]
    before = p if before is None else torch.from_numpy(np.stack(before))[None]
    return {name: values[0].numpy() for name, values in statistics_of(p, before, GRID).items()}


def test_planted_maps():
    equal, itself, first = np.full((T, T), 1 / T), np.eye(T), np.eye(T)[[0] * T]
    neighbour = np.eye(T)[[1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10]]  # beside it in its row
    found = of_maps(equal, itself, first, neighbour, before=[itself, itself, equal, itself])
    mean_distance = cdist(PLACES, PLACES).mean()
    assert np.allclose(found["entropy"], [1, 0, 0, 0])
    assert np.allclose(found["entropy_others"], [1, 1, 1 / T, 0])  # equal where there is nothing but itself
    assert np.allclose(found["self_share"], [1 / T, 1, 1 / T, 0])
    assert np.allclose(found["distance"], [mean_distance, 0, cdist(PLACES, PLACES)[0].mean(), 1])
    assert np.allclose(found["row_share"], [3 / T, 0, 3 / T, 1])
    assert np.allclose(found["column_share"], [2 / T, 0, 2 / T, 0])
    assert np.allclose(found["same_for_queries"], [1, 1 / T, 1, 1 / T])
    assert np.allclose(found["same_for_images"], [1 / T, 1, 1 / T, 0])
    assert np.allclose(found["same_for_heads"], np.array([3 / T, 2 / T, 3 / T, 2 / T]) / 3)
    assert np.isnan(of_maps(equal)["same_for_heads"]).all()  # one head


def test_queries_that_attend_to_nothing_do_not_count():
    """A head without scores has no statistics and is like no other; a query without scores is left out of the mean."""
    rng = np.random.default_rng()
    maps = rng.dirichlet(np.full(T, 0.3), (3, T))
    silent, part = np.zeros((T, T)), maps[1].copy()
    part[5] = 0
    found, whole = of_maps(maps[0], silent, part), of_maps(maps[0], part)
    for name, values in found.items():
        assert np.isnan(values[1]), name
        assert np.allclose(values[[0, 2]], whole[name]), name
    rest = np.delete(np.arange(T), 5)
    assert whole["entropy"][1] == pytest.approx(np.mean([entropy(maps[1][query], base=T) for query in rest]))
    assert whole["self_share"][1] == pytest.approx(np.diag(maps[1])[rest].mean())
    assert whole["same_for_queries"][1] == pytest.approx(
        np.mean([1 - abs(maps[1][query] - maps[1][rest].mean(0)).sum() / 2 for query in rest])
    )


def test_statistics_against_scipy():
    rng = np.random.default_rng()
    maps, before = rng.dirichlet(np.full(T, 0.3), (2, 3, T))
    found = of_maps(*maps, before=before)
    far = cdist(PLACES, PLACES)

    def same(one, other):
        return 1 - abs(one - other).sum() / 2

    for head, p in enumerate(maps):
        others = [np.delete(row, place) for place, row in enumerate(p)]
        pairs = [same(p[query], maps[other][query]) for other in {0, 1, 2} - {head} for query in range(T)]
        expected = {
            "entropy": np.mean([entropy(row, base=T) for row in p]),
            "entropy_others": np.mean([entropy(row, base=T - 1) for row in others]),  # SciPy divides by the sum
            "self_share": np.trace(p) / T,
            "distance": np.mean([row @ far[place] for place, row in enumerate(p)]),
            "row_share": np.mean(
                [row @ ((PLACES[:, 0] == i) & (PLACES[:, 1] != j)) for row, (i, j) in zip(p, PLACES, strict=True)]
            ),
            "column_share": np.mean(
                [row @ ((PLACES[:, 0] != i) & (PLACES[:, 1] == j)) for row, (i, j) in zip(p, PLACES, strict=True)]
            ),
            "same_for_queries": np.mean([same(row, p.mean(0)) for row in p]),
            "same_for_images": np.mean([same(row, old) for row, old in zip(p, before[head], strict=True)]),
            "same_for_heads": np.mean(pairs),
        }
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert found[name][head] == pytest.approx(value, abs=1e-6), name


# ---------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", CONFIGS)
def test_models(name):
    """Of two batches as of one; shares, class token and signs as the recorded scores have them."""
    model = with_large_weights(CONFIGS[name].build())
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    found = measure(model, [(images[:3], None), (images[3:], None)], (4, 4))
    with torch.no_grad(), record(model, "scores") as trace:
        model(images)
    first = trace.adapter.class_tokens
    scores = np.stack([trace.scores(level).double().numpy() for level in range(3)], 1)  # (images, levels, H, T, T)
    patches = scores[..., first:, first:]
    p = abs(patches) / abs(patches).sum(-1, keepdims=True)
    assert all(values.shape == (5, 3, 2) for values in found.values()) and list(found) == list(STATISTICS)
    close = dict(rtol=1e-3, atol=1e-5)
    assert np.allclose(found["entropy"], entropy(p, base=16, axis=-1).mean(-1), **close)
    assert np.allclose(found["self_share"], np.diagonal(p, axis1=-2, axis2=-1).mean(-1), **close)
    same = 1 - abs(p[1:] - p[:-1]).sum(-1).mean(-1) / 2
    assert np.isnan(found["same_for_images"][0]).all() and np.allclose(found["same_for_images"][1:], same, **close)
    negative = np.where(patches < 0, -patches, 0).sum(-1) / abs(patches).sum(-1)
    assert np.allclose(found["negative"], negative.mean(-1), **close)
    assert (found["negative"].max() > 0) == trace.adapter.signed
    if not first:
        assert np.isnan(found["to_class_token"]).all() and np.isnan(found["class_entropy"]).all()
        return
    whole = abs(scores) / abs(scores).sum(-1, keepdims=True)
    assert np.allclose(found["to_class_token"], whole[..., 1:, 0].mean(-1), **close)
    assert np.allclose(found["class_entropy"], entropy(whole[..., 0, 1:], base=16, axis=-1), **close)


def test_table_has_intervals_over_images():
    rng = np.random.default_rng()
    values = {name: rng.random((30, 2, 3)) for name in STATISTICS}
    values["same_for_images"][0] = values["to_class_token"][:] = np.nan
    table = tabulate({("a", TRAINED): values}).set_index(["statistic", "level", "head"])
    assert "to_class_token" not in table.index and len(table) == (len(STATISTICS) - 1) * 2 * 4
    for head, of_images in (("all", values["entropy"][:, 1].mean(1)), (3, values["entropy"][:, 1, 2])):
        row, half = table.loc["entropy", 2, head], t.ppf(0.975, 29) * of_images.std(ddof=1) / math.sqrt(30)
        expected = (of_images.mean(), of_images.mean() - half, of_images.mean() + half)
        assert (row["mean"], row["low"], row["high"]) == pytest.approx(expected) and row["images"] == 30
    pairs = table.loc["same_for_images", 1, 1]  # each image in one pair only, so that the pairs are independent
    values["entropy"][:10, 0, 1] = values["entropy"][:, 1] = np.nan  # a head silent in some images; a silent level
    table = tabulate({("a", TRAINED): values}).set_index(["statistic", "level", "head"])
    row, left = table.loc["entropy", 1, 2], values["entropy"][10:, 0, 1]
    assert row["mean"] == pytest.approx(left.mean())
    assert row["high"] == pytest.approx(left.mean() + t.ppf(0.975, 19) * left.std(ddof=1) / math.sqrt(20))
    assert np.isnan(table.loc["entropy", 2, "all"]["mean"])
    assert pairs["images"] == 15 and pairs["mean"] == pytest.approx(values["same_for_images"][1::2, 0, 0].mean())


# ---------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory, experiment_in):
    """Folders of a v2 and a ViT, trained on the made-up CIFAR-10."""
    trial = experiment_in(tmp_path_factory.mktemp("runs"), "bdh", model=dict(n_layer=2), epochs=1)
    vit = ViTConfig(n_layer=3, n_embd=8, n_head=2, mlp_dim=16, patch_size=8)
    trials = [trial, dataclasses.replace(trial, name="vit", model=vit)]
    for each in trials:
        fit(each)
    return [each.folder for each in trials]


def test_script(runs, call_script, data_dir, tmp_path, capsys):
    flags = ["--data-dir", data_dir, "--output-dir", "out", "--images", 12]
    assert call_script(SCRIPT, "--run", *runs, *flags) == 0
    folder = tmp_path / "out" / "bdh_seed0_versus_vit_seed0"
    name = "attention_statistics"
    assert {path.name for path in folder.iterdir()} == {f"{name}.{end}" for end in ("csv", "md", "png", "svg")}
    check_picture(folder / f"{name}.png")
    assert (folder / f"{name}.md").read_text(encoding="utf-8").rstrip("\n") in capsys.readouterr().out
    table = pd.read_csv(folder / f"{name}.csv")
    levels = table.groupby(["run", "weights"], sort=False)["level"].max().to_dict()
    assert levels == {("bdh", TRAINED): 2, ("bdh", UNTRAINED): 2, ("vit", TRAINED): 3, ("vit", UNTRAINED): 3}
    has_class_token = table[table.statistic == "class_entropy"].run.unique()
    assert list(has_class_token) == ["vit"] and set(table.statistic) == set(STATISTICS)
    run = TrainedRun(runs[0], data_dir)
    images = torch.cat([images for images, _ in run.batches(run.choose_images(12))])
    expected = measure(run.model, [(images, None)], (4, 4))["self_share"]
    rows = table[(table.run == "bdh") & (table.weights == TRAINED) & (table.statistic == "self_share")]
    by_head = rows[rows["head"] != "all"]["mean"].to_numpy().reshape(2, 2)
    assert np.allclose(by_head, expected.mean(0), rtol=1e-4)
    assert call_script(SCRIPT, "--run", runs[1], *flags, "--no-untrained") == 0
    assert set(pd.read_csv(tmp_path / "out" / "vit_seed0" / f"{name}.csv").weights) == {TRAINED}


def test_models_without_attention_are_refused(experiment, call_script, data_dir, tmp_path, capsys):
    trial = dataclasses.replace(experiment("resnet", epochs=1), model=ResNet20Config())
    fit(trial)
    capsys.readouterr()
    assert call_script(SCRIPT, "--run", trial.folder, "--data-dir", data_dir, "--output-dir", "out") == 1
    check_error(capsys, "cannot be inspected: ResNet20 is not supported")
    assert not (tmp_path / "out").exists()


def test_too_few_images_or_patches(experiment, call_script, data_dir, capsys):
    assert call_script(SCRIPT, "--images", 1) == 2
    assert "images = 1 must be at least 2" in capsys.readouterr().err
    trial = experiment("one_patch", model=dict(patch_size=32), epochs=1)
    fit(trial)
    capsys.readouterr()
    assert call_script(SCRIPT, "--run", trial.folder, "--data-dir", data_dir) == 1
    check_error(capsys, "has 1 patches an image: give a run with 3 or more")
