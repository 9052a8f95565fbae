"""The tables of neurons, their contact sheets, and the script."""

import numpy as np
import pandas as pd
import pytest

from training import UserError, fit
from interpretability.common.activity import batches_of_patches
from interpretability.common.contact_sheet import TopPatch, draw_sheet, window
from interpretability.common.selectivity import collect
from interpretability.common.trained import TrainedRun
from interpretability.neurons import (
    Found,
    describe,
    draw_measures,
    level_table,
    most_selective,
    neuron_table,
    top_patches,
)
from tests.inspecting import check_error
from tests.pictures import check_picture
from tests.planted_neurons import ALWAYS, CLASS_0, NEVER, batches, planted_images, planted_model, recorded

SCRIPT = "interpretability/neurons.py"
LABELS = [0, 1, 2, 3] * 5


@pytest.fixture
def planted():
    """What is found of the planted model: 20 images of 4 classes."""
    responses = collect(planted_model(), batches(planted_images(LABELS), LABELS, size=7), "x_sparse", k=4)
    return Found.of(responses, n_shuffles=199, seed=0)


# ---------------------------------------------------------------------------- tables


def test_planted_neurons_in_the_tables(planted):
    table = neuron_table(planted, ["cat", "dog", "elk", "fox"]).set_index(["level", "head", "neuron"])
    assert len(table) == 64
    for head in (1, 2):
        planted_row, never = table.loc[1, head, CLASS_0], table.loc[1, head, NEVER]
        assert planted_row[["best_class", "index", "auroc", "precision", "top_patches"]].tolist() == ["cat", 1, 1, 1, 4]
        assert planted_row["index_p"] == planted_row["auroc_p"] == 1 / 200 and planted_row["active"] == 0.25
        assert pd.isna(never["best_class"]) and never["top_patches"] == 0 and never[["index", "auroc_p"]].isna().all()
        assert table.loc[1, head, ALWAYS]["active"] == 1
    (row,) = level_table(planted, chance=0.01).to_dict("records")
    # by head: two neurons of class 0, one of the others, one that is always active; 28 never are
    assert (row["neurons"], row["never_active"], row["index_beats"], row["auroc_beats"]) == (64, 56, 4, 4)
    assert row["by_luck"] == pytest.approx(0.08) and row["one_class"] == 4 and row["one_class_shuffled"] < 0.5
    assert level_table(planted, chance=0.001)["index_beats"].item() == 0  # no p of 199 shuffles is below 1 / 200


def test_shuffled_labels_are_described_by_medians(planted):
    (_, null), (row,) = planted.by_level[0], level_table(planted, chance=0.01).to_dict("records")
    assert row["index_shuffled"] == np.nanmedian(null.index) and row["auroc_shuffled"] == np.nanmedian(null.auroc)
    assert np.nanmedian(null.index) < np.nanmax(null.index)


def test_few_patches_make_no_neuron_of_one_class():
    """Six are kept, and only the five images of class 0 excite those that are active for it alone."""
    responses = collect(planted_model(), batches(planted_images(LABELS), LABELS, size=20), "x_sparse", k=6)
    found = Found.of(responses, n_shuffles=9, seed=0)
    row = neuron_table(found, list("abcd")).iloc[CLASS_0]
    assert row["precision"] == 1 and row["top_patches"] == 5
    assert level_table(found, chance=0.1)["one_class"].item() == 0


def test_images_of_one_class_are_refused():
    responses = collect(planted_model(), batches(planted_images([0, 0, 0]), [0, 0, 0], size=3), "gated", k=2)
    with pytest.raises(UserError, match="all of one class"):
        Found.of(responses, n_shuffles=9, seed=0)


def test_most_selective():
    """Only what beats chance by the measure asked for; of a class, or the first of each, in the order of classes."""
    columns = ["neuron", "best_class", "index", "index_p", "auroc", "auroc_p"]
    rows = [
        (0, "b", 0.9, 0.5, 0.6, 0.001),
        (1, "b", 0.5, 0.01, 0.9, 0.001),
        (2, "b", 0.6, 0.001, 0.7, 0.2),
        (3, "a", 0.2, 0.001, 0.5, 0.9),
        (4, None, np.nan, np.nan, np.nan, np.nan),
        (5, "c", 0.3, 0.001, 0.95, 0.001),
    ]
    table, names = pd.DataFrame(rows, columns=columns), ["c", "b", "a"]
    assert most_selective(table, "index", 0.01, 10, names).neuron.tolist() == [5, 2, 3]
    assert most_selective(table, "index", 0.01, 2, names).neuron.tolist() == [5, 2]
    assert most_selective(table, "auroc", 0.01, 10, names).neuron.tolist() == [5, 1]
    assert most_selective(table, "index", 0.01, 10, names, "b").neuron.tolist() == [2, 1]
    assert most_selective(table, "auroc", 0.01, 1, names, "b").neuron.tolist() == [1]
    assert most_selective(table, "auroc", 0.01, 1, names, "a").empty


def test_distributions_are_those_of_the_measures(planted):
    responses = collect(planted_model(), batches(planted_images(LABELS), [0, 0, 1, 1] * 5, size=7), "x_sparse", k=4)
    before = Found.of(responses, n_shuffles=9, seed=0)  # its class-0 neurons miss half of the images of their class
    figure = draw_measures({"now": planted, "before": before}, top=4, title="title")
    measures, null = planted.by_level[0]
    assert [ax.get_xlabel() for ax in figure.axes] == [
        "class selectivity index",
        "AUROC for the best class",
        "best class among the top patches",
    ]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["labels shuffled", "now", "before"]
    for ax, name, n_bins in zip(figure.axes, ("index", "auroc", "precision"), (40, 40, 5), strict=True):
        drawn = [patch.get_data() for patch in ax.patches]
        for shown, each in zip(drawn, (null, measures, before.by_level[0][0]), strict=True):
            values = getattr(each, name)[~np.isnan(getattr(each, name))]
            assert len(shown.values) == n_bins
            assert np.allclose(shown.values, 100 * np.histogram(values, shown.edges)[0] / len(values))
    assert drawn[1].values[-1] >= 50  # the neurons of class 0, half of the active ones


# ---------------------------------------------------------------------------- contact sheets


def test_window():
    """So many on each side; at an edge it is moved, and in a small image it is all of it."""
    assert [window(place, 8, 2) for place in (0, 1, 2, 4, 5, 7)] == [(0, 5), (0, 5), (0, 5), (2, 7), (3, 8), (3, 8)]
    assert window(3, 8, 0) == (3, 4) and window(1, 4, 3) == (0, 4)


def test_sheet_shows_the_patches():
    """A 12 x 20 image in patches of 4 (3 rows, 5 columns), 1 patch around: what is drawn, and where the frame is."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (3, 12, 20), dtype=np.uint8)
    patches = [TopPatch(image, patch, value, r"$\frac$ of long name") for patch, value in ((9, 1.5), (7, 0.25))]
    figure = draw_sheet([("first", patches), ("$silent$", [])], "run $x$", grid=(3, 5), around=1)
    figure.draw_without_rendering()  # fails if names from data are read as formulas
    first, silent = figure.subfigs
    assert first.get_suptitle() == "run \\$x\\$\n\nfirst" and silent.get_suptitle() == r"\$silent\$"
    # patch 9: row 1, column 4, so the window is moved to columns 2 to 4; patch 7: row 1, column 2
    for ax, columns, corner in zip(first.axes, (slice(8, 20), slice(4, 16)), (7.5, 3.5), strict=False):
        assert np.array_equal(ax.images[0].get_array(), image.transpose(1, 2, 0)[:, columns])
        assert [frame.get_xy() for frame in ax.patches] == [(corner, 3.5)] * 2 and ax.patches[0].get_width() == 4
    assert [ax.get_title() for ax in first.axes[:3]] == ["\\$\\frac\\$ of l…\n1.5", "\\$\\frac\\$ of l…\n0.25", ""]
    assert [text.get_text() for text in silent.axes[0].texts] == ["no patch activates it"]


def test_sheet_of_more_patches_than_a_row_holds():
    patches = [TopPatch(np.zeros((1, 8, 8), np.uint8), 0, 1.0, "0")] * 11
    figure = draw_sheet([("first", patches)], "title", grid=(4, 4), around=9)
    drawn = [ax for ax in figure.subfigs[0].axes if ax.images]
    assert len(drawn) == 11 and len(figure.subfigs[0].axes) == 16 and drawn[10].images[0].get_array().shape == (8, 8)


# ---------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def run(experiment_in, tmp_path_factory):
    """Folder of a tiny run, with the weights before training and after."""
    trial = experiment_in(tmp_path_factory.mktemp("work"), epochs=1, model=dict(n_layer=2), options=dict(keep_every=1))
    fit(trial)
    return trial.folder


def test_top_patches_of_a_run(run, data_dir):
    """Of images that are not the first ones: their pixels, classes and patches are those of the strongest activity."""
    opened = TrainedRun(run, data_dir, "cpu")
    indices = opened.choose_images(9)
    found = Found.of(collect(opened.model, batches_of_patches(opened, indices, ""), "y_sparse", 3), 9, 0)
    images, labels = opened.samples(indices)
    values = recorded(opened.model, opened.pixels(images))["y_sparse"]  # (L, B, H, T, N)
    table = neuron_table(found, opened.class_names)
    neuron = table[table["head"] == 2].groupby("neuron")["top_patches"].min().idxmax()  # active at every level
    for _, row in table[(table.neuron == neuron) & (table["head"] == 2)].iterrows():
        of = values[row["level"] - 1, :, 1, :, neuron]
        order = [image for image in np.argsort(-of.max(1), kind="stable")[:3] if of[image].max() > 0]
        shown = top_patches(opened, indices, found.responses, row)
        assert len(shown) == len(order) == row["top_patches"] == 3
        for place, image in zip(shown, order, strict=True):
            assert np.array_equal(place.image, images[image].numpy())
            assert place.patch == of[image].argmax() and place.value == pytest.approx(of[image].max(), rel=1e-4)
            assert place.class_name == f"class {labels[image]}"
        assert f"level {row['level']}, head 2, neuron {neuron}, {row['best_class']}: index" in describe(row)


def test_script(run, data_dir, call_script, tmp_path, capsys):
    flags = ("--run", run, "--data-dir", data_dir, "--output-dir", "out", "--device", "cpu", "--quantity", "x_sparse")
    more = ("--neuron", 2, 1, 3, "--neuron", 1, 2, 0, "--top", 4, "--rows", 3, "--shuffles", 100, "--images", 30)
    assert call_script(SCRIPT, *flags, *more) == 0
    said = capsys.readouterr().out
    assert "x_sparse, 30 test images of 16 patches" in said and "before training:" in said
    output = tmp_path / "out" / "trial_seed0"
    names = {path.name.removesuffix(".png") for path in output.glob("*.png")}
    start = "neurons_x_sparse"
    assert {start, f"{start}_2-1-3_1-2-0", f"{start}_by_auroc_each_class"} <= names
    for name in names:
        check_picture(output / f"{name}.png")
    table = pd.read_csv(output / f"{start}.csv")
    assert len(table) == 2 * 2 * 16
    p = table[["index_p", "auroc_p"]].stack()
    assert p.between(1 / 101, 1).all() and np.allclose(p * 101, (p * 101).round())
    opened = TrainedRun(run, data_dir, "cpu")
    pixels, labels = next(opened.batches(opened.choose_images(30)))
    values = recorded(opened.model, pixels)["x_sparse"][1, :, 0, :, 3].mean(1)  # level 2, head 1, neuron 3
    by_class = pd.Series(values).groupby(labels.numpy()).mean()
    row = table[(table.level == 2) & (table["head"] == 1) & (table.neuron == 3)].iloc[0]
    rest = by_class.drop(by_class.idxmax()).mean()
    assert row["best_class"] == f"class {by_class.idxmax()}"
    assert row["index"] == pytest.approx((by_class.max() - rest) / (by_class.max() + rest), abs=1e-5)
    levels = pd.read_csv(output / f"{start}_levels.csv")
    assert levels.weights.tolist() == ["as trained"] * 2 + ["before training"] * 2
    beats = [int((table[table.level == level].auroc_p <= 0.01).sum()) for level in (1, 2)]
    assert levels.auroc_beats.tolist()[:2] == beats and max(beats) > 0
    assert levels["index"][0] != levels["index"][2]


def test_script_on_the_weights_before_training(run, data_dir, call_script, tmp_path, capsys):
    """They stand for themselves, under their own name; no class there is drawn that none is selective for."""
    flags = ("--run", run / "epoch_000.pt", "--data-dir", data_dir, "--output-dir", "out", "--images", 12)
    stale = [
        tmp_path / "out" / "trial_seed0" / f"neurons_epoch_000_gated_by_{by}_class 3.svg" for by in ("index", "auroc")
    ]
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("of an earlier call")
    assert call_script(SCRIPT, *flags, "--selective-for", "class 3", "--shuffles", 5, "--chance", 0.17) == 0
    assert not any(path.exists() and path.read_text() == "of an earlier call" for path in stale)
    said = capsys.readouterr().out
    assert "trial, seed 0, epoch_000: gated, 12 test images" in said and "as trained" not in said
    output = tmp_path / "out" / "trial_seed0"
    levels = pd.read_csv(output / "neurons_epoch_000_gated_levels.csv")
    assert levels.weights.tolist() == ["epoch_000"] * 2
    table = pd.read_csv(output / "neurons_epoch_000_gated.csv")
    for by in ("index", "auroc"):
        any_found = ((table.best_class == "class 3") & (table[f"{by}_p"] <= 0.17)).any()
        assert (output / f"neurons_epoch_000_gated_by_{by}_class 3.png").exists() == any_found
        assert (f"no neuron to draw by {by} class 3" in said) != any_found


def test_bad_input(run, data_dir, call_script, tmp_path, capsys):
    """One message each, and nothing is written."""
    for flags, said in (
        (
            ("--neuron", 3, 1, 0),
            "--neuron 3 1 0 does not exist: levels go from 1 to 2, heads from 1 to 2, neurons from",
        ),
        (("--neuron", 1, 0, 0), "--neuron 1 0 0 does not exist"),
        (("--neuron", 1, 1, 16), "from 0 to 15"),
        (("--selective-for", "clas 3"), "did you mean class 3?"),
        (("--selective-for", "zebra"), "classes are class 0, class 1"),
        (("--images", 0), "give --images 1 or more"),
        (("--images", 1), "give more --images"),
    ):
        assert call_script(SCRIPT, "--run", run, "--data-dir", data_dir, "--output-dir", tmp_path / "out", *flags) == 1
        check_error(capsys, said)
    assert not list((tmp_path / "out").rglob("*.*"))
    for flags, said in (
        (("--top", 0), "top = 0 must be at least 1"),
        (("--around", -1), "around = -1 must be at least 0"),
        (("--seed", -1), "seed = -1 must be at least 0"),
        (("--shuffles", 50), "chance = 0.01 must be below 1 and at least 0.02"),
        (("--neuron", 1, 1), "--neuron"),
        (("--quantity", "z_sparse"), "z_sparse"),
        (("--shufles", 3), "--shuffles"),
    ):
        assert call_script(SCRIPT, *flags) == 2
        assert said in capsys.readouterr().err
