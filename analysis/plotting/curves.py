"""Pieces of figures that the scripts on runs share: labels, learning curves, bars, points with names, legends."""

import math
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase, SubFigure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from scipy.optimize import isotonic_regression, linear_sum_assignment

from analysis.figures import COLORS, MARKERS, PAGE, new_figure, style_axes
from analysis.reading import Row, RunFiles, data_title, result_title, shared_parts
from analysis.tables import mean_and_spread

LINE = 0.15  # inches, of a line of text
CHARACTERS = 14.3  # an inch holds of them, on average
TITLE = 98  # characters, of a line of a title as wide as the page
BAR_LABEL = 38  # of a line of a bar's name
Curve = tuple[int, str, list[RunFiles]]  # place of its row, which gives the colour; legend entry; runs it averages


class Point(NamedTuple):
    """A row as a point in the plane, with a name on the margin."""

    place: int
    """of its row, which gives colour and marker"""
    label: str
    x: pd.Series
    """(seeds,)"""
    y: pd.Series
    """(seeds,)"""


# ---------------------------------------------------------------------------- text


def labels_of(rows: Sequence[Row]) -> tuple[list[str], str]:
    """A label for each row, and a title: `data_title` and the changed fields that all rows share."""
    shared = shared_parts(rows)
    labels = [", ".join(part for part in row.parts if part not in shared) for row in rows]
    if len(set(labels)) < len(labels):
        return [", ".join(row.parts) for row in rows], data_title(rows)
    joined = (", all with " if len(rows) > 1 else ", ") if shared else ""
    return labels, data_title(rows) + joined + ", ".join(shared)


def seeds_text(n: int) -> str:
    return f"{n}\N{NO-BREAK SPACE}seed" + "s" * (n != 1)


# ---------------------------------------------------------------------------- blocks, looks, axes, legends


def new_blocks(titles: Sequence[str], inches: Sequence[float]) -> tuple[Figure, list[SubFigure]]:
    """A figure as wide as a page, with a block below the other for each title; inches: of what a block holds."""
    titles = ["\n".join(textwrap.fill(line, TITLE) for line in title.splitlines()) for title in titles]
    heights = [height + LINE * len(title.splitlines()) for height, title in zip(inches, titles, strict=True)]
    figure = new_figure(PAGE, sum(heights))
    blocks = figure.subfigures(len(titles), 1, height_ratios=heights, squeeze=False)[:, 0]
    for block, title in zip(blocks, titles, strict=True):
        block.suptitle(title)
    return figure, list(blocks)


def look_of(place: int) -> dict[str, str]:
    """Colour and marker of a row."""
    return dict(color=COLORS[place % len(COLORS)], marker=MARKERS[place % len(MARKERS)])


def label_epochs(ax: Axes, name: str) -> None:
    style_axes(ax, "y")
    ax.set_xlabel("epoch")
    ax.set_ylabel(name)
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))


def choose_scale(ax: Axes, name: str, values: Sequence[float]) -> None:
    """The axis called name, "x" or "y": logarithmic, with plain numbers, where values, above 0, span a factor of 8."""
    axis = getattr(ax, f"{name}axis")
    if max(values) < 8 * min(values):
        axis.set_major_locator(MaxNLocator(5))
        return
    ax.set(**{f"{name}scale": "log"})
    spans_much = max(values) > 300 * min(values)
    axis.set_major_locator(LogLocator(subs=(1,) if spans_much else (1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def legend_shape(texts: Sequence[str]) -> tuple[int, int]:
    """Columns of a legend that fit a page, and lines of text it then has."""
    longest = max(len(line) for text in texts for line in text.splitlines())
    columns = max(1, min(len(texts), int(PAGE * CHARACTERS) // (longest + 9)))
    return columns, math.ceil(len(texts) / columns) * max(len(text.splitlines()) for text in texts)


def add_legend(figure: FigureBase, ax: Axes, columns: int, title: str | None) -> None:
    """The legend of ax, below all panels of the figure."""
    handles = ax.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", title=title, frameon=False, ncols=columns)


# ---------------------------------------------------------------------------- learning curves


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


def band_title(curves: Sequence[Curve]) -> str | None:
    """What a legend says of the bands, where there are any."""
    return "mean over seeds, band: one standard deviation" if any(len(runs) > 1 for *_, runs in curves) else None


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


# ---------------------------------------------------------------------------- bars


def bar_inches(labels: Sequence[str]) -> float:
    """Height of a block with a bar for each of these labels, which are wrapped already."""
    return 0.6 + _bar_pitch(labels) * (len(labels) + 0.2)


def _bar_pitch(labels: Sequence[str]) -> float:
    """Inches from bar to bar: there are two lines of numbers beside a bar, and the lines of its label."""
    return 0.12 + LINE * max(2, *(len(label.splitlines()) for label in labels))


def draw_bars(
    ax: Axes,
    labels: Sequence[str],
    seeds: Sequence[pd.Series],
    numbers: Sequence[str],
    colors: Sequence[str],
    title: str,
) -> None:
    """A bar a row to the mean of its seeds, with one standard deviation and a dot a seed; the first on top.

    labels: on the left. seeds: (seeds,) each, in the unit of the axis, empty for no bar. numbers: on the right.
    """
    thickness = 0.26 / _bar_pitch(labels)
    for place, (values, color) in enumerate(zip(seeds, colors, strict=True)):
        if len(values):
            ax.barh(place, values.mean(), height=thickness, color=color)
        if len(values) > 1:
            ax.errorbar(values.mean(), place, xerr=values.std(), color="black", capsize=4, linewidth=1.3)
            ax.scatter(values, [place] * len(values), s=12, color="white", edgecolor="black", zorder=3)
    note = "with one standard deviation; a dot is a seed" if any(len(values) > 1 for values in seeds) else ""
    ax.set_xlabel(title + (", " if len(title + note) < 80 else "\n") * bool(note) + note)
    ax.set_xlim(left=0)
    style_axes(ax, "x")
    other = ax.twinx()
    other.spines[["top", "right"]].set_visible(False)
    for each, texts in ((ax, labels), (other, numbers)):
        each.set_yticks(range(len(texts)), texts)
        each.set_ylim(len(texts) - 0.4, -0.6)
        each.tick_params(axis="y", length=0)


def draw_results(ax: Axes, rows: Sequence[Row], labels: Sequence[str], colors: Sequence[str]) -> None:
    """Bars of the rows' results, with the numbers beside."""
    results = [row.metric.scale * row.result for row in rows]
    draw_bars(ax, labels, results, [_result_text(row) for row in rows], colors, result_title(rows))


def _result_text(row: Row) -> str:
    if not row.finished:
        return "not finished"
    unit = " %" if row.metric.percent else ""
    return f"{mean_and_spread(row.metric, row.result)}{unit}\n{seeds_text(len(row.result))}"


# ---------------------------------------------------------------------------- points with names


def point_panel(block: FigureBase) -> tuple[Axes, Axes]:
    """Axes for points, and a margin for their names on the right."""
    ax, margin = block.subplots(1, 2, width_ratios=(5, 3))
    margin.set_axis_off()
    return ax, margin


def point_inches(labels: Sequence[str]) -> float:
    """Height of a block whose margin holds these labels, which are wrapped already."""
    return 0.7 + max(2.0, sum(map(_label_inches, labels)))


def _label_inches(label: str) -> float:
    return LINE * (len(label.splitlines()) + 0.3)


def draw_points(ax: Axes, points: Sequence[Point]) -> None:
    """Each point at the median of x and the mean of y, with bars from least to most x and of one deviation of y."""
    for point in points:
        x, y = point.x.median(), point.y.mean()
        xerr = [[x - point.x.min()], [point.x.max() - x]] if point.x.nunique() > 1 else None
        yerr = point.y.std() if len(point.y) > 1 else None
        look = look_of(point.place) | dict(markersize=6.5, markeredgecolor="white", markeredgewidth=0.5)
        ax.errorbar(x, y, yerr, xerr, linestyle="", elinewidth=1.1, capsize=2.5, capthick=1.1, **look)
    choose_scale(ax, "x", [value for point in points for value in point.x])
    ax.margins(0.08)
    style_axes(ax, "both")


def name_points(ax: Axes, margin: Axes, points: Sequence[Point]) -> None:
    """The labels on the margin, as near to their points' height as they can be without overlap, and lines to them.

    The figure has to be laid out before.
    """
    points = sorted(points, key=lambda point: point.y.mean())
    ends = np.array([(point.x.median(), point.y.mean()) for point in points])
    box, (x, y) = margin.get_window_extent(), ax.transData.transform(ends).T  # pixels
    heights = (y - box.y0) / box.height
    sizes = np.array([_label_inches(point.label) for point in points]) * margin.figure.dpi / box.height
    slots = spread_out(heights, sizes)
    lengths = np.hypot(box.x0 - x[:, None], box.y0 + slots * box.height - y[:, None])
    order = np.argsort(linear_sum_assignment(lengths)[1])  # lines of the least total length do not cross
    for index, height in zip(order, spread_out(slots, sizes[order]), strict=True):
        color = look_of(points[index].place)["color"]
        name = ax.annotate(
            points[index].label,
            xy=ends[index],
            xycoords=ax.transData,
            xytext=(0.02, height),
            textcoords=margin.transAxes,
            va="center",
            arrowprops=dict(arrowstyle="-", color=color, linewidth=0.8, linestyle=":", shrinkB=4, relpos=(0, 0.5)),
            annotation_clip=False,
            zorder=1,  # below the markers
        )
        name.set_in_layout(False)


def spread_out(wanted: Sequence[float], sizes: Sequence[float]) -> np.ndarray:
    """Centres of intervals of these sizes that do not overlap and lie in [0, 1], nearest to those wanted.

    wanted: ascending. Nearest by least squares, which is an isotonic regression once the sizes are taken off.
    Where they do not all fit, they reach below 0.
    """
    sizes = np.asarray(sizes)
    below = np.concatenate([[0], np.cumsum((sizes[:-1] + sizes[1:]) / 2)])  # the least that a centre is above the first
    first = isotonic_regression(np.asarray(wanted) - below).x
    return np.clip(first, sizes[0] / 2, None).clip(max=1 - sizes[-1] / 2 - below[-1]) + below
