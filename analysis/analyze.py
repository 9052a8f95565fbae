"""Tables and plots of finished and running experiments, from the CSV and JSON files in their folders.

Averages over the runs of one experiment whose configurations are equal but for the seed. Standard deviations are over
seeds, with n - 1. A run that is not finished shows in the curves, dashed, and enters no average where another seed is
finished. Writes results.md (in percent), results.csv (in fractions), and as PNG and SVG

    learning_curves              validation metric and both losses over epochs
    final_accuracy               the test result, or the best validation's where the data have no test part
    accuracy_against_parameters  the same over the number of parameters
    accuracy_against_time        the same over the time that training and validation took, by hardware
    speed                        training speed as a ratio to one experiment's, by hardware
    mlp_multiplier               result and parameters of runs that are equal but for mlp_internal_dim_multiplier

What has nothing to show is not written; a line says so. Other processes on a machine make its times longer.

    python analysis/analyze.py
    python analysis/analyze.py --runs-dir results --output-dir plots --relative-to vit_tiny_cifar10
"""

import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
from matplotlib.figure import Figure, SubFigure

from analysis.costs import MULTIPLIER, Tasks, draw_multipliers, draw_parameters, draw_speed, draw_time
from analysis.plots import (
    BAR_LABEL,
    LINE,
    Curve,
    add_legend,
    band_title,
    bar_inches,
    by_seed,
    curves_of,
    draw_curve,
    draw_results,
    label_epochs,
    labels_of,
    legend_shape,
    look_of,
    new_blocks,
)
from analysis.plotting.style import save_figure
from analysis.reading import data_title, find_runs, make_rows, read_runs
from analysis.tables import NOTE, results_table
from training.command_line import run_script
from training.config import ROOT, UserError
from training.metrics import METRICS

NEEDS = {  # what there has to be for a figure that is not always drawn
    "accuracy_against_parameters": "two finished experiments on the same data with different numbers of parameters",
    "accuracy_against_time": "two finished experiments on the same data and hardware",
    "speed": "two experiments on the same data and hardware",
    "mlp_multiplier": f"finished runs that are equal but for {MULTIPLIER}",
}
IN_NATS = ("accuracy", "bits_per_byte")  # metrics of tasks whose loss is the cross-entropy alone


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where the runs are, where tables and plots go, and what speeds are relative to."""

    runs_dir: Path = ROOT / "runs"
    """folder with runs, at any depth"""
    output_dir: Path = ROOT / "analysis_results"
    """folder of the tables and plots"""
    relative_to: str | None = None
    """experiment, by its full name, that speeds are relative to; None: the slowest on each data set and hardware"""


def analyze(
    runs: Sequence[Path], output: Path, relative_to: str | None = None, say: Callable[[str], None] = lambda line: None
) -> tuple[Path, ...]:
    """Tables and plots of these runs' folders, into the folder output; returns the files, learning_curves.png first.

    relative_to: as in Options. say: is told of each figure that has nothing to show; an older one of its name is
    removed. Warns of runs that cannot be read and leaves them out. Raises UserError where that leaves none.
    """
    tasks = read_tasks(runs)
    figures = {
        "learning_curves": draw_curves(tasks),
        "final_accuracy": draw_final(tasks),
        "accuracy_against_parameters": draw_parameters(tasks),
        "accuracy_against_time": draw_time(tasks),
        "speed": draw_speed(tasks, relative_to),
        "mlp_multiplier": draw_multipliers(tasks),
    }
    paths: list[Path] = []
    for name, figure in figures.items():
        if figure is not None:
            paths += save_figure(figure, output / f"{name}.png")
            continue
        chosen = f", one of them {relative_to}" if name == "speed" and relative_to else ""
        say(f"not drawn: {name}, it needs {NEEDS[name]}{chosen}")
        for suffix in (".png", ".svg"):
            (output / f"{name}{suffix}").unlink(missing_ok=True)
    return (*paths, *write_tables(tasks, output))


def read_tasks(runs: Sequence[Path]) -> Tasks:
    """The rows of every data set. Warns of runs that cannot be read; raises UserError where that leaves none."""
    rows = make_rows(read_runs(runs))
    if not rows:
        raise UserError("there is no run to analyse: train one (python train_quickstart.py), or give --runs-dir")
    return {task: list(members) for task, members in groupby(rows, key=lambda row: row.task)}


def write_tables(tasks: Tasks, output: Path) -> tuple[Path, Path]:
    """results.md and results.csv in the folder output; returns them."""
    output.mkdir(parents=True, exist_ok=True)
    table, numbers = output / "results.md", output / "results.csv"
    table.write_text("\n".join(markdown_lines(tasks)) + "\n")
    pd.DataFrame([row.record() for rows in tasks.values() for row in rows]).to_csv(numbers, index=False)
    return table, numbers


def markdown_lines(tasks: Tasks) -> list[str]:
    """results.md: one table a data set, in percent."""
    lines = ["# Results", ""]
    for rows in tasks.values():
        lines += [f"## {data_title(rows)}", "", *results_table(rows), ""]
    return [*lines, NOTE]


def draw_curves(tasks: Tasks) -> Figure:
    """One block a data set: validation metric, validation loss, training loss over epochs, and a legend below."""
    curves = {task: curves_of(labels_of(rows)[0], rows) for task, rows in tasks.items()}
    shapes = [legend_shape([text for _, text, _ in each]) for each in curves.values()]
    titles = [labels_of(rows)[1] for rows in tasks.values()]
    figure, blocks = new_blocks(titles, [2.6 + LINE * (lines + 1) for _, lines in shapes])
    for block, (columns, _), (task, each) in zip(blocks, shapes, curves.items(), strict=True):
        _draw_block(block, task[1], each, columns)
    return figure


def _draw_block(block: SubFigure, metric: str, curves: Sequence[Curve], legend_columns: int) -> None:
    axes = block.subplots(1, 3)
    axes[2].sharey(axes[1])
    unit = " (nats)" if metric in IN_NATS else ""
    titles = (f"validation {METRICS[metric].title}", f"validation loss{unit}", f"training loss{unit}")
    for ax, column, title in zip(axes, (f"val_{metric}", "val_loss", "train_loss"), titles, strict=True):
        for curve in curves:
            draw_curve(ax, curve, METRICS[column.partition("_")[2]].scale * by_seed(curve[2], column))
        label_epochs(ax, title)
    add_legend(block, axes[0], legend_columns, band_title(curves))


def draw_final(tasks: Tasks) -> Figure:
    """One block a data set: bars of the result with a standard deviation over seeds, and the numbers beside.

    The result is the test's, or the best validation's where the data have no test part.
    """
    names, titles = zip(*(labels_of(rows) for rows in tasks.values()), strict=True)
    labels = [[textwrap.fill(name, BAR_LABEL) for name in each] for each in names]
    figure, blocks = new_blocks(titles, list(map(bar_inches, labels)))
    for block, texts, rows in zip(blocks, labels, tasks.values(), strict=True):
        draw_results(block.subplots(), rows, texts, [look_of(place)["color"] for place in range(len(rows))])
    return figure


def main(options: Options) -> None:
    print(*analyze(find_runs(options.runs_dir), options.output_dir, options.relative_to, say=print), sep="\n")


if __name__ == "__main__":
    run_script(main, __doc__)
