"""Bar charts of results and speeds, with the numbers beside the bars."""

import textwrap
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes

from analysis.plotting.curves import seeds_text
from analysis.plotting.style import LINE, style_axes
from analysis.reading import Row, result_title
from analysis.tables import mean_and_spread

WIDTH = 38  # characters in a line of a bar's label


def wrap_labels(labels: Sequence[str]) -> list[str]:
    return [textwrap.fill(label, WIDTH) for label in labels]


def bar_inches(labels: Sequence[str]) -> float:
    """Height of a bar chart with these wrapped labels."""
    return 0.6 + _bar_pitch(labels) * (len(labels) + 0.2)


def _bar_pitch(labels: Sequence[str]) -> float:
    """Inches from bar to bar: room for two lines of numbers and for the label."""
    return 0.12 + LINE * max(2, *(len(label.splitlines()) for label in labels))


def draw_bars(
    ax: Axes,
    labels: Sequence[str],
    seeds: Sequence[pd.Series],
    numbers: Sequence[str],
    colors: Sequence[str],
    title: str,
) -> None:
    """Horizontal bars of the mean over seeds with one standard deviation and a dot for each seed; the first on top.

    labels: wrapped, on the left. numbers: on the right. seeds: (seeds,) each, in the unit of the axis, empty: no bar.
    """
    thickness = 0.26 / _bar_pitch(labels)
    for place, (values, color) in enumerate(zip(seeds, colors, strict=True)):
        if len(values):
            ax.barh(place, values.mean(), height=thickness, color=color)
        if len(values) > 1:
            ax.errorbar(values.mean(), place, xerr=values.std(), color="black", capsize=4, linewidth=1.3)
            ax.scatter(values, [place] * len(values), s=12, color="white", edgecolor="black", zorder=3)
    note = "with one standard deviation; dots: seeds" if any(len(values) > 1 for values in seeds) else ""
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
    """Bars of the rows' results. labels: wrapped."""
    results = [row.metric.scale * row.result for row in rows]
    draw_bars(ax, labels, results, list(map(_result_text, rows)), colors, result_title(rows))


def _result_text(row: Row) -> str:
    if not row.finished:
        return "not finished"
    unit = " %" if row.metric.percent else ""
    return f"{mean_and_spread(row.metric, row.result)}{unit}\n{seeds_text(len(row.result))}"
