"""Figures of what results cost: accuracy against parameters and time, speed, and the MLP multiplier.

Each function takes the rows of every data set and returns None if there is nothing to compare.
"""

import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from analysis.plotting import style
from analysis.plotting.bars import bar_inches, draw_bars, wrap_labels
from analysis.plotting.curves import labels_of
from analysis.reading import Row, Task, result_title, row_called

MULTIPLIER = "mlp_internal_dim_multiplier"
Tasks = dict[Task, list[Row]]


# ---------------------------------------------------------------------------- parameters and time


class Point(NamedTuple):
    """An experiment's result against what it costs."""

    place: int
    """place of its row, which gives colour and marker"""
    label: str
    x: pd.Series
    """(seeds,) cost"""
    y: pd.Series
    """(seeds,) result"""


class Panel(NamedTuple):
    """Results on one data set against what they cost."""

    title: str
    x_title: str
    y_title: str
    points: list[Point]


def draw_parameters(tasks: Tasks) -> Figure | None:
    """Result over number of parameters, for data sets with two finished experiments that differ in it."""
    panels = []
    for rows in tasks.values():
        labels, title = labels_of(rows)
        counts = {place: row.runs[0].config["parameters"] for place, row in enumerate(rows) if row.finished}
        if len(set(counts.values())) > 1:
            unit, name = (1e6, "millions") if max(counts.values()) >= 1e6 else (1e3, "thousands")
            points = [_point(place, labels[place], [n / unit], rows[place]) for place, n in counts.items()]
            panels.append(Panel(title, f"parameters ({name})", result_title(rows), points))
    return _draw_panels(panels)


def draw_time(tasks: Tasks) -> Figure | None:
    """Result over the time of the whole run, a panel for each hardware, as times on others are not comparable.

    None if no two experiments have finished on the same data set and hardware.
    """
    panels, comparable = [], False
    for rows in tasks.values():
        labels, title = labels_of(rows)
        groups = by_hardware(rows, finished=True)
        for hardware, members in groups.items():
            comparable |= len(members) > 1
            unit, name = _time_unit(max(run.seconds for _, row in members for run in row.runs))
            points = [_point(n, labels[n], [run.seconds / unit for run in row.runs], row) for n, row in members]
            x_title = f"time of a run, training and validation ({name})"
            panels.append(Panel(_on(title, hardware, groups), x_title, result_title(rows), points))
    return _draw_panels(panels) if comparable else None


def by_hardware(rows: Sequence[Row], finished: bool) -> dict[str, list[tuple[int, Row]]]:
    """For each hardware the rows that ran on it, reduced to their runs there, with their places in rows.

    finished: only finished runs; otherwise the runs that averages are taken over.
    """
    groups: dict[str, list[tuple[int, Row]]] = {}
    for place, row in enumerate(rows):
        runs = row.finished if finished else row.counted
        for hardware in sorted({run.hardware for run in runs}):
            own = replace(row, runs=tuple(run for run in runs if run.hardware == hardware))
            groups.setdefault(hardware, []).append((place, own))
    return dict(sorted(groups.items()))


def _on(title: str, hardware: str, groups: Iterable[str]) -> str:
    warning = "; not comparable with other hardware" if len(list(groups)) > 1 else ""
    return f"{title}\non {style.plain_text(hardware)}{warning}"


def _time_unit(longest: float) -> tuple[float, str]:
    """Unit in seconds, and its name, for times up to longest, in seconds."""
    return (1, "s") if longest < 300 else (60, "min") if longest < 4 * 3600 else (3600, "h")


def _point(place: int, label: str, x: Sequence[float], row: Row) -> Point:
    return Point(place, textwrap.fill(label, style.LEGEND), pd.Series(x), row.metric.scale * row.result)


def _draw_panels(panels: Sequence[Panel]) -> Figure | None:
    if not panels:
        return None
    heights = [2.4 + style.legend_inches([point.label for point in panel.points]) for panel in panels]
    figure, blocks = style.new_blocks([panel.title for panel in panels], heights)
    for block, panel in zip(blocks, panels, strict=True):
        ax = block.subplots()
        _draw_points(ax, panel.points)
        ax.set(xlabel=panel.x_title, ylabel=panel.y_title)
        notes = ["vertical bar: one standard deviation over seeds"] * any(len(point.y) > 1 for point in panel.points)
        notes += ["horizontal bar: fastest to slowest seed"] * any(len(point.x) > 1 for point in panel.points)
        style.add_legend(block, ax, "; ".join(notes))
    return figure


def _draw_points(ax: Axes, points: Sequence[Point]) -> None:
    """Each point at the median of x and the mean of y; bars: range of x and one standard deviation of y."""
    for point in points:
        x, y = point.x.median(), point.y.mean()
        xerr = [[x - point.x.min()], [point.x.max() - x]] if point.x.nunique() > 1 else None
        yerr = point.y.std() if len(point.y) > 1 else None
        look = style.look_of(point.place) | dict(markersize=6.5, markeredgecolor="white", markeredgewidth=0.5)
        look |= dict(linestyle="", elinewidth=1.1, capsize=2.5, capthick=1.1)
        ax.errorbar(x, y, yerr, xerr, label=point.label, **look)
    style.choose_scale(ax, "x", [value for point in points for value in point.x])
    ax.margins(0.08)
    style.style_axes(ax, "both")


# ---------------------------------------------------------------------------- speed


class Speeds(NamedTuple):
    """Training speeds on one data set and hardware."""

    title: str
    seeds: dict[str, pd.Series]
    """label -> (seeds,) median samples a second; fastest first"""
    colors: list[str]
    reference: str
    """label of the experiment that the others are relative to"""


def draw_speed(tasks: Tasks, relative_to: str | None) -> Figure | None:
    """Training speed relative to one experiment, among runs on the same data set and hardware.

    relative_to: an experiment's name; None: the slowest of each panel. Raises UserError if it is not exactly one
    experiment.
    """
    every = [row for rows in tasks.values() for row in rows]
    chosen = row_called(relative_to, every, "--relative-to") if relative_to else None
    panels = [speeds for rows in tasks.values() for speeds in speeds_of(rows, chosen)]
    if not panels:
        return None
    labels = [wrap_labels(list(speeds.seeds)) for speeds in panels]
    figure, blocks = style.new_blocks([speeds.title for speeds in panels], list(map(bar_inches, labels)))
    for block, speeds, texts in zip(blocks, panels, labels, strict=True):
        ax, base = block.subplots(), speeds.seeds[speeds.reference].mean()
        means = [each.mean() for each in speeds.seeds.values()]
        numbers = [f"{m / base:.2f} times\n{m:,.{0 if m >= 100 else 1}f} samples/s" for m in means]
        title = textwrap.fill(f"training speed relative to {speeds.reference}", style.LEGEND)
        draw_bars(ax, texts, [each / base for each in speeds.seeds.values()], numbers, speeds.colors, title)
        ax.axvline(1, color="0.35", linestyle=":", linewidth=1)
    return figure


def speeds_of(rows: Sequence[Row], chosen: Row | None) -> list[Speeds]:
    """A panel for each hardware on which two or more experiments ran; with chosen, only those it ran on."""
    labels, title = labels_of(rows)
    groups = by_hardware(rows, finished=False)
    panels = []
    for hardware, members in groups.items():
        speeds = {n: pd.Series([run.speed for run in row.runs]) for n, row in members}
        speeds = {n: each for n, each in speeds.items() if (each > 0).all()}  # NaN: not stored
        order = sorted(speeds, key=lambda n: -speeds[n].mean())
        references = [n for n in order if rows[n] is chosen] if chosen else order[-1:]
        if len(order) > 1 and references:
            seeds = {labels[n]: speeds[n] for n in order}
            colors = [style.look_of(n)["color"] for n in order]
            panels.append(Speeds(_on(title, hardware, groups), seeds, colors, labels[references[0]]))
    return panels


# ---------------------------------------------------------------------------- the MLP multiplier


def draw_multipliers(tasks: Tasks) -> Figure | None:
    """Result and parameters over the MLP multiplier, for runs that differ in nothing else."""
    panels = [sweeps for rows in tasks.values() if (sweeps := sweeps_of(rows))]
    if not panels:
        return None
    labels, titles = zip(*(labels_of([_common(sweep) for sweep in sweeps]) for sweeps in panels), strict=True)
    texts = [[textwrap.fill(label, style.LEGEND) for label in each] for each in labels]
    figure, blocks = style.new_blocks(titles, [2.8 + style.legend_inches(each) for each in texts])
    for block, each, sweeps in zip(blocks, texts, panels, strict=True):
        axes = block.subplots(1, 2)
        for place, (text, sweep) in enumerate(zip(each, sweeps, strict=True)):
            _draw_sweep(axes, place, text, sweep)
        _style_sweep(axes, sweeps)
        seeds = any(len(row.result) > 1 for sweep in sweeps for row in sweep)
        style.add_legend(block, axes[0], "mean over seeds, bar: one standard deviation" if seeds else None)
    return figure


def sweeps_of(rows: Iterable[Row]) -> list[list[Row]]:
    """Finished rows that differ only in the multiplier, in groups of two or more, sorted by it.

    Experiments of different names form one group, unless two of them have the same multiplier.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        fields = row.runs[0].fields
        if row.finished and MULTIPLIER in fields:
            rest = {key: value for key, value in fields.items() if key != MULTIPLIER}
            groups.setdefault(json.dumps(rest, sort_keys=True), []).append(row)
    sweeps = []
    for group in groups.values():
        named: dict[str, list[Row]] = {}
        for row in group:
            named.setdefault(_common([row]).experiment, []).append(row)
        parts = [group] if len(set(map(_multiplier, group))) == len(group) else named.values()
        sweeps += [sorted(part, key=_multiplier) for part in parts if len(set(map(_multiplier, part))) > 1]
    return sweeps


def _multiplier(row: Row) -> float:
    return row.runs[0].fields[MULTIPLIER]


def _common(sweep: Sequence[Row]) -> Row:
    """The first row under a name for the whole sweep, without the multiplier."""
    names = ["+".join(part for part in row.experiment.split("+") if not part.startswith(MULTIPLIER)) for row in sweep]
    differs = tuple(part for part in sweep[0].differs if not part.startswith(MULTIPLIER))
    return replace(sweep[0], experiment=" / ".join(dict.fromkeys(names)), differs=differs)


def _draw_sweep(axes: Sequence[Axes], place: int, text: str, sweep: Sequence[Row]) -> None:
    results = [row.metric.scale * row.result for row in sweep]
    look = style.look_of(place) | dict(linewidth=1.3, linestyle=("-", "--", ":", "-.")[place % 4])
    multipliers = [_multiplier(row) for row in sweep]
    means, deviations = ([getattr(values, name)() for values in results] for name in ("mean", "std"))
    axes[0].errorbar(multipliers, means, deviations, label=text, markersize=5, capsize=2.5, **look)
    millions = [row.runs[0].config["parameters"] / 1e6 for row in sweep]
    axes[1].plot(multipliers, millions, markersize=max(3, 8 - 2 * place), **look)  # coinciding curves stay visible


def _style_sweep(axes: Sequence[Axes], sweeps: Sequence[Sequence[Row]]) -> None:
    rows = [row for sweep in sweeps for row in sweep]
    style.choose_scale(axes[1], "y", [row.runs[0].config["parameters"] for row in rows])
    for ax, name in zip(axes, (result_title(rows), "parameters (millions)"), strict=True):
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_locator(FixedLocator(sorted(set(map(_multiplier, rows)))))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set(xlabel="MLP multiplier (neurons of all heads / n_embd)", ylabel=name)
        style.style_axes(ax, "y")
