"""What results cost: figures of accuracy against parameters and time, of speed, and of the MLP multiplier.

Each function takes the rows of every data set, and returns None where there is nothing to show.
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

from analysis.figures import style_axes
from analysis.plots import (
    BAR_LABEL,
    LINE,
    Point,
    add_legend,
    bar_inches,
    choose_scale,
    draw_bars,
    draw_points,
    labels_of,
    legend_shape,
    look_of,
    name_points,
    new_blocks,
    point_inches,
    point_panel,
)
from analysis.reading import Row, Task, result_title, row_called

MULTIPLIER = "mlp_internal_dim_multiplier"
POINT_LABEL = 34  # characters, of a line of a point's name
Tasks = dict[Task, list[Row]]


class Panel(NamedTuple):
    """Results of one data set against what they cost."""

    title: str
    x_title: str
    y_title: str
    points: list[Point]


# ---------------------------------------------------------------------------- parameters and time


def draw_parameters(tasks: Tasks) -> Figure | None:
    """Result over number of parameters. None where no data set has two finished experiments that differ in it."""
    panels = []
    for rows in tasks.values():
        labels, title = labels_of(rows)
        counts = {place: row.runs[0].config["parameters"] for place, row in enumerate(rows) if row.finished}
        if len(set(counts.values())) < 2:
            continue
        unit, name = (1e6, "millions") if max(counts.values()) >= 1e6 else (1e3, "thousands")
        points = [_point(place, labels[place], [n / unit], rows[place]) for place, n in counts.items()]
        panels.append(Panel(title, f"parameters ({name})", result_title(rows), points))
    return _draw_panels(panels)


def draw_time(tasks: Tasks) -> Figure | None:
    """Result over the time of the whole run, a panel for each hardware: times on different ones are not comparable.

    None where no two experiments have finished on the same data set and hardware.
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
    """For each hardware the rows that ran on it, with the runs that did alone, and their places in rows.

    finished: of those only; else those that averages are taken over.
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
    return f"{title}\non {hardware}{warning}"


def _time_unit(longest: float) -> tuple[float, str]:
    """Seconds of the unit, and its name, for times up to longest, in seconds."""
    return (1, "s") if longest < 300 else (60, "min") if longest < 4 * 3600 else (3600, "h")


def _point(place: int, label: str, x: Sequence[float], row: Row) -> Point:
    return Point(place, textwrap.fill(label, POINT_LABEL), pd.Series(x), row.metric.scale * row.result)


def _draw_panels(panels: Sequence[Panel]) -> Figure | None:
    if not panels:
        return None
    heights = [point_inches([point.label for point in panel.points]) for panel in panels]
    figure, blocks = new_blocks([panel.title for panel in panels], heights)
    axes = [point_panel(block) for block in blocks]
    for (ax, _), panel in zip(axes, panels, strict=True):
        draw_points(ax, panel.points)
        bars = "bar: one standard deviation over seeds" if any(len(point.y) > 1 for point in panel.points) else ""
        bars += "; across: fastest to slowest" * any(len(point.x) > 1 for point in panel.points)
        ax.set(xlabel="\n".join(filter(None, (panel.x_title, bars))), ylabel=panel.y_title)
    figure.draw_without_rendering()  # finds the axes' places
    for (ax, margin), panel in zip(axes, panels, strict=True):
        name_points(ax, margin, panel.points)
    return figure


# ---------------------------------------------------------------------------- speed


class Speeds(NamedTuple):
    """Training speeds on one data set and hardware, and what they are relative to."""

    title: str
    labels: list[str]
    places: list[int]
    seeds: list[pd.Series]
    """for each experiment (seeds,) median samples a second"""
    reference: int
    """index of the experiment that the others are relative to"""


def draw_speed(tasks: Tasks, relative_to: str | None) -> Figure | None:
    """Training speed as a ratio to one experiment's, among runs on the same data set and hardware.

    relative_to: an experiment's name; None takes the slowest of each panel. None where no two can be compared. Raises
    UserError where relative_to is no single experiment.
    """
    every = [row for rows in tasks.values() for row in rows]
    chosen = row_called(relative_to, every, "--relative-to") if relative_to else None
    panels = [speeds for rows in tasks.values() for speeds in speeds_of(rows, chosen)]
    if not panels:
        return None
    labels = [[textwrap.fill(label, BAR_LABEL) for label in speeds.labels] for speeds in panels]
    figure, blocks = new_blocks([speeds.title for speeds in panels], list(map(bar_inches, labels)))
    for block, speeds, texts in zip(blocks, panels, labels, strict=True):
        _draw_speeds(block.subplots(), speeds, texts)
    return figure


def speeds_of(rows: Sequence[Row], chosen: Row | None) -> list[Speeds]:
    """A panel for each hardware on which two experiments or more have run, chosen among them if there is one."""
    labels, title = labels_of(rows)
    groups = by_hardware(rows, finished=False)
    panels = []
    for hardware, members in groups.items():
        members = [(place, row) for place, row in members if all(run.speed > 0 for run in row.runs)]  # stored, that is
        seeds = [pd.Series([run.speed for run in row.runs]) for _, row in members]
        reference = min(range(len(members)), key=lambda index: seeds[index].mean(), default=None)
        if chosen is not None:
            found = [index for index, (place, _) in enumerate(members) if rows[place] is chosen]
            reference = found[0] if found else None
        if len(members) > 1 and reference is not None:
            places = [place for place, _ in members]
            names = [labels[place] for place in places]
            panels.append(Speeds(_on(title, hardware, groups), names, places, seeds, reference))
    return panels


def _draw_speeds(ax: Axes, speeds: Speeds, texts: Sequence[str]) -> None:
    base = speeds.seeds[speeds.reference].mean()
    order = sorted(range(len(texts)), key=lambda index: -speeds.seeds[index].mean())
    ratios = [speeds.seeds[index] / base for index in order]
    colors = [look_of(speeds.places[index])["color"] for index in order]
    title = f"training speed relative to {speeds.labels[speeds.reference]}"
    numbers = [f"{each.mean():.2f} times\n{_speed_text(base * each.mean())}" for each in ratios]
    draw_bars(ax, [texts[index] for index in order], ratios, numbers, colors, textwrap.fill(title, 64))
    ax.axvline(1, color="0.35", linestyle=":", linewidth=1)


def _speed_text(speed: float) -> str:
    return f"{speed:,.{0 if speed >= 100 else 1}f} samples/s"


# ---------------------------------------------------------------------------- the MLP multiplier


def draw_multipliers(tasks: Tasks) -> Figure | None:
    """Result and parameters over the MLP multiplier. None where no runs differ in it alone."""
    panels = {task: found for task, rows in tasks.items() if (found := sweeps_of(rows))}
    if not panels:
        return None
    texts, titles, shapes = {}, [], []
    for task, sweeps in panels.items():
        labels, title = labels_of([_common(sweep) for sweep in sweeps])
        texts[task] = [textwrap.fill(label, 66) for label in labels]
        titles.append(title)
        shapes.append(legend_shape(texts[task]))
    figure, blocks = new_blocks(titles, [2.8 + LINE * (lines + 1) for _, lines in shapes])
    for block, (columns, _), (task, sweeps) in zip(blocks, shapes, panels.items(), strict=True):
        axes = block.subplots(1, 2)
        for place, (text, sweep) in enumerate(zip(texts[task], sweeps, strict=True)):
            _draw_sweep(axes, place, text, sweep)
        _style_sweep(axes, sweeps)
        seeds = any(len(row.result) > 1 for sweep in sweeps for row in sweep)
        add_legend(block, axes[0], columns, "mean over seeds, bar: one standard deviation" if seeds else None)
    return figure


def sweeps_of(rows: Iterable[Row]) -> list[list[Row]]:
    """Groups of finished rows that are equal but for the multiplier, of which each has two or more, in its order.

    Experiments of several names are one group, unless two of them have the same multiplier.
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
    """The first row, under what is common to all names of the sweep: the multiplier is not in it."""
    names = ["+".join(part for part in row.experiment.split("+") if not part.startswith(MULTIPLIER)) for row in sweep]
    differs = tuple(part for part in sweep[0].differs if not part.startswith(MULTIPLIER))
    return replace(sweep[0], experiment=" / ".join(dict.fromkeys(names)), differs=differs)


def _draw_sweep(axes: Sequence[Axes], place: int, text: str, sweep: Sequence[Row]) -> None:
    results = [row.metric.scale * row.result for row in sweep]
    look = look_of(place) | dict(linewidth=1.3, linestyle=("-", "--", ":", "-.")[place % 4])
    multipliers = [_multiplier(row) for row in sweep]
    means, deviations = ([getattr(values, name)() for values in results] for name in ("mean", "std"))
    axes[0].errorbar(multipliers, means, deviations, label=text, markersize=5, capsize=2.5, **look)
    millions = [row.runs[0].config["parameters"] / 1e6 for row in sweep]
    axes[1].plot(multipliers, millions, markersize=max(3, 8 - 2 * place), **look)  # curves that coincide all show


def _style_sweep(axes: Sequence[Axes], sweeps: Sequence[Sequence[Row]]) -> None:
    rows = [row for sweep in sweeps for row in sweep]
    multipliers = sorted({_multiplier(row) for row in rows})
    choose_scale(axes[1], "y", [row.runs[0].config["parameters"] for row in rows])
    for ax, name in zip(axes, (result_title(rows), "parameters (millions)"), strict=True):
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_locator(FixedLocator(multipliers))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set(xlabel="MLP multiplier (neurons over all heads per n_embd)", ylabel=name)
        style_axes(ax, "y")
