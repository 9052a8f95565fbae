"""Any runs and folders of results side by side: one table and one figure.

Takes runs, experiments' folders, or folders that hold them at any depth. Seeds of one experiment are averaged within a
given folder, never across two: where an experiment is in several, each has its own line with the folder's name and
what their configurations differ in. A run that lies in several of the given folders counts for the first. Data sets
are kept apart. Writes a table in Markdown (in percent) and CSV (in fractions), and a figure as PNG and SVG.

analyze.py draws everything about the runs of one folder; compare.py says what a change is worth, by differences to a
default that are paired by seed. Neither looks at where a run lies; this puts the runs of two places beside each other,
such as one's own and another's.

    python analysis/compare_existing_results.py runs results/ablation_small_cpu
    python analysis/compare_existing_results.py runs/v2_cifar10 runs/v1_cifar10/seed0 --output plots/v1_and_v2
"""

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
import tyro
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from analysis.plots import BAR_LABEL, LINE, bar_inches, draw_results, labels_of, legend_shape, look_of, new_blocks
from analysis.plotting.style import COLORS, save_figure
from analysis.reading import Row, data_title, find_runs, make_rows, read_runs
from analysis.tables import NOTE, results_table
from training.command_line import run_script
from training.config import ROOT, UserError

Line = tuple[str, Row]  # the name of the given folder that the row is from, and the row


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is compared, and where the table and the figure go."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """runs, or folders that hold runs at any depth"""
    output: Path = ROOT / "analysis_results" / "existing_results"
    """the files are this with .md, .csv, .png and .svg"""


def compare_results(paths: Sequence[Path], output: Path) -> tuple[Path, ...]:
    """Compares the runs in these folders; returns the files: Markdown, CSV, PNG, SVG.

    Raises UserError for a path that holds no run, or where none can be read; warns of single ones that cannot.
    """
    if not output.name:
        raise UserError(f"--output {output} is a folder: name the files in it, without .md")
    lines = read_lines(paths)
    tables = {task: list(members) for task, members in groupby(lines, key=lambda line: line[1].task)}
    output.parent.mkdir(parents=True, exist_ok=True)
    markdown, csv, picture = (output.with_name(f"{output.name}{suffix}") for suffix in (".md", ".csv", ".png"))
    text = ["# Results side by side", ""]
    for members in tables.values():
        folders, rows = zip(*members, strict=True)
        text += [f"## {data_title(rows)}", "", *results_table(rows, folders), ""]
    markdown.write_text("\n".join([*text, NOTE]) + "\n")
    pd.DataFrame([{"folder": folder} | row.record() for folder, row in lines]).to_csv(csv, index=False)
    return (markdown, csv, *save_figure(draw(list(tables.values())), picture))


def read_lines(paths: Sequence[Path]) -> list[Line]:
    """What the runs in these folders come to; by data set, best experiment first, its folders one below the other."""
    if not paths:
        raise UserError("there is nothing to compare: name folders with runs, such as runs or results")
    names = short_names(paths)
    origin: dict[Path, str] = {}  # name of the given folder, by folder of a run
    for path in paths:
        found = find_runs(path)
        if not found:
            problem = "holds no run: name a folder that holds config.json and metrics.csv, at any depth"
            raise UserError(f"{path} {problem if path.is_dir() else 'is no folder'}")
        for run in found:
            origin.setdefault(run.resolve(), names[path])
    rows = make_rows(read_runs(origin), folder_of=lambda run: origin[run.folder])
    if not rows:
        raise UserError("no run in these folders can be read")
    order = [(row.task, row.experiment) for row in rows]
    rows.sort(key=lambda row: order.index((row.task, row.experiment)))
    return [(origin[row.runs[0].folder], row) for row in rows]


def short_names(paths: Sequence[Path]) -> dict[Path, str]:
    """The shortest end of each path that no other has; the whole path where there is none."""
    parts = {path: path.resolve().parts for path in paths}
    names = {}
    for path, own in parts.items():
        others = [each for each in parts.values() if each != own]
        depths = [n for n in range(1, len(own)) if all(each[-n:] != own[-n:] for each in others)]
        names[path] = str(Path(*own[-depths[0] :])) if depths else str(path)
    return names


def draw(tables: Sequence[Sequence[Line]]) -> Figure:
    """One block a data set: bars of the results, the numbers beside; colours tell folders where there are several."""
    folders = list(dict.fromkeys(folder for lines in tables for folder, _ in lines))
    names, titles = zip(*(labels_of([row for _, row in lines]) for lines in tables), strict=True)
    labels = [[textwrap.fill(name, BAR_LABEL) for name in each] for each in names]
    columns, legend_lines = legend_shape(folders)
    inches = list(map(bar_inches, labels))
    if len(folders) > 1:
        inches[-1] += LINE * (legend_lines + 1.5)
    figure, blocks = new_blocks(titles, inches)
    for block, texts, lines in zip(blocks, labels, tables, strict=True):
        places = [folders.index(folder) if len(folders) > 1 else place for place, (folder, _) in enumerate(lines)]
        draw_results(block.subplots(), [row for _, row in lines], texts, [look_of(n)["color"] for n in places])
    if len(folders) > 1:
        handles = [Patch(color=COLORS[n % len(COLORS)], label=folder) for n, folder in enumerate(folders)]
        blocks[-1].legend(handles=handles, loc="outside lower center", title="folder", frameon=False, ncols=columns)
    return figure


def main(options: Options) -> None:
    files = compare_results(options.paths, options.output)
    print(files[0].read_text(), *files, sep="\n")


if __name__ == "__main__":
    run_script(main, __doc__)
