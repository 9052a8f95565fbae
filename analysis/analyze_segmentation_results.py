"""What the segmentation runs on one data set came to: curves, convergence, overfitting, classes, a table, a report.

Averages over seeds as analyze.py does. Writes learning_curves, convergence, train_val_gap and per_class_iou as PNG and
SVG, performance_comparison.csv (metrics as fractions) and analysis_report.txt (in percent). A run that is not finished
is drawn dashed, and enters no average where another seed of its experiment is finished.

    python analysis/analyze_segmentation_results.py
    python analysis/analyze_segmentation_results.py --dataset voc --runs-dir results --output-dir plots
"""

import math
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import plots
from analysis.plotting.style import PAGE, new_figure, save_figure, style_axes
from analysis.reading import Row, RunFiles, find_runs, make_rows, read_runs
from training.command_line import run_script
from training.config import ROOT, UserError

PICTURES = ("learning_curves", "convergence", "train_val_gap", "per_class_iou")
CLASS = "val_iou_"  # what the column of a class begins with
NEEDED = ("train_miou", "val_pixel_accuracy", "val_miou_batch", "peak_memory_mb")  # beside what every run has
PANELS = {
    "train_loss": "training loss",
    "val_loss": "validation loss",
    "train_miou": "training mIoU (%)",
    "val_miou": "validation mIoU (%)",
}
COLUMNS = 110  # characters, of a line of the report
TABLE = {  # of the report: title, and what is below it: column of performance_comparison.csv, scale, format
    "para-\nmeters": ("parameters", 1, ","),
    "best\nmIoU": ("best_val_miou_mean", 100, ".2f"),
    "\n±": ("best_val_miou_std", 100, ".2f"),
    "best\nepoch": ("best_epoch_median", 1, "g"),
    "last\nmIoU": ("final_val_miou_mean", 100, ".2f"),
    "mean of\nbatches": ("val_miou_batch_at_best_mean", 100, ".2f"),
    "pixel\naccuracy": ("val_pixel_accuracy_at_best_mean", 100, ".2f"),
    "training\nmIoU": ("train_miou_at_best_mean", 100, ".2f"),
    "gap\n(points)": ("train_val_miou_gap_at_best_mean", 100, "+.2f"),
    "epochs\nto 90 %": ("epochs_to_90_percent_of_best_median", 1, "g"),
    "epochs\nto 95 %": ("epochs_to_95_percent_of_best_median", 1, "g"),
    "seconds\nan epoch": ("epoch_time_sec_median", 1, ".3g"),
    "memory\n(MB)": ("peak_memory_mb_max", 1, ",.0f"),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where the runs are, which of them count, and where tables and plots go."""

    runs_dir: Path = ROOT / "runs"
    """folder with runs, at any depth"""
    dataset: str = "camvid"
    """data set that was segmented, as the runs call it: camvid, voc, cityscapes"""
    output_dir: Path | None = None
    """folder of the tables and plots; analysis_results_<dataset> in the repository where none is named"""


def analyze_segmentation(runs: Sequence[Path], output: Path, dataset: str = "camvid") -> tuple[Path, ...]:
    """Tables and plots of these runs' folders, into the folder output; returns the files, learning_curves.png first.

    Leaves out runs of other tasks, and with a warning those that cannot be read. Raises UserError where none is left.
    """
    rows = segmentation_rows(read_runs(runs), dataset)
    drawings = (draw_learning, draw_convergence, draw_gaps, draw_classes)
    paths: list[Path] = []
    for name, draw in zip(PICTURES, drawings, strict=True):
        paths += save_figure(draw(rows), output / f"{name}.png")
    return (*paths, *write_tables(rows, output))


def write_tables(rows: Sequence[Row], output: Path) -> tuple[Path, Path]:
    """performance_comparison.csv and analysis_report.txt in the folder output; returns them."""
    output.mkdir(parents=True, exist_ok=True)
    table, report = output / "performance_comparison.csv", output / "analysis_report.txt"
    pd.DataFrame([comparison_line(row) for row in rows]).to_csv(table, index=False)
    report.write_text("\n".join(report_lines(rows)).replace("\N{NO-BREAK SPACE}", " ") + "\n")
    return table, report


def segmentation_rows(runs: Iterable[RunFiles], dataset: str) -> list[Row]:
    """Runs with mIoU on this data set, averaged over seeds: best validation mIoU first, then what is not finished."""
    segmented = [run for run in runs if run.metric.key == "miou"]
    chosen = [run for run in segmented if run.config["data"]["name"] == dataset and _is_complete(run)]
    if not chosen:
        others = sorted({run.config["data"]["name"] for run in segmented} - {dataset})
        raise UserError(
            f"there is no segmentation run on {dataset}: train one (python train_bdh_unet.py), or give --runs-dir"
            + (f", or --dataset {' or '.join(others)}" if others else "")
        )
    rows = make_rows(chosen)
    return sorted(rows, key=lambda row: (not row.finished, -row.record()["best_val_miou_mean"], row.parts))


def _is_complete(run: RunFiles) -> bool:
    """Whether all columns of a segmentation run are there; says on stderr if not. A class may lack its IoU."""
    numbers = run.epochs.select_dtypes("number")
    classes = [name for name in run.epochs if name.startswith(CLASS)] or [f"{CLASS}<class>"]
    lacking = [name for name in NEEDED if name not in numbers or numbers[name].isna().any()]
    lacking += [name for name in classes if name not in numbers]
    if lacking:
        print(f"warning: {run.folder} is left out, it lacks numbers for {', '.join(lacking)}", file=sys.stderr)
    return not lacking


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
    """(seeds, columns of metrics.csv) each run's numbers at its best epoch, which is the index."""
    return pd.DataFrame([run.epochs.loc[run.best_epoch] for run in runs])


def class_iou(row: Row) -> pd.DataFrame:
    """(seeds, classes) IoU at the best epoch as a fraction; NaN where a class is in neither truth nor prediction."""
    return at_best(row.counted).filter(regex=f"^{CLASS}").rename(columns=lambda name: name.removeprefix(CLASS))


def epochs_to(run: RunFiles, share: float) -> int:
    """The first epoch with this share of the run's own best validation mIoU."""
    miou = run.epochs["val_miou"]
    return int((miou >= share * miou[run.best_epoch]).idxmax())


# ---------------------------------------------------------------------------- pictures


def draw_learning(rows: Sequence[Row]) -> Figure:
    """Loss above, mIoU below, of training on the left and validation on the right."""
    labels, title = plots.labels_of(rows)
    curves = plots.curves_of(labels, rows)
    figure, columns = _figure(title, [text for _, text, _ in curves], 5.2)
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    for ax, (column, name) in zip(axes.flat, PANELS.items(), strict=True):
        for curve in curves:
            values = plots.by_seed(curve[2], column) * (100 if column.endswith("miou") else 1)
            plots.draw_curve(ax, curve, values)
            _mark_end(ax, curve, values)
        plots.label_epochs(ax, name)
        ax.tick_params(labelleft=True)
    for ax in axes[0]:
        ax.set_xlabel("")
    plots.add_legend(figure, axes[0, 0], columns, plots.band_title(curves))
    return figure


def draw_convergence(rows: Sequence[Row]) -> Figure:
    """Validation mIoU over epochs in percent of the run's own best: how fast each gets to where it ends."""
    labels, title = plots.labels_of(rows)
    curves = [(place, _with_epoch(text, runs), runs) for place, text, runs in plots.curves_of(labels, rows)]
    figure, columns = _figure(title, [text for _, text, _ in curves], 3.8)
    ax = figure.subplots()
    for share in (90, 95):
        ax.axhline(share, color="0.35", linestyle="--", linewidth=1)
        ax.annotate(f"{share} %", (1.01, share), xycoords=("axes fraction", "data"), va="center")
    for curve in curves:
        shares = [100 * run.epochs["val_miou"] / run.epochs["val_miou"][run.best_epoch] for run in curve[2]]
        plots.draw_curve(ax, curve, pd.concat(shares, axis=1))
    plots.label_epochs(ax, "validation mIoU (% of the run's best)")
    ax.set_ylim(0, 103)
    plots.add_legend(figure, ax, columns, plots.band_title(curves))
    return figure


def _with_epoch(text: str, runs: Sequence[RunFiles]) -> str:
    so_far = "" if runs[0].summary else " of the best so far"
    epoch = np.median([epochs_to(run, 0.90) for run in runs])
    return textwrap.fill(f"{text}: 90 %{so_far} at epoch {epoch:g}", 66)


def draw_gaps(rows: Sequence[Row]) -> Figure:
    """A panel for each experiment, and for each run that is not finished: training against validation mIoU."""
    labels, title = plots.labels_of(rows)
    curves = plots.curves_of(labels, rows)
    across = 2 if len(curves) in (2, 4) else min(3, len(curves))
    titles = [textwrap.fill(text, 102 // across) + f"\n{_gap_text(runs)}" for _, text, runs in curves]
    down = math.ceil(len(curves) / across)
    panel = {1: 3.0, 2: 2.4, 3: 1.9}[across]  # inches
    inches = down * (panel + plots.LINE * max(len(each.splitlines()) for each in titles))
    figure, columns = _figure(title, ["validation", "training", "best epoch (median)"], inches)
    axes = figure.subplots(down, across, sharey=True, squeeze=False)
    for ax, curve, text in zip(axes.flat, curves, titles, strict=False):
        _draw_gap(ax, curve[2])
        plots.label_epochs(ax, "mIoU (%)" if ax in axes[:, 0] else "")
        ax.set_title(text)
    axes[0, 0].set_ylim(bottom=0)
    for ax in axes.flat[len(curves) :]:
        ax.set_visible(False)
    seeds = ", means over seeds" if any(len(runs) > 1 for *_, runs in curves) else ""
    plots.add_legend(figure, axes[0, 0], columns, f"gap: training less validation, at the best epoch{seeds}")
    return figure


def _gap_text(runs: Sequence[RunFiles]) -> str:
    best = at_best(runs)
    gap = 100 * (best["train_miou"] - best["val_miou"]).mean()
    return f"gap {gap:+.1f} points at epoch {np.median(best.index):g}"


def _draw_gap(ax: Axes, runs: Sequence[RunFiles]) -> None:
    train, val = (100 * plots.by_seed(runs, column).mean(axis=1) for column in ("train_miou", "val_miou"))
    style = "-" if runs[0].summary else "--"
    every = max(1, len(val) // 6)
    ax.fill_between(val.index, train, val, color="0.88", linewidth=0)
    for place, (name, mean) in enumerate({"validation": val, "training": train}.items()):
        look = plots.look_of(place) | dict(markersize=4, markevery=every, linewidth=1.5)
        ax.plot(mean.index, mean, style, label=name, **look)
    best = np.median([run.best_epoch for run in runs])
    ax.axvline(best, color="0.35", linestyle=":", linewidth=1.2, label="best epoch (median)")


def draw_classes(rows: Sequence[Row]) -> Figure:
    """IoU of each class at the best epoch: a dot an experiment, with one standard deviation over seeds."""
    labels, title = plots.labels_of(rows)
    counts = [plots.seeds_text(len(row.counted)) + ("" if row.finished else ", not finished") for row in rows]
    texts = [textwrap.fill(f"{label} ({count})", 66) for label, count in zip(labels, counts, strict=True)]
    seeds = [100 * class_iou(row) for row in rows]
    means = pd.DataFrame([each.mean() for each in seeds])  # (experiments, classes)
    order = means.mean().sort_values(ascending=False, na_position="last").index
    figure, columns = _figure(title, texts, 0.9 + max(1.0, len(order) * max(0.24, 0.06 + 0.065 * len(rows))))
    ax = figure.subplots()
    for place, (text, each) in enumerate(zip(texts, seeds, strict=True)):
        shift = (place + 0.5) / len(rows) - 0.5
        look = plots.look_of(place) | dict(linestyle="", elinewidth=1.2, markersize=5)
        look |= {} if rows[place].finished else {"markerfacecolor": "white"}
        each = each.reindex(columns=order)
        ax.errorbar(each.mean(), np.arange(len(order)) + 0.8 * shift, xerr=each.std(), label=text, **look)
    _label_classes(ax, [name if means[name].notna().any() else f"{name}: not there" for name in order])
    note = "best epoch" + (", mean ± standard deviation over seeds" if any(len(each) > 1 for each in seeds) else "")
    plots.add_legend(figure, ax, columns, note)
    return figure


def _label_classes(ax: Axes, names: Sequence[str]) -> None:
    """The first class on top; stripes tell which dots belong to one class."""
    for place in range(0, len(names), 2):
        ax.axhspan(place - 0.5, place + 0.5, color="0.95", linewidth=0, zorder=0)
    style_axes(ax, "x")
    ax.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    ax.tick_params(axis="y", length=0)
    ax.set(xlabel="validation IoU (%)", xlim=(-1, 101), ylim=(len(names) - 0.5, -0.5))


def _figure(title: str, texts: Sequence[str], inches: float) -> tuple[Figure, int]:
    """A figure whose panels have this height, with room for its legend; and the columns that this will have."""
    columns, lines = plots.legend_shape(texts)
    title = textwrap.fill(title, plots.TITLE)
    figure = new_figure(PAGE, inches + plots.LINE * (lines + 1 + len(title.splitlines())))
    figure.suptitle(title)
    return figure, columns


def _mark_end(ax: Axes, curve: plots.Curve, seeds: pd.DataFrame) -> None:
    """A larger marker at the last epoch; seeds: (epochs, seeds)."""
    mean = seeds.mean(axis=1)
    look = plots.look_of(curve[0]) | dict(markersize=6.5, markeredgecolor="white", markeredgewidth=0.5)
    ax.plot(mean.index[-1:], mean.iloc[-1:], zorder=3, **look)


# ---------------------------------------------------------------------------- report


def report_lines(rows: Sequence[Row]) -> list[str]:
    """analysis_report.txt, in percent."""
    labels, title = plots.labels_of(rows)
    lines = [comparison_line(row) for row in rows]
    heading = f"Segmentation: {title}"
    text = [*textwrap.wrap(heading, COLUMNS), "=" * min(len(heading), COLUMNS), ""]
    for note in _notes(rows):
        text += textwrap.wrap(note, COLUMNS, initial_indent="- ", subsequent_indent="  ")
    text += ["", "Experiments, best first (% where no unit is named)", "", *_main_table(labels, rows, lines), ""]
    for number, (label, row, line) in enumerate(zip(labels, rows, lines, strict=True), 1):
        text += [*textwrap.wrap(f"{number}. {_in_words(label, row, line)}", COLUMNS, subsequent_indent="   "), ""]
    return [*text, "IoU of each class at the best epoch (%), by number of the experiment", "", *_class_table(rows)]


def _notes(rows: Sequence[Row]) -> list[str]:
    """How the numbers came about, and what they do not say."""
    images = {(run.config["data"].get("images") or {}).get("val") for row in rows for run in row.runs} - {None}
    part = f"all {images.pop():,} validation images" if len(images) == 1 else "all validation images"
    notes = [
        f"mIoU is from one confusion matrix over {part}, void pixels ignored; a class that is neither in the "
        "truth nor in the prediction is left out of its mean.",
        "Mean of batches is the mean of each validation batch's own mIoU. It depends on the batch size, and is here "
        "for comparison with published numbers that were made this way, and for nothing else.",
        "Training mIoU is measured during the epoch, on augmented images; gap is training less validation mIoU, in "
        "percentage points, at the best epoch.",
        "Means over seeds ± standard deviation (n - 1); best epoch, epochs to 90 % and 95 % of a run's own best, and "
        "seconds are medians; memory is the most that any epoch took.",
    ]
    if not any(len(row.test) for row in rows):
        notes.append("There is no test part: the best epoch is chosen by the very images that the result is of.")
    single = ", ".join(str(number) for number, row in enumerate(rows, 1) if len(row.counted) == 1)
    if single:
        claim = "Seeds alone make results differ, so no difference to these is claimed; their place is no finding."
        notes.append(f"Experiments of a single seed: {single}. {claim}")
    notes.append("Whether a difference is more than luck: analysis/compare.py gives intervals for it, paired by seed.")
    return notes


def _main_table(labels: Sequence[str], rows: Sequence[Row], lines: Sequence[dict]) -> list[str]:
    table = []
    for number, (label, row, line) in enumerate(zip(labels, rows, lines, strict=True), 1):
        done = f" (and {len(row.unfinished)} not finished)" if row.unfinished else ""
        done = done if row.finished else f" (not finished, epoch {line['epochs_done']} of {line['epochs']})"
        cells = [_shown(scale * line[key], form) for key, scale, form in TABLE.values()]
        table.append([str(number), textwrap.fill(label + done, 34), str(len(row.counted)), *cells])
    return _aligned(["", "\nexperiment", "\nseeds", *TABLE], table, left=1)


def _in_words(label: str, row: Row, line: dict) -> str:
    """One experiment, in a few sentences; no line breaks before a unit."""
    count = plots.seeds_text(len(row.counted))
    deviation = f" ± {_percent(line['best_val_miou_std'])}" if len(row.counted) > 1 else ""
    so_far = "" if row.finished else " so far"
    iou = class_iou(row).mean().dropna()
    hardest = ", ".join(f"{name} ({_percent(value)} %)" for name, value in iou.nsmallest(3).items())
    words = [
        f"{label} ({count}): best validation mIoU{so_far} {_percent(line['best_val_miou_mean'])}{deviation} %",
        f"at epoch {line['best_epoch_median']:g} of {line['epochs']},",
        f"{_percent(line['final_val_miou_mean'])} % at the last epoch.",
        f"90 % of its best at epoch {line['epochs_to_90_percent_of_best_median']:g}, "
        f"95 % at epoch {line['epochs_to_95_percent_of_best_median']:g}.",
        f"At the best epoch training mIoU is {_percent(line['train_miou_at_best_mean'])} %, "
        f"a gap of {_percent(line['train_val_miou_gap_at_best_mean'], '+')} points.",
        f"Lowest IoU: {hardest}." if len(iou) else "No class has an IoU.",
        f"{_percent(line['best_val_miou_per_million_parameters'])} points of mIoU per million parameters.",
        f"On {line['hardware']}.",
    ]
    for run in row.unfinished:
        words.append(f"Not finished: seed {run.train['seed']}, epoch {len(run.epochs)} of {run.train['epochs']}.")
    return " ".join(words).replace(" %", "\N{NO-BREAK SPACE}%")


def _class_table(rows: Sequence[Row]) -> list[str]:
    iou = pd.DataFrame([class_iou(row).mean() for row in rows])  # (experiments, classes)
    table = [[name, *map(_percent, iou[name])] for name in iou]
    return _aligned(["class", *(str(number) for number in range(1, len(rows) + 1))], table, left=0)


def _percent(fraction: float, sign: str = "") -> str:
    return _shown(100 * fraction, f"{sign}.2f")


def _shown(value: float, form: str) -> str:
    return "-" if math.isnan(value) else f"{value:{form}}"


def _aligned(heads: Sequence[str], table: Sequence[Sequence[str]], left: int) -> list[str]:
    """A table in plain text whose cells may have several lines; the column `left` is flush left, all others right."""
    blocks = [list(zip_longest(*(cell.split("\n") for cell in cells), fillvalue="")) for cells in (heads, *table)]
    widths = [max(map(len, column)) for column in zip(*(line for block in blocks for line in block), strict=True)]

    def join(cells: Iterable[str]) -> str:
        pairs = enumerate(zip(cells, widths, strict=True))
        return "  ".join(c.ljust(width) if place == left else c.rjust(width) for place, (c, width) in pairs).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return [*map(join, blocks[0]), rule, *(join(line) for block in blocks[1:] for line in block)]


def main(options: Options) -> None:
    output = options.output_dir or ROOT / f"analysis_results_{options.dataset}"
    print(*analyze_segmentation(find_runs(options.runs_dir), output, options.dataset), sep="\n")


if __name__ == "__main__":
    run_script(main, __doc__)
