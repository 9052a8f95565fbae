"""Tables and plots of finished and running experiments, from the CSV and JSON files in their folders.

Averages over the runs of one experiment whose configurations are equal but for the seed. Writes learning_curves.png,
final_accuracy.png, results.md (in percent) and results.csv (in fractions). Standard deviations are over seeds, with
n - 1. A run that is not finished shows in the curves, dashed, and enters no average where another seed is finished.

    python analysis/analyze.py
    python analysis/analyze.py --runs-dir results --output-dir plots
"""

import math
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase, SubFigure
from matplotlib.ticker import MaxNLocator

from analysis.reading import Row, RunFiles, Task, find_runs, make_rows, read_runs
from training.config import ROOT, UserError
from training.metrics import METRICS
from training.script import run_script

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")  # Okabe and Ito; grey for yellow
MARKERS = "os^DvP*X"  # no common factor with the 7 colours: 56 looks before one comes again
NOTE = "Means over seeds ± standard deviation (n - 1); best epoch and seconds are medians. Tested at the best epoch."
OUTPUTS = ("learning_curves.png", "final_accuracy.png", "results.md", "results.csv")
DPI = 200
WIDTH = 10.5  # inches, of the learning curves
FONT = 8.5  # points, of legends and of what stands beside bars
Curve = tuple[int, str, list["RunFiles"]]  # place of its row, which gives the colour; legend entry; runs it averages


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where the runs are, and where tables and plots go."""

    runs_dir: Path = ROOT / "runs"
    """folder with runs, at any depth"""
    output_dir: Path = ROOT / "analysis_results"
    """folder of the tables and plots"""


def analyze(runs: Sequence[Path], output: Path) -> tuple[Path, ...]:
    """Tables and plots of these runs' folders, into the folder output; returns the files, learning curves first.

    Warns of runs that cannot be read and leaves them out. Raises UserError where that leaves none.
    """
    rows = make_rows(read_runs(runs))
    if not rows:
        raise UserError("there is no run to analyse: train one (python train_quickstart.py), or give --runs-dir")
    tasks = {task: list(members) for task, members in groupby(rows, key=lambda row: row.task)}
    output.mkdir(parents=True, exist_ok=True)
    paths = tuple(output / name for name in OUTPUTS)
    draw_curves(tasks).savefig(paths[0], dpi=DPI)
    draw_final(tasks).savefig(paths[1], dpi=DPI)
    paths[2].write_text("\n".join(markdown_lines(tasks)) + "\n")
    pd.DataFrame([row.record() for row in rows]).to_csv(paths[3], index=False)
    return paths


def markdown_lines(tasks: dict[Task, list[Row]]) -> list[str]:
    """results.md: one table a data set, in percent."""
    lines = ["# Results", ""]
    for (dataset, metric), rows in tasks.items():
        title = METRICS[metric].title
        titles = ("experiment", "parameters", "seeds", f"test {title}", f"best validation {title}")
        titles += ("best epoch", "epochs", "seconds an epoch", "hardware")
        lines += [f"## {dataset}", "", _table_line(titles), "| --- |" + " ---: |" * 7 + " --- |"]
        lines += [*(_table_line(_cells(row, metric)) for row in rows), ""]
    return [*lines, NOTE]


def _table_line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _cells(row: Row, metric: str) -> list[str]:
    line = row.record()
    counts = [str(line["seeds"])] * bool(row.finished)
    counts += [f"{line['seeds_not_finished']} not finished"] * bool(row.unfinished)
    done = "" if line["epochs_done"] == line["epochs"] else f"{line['epochs_done']} of "
    return [
        row.experiment + (f" ({line['differs_in']})" if row.differs else ""),
        f"{line['parameters']:,}",
        " and ".join(counts),
        _test_cell(row),
        row.metric.number(line[f"best_val_{metric}_mean"]),
        f"{line['best_epoch_median']:g}",
        f"{done}{line['epochs']}",
        f"{line['epoch_time_sec_median']:.3g}",
        line["hardware"],
    ]


def _test_cell(row: Row) -> str:
    """The test result in percent, or why there is none."""
    if not len(row.test):
        return "no test part" if row.finished else "not finished"
    return _mean_and_spread(row, row.test)


def _mean_and_spread(row: Row, values: pd.Series) -> str:
    spread = f" ± {row.metric.number(values.std())}" if len(values) > 1 else ""
    return f"{row.metric.number(values.mean())}{spread}"


def labels_of(task: Task, rows: Sequence[Row]) -> tuple[list[str], str]:
    """A label for each row, and a title: the data set and the changed fields that all rows share."""
    shared = [part for part in rows[0].parts[1:] if all(part in row.parts[1:] for row in rows)]
    labels = [", ".join(part for part in row.parts if part not in shared) for row in rows]
    if len(set(labels)) < len(labels):
        return [", ".join(row.parts) for row in rows], task[0]
    return labels, task[0] + (", all with " if shared and len(rows) > 1 else ", " if shared else "") + ", ".join(shared)


def draw_curves(tasks: dict[Task, list[Row]]) -> Figure:
    """One block a data set: validation metric, validation loss, training loss over epochs, and a legend below."""
    curves = {task: curves_of(labels_of(task, rows)[0], rows) for task, rows in tasks.items()}
    legends = [legend_shape([text for _, text, _ in each]) for each in curves.values()]  # columns, lines of text
    heights = [3.6 + 0.17 * lines for _, lines in legends]
    figure = Figure((WIDTH, sum(heights)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, wspace=0.04)
    blocks = figure.subfigures(len(tasks), 1, height_ratios=heights, squeeze=False)[:, 0]
    for block, (columns, _), (task, rows) in zip(blocks, legends, tasks.items(), strict=True):
        block.suptitle(textwrap.fill(labels_of(task, rows)[1], 130), fontsize=10)
        _draw_block(block, task[1], curves[task], columns)
    return figure


def curves_of(labels: Sequence[str], rows: Sequence[Row]) -> list[Curve]:
    """What is drawn: each row's finished runs as one curve, then each run that is not finished."""
    curves: list[Curve] = []
    for place, (label, row) in enumerate(zip(labels, rows, strict=True)):
        if row.finished:
            curves.append((place, f"{label} ({seeds_text(len(row.finished))})", row.finished))
        for run in row.unfinished:
            done = f"not finished, epoch {len(run.epochs)} of {run.train['epochs']}"
            curves.append((place, f"{label}, seed {run.train['seed']}: {done}", [run]))
    return [(place, textwrap.fill(text, 66), runs) for place, text, runs in curves]


def legend_shape(texts: Sequence[str], inches: float = WIDTH) -> tuple[int, int]:
    """Columns of a legend that fit a figure of this width, and lines of text it then has."""
    longest = max(len(line) for text in texts for line in text.splitlines())
    columns = max(1, min(len(texts), int(inches / WIDTH * 150) // (longest + 9)))
    return columns, math.ceil(len(texts) / columns) * max(len(text.splitlines()) for text in texts)


def seeds_text(n: int) -> str:
    return f"{n}\N{NO-BREAK SPACE}seed" + "s" * (n != 1)


def _draw_block(block: SubFigure, metric: str, curves: Sequence[Curve], legend_columns: int) -> None:
    axes = block.subplots(1, 3)
    axes[2].sharey(axes[1])
    titles = (f"validation {METRICS[metric].title}", "validation loss (nats)", "training loss (nats)")
    for ax, column, title in zip(axes, (f"val_{metric}", "val_loss", "train_loss"), titles, strict=True):
        for curve in curves:
            draw_curve(ax, curve, METRICS[column.partition("_")[2]].scale * by_seed(curve[2], column))
        label_epochs(ax, title)
    add_legend(block, axes[0], legend_columns, band_title(curves))


def label_epochs(ax: Axes, name: str) -> None:
    style_axes(ax, "y")
    ax.set_xlabel("epoch")
    ax.set_ylabel(name)
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))


def band_title(curves: Sequence[Curve]) -> str | None:
    """What a legend says of the bands, where there are any."""
    return "mean over seeds, band: one standard deviation" if any(len(runs) > 1 for *_, runs in curves) else None


def add_legend(figure: FigureBase, ax: Axes, columns: int, title: str | None) -> None:
    """The legend of ax, below all panels of the figure."""
    look = dict(fontsize=FONT, title_fontsize=FONT, frameon=False, ncols=columns)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", title=title, **look)


def look_of(place: int) -> dict[str, str]:
    """Colour and marker of a row."""
    return dict(color=COLORS[place % len(COLORS)], marker=MARKERS[place % len(MARKERS)])


def by_seed(runs: Sequence[RunFiles], column: str) -> pd.DataFrame:
    """(epochs, seeds) a column of metrics.csv, as stored."""
    return pd.concat([run.epochs[column] for run in runs], axis=1)


def draw_curve(ax: Axes, curve: Curve, seeds: pd.DataFrame) -> None:
    """Mean over the runs with a band of one standard deviation; dashed where they are not finished.

    seeds: (epochs, seeds), in the unit of the axis.
    """
    place, text, runs = curve
    look = look_of(place)
    mean, std = seeds.mean(axis=1), seeds.std(axis=1)  # pandas divides by n - 1
    if len(runs) > 1:
        ax.fill_between(mean.index, mean - std, mean + std, color=look["color"], alpha=0.18, linewidth=0)
    step = max(1, len(mean) // 8)
    every = (place * step // 4 % step, step)  # so that not all experiments have their markers at the same epochs
    look |= dict(markersize=4, markevery=every, linewidth=1.5)
    ax.plot(mean.index, mean, "--" if runs[0].summary is None else "-", label=text, **look)


def draw_final(tasks: dict[Task, list[Row]]) -> Figure:
    """One block a data set: bars of the result with a standard deviation over seeds, and the numbers beside.

    The result is the test's, or the best validation's where the data have no test part.
    """
    labels = {task: [textwrap.fill(each, 38) for each in labels_of(task, rows)[0]] for task, rows in tasks.items()}
    bar_inches = 0.12 + 0.16 * max(2, *(len(each.splitlines()) for texts in labels.values() for each in texts))
    spans = [len(rows) + 0.2 for rows in tasks.values()]  # in bars
    figure = Figure((8.5, bar_inches * sum(spans) + 0.8 * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), 1, height_ratios=spans, squeeze=False)[:, 0]
    for ax, (task, rows) in zip(axes, tasks.items(), strict=True):
        ax.set_title(textwrap.fill(labels_of(task, rows)[1], 85), fontsize=10)
        _draw_bars(ax, task[1], rows)
        _label_bars(ax, labels[task], [_result_cell(row) for row in rows])
    return figure


def _result_cell(row: Row) -> str:
    if not row.finished:
        return "not finished"
    unit = " %" if row.metric.percent else ""
    return f"{_mean_and_spread(row, row.result)}{unit}\n{seeds_text(len(row.result))}"


def _draw_bars(ax: Axes, metric: str, rows: Sequence[Row]) -> None:
    scale = METRICS[metric].scale
    for place, values in enumerate(scale * row.result for row in rows):
        if len(values):
            ax.barh(place, values.mean(), height=0.62, color=COLORS[place % len(COLORS)])
        if len(values) > 1:
            ax.errorbar(values.mean(), place, xerr=values.std(), color="black", capsize=4, linewidth=1.3)
            ax.scatter(values, [place] * len(values), s=12, color="white", edgecolor="black", zorder=3)
    note = ", with one standard deviation; a dot is a seed" if any(len(row.result) > 1 for row in rows) else ""
    part = "test" if any(len(row.test) for row in rows) or not any(row.finished for row in rows) else "best validation"
    ax.set_xlabel(f"{part} {METRICS[metric].title}{note}")
    ax.set_xlim(left=0)
    style_axes(ax, "x")


def _label_bars(ax: Axes, left: Sequence[str], right: Sequence[str]) -> None:
    """Names on the left, numbers on the right, the first bar on top."""
    other = ax.twinx()
    other.spines[["top", "right"]].set_visible(False)
    for each, texts in ((ax, left), (other, right)):
        each.set_yticks(range(len(texts)), texts, fontsize=FONT)
        each.set_ylim(len(texts) - 0.4, -0.6)
        each.tick_params(axis="y", length=0)


def style_axes(ax: Axes, grid: str) -> None:
    ax.grid(axis=grid, color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def main(options: Options) -> None:
    print(*analyze(find_runs(options.runs_dir), options.output_dir), sep="\n")


if __name__ == "__main__":
    run_script(main, __doc__)
