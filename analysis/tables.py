"""Markdown tables of runs, and the numbers in them."""

import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import binomtest, t

from analysis.reading import Row
from training.config import UserError
from training.files import written_whole
from training.metrics import Metric

CONFIDENCE = 0.95  # of every interval
NONE = "\N{EN DASH}"  # empty cell
NOTE = (
    "Mean over seeds ± standard deviation (n - 1); median best epoch and seconds. Test: weights of the best epoch, or "
    "of the last one if the run trained on its validation images. Seconds on different hardware are not averaged."
)


def check_output(output: Path) -> None:
    """Raises UserError if the path is a folder."""
    if not output.name or output.is_dir():
        raise UserError(f"--output {output} is a folder: add a file name without suffix")


def write_tables(output: Path, table: pd.DataFrame, lines: Iterable[str]) -> tuple[Path, Path]:
    """Writes the path output with .md (the lines) and .csv (the table); returns both. Makes the folder."""
    report, numbers = (output.with_name(f"{output.name}{suffix}") for suffix in (".md", ".csv"))
    with written_whole(report) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return report, write_csv(numbers, table)


def write_csv(path: Path, table: pd.DataFrame) -> Path:
    """Writes the table without its index; returns the path. Makes the folder."""
    with written_whole(path) as partial:
        table.to_csv(partial, index=False)
    return path


def markdown_table(titles: Sequence[str], lines: Iterable[Sequence[str]], left: Sequence[str] = ()) -> list[str]:
    """Lines of a table. left: titles of the columns aligned left; all others are aligned right."""
    rule = "|".join(" --- " if title in left else " ---: " for title in titles)
    return [_line(titles), f"|{rule}|", *map(_line, lines)]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def results_table(rows: Sequence[Row]) -> list[str]:
    """One line for each row, all on one data set; with a column of folders if the rows have any."""
    title = rows[0].metric.title
    titles = ["experiment", "parameters", "seeds", f"test {title}", f"best validation {title}"]
    titles += ["best epoch", "epochs", "seconds an epoch", "hardware"]
    lines = [_cells(row) for row in rows]
    if any(row.folder for row in rows):
        titles, lines = ["folder", *titles], [[row.folder, *line] for row, line in zip(rows, lines, strict=True)]
    return markdown_table(titles, lines, left=("folder", "experiment", "hardware"))


def _cells(row: Row) -> list[str]:
    line = row.record()
    best = line[f"best_val_{row.metric.key}_mean"]
    counts = [str(line["seeds"])] * bool(row.finished)
    counts += [f"{line['seeds_not_finished']} not finished"] * bool(row.unfinished)
    done = "" if line["epochs_done"] == line["epochs"] else f"{line['epochs_done']} of "
    return [
        row.experiment + (f" ({line['differs_in']})" if row.differs else ""),
        f"{line['parameters']:,}",
        " and ".join(counts),
        _test_cell(row),
        "trained on it" if math.isnan(best) else row.metric.number(best),
        f"{line['best_epoch_median']:g}",
        f"{done}{line['epochs']}",
        number_cell(line["epoch_time_sec_median"], ".3g"),
        line["hardware"],
    ]


def number_cell(value: float, form: str) -> str:
    """The number in this format, or NONE for NaN."""
    return NONE if math.isnan(value) else format(value, form)


def _test_cell(row: Row) -> str:
    """The test result, or why there is none."""
    if not len(row.test):
        return "no test part" if row.finished else "not finished"
    return mean_and_spread(row.metric, row.test)


def accuracy_interval(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of an accuracy measured on n images (Wilson 1927); it covers the choice of test images only."""
    interval = binomtest(hits, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over the first axis and the ends of its 95 % interval by Student's t. values: (n, ...).

    NaN is left out; where fewer than two values are left, the ends are NaN.
    """
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # of NumPy, where nothing is left
        mean, sd = np.nanmean(values, 0), np.nanstd(values, 0, ddof=1)
    n = (~np.isnan(values)).sum(0).clip(min=1)
    half = t.ppf((1 + CONFIDENCE) / 2, n - 1) * sd / np.sqrt(n)
    return mean, mean - half, mean + half


def mean_and_spread(metric: Metric, values: pd.Series) -> str:
    """Mean in the metric's unit, with the standard deviation if there are several. values: (seeds,) as stored."""
    spread = f" ± {metric.number(values.std())}" if len(values) > 1 else ""
    return f"{metric.number(values.mean())}{spread}"
