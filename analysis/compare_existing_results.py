"""Results of any runs and folders side by side: one table and one figure.

Takes runs, folders of experiments, or any folders that hold runs. Seeds are averaged within a folder, never across
folders; a run in several of the folders counts for the first. Data sets are kept apart. Use it to compare your runs
with those of others; analysis/analyze.py draws more about one folder, analysis/compare.py tests differences by seed.

    python analysis/compare_existing_results.py runs results/ablation_small_cpu
    python analysis/compare_existing_results.py runs/v2_cifar10 runs/v1_cifar10/seed0 --output plots/v1_and_v2
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from analysis.analyze import by_task, draw_final, write_results
from analysis.plotting.style import save_figure
from analysis.reading import Row, find_runs, make_rows, read_runs
from analysis.tables import check_output
from training.command_line import run_script
from training.config import ROOT, UserError


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to compare, and the output files."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """runs, or folders that hold runs at any depth"""
    output: Path = ROOT / "analysis_results" / "existing_results"
    """output files without suffix: .md, .csv, .png and .svg are added"""


def compare_results(paths: Sequence[Path], output: Path) -> tuple[Path, ...]:
    """Compares the runs in these folders; returns the files: Markdown, CSV, PNG, SVG.

    Runs that cannot be read are named and left out. Raises UserError for a path that holds no run, or if none can be
    read.
    """
    check_output(output)
    tasks = by_task(read_rows(paths))
    tables = write_results(tasks, output, "Results side by side")
    return (*tables, *save_figure(draw_final(tasks), output.with_name(f"{output.name}.png")))


def read_rows(paths: Sequence[Path]) -> list[Row]:
    """Rows with the name of their folder; by data set, best experiment first, its folders below each other."""
    if not paths:
        raise UserError("nothing to compare: name folders with runs, such as runs or results")
    names = short_names(paths)
    origin: dict[Path, str] = {}  # folder of a run -> name of the given folder
    for path in paths:
        found = find_runs(path)
        if not found:
            problem = "holds no run: name a folder with config.json and metrics.csv, at any depth"
            raise UserError(f"{path} {problem if path.is_dir() else 'is no folder'}")
        for run in found:
            origin.setdefault(run.resolve(), names[path])
    rows = make_rows(read_runs(origin), folder_of=lambda run: origin[run.folder])
    order = [(row.task, row.experiment) for row in rows]
    return sorted(rows, key=lambda row: order.index((row.task, row.experiment)))


def short_names(paths: Sequence[Path]) -> dict[Path, str]:
    """For each path its shortest end that no other path has, or the whole path."""
    parts = {path: path.resolve().parts for path in paths}
    names = {}
    for path, own in parts.items():
        others = [each for each in parts.values() if each != own]
        depths = [n for n in range(1, len(own)) if all(each[-n:] != own[-n:] for each in others)]
        names[path] = str(Path(*own[-depths[0] :])) if depths else str(path)
    return names


def main(options: Options) -> None:
    files = compare_results(options.paths, options.output)
    print(files[0].read_text(encoding="utf-8"), *files, sep="\n")


if __name__ == "__main__":
    run_script(main, __doc__)
