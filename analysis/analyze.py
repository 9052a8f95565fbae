"""Tables and figures of finished and running experiments.

Averages over runs that differ only in the seed, with standard deviations over seeds (n - 1). Unfinished runs are drawn
dashed; they count in an average only if no seed has finished. Writes results.md, results.csv (percentages as
fractions), and as PNG and SVG:

    learning_curves              validation metric and both losses over epochs
    final_accuracy               test result, or best validation result if the data have no test part
    accuracy_against_parameters  the same over the number of parameters
    accuracy_against_time        the same over the time of training and validation, for each hardware
    speed                        training speed relative to one experiment, for each hardware
    mlp_multiplier               result and parameters of runs that differ only in mlp_internal_dim_multiplier

Draws every figure it has data for, and names those it skips. Run folders that cannot be read are named and left out.

    python analysis/analyze.py
    python analysis/analyze.py --runs-dir results --output-dir plots
    python analysis/analyze.py --relative-to vit_tiny_cifar10
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
from matplotlib.figure import Figure

from analysis.plotting import style
from analysis.plotting.bars import bar_inches, draw_results, wrap_labels
from analysis.plotting.costs import MULTIPLIER, Tasks, draw_multipliers, draw_parameters, draw_speed, draw_time
from analysis.plotting.curves import band_title, curves_of, draw_panels, labels_of
from analysis.reading import Row, data_title, find_runs, make_rows, read_runs
from analysis.tables import NOTE, results_table, write_tables
from training.command_line import run_script
from training.config import ROOT, UserError
from training.metrics import METRICS

NEEDS = {  # figure -> what it needs
    "accuracy_against_parameters": "two finished experiments on the same data with different numbers of parameters",
    "accuracy_against_time": "two finished experiments on the same data and hardware",
    "speed": "two experiments on the same data and hardware",
    "mlp_multiplier": f"finished runs that differ only in {MULTIPLIER}",
}
IN_NATS = ("accuracy", "bits_per_byte")  # metrics of tasks whose loss is plain cross-entropy


@dataclass(frozen=True, kw_only=True)
class Options:
    """Input and output folders, and the reference for speeds."""

    runs_dir: Path = ROOT / "runs"
    """folder with runs, at any depth"""
    output_dir: Path = ROOT / "analysis_results"
    """folder for tables and figures"""
    relative_to: str | None = None
    """full name of the experiment that speeds are relative to; default: the slowest on each data set and hardware"""


def analyze(
    runs: Sequence[Path], output: Path, relative_to: str | None = None, say: Callable[[str], None] = lambda line: None
) -> tuple[Path, ...]:
    """Writes tables and figures of these runs into the folder output; returns the files, learning_curves.png first.

    relative_to: as in Options. say: called with a line for each figure that is skipped; an older file of its name is
    removed. Raises UserError if no run can be read.
    """
    tasks = by_task(make_rows(read_runs(runs)))
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
            paths += style.save_figure(figure, output / f"{name}.png")
            continue
        chosen = f", one of them {relative_to}" if name == "speed" and relative_to else ""
        say(f"skipped: {name} needs {NEEDS[name]}{chosen}")
        style.remove_figure(output / f"{name}.png")
    return (*paths, *write_results(tasks, output / "results", "Results"))


def by_task(rows: Iterable[Row]) -> Tasks:
    """The rows of each data set. Raises UserError if there are none."""
    tasks = {task: list(members) for task, members in groupby(rows, key=lambda row: row.task)}
    if not tasks:
        raise UserError("no run can be read: train one (python train_quickstart.py), or name another folder of runs")
    return tasks


def write_results(tasks: Tasks, path: Path, title: str) -> tuple[Path, Path]:
    """Writes path with .md (a table for each data set) and .csv; returns both. Makes the folder."""
    lines = [f"# {title}", ""]
    for rows in tasks.values():
        lines += [f"## {data_title(rows)}", "", *results_table(rows), ""]
    rows = [row for rows in tasks.values() for row in rows]
    folders = [{"folder": row.folder} if row.folder else {} for row in rows]
    records = [folder | row.record() for folder, row in zip(folders, rows, strict=True)]
    return write_tables(path, pd.DataFrame(records), [*lines, NOTE])


def draw_curves(tasks: Tasks) -> Figure:
    """For each data set: validation metric, validation loss and training loss over epochs."""
    curves = [curves_of(labels_of(rows)[0], rows) for rows in tasks.values()]
    titles = [labels_of(rows)[1] for rows in tasks.values()]
    inches = [2.6 + style.legend_inches([curve.text for curve in each]) for each in curves]
    figure, blocks = style.new_blocks(titles, inches)
    for block, (_, metric), each in zip(blocks, tasks, curves, strict=True):
        axes = block.subplots(1, 3)
        axes[2].sharey(axes[1])
        unit = " (nats)" if metric in IN_NATS else ""
        panels = {f"val_{metric}": f"validation {METRICS[metric].title}"}
        panels |= {"val_loss": f"validation loss{unit}", "train_loss": f"training loss{unit}"}
        draw_panels(axes, panels, each)
        style.add_legend(block, axes[0], band_title(each))
    return figure


def draw_final(tasks: Tasks) -> Figure:
    """For each data set: bars of the results. Rows of several folders are coloured by folder."""
    folders = list(dict.fromkeys(row.folder for rows in tasks.values() for row in rows))
    several = len(folders) > 1
    names, titles = zip(*map(labels_of, tasks.values()), strict=True)
    labels = list(map(wrap_labels, names))
    inches = list(map(bar_inches, labels))
    inches[-1] += style.legend_inches(folders) if several else 0
    figure, blocks = style.new_blocks(titles, inches)
    for block, texts, rows in zip(blocks, labels, tasks.values(), strict=True):
        places = [folders.index(row.folder) if several else place for place, row in enumerate(rows)]
        ax = block.subplots()
        draw_results(ax, rows, texts, [style.look_of(place)["color"] for place in places])
        if several and block is blocks[-1]:
            for place, folder in enumerate(folders):
                ax.plot([], [], "s", color=style.look_of(place)["color"], label=style.plain_text(folder))
            style.add_legend(block, ax, "folder")
    return figure


def main(options: Options) -> None:
    print(*analyze(find_runs(options.runs_dir), options.output_dir, options.relative_to, say=print), sep="\n")


if __name__ == "__main__":
    run_script(main, __doc__)
