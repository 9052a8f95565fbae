"""What runs left on disk, read back and grouped: for every script that makes tables or plots of them."""

import io
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from training.config import UserError
from training.metrics import METRICS, Metric

Task = tuple[str, str]  # name of the data and key of the metric: results of one task can be compared
SMALL = "small_cpu"  # end of the names of folders with runs of reduced size
DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError)  # what reading a damaged file can raise


@dataclass(frozen=True)
class RunFiles:
    """What the files of one run say."""

    folder: Path
    config: dict
    """config.json"""
    epochs: pd.DataFrame
    """metrics.csv, indexed by epoch, from 1"""
    summary: dict | None
    """summary.json, None where the run is not finished"""

    @property
    def fields(self) -> dict:
        """All fields that decide the result, but the seed; names are unique over model and training.

        What is None is left out: runs of earlier versions may lack it.
        """
        model_class = {"model_class": self.config["model_class"]}
        data = {"data": self.config["data"]["name"]}
        fields = model_class | data | self.config["config"]["model"] | self.train
        return {key: value for key, value in fields.items() if value is not None and key != "seed"}

    @property
    def train(self) -> dict:
        return self.config["config"]["train"]

    @property
    def is_small(self) -> bool:
        """Whether it lies in a folder of runs of reduced size: <SMALL>/<experiment>/seed<k>."""
        return self.folder.resolve().parents[1].name.endswith(SMALL)

    @property
    def metric(self) -> Metric:
        """That of the first column val_<key> after val_loss. Raises ValueError without one, KeyError if unknown."""
        keys = [name.removeprefix("val_") for name in self.epochs if name.startswith("val_")]
        if "loss" not in keys[:-1]:
            raise ValueError("metrics.csv has no column val_<metric> after val_loss")
        return METRICS[keys[keys.index("loss") + 1]]

    @property
    def best_epoch(self) -> int:
        """The epoch whose weights were tested; before the end, the one that would be: best metric, then lowest loss."""
        if self.summary is not None:
            return self.summary["best"]["epoch"]
        columns, ascending = [f"val_{self.metric.key}", "val_loss"], [not self.metric.higher_is_better, True]
        ranked = self.epochs.sort_values(columns, ascending=ascending, kind="stable")
        return int(ranked.index[0])

    @property
    def seconds(self) -> float:
        """What all epochs took, validation included; the test is not in it."""
        return self.epochs["epoch_time_sec"].sum()

    @property
    def speed(self) -> float:
        """Median over epochs of the training samples a second, validation not counted; NaN where none are stored."""
        return self.epochs["images_per_sec"].median() if "images_per_sec" in self.epochs else math.nan

    @property
    def hardware(self) -> str:
        about = self.config["hardware"]
        return about["name"] + (f", {about['threads']} threads" if "threads" in about else "")


@dataclass(frozen=True)
class Row:
    """Runs that are averaged: one experiment, one configuration, several seeds."""

    experiment: str
    differs: tuple[str, ...]
    """fields that tell it from other configurations of the same experiment name, as "n_layer=12"; mostly none"""
    runs: tuple[RunFiles, ...]
    folder: str = ""
    """which of several folders the runs are from, where runs of the same experiment are from others, too"""

    @property
    def finished(self) -> list[RunFiles]:
        return [run for run in self.runs if run.summary is not None]

    @property
    def unfinished(self) -> list[RunFiles]:
        return [run for run in self.runs if run.summary is None]

    @property
    def counted(self) -> list[RunFiles]:
        """Those that averages are taken over: the finished ones, or all where none is."""
        return self.finished or self.unfinished

    @property
    def task(self) -> Task:
        return self.runs[0].config["data"]["name"], self.metric.key

    @property
    def metric(self) -> Metric:
        return self.runs[0].metric

    @property
    def test(self) -> pd.Series:
        """Test metric as stored, by seed, empty where there is none; its std() has n - 1, NaN for one seed."""
        tests = {run.train["seed"]: run.summary["test"] for run in self.finished}  # None for data without a test part
        return pd.Series({seed: test[self.metric.key] for seed, test in tests.items() if test is not None}, dtype=float)

    @property
    def result(self) -> pd.Series:
        """Test as stored, by seed, or the metric of the best validation where the data have no test part."""
        if len(self.test):
            return self.test
        key = f"val_{self.metric.key}"
        return pd.Series({run.train["seed"]: run.summary["best"][key] for run in self.finished}, dtype=float)

    @property
    def parts(self) -> list[str]:
        """The experiment's name, its changed fields, what it differs in, its folder where that is said."""
        return [*self.experiment.split("+"), *self.differs, *([f"in {self.folder}"] if self.folder else [])]

    def record(self) -> dict:
        """One line of results.csv; metrics as stored: those in percent as fractions."""
        runs, metric = self.counted, self.metric.key
        best = [run.epochs.loc[run.best_epoch, f"val_{metric}"] for run in runs]
        return {
            "experiment": self.experiment,
            "differs_in": ", ".join(self.differs),
            "dataset": self.task[0],
            "parameters": runs[0].config["parameters"],
            "seeds": len(self.finished),
            "seeds_not_finished": len(self.unfinished),
            f"test_{metric}_mean": self.test.mean(),
            f"test_{metric}_std": self.test.std(),
            f"best_val_{metric}_mean": np.mean(best),
            "best_epoch_median": np.median([run.best_epoch for run in runs]),
            "epochs": runs[0].train["epochs"],
            "epochs_done": min(len(run.epochs) for run in runs),
            "epoch_time_sec_median": pd.concat([run.epochs["epoch_time_sec"] for run in runs]).median(),
            "training_time_sec_median": pd.Series([run.seconds for run in self.finished], dtype=float).median(),
            "images_per_sec_median": np.median([run.speed for run in runs]),
            "hardware": "; ".join(sorted({run.hardware for run in runs})),
        }


def find_runs(root: Path) -> list[Path]:
    """Folders at any depth below root, or root itself, with the files of a run that has begun."""
    return sorted(path.parent for path in root.rglob("config.json") if (path.parent / "metrics.csv").is_file())


def read_runs(folders: Iterable[Path]) -> list[RunFiles]:
    """The runs that can be read; one line on stderr for each that cannot."""
    runs = []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except DAMAGED as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"warning: {folder} is left out, it cannot be read ({reason})", file=sys.stderr)
    return runs


def read_run(folder: Path) -> RunFiles:
    """Reads and checks one run. Raises one of DAMAGED."""
    text = (folder / "metrics.csv").read_text()
    whole = text[: text.rfind("\n") + 1]  # a last line without its end: the process was stopped while it wrote it
    epochs = pd.read_csv(io.StringIO(whole))
    config = json.loads((folder / "config.json").read_text())
    summary = folder / "summary.json"
    summary = json.loads(summary.read_text()) if summary.exists() else None
    run = RunFiles(folder, config, epochs.set_index("epoch"), summary)
    numbers = run.epochs[["train_loss", "val_loss", f"val_{run.metric.key}", "epoch_time_sec"]].to_numpy(float)
    if not len(numbers) or not np.isfinite(numbers).all():
        raise ValueError("metrics.csv has no epoch, or one without its numbers")
    last = run.summary["epochs"] if run.summary else len(numbers)
    if run.epochs.index.tolist() != list(range(1, last + 1)):
        raise ValueError(f"the epochs in metrics.csv do not count from 1 to {last}")
    Row(run.config["experiment"], (), (run,)).record()  # raises where something the tables need is missing
    return run


def make_rows(runs: Iterable[RunFiles], folder_of: Callable[[RunFiles], str] = lambda run: "") -> list[Row]:
    """Groups runs by experiment and configuration; sorted by data set, then test metric, best first.

    folder_of: which of several folders a run is from; runs from different ones are not averaged.
    """
    configurations: dict[str, dict[tuple[str, str], list[RunFiles]]] = {}
    for run in runs:
        key = (folder_of(run), json.dumps(run.fields, sort_keys=True))
        configurations.setdefault(run.config["experiment"], {}).setdefault(key, []).append(run)
    rows = []
    for experiment, groups in configurations.items():
        variants = [group[0].fields for group in groups.values()]
        varied = sorted(key for key in set().union(*variants) if len({str(each.get(key)) for each in variants}) > 1)
        in_several = len({folder for folder, _ in groups}) > 1
        for ((folder, _), group), fields in zip(groups.items(), variants, strict=True):
            differs = tuple(f"{key}={fields.get(key)}" for key in varied)
            rows.append(Row(experiment, differs, _one_run_a_seed(group), folder if in_several else ""))
    return sorted(rows, key=lambda row: (row.task, _badness(row), row.parts))


def data_title(rows: Sequence[Row]) -> str:
    """The data set of rows of one task, and whether they are runs of reduced size."""
    small = all(run.is_small for row in rows for run in row.runs)
    return f"{rows[0].task[0]}, small runs" if small else rows[0].task[0]


def result_title(rows: Sequence[Row]) -> str:
    """What the rows' results are: the test's, or the best validation's where the data have no test part."""
    part = "test" if any(len(row.test) for row in rows) or not any(row.finished for row in rows) else "best validation"
    return f"{part} {rows[0].metric.title}"


def shared_parts(rows: Sequence[Row]) -> list[str]:
    """What all rows' `parts` have beside the experiment's name."""
    return [part for part in rows[0].parts[1:] if all(part in row.parts[1:] for row in rows)]


def row_called(experiment: str, rows: Sequence[Row], flag: str, wanted: str = "run") -> Row:
    """The only row of that experiment. Raises UserError where there are none or several, naming flag and experiments.

    wanted: what rows were made of.
    """
    found = [row for row in rows if row.experiment == experiment]
    if len(found) == 1:
        return found[0]
    problem = "has runs of several configurations" if found else f"has no {wanted}"
    others = ", ".join(sorted({row.experiment for row in rows}))
    raise UserError(f"{experiment} {problem}: name another {flag} ({others})")


def _badness(row: Row) -> float:
    """The lower the better: of the result, last what has none."""
    sign = -1 if row.metric.higher_is_better else 1
    return sign * row.result.mean() if len(row.result) else math.inf


def _one_run_a_seed(runs: Iterable[RunFiles]) -> tuple[RunFiles, ...]:
    """A copy of a run is no further seed: of several, the one that got furthest counts."""
    kept: dict[int, RunFiles] = {}
    for run in sorted(runs, key=lambda run: (run.summary is None, -len(run.epochs), run.folder)):
        first = kept.setdefault(run.train["seed"], run)
        if first is not run:
            print(f"warning: {run.folder} is left out, it has the seed and fields of {first.folder}", file=sys.stderr)
    return tuple(kept[seed] for seed in sorted(kept))
