"""Training time and training operations that an accuracy costs: table and figure over runs on one data set.

Time counts training alone: augmentation, forward, backward and optimizer steps of all epochs, without start-up,
validation and test. Operations are those of matrix products and convolutions, forward and backward, which no hardware
changes. A run reaches the target at the first epoch whose validation accuracy does.

    python analysis/time_to_accuracy.py --runs-dir results/speedrun
    python analysis/time_to_accuracy.py --target 0.9 --runs-dir runs
"""

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.plotting import style
from analysis.plotting.curves import labels_of
from analysis.published import read_published
from analysis.reading import Row, RunFiles, find_runs, make_rows, read_runs
from analysis.tables import NONE, check_output, markdown_table, number_cell, write_tables
from models import build_config
from models.flops import flop_of
from training.command_line import run_script
from training.config import ROOT, UserError, require

# test accuracy of v2 on CIFAR-10 after 50 epochs, the documented headline
(PUBLISHED_V2,) = (
    float(line.value) / 100
    for line in read_published()
    if (line.source, line.dataset, line.experiment) == ("spec_current", "cifar10", "v2_raw")
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which runs, and the accuracy."""

    runs_dir: Path = ROOT / "results" / "speedrun"
    """folder with runs, at any depth"""
    target: float = PUBLISHED_V2
    """accuracy to reach, as a share; default: the documented test accuracy of v2"""
    output: Path | None = None
    """output files without suffix: .md, .csv, .png and .svg are added; default: time_to_accuracy in runs_dir"""

    def __post_init__(self):
        require(0 < self.target <= 1, self, "target", "must be above 0 and at most 1: 0.9 is 90 %")


def training_seconds(run: RunFiles) -> pd.Series:
    """(epochs,) seconds of training up to the end of each epoch, without validation, of a finished run."""
    return (run.summary["images"]["train"] / run.epochs["images_per_sec"]).cumsum()


def training_pflop(run: RunFiles) -> pd.Series:
    """(epochs,) 1e15 operations of training up to the end of each epoch."""
    model = build_config(run.config["model_class"], run.config["config"]["model"])
    sizes = tuple(run.configuration.train.get("train_sizes", ()))
    return run.summary["images"]["train"] * run.epochs.index.to_series() * flop_of(model, sizes) / 1e15


def measure(row: Row, target: float) -> dict:
    """A line of the table; NaN where not every run reaches the target, and for minutes on different hardware."""
    seconds, pflop = ([each(run) for run in row.finished] for each in (training_seconds, training_pflop))
    reached = [run.epochs.index[run.epochs["val_accuracy"] >= target] for run in row.finished]
    complete = all(len(epochs) for epochs in reached)
    minute = 60 if len(row.hardware) == 1 else np.nan

    def at(costs: Sequence[pd.Series]) -> float:
        return np.mean([cost[epochs[0]] for cost, epochs in zip(costs, reached, strict=True)]) if complete else np.nan

    return {
        "experiment": ", ".join(row.parts),
        "parameters": row.runs[0].config["parameters"],
        "seeds": len(row.finished),
        "epochs": len(row.finished[0].epochs),
        "minutes": np.mean([each.iloc[-1] for each in seconds]) / minute,
        "pflop": np.mean([each.iloc[-1] for each in pflop]),
        "test_accuracy": row.test.mean(),
        "test_accuracy_lowest": row.test.min(),
        "minutes_to_target": at(seconds) / minute,
        "pflop_to_target": at(pflop),
        "hardware": "; ".join(row.hardware),
    }


def draw(rows: Sequence[Row], target: float) -> Figure:
    """Validation accuracy of every run over minutes of training, and over its operations.

    Lines are labelled with their hardware if there are several.
    """
    labels, title = labels_of(rows)
    hardware = ["; ".join(row.hardware) for row in rows]
    if len(set(hardware)) > 1:
        labels = [f"{label} ({on})" for label, on in zip(labels, hardware, strict=True)]
    labels = [textwrap.fill(label, style.LEGEND) for label in labels]
    figure, (block,) = style.new_blocks([title], [2.6 + style.legend_inches(labels)])
    axes = block.subplots(1, 2, sharey=True)
    panels = (training_seconds, 60, "minutes of training"), (training_pflop, 1, "training operations (1e15)")
    for ax, (cost, unit, name) in zip(axes, panels, strict=True):
        values = []
        for place, (row, label) in enumerate(zip(rows, labels, strict=True)):
            look = style.look_of(place) | dict(linewidth=1.3, markersize=3)
            for n, run in enumerate(row.finished):
                x = cost(run) / unit
                values += list(x)
                ax.plot(x, 100 * run.epochs["val_accuracy"], label="_" if n else label, **look)
        ax.axhline(100 * target, color="0.35", linestyle=":", linewidth=1)
        style.choose_scale(ax, "x", values)
        style.style_axes(ax, "both")
        ax.set_xlabel(name)
    axes[0].set_ylabel("validation accuracy (%)")
    style.add_legend(block, axes[0], f"a line for each seed; dotted: {100 * target:.2f} %")
    return figure


def find_rows(runs_dir: Path) -> list[Row]:
    """Rows of the finished runs whose work and time are known; warns of the others.

    Raises UserError unless they classify, all on one data set.
    """
    known = []
    for run in (run for run in read_runs(find_runs(runs_dir)) if run.summary is not None):
        if "images" not in run.summary:
            print(f"warning: {run.folder} is left out: summary.json has no number of images", file=sys.stderr)
        elif "images_per_sec" not in run.epochs:
            print(f"warning: {run.folder} is left out: metrics.csv has no column images_per_sec", file=sys.stderr)
        elif not (run.epochs["images_per_sec"] > 0).all():
            print(f"warning: {run.folder} is left out: images_per_sec is not above 0 in every epoch", file=sys.stderr)
        else:
            known.append(run)
    rows = make_rows(known)
    if len({row.task for row in rows}) != 1 or rows[0].metric.key != "accuracy":
        raise UserError(
            f"{runs_dir} must hold finished runs of classification on one data set: name another --runs-dir"
        )
    return rows


def markdown_lines(table: pd.DataFrame, target: float) -> list[str]:
    """The table as Markdown, and what to know to read it. table: a row of `measure` for each experiment."""
    percent = f"{100 * target:.2f} %"
    lines = [
        [
            row.experiment,
            f"{row.parameters:,}",
            f"{row.seeds}",
            f"{row.epochs}",
            number_cell(row.minutes, ".1f"),
            number_cell(row.pflop, ".2f"),
            number_cell(100 * row.test_accuracy, ".2f"),
            number_cell(row.minutes_to_target, ".1f"),
            number_cell(row.pflop_to_target, ".2f"),
            row.hardware,
        ]
        for row in table.itertuples()
    ]
    titles = ["experiment", "parameters", "seeds", "epochs", "minutes", "PFLOP", "test accuracy (%)"]
    titles += [f"minutes to {percent}", f"PFLOP to {percent}", "hardware"]
    note = (
        "Minutes are of training alone; compare them on one hardware only. The target is validation accuracy. "
        f"{NONE}: not every seed reached it, or, for minutes, the seeds ran on different hardware."
    )
    return [*markdown_table(titles, lines, left=("experiment", "hardware")), "", note]


def main(options: Options) -> None:
    output = options.output or options.runs_dir / "time_to_accuracy"
    check_output(output)
    rows = find_rows(options.runs_dir)
    table = pd.DataFrame([measure(row, options.target) for row in rows])
    text = markdown_lines(table, options.target)
    write_tables(output, table, text)
    png, _ = style.save_figure(draw(rows, options.target), output.with_name(f"{output.name}.png"))
    print(*text, "", png, sep="\n")


if __name__ == "__main__":
    run_script(main, __doc__)
