"""Differences of experiments to one default experiment, paired by seed.

The difference is the mean over the seeds that both have, with a 95 % confidence interval: Student's t of the paired
differences. Runs with the same seed share their validation split, so pairing removes that part of the variance. If the
data have no test part, best validation results are compared. Writes a table as Markdown (in percent) and CSV (as
fractions).

    python analysis/compare.py --default v2_cifar10
    python analysis/compare.py --runs-dir runs/sweep --default ablation --output results/ablation
    python analysis/compare.py --runs-dir results/small_cpu results/v4_small_cpu \\
        --default v4_unet+epochs=30+img_size=96+precision=bf16
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd

from analysis.reading import Row, find_runs, make_rows, read_runs, result_title, row_called
from analysis.tables import check_output, markdown_table, mean_interval, write_tables
from training.command_line import run_script
from training.config import ROOT


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to compare."""

    default: str
    """full name of the experiment that the others are compared with"""
    runs_dir: tuple[Path, ...] = (ROOT / "runs",)
    """folders with runs, at any depth"""
    output: Path = ROOT / "analysis_results" / "comparison"
    """output files without suffix: .md and .csv are added"""


def compare(runs: Sequence[Path], default: str, output: Path) -> pd.DataFrame:
    """Compares the finished runs in these folders; prints, writes and returns the table, with metrics as stored.

    default: experiment to compare with. output: path of the files without .md and .csv. Raises UserError if the default
    has no finished run, or the output no name.
    """
    check_output(output)
    rows = [row for row in make_rows(read_runs(runs)) if row.finished]
    chosen = row_called(default, rows, "--default", "finished run")
    alike = [row for row in rows if row.task == chosen.task and _is_measured_as(row, chosen)]
    table = pd.DataFrame([_line(row, chosen) for row in alike])
    lines = _markdown(table, chosen)
    print(*lines, "", *write_tables(output, table, lines), sep="\n")
    return table


def _is_measured_as(row: Row, default: Row) -> bool:
    """Whether both have a test result or neither has; warns on stderr if only one has."""
    tested, default_tested = (len(each.test) > 0 for each in (row, default))
    if tested != default_tested:
        parts = ["no test part", "a test part"]
        print(
            f"warning: {row.experiment} is left out: its data have {parts[tested]}, the default's {parts[not tested]}",
            file=sys.stderr,
        )
    return tested == default_tested


def difference_interval(values: Sequence[float], defaults: Sequence[float]) -> tuple[float, float, float]:
    """Mean of the paired differences and the ends of its confidence interval; NaN ends for a single pair.

    values, defaults: (seeds,) of the same seeds in the same order.
    """
    mean, low, high = mean_interval(np.asarray(np.subtract(values, defaults)))
    return float(mean), float(low), float(high)


def _line(row: Row, default: Row) -> dict:
    own, others = row.result, default.result
    both = sorted(own.index.intersection(others.index))
    mean = low = high = np.nan
    if row is not default and both:
        mean, low, high = difference_interval(own[both], others[both])
    return {
        "experiment": row.experiment,
        "differs_in": ", ".join(row.differs),
        "parameters": row.runs[0].config["parameters"],
        "seeds": len(own),
        "mean": own.mean(),
        "std": own.std(),
        "difference": mean,
        "difference_low": low,
        "difference_high": high,
        "pairs": 0 if row is default else len(both),
    }


def _markdown(table: pd.DataFrame, default: Row) -> list[str]:
    def number(value: float, sign: str = "") -> str:
        return "" if np.isnan(value) else default.metric.number(value, sign)

    titles = ["setting", "parameters", "seeds", result_title([default]), "standard deviation", "difference"]
    titles += ["95 % interval", "pairs"]
    lines = []
    for line in table.to_dict("records"):
        is_default = line["experiment"] == default.experiment
        setting = "default" if is_default else _changes(line["experiment"], default.experiment)
        interval = [number(line[end], "+") for end in ("difference_low", "difference_high")]
        cells = [setting + (f" ({line['differs_in']})" if line["differs_in"] else "")]
        cells += [f"{line['parameters']:,}", str(line["seeds"]), number(line["mean"]), number(line["std"])]
        pairs = "" if is_default else str(line["pairs"])
        lines.append([*cells, number(line["difference"], "+"), " to ".join(filter(None, interval)), pairs])
    return [
        "# What each change is worth",
        "",
        f"Default: `{default.experiment}`, on {default.task[0]}.",
        "",
        *markdown_table(titles, lines, ("setting",)),
        "",
        "Standard deviations over seeds (n - 1); differences over pairs of one seed; interval: Student's t.",
    ]


def _changes(experiment: str, default: str) -> str:
    """The parts of the name that the default's does not have."""
    shared = default.split("+")
    return ", ".join(part for part in experiment.split("+") if part not in shared) or experiment


def main(options: Options) -> None:
    compare([run for folder in options.runs_dir for run in find_runs(folder)], options.default, options.output)


if __name__ == "__main__":
    run_script(main, __doc__)
