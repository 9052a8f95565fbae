"""Tables and figures of made-up segmentation runs."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from training import UserError
from analysis import analyze_segmentation_results as segmentation
from analysis.analyze_segmentation_results import analyze_segmentation, segmentation_rows
from analysis.plotting.style import COLORS
from analysis.reading import find_runs, read_run, read_runs
from tests import claimed_runs
from tests.pictures import check_picture, share_of_color
from tests.trials import read_table

FIRST = dict(miou=(0.10, 0.37, 0.40, 0.385, 0.39), train_miou=(0.1, 0.3, 0.46, 0.5, 0.55))  # best: epoch 3
SECOND = dict(miou=(0.20, 0.30, 0.40, 0.47, 0.50), train_miou=(0.1, 0.2, 0.3, 0.4, 0.48))  # best: epoch 5
SKY, POLE = (0.1, 0.2, 0.8, 0.4, 0.5), (0.1, 0.2, None, 0.3, 0.3)
NAMES = [f"{name}.{kind}" for name in segmentation.FIGURES for kind in ("png", "svg")]
NAMES += ["performance_comparison.md", "performance_comparison.csv"]
LONG = "bdh_unet+learning_rate=0.001+mlp_internal_dim_multiplier=32+attention=softmax+patch_size=16+n_embd="
SCRIPT = "analysis/analyze_segmentation_results.py"


@pytest.fixture
def write_run(tmp_path):
    """Writes a run's folder, by default below runs, and returns it.

    miou, train_miou and each list in classes: fractions, one an epoch; None for a class that was not there.
    epochs: those it was to have, if it is not finished. changed: fields of model or training.
    """

    def write(name="bdh_unet", seed=0, epochs=None, classes=None, data="camvid", parameters=2_000_000, **changed):
        miou, train_miou = (changed.pop(key, FIRST[key]) for key in ("miou", "train_miou"))
        done = len(miou)
        classes = classes or {"sky": SKY[:done], "pole": POLE[:done], "ghost": (None,) * done}
        count = np.arange(1, done + 1)
        columns = {"train_loss": 2.0 / count, "val_loss": 2.5 / count, "val_miou": miou}
        columns |= {"val_miou_batch": np.array(miou) - 0.03 * (seed + 1), "train_miou": train_miou[:done]}
        columns |= {"val_pixel_accuracy": 0.5 + count / 10, "epoch_time_sec": 30.0 + 10 * seed + count}
        columns |= {"peak_memory_mb": 1000.0 + 100 * seed + count}
        columns |= {f"val_iou_{label}": values for label, values in classes.items()}
        folder, flags = tmp_path / "runs" / name / f"seed{seed}", f"--epochs {epochs or done}"
        about = dict(name=name, finished=epochs is None, columns=columns, parameters=parameters, dataset=data)
        return claimed_runs.write_run(folder, "train_bdh_unet.py", flags, seed, **about, **changed)

    return write


@pytest.fixture
def two_seeds(write_run):
    """One experiment, two seeds; the class pole is not there at the first one's best epoch."""
    first = write_run(**FIRST)
    return first, write_run(
        seed=1, classes={"sky": (0.0,) * 4 + (0.9,), "pole": (0.3,) * 5, "ghost": (None,) * 5}, **SECOND
    )


def numbers_of(line, *keys):
    return pytest.approx([float(line[key]) for key in keys])


def rows_of(tmp_path):
    return segmentation_rows(read_runs(find_runs(tmp_path / "runs")), "camvid")


def tables_of(runs, output, dataset="camvid"):
    """The tables, without the slow figures."""
    return segmentation.write_results(segmentation_rows(read_runs(runs), dataset), output)


def test_numbers_of_two_seeds(two_seeds, tmp_path):
    """Against values worked out by hand from FIRST and SECOND."""
    paths = analyze_segmentation(two_seeds, tmp_path / "out")
    assert [path.name for path in paths] == NAMES
    (line,) = read_table(paths[-1])
    assert [line[key] for key in ("experiment", "dataset", "hardware")] == ["bdh_unet", "camvid", "GPU X"]
    assert [int(line[key]) for key in ("seeds", "seeds_not_finished", "parameters")] == [2, 0, 2_000_000]
    miou = ("best_val_miou_mean", "best_val_miou_std", "final_val_miou_mean", "best_val_miou_per_million_parameters")
    assert numbers_of(line, *miou) == [0.45, 0.1 / 2**0.5, 0.445, 0.225]
    best = ("val_miou_batch", "val_pixel_accuracy", "train_miou", "train_val_miou_gap")
    assert numbers_of(line, *(f"{key}_at_best_mean" for key in best)) == [0.405, 0.9, 0.47, 0.02]
    epochs = ("best_epoch_median", "epochs_to_90_percent_of_best_median", "epochs_to_95_percent_of_best_median")
    assert numbers_of(line, *epochs) == [4, 3, 4]  # of 3 and 5, 2 and 4, 3 and 5
    assert numbers_of(line, "epoch_time_sec_median", "peak_memory_mb_max") == [38, 1105]
    assert numbers_of(line, "iou_sky", "iou_pole") == [0.85, 0.3] and line["iou_ghost"] == ""


def test_numbers_of_one_seed(write_run, tmp_path):
    (line,) = read_table(tables_of([write_run()], tmp_path / "out")[-1])
    assert numbers_of(line, "best_val_miou_mean", "best_epoch_median", "iou_sky") == [0.40, 3, 0.8]
    assert line["best_val_miou_std"] == line["iou_pole"] == ""
    assert numbers_of(line, "train_val_miou_gap_at_best_mean", "val_miou_batch_at_best_mean") == [0.06, 0.37]


def test_a_run_that_is_not_finished(two_seeds, write_run, tmp_path):
    """It is told apart everywhere, comes last, and does not change the mean of seeds that are finished."""
    write_run(seed=2, epochs=5, miou=(0.9, 0.8))
    write_run("unet", epochs=9, miou=(0.6, 0.55, 0.5))
    first, second = read_table(tables_of(find_runs(tmp_path / "runs"), tmp_path / "out")[-1])
    assert (first["experiment"], first["seeds"], first["seeds_not_finished"]) == ("bdh_unet", "2", "1")
    assert numbers_of(first, "best_val_miou_mean") == [0.45]
    assert (second["seeds"], second["epochs"], second["epochs_done"]) == ("0", "9", "3")
    assert numbers_of(second, "best_val_miou_mean", "best_epoch_median", "final_val_miou_mean") == [0.6, 1, 0.5]
    axes = segmentation.draw_learning(rows_of(tmp_path)).axes
    assert [line.get_linestyle() for line in axes[3].lines] == ["-", "--", "--"]
    assert [len(line.get_xdata()) for line in axes[3].lines] == [5, 2, 3]
    assert [line.get_markevery()[-1] for line in axes[3].lines] == [4, 1, 2]  # marks the end


def test_markdown(two_seeds, write_run, tmp_path):
    """The numbers of the CSV file side by side, in percent, with notes."""
    write_run("unet", miou=(0.1, 0.2, 0.3), parameters=14_000_000)
    text = tables_of(find_runs(tmp_path / "runs"), tmp_path / "out")[0].read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    table = {cells[0]: cells[1:] for cells in rows}
    assert table["experiment"] == ["bdh_unet", "unet"] and table["parameters"] == ["2,000,000", "14,000,000"]
    assert table["best val miou mean"] == ["45.00", "30.00"] and table["best val miou std"] == ["7.07", ""]
    assert table["iou pole"] == ["30.00", ""] and table["peak memory mb max"] == ["1,105", "1,003"]
    plain = " ".join(text.split())
    assert "one confusion matrix over all validation images, void pixels ignored" in plain
    assert "compare with published numbers" in plain and "The data have no test part" in plain


def test_curves(two_seeds, tmp_path):
    """What matplotlib was given: means over seeds, in percent."""
    rows = rows_of(tmp_path)
    axes = segmentation.draw_learning(rows).axes
    assert [ax.get_ylabel() for ax in axes] == list(segmentation.PANELS.values())
    means = {"train_miou": (0.1, 0.25, 0.38, 0.45, 0.515), "val_miou": (0.15, 0.335, 0.4, 0.4275, 0.445)}
    for ax, values in zip(axes[2:], means.values(), strict=True):
        assert np.allclose(ax.lines[0].get_ydata(), 100 * np.array(values))
        assert len(ax.collections) == 1  # the band
    assert np.allclose(axes[0].lines[0].get_ydata(), 2.0 / np.arange(1, 6))

    figure = segmentation.draw_convergence(rows)
    shares = (np.array(FIRST["miou"]) / 0.4 + np.array(SECOND["miou"]) / 0.5) / 2
    low, high, curve = figure.axes[0].lines
    assert np.allclose(curve.get_ydata(), 100 * shares)
    assert [line.get_ydata()[0] for line in (low, high)] == [90, 95] and low.get_linestyle() == "--"
    (text,) = (text.get_text() for text in figure.subfigs[0].legends[0].get_texts())
    assert text == "bdh_unet (2\N{NO-BREAK SPACE}seeds): 90 % at epoch 3"


def test_gaps(two_seeds, write_run, tmp_path):
    """A panel for each experiment and for each run that is not finished, none for the rest of the grid."""
    write_run("unet", epochs=5, miou=(0.1, 0.3), train_miou=(0.2, 0.25))
    for index in range(3):
        write_run(f"other{index}", miou=(0.01, 0.02))
    axes = segmentation.draw_gaps(rows_of(tmp_path)).axes
    titles = [ax.get_title() for ax in axes if ax.get_visible()]
    assert titles[0].endswith("gap +2.0 points at epoch 4") and titles[-1].endswith("gap -5.0 points at epoch 2")
    assert (len(axes), len(titles)) == (6, 5)
    last = [ax for ax in axes if ax.get_visible()][-1]
    assert [line.get_linestyle() for line in last.lines] == ["--", "--", ":"]
    assert np.allclose(last.lines[0].get_ydata(), [10, 30]) and np.allclose(last.lines[1].get_ydata(), [20, 25])
    assert len(last.collections) == 1  # what is between


def test_classes(two_seeds, write_run, tmp_path):
    """Highest IoU on top; a class that no experiment has is named; what is not finished has hollow dots."""
    write_run("unet", epochs=9)
    (ax,) = segmentation.draw_classes(rows_of(tmp_path)).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["sky", "pole", "ghost: absent"]
    assert ax.get_ylim() == (2.5, -0.5)
    full, hollow = (container[0] for container in ax.containers)
    assert np.allclose(full.get_xdata().astype(float), [85, 30, np.nan], equal_nan=True)
    (bars,) = ax.containers[0][2]  # of one standard deviation: IoU of the sky is 80 and 90
    assert np.allclose(bars.get_segments()[0][:, 0], [85 - 50**0.5, 85 + 50**0.5])
    assert np.allclose(hollow.get_xdata().astype(float), [80, np.nan, np.nan], equal_nan=True)
    assert hollow.get_markerfacecolor() == "white" != full.get_markerfacecolor()
    assert all(full.get_ydata() < hollow.get_ydata()) and np.allclose(np.round(hollow.get_ydata()), [0, 1, 2])


def test_pictures_show_every_experiment(write_run, tmp_path):
    heights = {f"class_{place}": (0.1 + place / 30,) * 5 for place in range(21)}
    for index in range(5):
        write_run(f"{LONG}{index}", miou=tuple(np.linspace(0.05, 0.3 + index / 10, 5)), classes=heights)
    for path in analyze_segmentation(find_runs(tmp_path / "runs"), tmp_path / "out")[:8:2]:
        pixels = check_picture(path)
        assert pixels.shape[1] == 1440 and 500 < len(pixels) < 2400
        colors = COLORS[: 2 if path.name == "train_val_gap.png" else 5]
        assert all(share_of_color(pixels, color) > 1e-4 for color in colors), path.name


def draw(figure):
    """Lays the figure out as for a file."""
    FigureCanvasAgg(figure).draw()
    return figure


@pytest.mark.parametrize("name", ["draw_learning", "draw_convergence", "draw_gaps", "draw_classes"])
@pytest.mark.parametrize("experiments", [1, 6])
def test_long_names_are_neither_cut_nor_over_the_panels(write_run, tmp_path, name, experiments):
    for index in range(experiments):
        write_run(f"{LONG}{index}{'+wide=yes' * index}", epochs=9 if index == 2 else None)
    figure = draw(getattr(segmentation, name)(rows_of(tmp_path)))
    legend = figure.subfigs[0].legends[0].get_window_extent()
    panels = [ax.get_tightbbox() for ax in figure.axes if ax.get_visible()]
    for box in [legend, *panels, figure.subfigs[0]._suptitle.get_window_extent()]:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
    assert all(box.y0 >= legend.y1 for box in panels)
    assert all(ax.get_window_extent().height > 100 for ax in figure.axes if ax.get_visible())  # of 100 dots an inch
    titles = [ax.title.get_window_extent() for ax in figure.axes if ax.get_visible() and ax.get_title()]
    assert not any(one.overlaps(other) for place, one in enumerate(titles) for other in titles[:place])


def test_other_runs_are_ignored(make_run, write_run, tmp_path):
    """Classification, and segmentation of other data; neither gets a warning nor a place."""
    make_run(folder=tmp_path / "runs" / "classified")
    write_run("on_voc", data="voc")
    write_run()
    runs = find_runs(tmp_path / "runs")
    assert [line["experiment"] for line in read_table(tables_of(runs, tmp_path / "out")[-1])] == ["bdh_unet"]
    (line,) = read_table(tables_of(runs, tmp_path / "voc", "voc")[-1])
    assert (line["experiment"], line["dataset"]) == ("on_voc", "voc")


DAMAGES = {  # what becomes of metrics.csv
    "no_train_miou": lambda text: text.replace("train_miou", "other"),
    "no_classes": lambda text: text.replace("val_iou_", "iou_"),
    "word_for_a_class": lambda text: text.replace("0.8,", "much,"),
    # the last line ends, but lacks its last numbers, val_pixel_accuracy among them
    "short_line": lambda text: text.rsplit(",", len(text.partition(",val_pixel_accuracy")[2].split(",")))[0] + "\n",
}


@pytest.mark.parametrize("change", DAMAGES.values(), ids=DAMAGES)
def test_damaged_runs_are_left_out_with_one_line(write_run, tmp_path, capsys, change):
    def damage(folder):
        (folder / "metrics.csv").write_text(change((folder / "metrics.csv").read_text()))

    whole, broken = write_run(), write_run(seed=1)
    damage(broken)
    (line,) = read_table(tables_of([whole, broken], tmp_path / "out")[-1])
    assert line["seeds"] == "1"
    error = capsys.readouterr().err
    assert error.startswith(f"warning: {broken} is left out") and error.count("\n") == 1
    damage(whole)
    with pytest.raises(UserError, match="no segmentation run"):
        tables_of([whole, broken], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_an_absent_class_in_the_last_line_does_not_lose_the_epoch(write_run):
    run = read_run(write_run(epochs=9, miou=(0.1, 0.2, 0.3)))  # pole is not there in epoch 3, ghost never
    assert len(run.epochs) == 3 and run.metric.key == "miou" and run.best_epoch == 3


@pytest.mark.parametrize("keep", [1, 3, 12, 14])
def test_a_last_line_without_its_end_is_not_an_epoch(write_run, keep):
    """Cut behind any of its fields, even if all numbers are there."""
    folder = write_run(epochs=9, miou=(0.1, 0.2, 0.3))
    lines = (folder / "metrics.csv").read_text().splitlines()
    (folder / "metrics.csv").write_text("\n".join([*lines[:-1], ",".join(lines[-1].split(",")[:keep])]))
    assert read_run(folder).epochs.index.tolist() == [1, 2]


def test_command_line(write_run, call_script, tmp_path, capsys):
    write_run()
    assert call_script(SCRIPT, "--runs-dir", "runs", "--output-dir", "out") == 0
    assert capsys.readouterr().out.split() == [f"out/{name}" for name in NAMES]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(NAMES)


def test_no_runs_is_one_message(make_run, write_run, call_script, tmp_path, capsys):
    make_run()
    assert call_script(SCRIPT, "--runs-dir", "runs", "--output-dir", "out") == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: there is no segmentation run on camvid: train one (python ")
    assert shown.err.count("\n") == 1 and "train_bdh_unet.py" in shown.err and "--dataset" not in shown.err
    write_run(data="voc")
    assert call_script(SCRIPT, "--runs-dir", "runs", "--output-dir", "out") == 1
    assert "--dataset voc" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_runs_trained_on_their_validation_images_are_left_out(write_run, tmp_path, capsys):
    write_run(**FIRST)
    write_run(name="both", train_val=True, **FIRST)
    unfinished = write_run(name="more", train_val=True, epochs=9, **FIRST)
    assert [row.experiment for row in rows_of(tmp_path)] == ["bdh_unet"]
    assert "both/seed0 is left out: it was trained on the validation images" in capsys.readouterr().err
    (run,) = read_runs([unfinished])
    assert run.best_epoch == len(FIRST["miou"]) and FIRST["miou"][-1] < max(FIRST["miou"])
