"""Labels of experiments, and learning curves."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes

from analysis.plotting.style import LEGEND, label_epochs, look_of, plain_text
from analysis.reading import Row, RunFiles, data_title, shared_parts
from training.metrics import METRICS


class Curve(NamedTuple):
    """The finished runs of an experiment, averaged, or one unfinished run."""

    place: int
    """place of its row, which gives the colour"""
    text: str
    """legend entry"""
    runs: list[RunFiles]


def labels_of(rows: Sequence[Row]) -> tuple[list[str], str]:
    """A short label for each row, and a title: the data set and the changed fields that all rows share."""
    shared = shared_parts(rows)
    labels = [", ".join(part for part in row.parts if part not in shared) for row in rows]
    in_folder = [
        f", in {row.folder}" if labels.count(label) > 1 else "" for label, row in zip(labels, rows, strict=True)
    ]
    joined = (", all with " if len(rows) > 1 else ", ") if shared else ""
    title = data_title(rows) + joined + ", ".join(shared)
    return [plain_text(label + folder) for label, folder in zip(labels, in_folder, strict=True)], plain_text(title)


def seeds_text(n: int) -> str:
    return f"{n}\N{NO-BREAK SPACE}seed" + "s" * (n != 1)


def curves_of(labels: Sequence[str], rows: Sequence[Row]) -> list[Curve]:
    """For each row a curve of its finished runs, then one for each unfinished run."""
    curves: list[Curve] = []
    for place, (label, row) in enumerate(zip(labels, rows, strict=True)):
        if row.finished:
            curves.append(Curve(place, f"{label} ({seeds_text(len(row.finished))})", row.finished))
        for run in row.unfinished:
            done = f"not finished, epoch {len(run.epochs)} of {run.train['epochs']}"
            curves.append(Curve(place, f"{label}, seed {run.train['seed']}: {done}", [run]))
    return [curve._replace(text=textwrap.fill(curve.text, LEGEND)) for curve in curves]


def band_title(curves: Sequence[Curve]) -> str | None:
    """Legend title that explains the bands; None if there are none."""
    return "mean over seeds, band: one standard deviation" if any(len(curve.runs) > 1 for curve in curves) else None


def by_seed(runs: Sequence[RunFiles], column: str) -> pd.DataFrame:
    """(epochs, seeds) a column of metrics.csv, as stored."""
    return pd.concat([run.epochs[column] for run in runs], axis=1)


def draw_panels(axes: Iterable[Axes], panels: Mapping[str, str], curves: Sequence[Curve]) -> None:
    """One panel for each column of metrics.csv over epochs. panels: column -> label of the y axis."""
    for ax, (column, name) in zip(axes, panels.items(), strict=True):
        scale = METRICS[column.partition("_")[2]].scale
        for curve in curves:
            draw_curve(ax, curve, scale * by_seed(curve.runs, column))
        label_epochs(ax, name)


def draw_curve(ax: Axes, curve: Curve, seeds: pd.DataFrame) -> None:
    """Mean over runs with a band of one standard deviation; dashed if the runs are not finished.

    seeds: (epochs, seeds), in the unit of the axis.
    """
    look = look_of(curve.place)
    mean, std = seeds.mean(axis=1), seeds.std(axis=1)  # pandas divides by n - 1
    if len(curve.runs) > 1:
        ax.fill_between(mean.index, mean - std, mean + std, color=look["color"], alpha=0.18, linewidth=0)
    step = max(1, len(mean) // 8)
    first = curve.place * step // 4 % step  # experiments have their markers at different epochs
    marked = sorted({*range(first, len(mean), step), len(mean) - 1})
    style = "-" if curve.runs[0].summary else "--"
    ax.plot(mean.index, mean, style, label=curve.text, markersize=4, markevery=marked, linewidth=1.5, **look)
