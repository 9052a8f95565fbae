"""Figures and tables of the segmentation runs on one data set.

Averages over seeds as analysis/analyze.py does. Writes learning_curves, convergence, train_val_gap and per_class_iou as
PNG and SVG, performance_comparison.md (in percent) and performance_comparison.csv (metrics as fractions). Unfinished
runs are drawn dashed; they count in an average only if no seed has finished.

    python analysis/analyze_segmentation_results.py
    python analysis/analyze_segmentation_results.py --dataset voc --runs-dir results --output-dir plots
"""

import math
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.plotting import style
from analysis.plotting.curves import (
    Curve,
    band_title,
    by_seed,
    curves_of,
    draw_curve,
    draw_panels,
    labels_of,
    seeds_text,
)
from analysis.reading import Row, RunFiles, find_runs, make_rows, read_runs
from analysis.tables import markdown_table, write_tables
from training.command_line import run_script
from training.config import ROOT, UserError

CLASS = "val_iou_"  # prefix of the columns with the IoU of a class
NEEDED = ("train_miou", "val_pixel_accuracy", "val_miou_batch", "peak_memory_mb")  # beside what every run has
PANELS = {
    "train_loss": "training loss",
    "val_loss": "validation loss",
    "train_miou": "training mIoU (%)",
    "val_miou": "validation mIoU (%)",
}
NOTES = """\
- mIoU: from one confusion matrix over all validation images, void pixels ignored. A class in neither truth nor
  prediction has no IoU and is left out of the mean.
- miou batch: mean over validation batches of the mIoU of each. It depends on the batch size; use it only to compare
  with published numbers measured in this way.
- train miou: measured during the epoch, on augmented images. Gap: training minus validation mIoU.
- Means over seeds, std divides by n - 1. A difference between experiments with one seed each may be chance;
  analysis/compare.py gives intervals for differences, paired by seed."""
NO_TEST = "- The data have no test part: the best epoch was chosen on the images that the result is measured on."


@dataclass(frozen=True, kw_only=True)
class Options:
    """Input and output folders, and the data set."""

    runs_dir: Path = ROOT / "runs"
    """folder with runs, at any depth"""
    dataset: str = "camvid"
    """data set of the runs: camvid, voc, cityscapes, ade20k"""
    output_dir: Path | None = None
    """folder for tables and figures; default: analysis_results_<dataset> in the repository"""


def analyze_segmentation(runs: Sequence[Path], output: Path, dataset: str = "camvid") -> tuple[Path, ...]:
    """Writes figures and tables of these runs into the folder output; returns the files, learning_curves.png first.

    Ignores runs of other tasks; names and leaves out those that cannot be read. Raises UserError if none is left.
    """
    rows = segmentation_rows(read_runs(runs), dataset)
    paths: list[Path] = []
    for name, draw in FIGURES.items():
        paths += style.save_figure(draw(rows), output / f"{name}.png")
    return (*paths, *write_results(rows, output))


def write_results(rows: Sequence[Row], output: Path) -> tuple[Path, Path]:
    """performance_comparison.md and performance_comparison.csv in the folder output; returns them."""
    table = pd.DataFrame([comparison_line(row) for row in rows])
    return write_tables(output / "performance_comparison", table, report_lines(rows))


def segmentation_rows(runs: Iterable[RunFiles], dataset: str) -> list[Row]:
    """Rows of the runs with mIoU on this data set: finished ones first, best validation mIoU first."""
    segmented = [run for run in runs if run.metric.key == "miou"]
    chosen = [
        run for run in segmented if run.config["data"]["name"] == dataset and _validates(run) and _is_complete(run)
    ]
    if not chosen:
        others = sorted({run.config["data"]["name"] for run in segmented} - {dataset})
        raise UserError(
            f"there is no segmentation run on {dataset}: train one (python train_bdh_unet.py), or give --runs-dir"
            + (f", or --dataset {' or '.join(others)}" if others else "")
        )
    rows = make_rows(chosen)
    return sorted(rows, key=lambda row: (not row.finished, -row.record()["best_val_miou_mean"], row.parts))


def _validates(run: RunFiles) -> bool:
    """Whether the run was not trained on its validation images; warns on stderr if it was."""
    if run.train.get("train_val"):
        print(
            f"warning: {run.folder} is left out: it was trained on the validation images (--train-val); its result is "
            "the test in summary.json",
            file=sys.stderr,
        )
    return not run.train.get("train_val")


def _is_complete(run: RunFiles) -> bool:
    """Whether the run has all columns of a segmentation run; warns on stderr if not. A class may lack its IoU."""
    numbers = run.epochs.select_dtypes("number")
    classes = [name for name in run.epochs if name.startswith(CLASS)] or [f"{CLASS}<class>"]
    missing = [name for name in NEEDED if name not in numbers or numbers[name].isna().any()]
    missing += [name for name in classes if name not in numbers]
    if missing:
        print(f"warning: {run.folder} is left out: metrics.csv has no numbers in {', '.join(missing)}", file=sys.stderr)
    return not missing


# ---------------------------------------------------------------------------- numbers


def comparison_line(row: Row) -> dict:
    """One line of performance_comparison.csv: means over seeds, metrics as fractions; std divides by n - 1."""
    line, best = row.record(), at_best(row.counted)
    shared = ("experiment", "differs_in", "dataset", "parameters", "seeds", "seeds_not_finished", "best_val_miou_mean")
    return {
        **{key: line[key] for key in shared},
        "best_val_miou_std": best["val_miou"].std(),
        "best_epoch_median": line["best_epoch_median"],
        "final_val_miou_mean": np.mean([run.epochs["val_miou"].iloc[-1] for run in row.counted]),
        "val_miou_batch_at_best_mean": best["val_miou_batch"].mean(),
        "val_pixel_accuracy_at_best_mean": best["val_pixel_accuracy"].mean(),
        "train_miou_at_best_mean": best["train_miou"].mean(),
        "train_val_miou_gap_at_best_mean": (best["train_miou"] - best["val_miou"]).mean(),
        "epochs_to_90_percent_of_best_median": np.median([epochs_to(run, 0.90) for run in row.counted]),
        "epochs_to_95_percent_of_best_median": np.median([epochs_to(run, 0.95) for run in row.counted]),
        "best_val_miou_per_million_parameters": 1e6 * line["best_val_miou_mean"] / line["parameters"],
        **{key: line[key] for key in ("epochs", "epochs_done", "epoch_time_sec_median")},
        "peak_memory_mb_max": max(run.epochs["peak_memory_mb"].max() for run in row.counted),
        "hardware": line["hardware"],
        **{f"iou_{name}": value for name, value in class_iou(row).mean().items()},
    }


def at_best(runs: Sequence[RunFiles]) -> pd.DataFrame:
    """(seeds, columns of metrics.csv) each run's line at its best epoch, which is the index."""
    return pd.DataFrame([run.epochs.loc[run.best_epoch] for run in runs])


def class_iou(row: Row) -> pd.DataFrame:
    """(seeds, classes) IoU at the best epoch as a fraction; NaN for a class in neither truth nor prediction."""
    return at_best(row.counted).filter(regex=f"^{CLASS}").rename(columns=lambda name: name.removeprefix(CLASS))


def epochs_to(run: RunFiles, share: float) -> int:
    """The first epoch that reaches this share of the run's own best validation mIoU."""
    miou = run.epochs["val_miou"]
    return int((miou >= share * miou[run.best_epoch]).idxmax())


# ---------------------------------------------------------------------------- figures


def draw_learning(rows: Sequence[Row]) -> Figure:
    """Losses above, mIoU below; training left, validation right."""
    labels, title = labels_of(rows)
    curves = curves_of(labels, rows)
    figure, (block,) = style.new_blocks([title], [5.2 + style.legend_inches([curve.text for curve in curves])])
    axes = block.subplots(2, 2, sharex=True, sharey="row")
    draw_panels(axes.flat, PANELS, curves)
    for ax in axes[0]:
        ax.set_xlabel("")
    style.add_legend(block, axes[0, 0], band_title(curves))
    return figure


def draw_convergence(rows: Sequence[Row]) -> Figure:
    """Validation mIoU over epochs in percent of the run's own best: how fast each run converges."""
    labels, title = labels_of(rows)
    curves = [curve._replace(text=_with_epoch(curve)) for curve in curves_of(labels, rows)]
    figure, (block,) = style.new_blocks([title], [3.8 + style.legend_inches([curve.text for curve in curves])])
    ax = block.subplots()
    for share in (90, 95):
        ax.axhline(share, color="0.35", linestyle="--", linewidth=1)
        ax.annotate(f"{share} %", (1.01, share), xycoords=("axes fraction", "data"), va="center")
    for curve in curves:
        shares = [100 * run.epochs["val_miou"] / run.epochs["val_miou"][run.best_epoch] for run in curve.runs]
        draw_curve(ax, curve, pd.concat(shares, axis=1))
    style.label_epochs(ax, "validation mIoU (% of the run's best)")
    ax.set_ylim(0, 103)
    style.add_legend(block, ax, band_title(curves))
    return figure


def _with_epoch(curve: Curve) -> str:
    so_far = "" if curve.runs[0].summary else " of the best so far"
    epoch = np.median([epochs_to(run, 0.90) for run in curve.runs])
    return textwrap.fill(f"{curve.text}: 90 %{so_far} at epoch {epoch:g}", style.LEGEND)


def draw_gaps(rows: Sequence[Row]) -> Figure:
    """Training against validation mIoU, a panel for each experiment and each unfinished run."""
    labels, title = labels_of(rows)
    curves = curves_of(labels, rows)
    across = min(3, len(curves))
    titles = [textwrap.fill(curve.text, 102 // across) + f"\n{_gap_text(curve.runs)}" for curve in curves]
    down = math.ceil(len(curves) / across)
    panel = 2.0 + style.LINE * max(len(each.splitlines()) for each in titles)  # inches
    figure, (block,) = style.new_blocks([title], [down * panel + 2 * style.LINE])
    axes = block.subplots(down, across, sharey=True, squeeze=False)
    for ax, curve, text in zip(axes.flat, curves, titles, strict=False):
        _draw_gap(ax, curve.runs)
        style.label_epochs(ax, "mIoU (%)" if ax in axes[:, 0] else "")
        ax.set_title(text)
    axes[0, 0].set_ylim(bottom=0)
    for ax in axes.flat[len(curves) :]:
        ax.set_visible(False)
    seeds = ", mean over seeds" if any(len(curve.runs) > 1 for curve in curves) else ""
    style.add_legend(block, axes[0, 0], f"gap: training minus validation at the best epoch{seeds}")
    return figure


def _gap_text(runs: Sequence[RunFiles]) -> str:
    best = at_best(runs)
    gap = 100 * (best["train_miou"] - best["val_miou"]).mean()
    return f"gap {gap:+.1f} points at epoch {np.median(best.index):g}"


def _draw_gap(ax: Axes, runs: Sequence[RunFiles]) -> None:
    train, val = (100 * by_seed(runs, column).mean(axis=1) for column in ("train_miou", "val_miou"))
    line = "-" if runs[0].summary else "--"
    every = max(1, len(val) // 6)
    ax.fill_between(val.index, train, val, color="0.88", linewidth=0)
    for place, (name, mean) in enumerate({"validation": val, "training": train}.items()):
        look = style.look_of(place) | dict(markersize=4, markevery=every, linewidth=1.5)
        ax.plot(mean.index, mean, line, label=name, **look)
    best = np.median([run.best_epoch for run in runs])
    ax.axvline(best, color="0.35", linestyle=":", linewidth=1.2, label="best epoch (median)")


def draw_classes(rows: Sequence[Row]) -> Figure:
    """IoU of each class at the best epoch, a dot for each experiment with one standard deviation over seeds."""
    labels, title = labels_of(rows)
    counts = [seeds_text(len(row.counted)) + ("" if row.finished else ", not finished") for row in rows]
    texts = [textwrap.fill(f"{label} ({count})", style.LEGEND) for label, count in zip(labels, counts, strict=True)]
    seeds = [100 * class_iou(row) for row in rows]
    means = pd.DataFrame([each.mean() for each in seeds])  # (experiments, classes)
    order = means.mean().sort_values(ascending=False, na_position="last").index
    height = 0.9 + max(1.0, len(order) * max(0.24, 0.06 + 0.065 * len(rows)))
    figure, (block,) = style.new_blocks([title], [height + style.legend_inches(texts)])
    ax = block.subplots()
    for place, (text, each) in enumerate(zip(texts, seeds, strict=True)):
        shift = (place + 0.5) / len(rows) - 0.5
        look = style.look_of(place) | dict(linestyle="", elinewidth=1.2, markersize=5)
        look |= {} if rows[place].finished else {"markerfacecolor": "white"}
        each = each.reindex(columns=order)
        ax.errorbar(each.mean(), np.arange(len(order)) + 0.8 * shift, xerr=each.std(), label=text, **look)
    _label_classes(ax, [name if means[name].notna().any() else f"{name}: absent" for name in order])
    several = any(len(each) > 1 for each in seeds)
    style.add_legend(block, ax, "best epoch" + (", mean ± standard deviation over seeds" if several else ""))
    return figure


def _label_classes(ax: Axes, names: Sequence[str]) -> None:
    """The first class on top; stripes group the dots of a class."""
    for place in range(0, len(names), 2):
        ax.axhspan(place - 0.5, place + 0.5, color="0.95", linewidth=0, zorder=0)
    style.style_axes(ax, "x")
    ax.set_yticks(range(len(names)), [style.plain_text(name.replace("_", " ")) for name in names])
    ax.tick_params(axis="y", length=0)
    ax.set(xlabel="validation IoU (%)", xlim=(-1, 101), ylim=(len(names) - 0.5, -0.5))


FIGURES = {
    "learning_curves": draw_learning,
    "convergence": draw_convergence,
    "train_val_gap": draw_gaps,
    "per_class_iou": draw_classes,
}


# ---------------------------------------------------------------------------- performance_comparison.md


def report_lines(rows: Sequence[Row]) -> list[str]:
    """performance_comparison.md: the lines of the CSV file side by side, in percent."""
    numbers = list(map(str, range(1, len(rows) + 1)))
    columns = pd.DataFrame(list(map(comparison_line, rows))).items()
    table = [[name.replace("_", " "), *(_cell(name, value) for value in values)] for name, values in columns]
    return [
        f"# Segmentation on {rows[0].task[0]}",
        "",
        "Validation results, best experiment first; mIoU, IoU and accuracy in percent.",
        "",
        *markdown_table(["", *numbers], table, left=("",)),
        "",
        *NOTES.splitlines(),
        *([] if any(len(row.test) for row in rows) else NO_TEST.splitlines()),
    ]


def _cell(name: str, value: Any) -> str:
    if isinstance(value, str) or value != value:  # NaN: no number
        return value if isinstance(value, str) else ""
    return f"{100 * value:.2f}" if "iou" in name or "accuracy" in name else f"{value:,.10g}"


def main(options: Options) -> None:
    output = options.output_dir or ROOT / f"analysis_results_{options.dataset}"
    print(*analyze_segmentation(find_runs(options.runs_dir), output, options.dataset), sep="\n")


if __name__ == "__main__":
    run_script(main, __doc__)
