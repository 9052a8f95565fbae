"""Reads run folders and groups their runs into rows: used by every script that makes tables or figures of runs."""

import contextlib
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from models import build_config
from training.batchnorm import has_batchnorm
from training.config import OWN_FILES, UserError
from training.experiment import Configuration
from training.metrics import METRICS, Metric
from training.stored import (
    SMALL_FILES,
    Damaged,
    configuration_of,
    first_line,
    hardware_of,
    read_config,
    read_metrics,
    read_summary,
)

Task = tuple[str, str]  # data set and key of the metric; results of one task can be compared
SMALL = "small_cpu"  # folders of reduced-size runs have names that end in this


@dataclass(frozen=True)
class RunFiles:
    """The contents of one run's files."""

    folder: Path
    config: dict
    """config.json"""
    epochs: pd.DataFrame
    """metrics.csv, indexed by epoch, from 1"""
    summary: dict | None
    """summary.json; None if the run is not finished"""

    @cached_property
    def configuration(self) -> Configuration:
        """Fields younger than the run have their defaults."""
        return configuration_of(self.config)

    @property
    def fields(self) -> dict:
        """All that decides the result but the seed: equal if runs may be averaged.

        The configuration, the data, and whether BatchNorm saw shares of the batch. The run with the same seed that a
        training starts from counts as the same start for all seeds.
        """
        fields, data = self.configuration.flat(), self.config["data"]
        seed = fields.pop("seed")
        fields |= {
            "data": data["name"],
            "text_sha256": data.get("sha256"),
            "images": data.get("images"),  # of each part
            "batchnorm_of_shares": self.normalised_shares,
        }
        if self.train.get("dataset") in OWN_FILES:
            fields["files"] = data.get("file_names_and_sizes")
            fields["boxes"] = data.get("boxes")  # of detection
        for key in ("start_from", "encoder"):
            if fields.get(key):
                fields[key] = re.sub(rf"-seed{seed}(?!\d)", "", str(fields[key]))
        return fields

    @cached_property
    def normalised_shares(self) -> bool:
        """Whether BatchNorm normalised each process's share of a batch by itself; True of an unknown model."""
        if self.train.get("sync_batchnorm") or all(each.get("processes", 1) == 1 for each in hardware_of(self.config)):
            return False
        with contextlib.suppress(ValueError, TypeError), torch.device("meta"):
            return has_batchnorm(build_config(self.config["model_class"], self.config["config"]["model"]).build())
        return True

    @property
    def train(self) -> dict:
        return self.config["config"]["train"]

    @property
    def is_small(self) -> bool:
        """Whether it lies in a folder of reduced-size runs: <...SMALL>/<experiment>/seed<k>."""
        return self.folder.resolve().parents[1].name.endswith(SMALL)

    @property
    def metric(self) -> Metric:
        """Metric of the first column val_<key> after val_loss. Raises ValueError if missing, KeyError if unknown."""
        keys = [name.removeprefix("val_") for name in self.epochs if name.startswith("val_")]
        if "loss" not in keys[:-1]:
            raise ValueError("metrics.csv has no column val_<metric> after val_loss")
        return METRICS[keys[keys.index("loss") + 1]]

    @property
    def best_epoch(self) -> int:
        """The epoch whose weights were tested; of an unfinished run the best so far: best metric, then lowest loss.

        The last so far, if it trains on its validation images.
        """
        if self.summary is not None:
            return self.summary["best"]["epoch"]
        if self.train.get("train_val"):
            return int(self.epochs.index[-1])
        columns, ascending = [f"val_{self.metric.key}", "val_loss"], [not self.metric.higher_is_better, True]
        ranked = self.epochs.sort_values(columns, ascending=ascending, kind="stable")
        return int(ranked.index[0])

    @property
    def seconds(self) -> float:
        """Seconds of all epochs, with validation, without the test."""
        return self.epochs["epoch_time_sec"].sum()

    @property
    def speed(self) -> float:
        """Median over epochs of training samples a second, without validation; NaN if not stored."""
        return self.epochs["images_per_sec"].median() if "images_per_sec" in self.epochs else math.nan

    @property
    def hardware(self) -> str:
        """All that it was trained on, one after the other."""
        return ", then ".join(map(_described, hardware_of(self.config)))


def _described(hardware: dict) -> str:
    threads = hardware.get("threads")
    several = f", {hardware['processes']} processes" if hardware.get("processes", 1) > 1 else ""
    return hardware["name"] + (f", {threads} thread{'s' * (threads != 1)}" if threads else "") + several


@dataclass(frozen=True)
class Row:
    """Runs that are averaged: one experiment and configuration, several seeds."""

    experiment: str
    differs: tuple[str, ...]
    """fields that distinguish it from other configurations of the same name, as "n_layer=12"; usually none"""
    runs: tuple[RunFiles, ...]
    folder: str = ""
    """name of the folder that the runs are from, if the caller distinguishes folders"""

    @property
    def finished(self) -> list[RunFiles]:
        return [run for run in self.runs if run.summary is not None]

    @property
    def unfinished(self) -> list[RunFiles]:
        return [run for run in self.runs if run.summary is None]

    @property
    def counted(self) -> list[RunFiles]:
        """The runs that are averaged: the finished ones, or all if none is finished."""
        return self.finished or self.unfinished

    @property
    def task(self) -> Task:
        return self.runs[0].config["data"]["name"], self.metric.key

    @property
    def metric(self) -> Metric:
        return self.runs[0].metric

    @property
    def test(self) -> pd.Series:
        """Test metric as stored, by seed; empty without a test part. Its std() divides by n - 1: NaN for one seed."""
        tests = {run.train["seed"]: run.summary["test"] for run in self.finished}  # None without a test part
        return pd.Series({seed: test[self.metric.key] for seed, test in tests.items() if test is not None}, dtype=float)

    @property
    def result(self) -> pd.Series:
        """Test metric as stored, by seed, or the best validation metric if the data have no test part."""
        if len(self.test):
            return self.test
        key = f"val_{self.metric.key}"
        return pd.Series({run.train["seed"]: run.summary["best"][key] for run in self.finished}, dtype=float)

    @property
    def hardware(self) -> list[str]:
        """All that the counted runs were trained on, sorted."""
        return sorted({run.hardware for run in self.counted})

    @property
    def parts(self) -> list[str]:
        """The experiment's name, its changed fields, and the fields in `differs`."""
        return [*self.experiment.split("+"), *self.differs]

    def record(self) -> dict:
        """One line of results.csv; metrics as stored (percentages as fractions).

        NaN: the validation metric of runs that trained on their validation images, and times on different hardware.
        """
        runs, metric = self.counted, self.metric.key
        best = [run.epochs.loc[run.best_epoch, f"val_{metric}"] for run in runs]
        one = 1.0 if len(self.hardware) == 1 else math.nan  # times on different hardware are not averaged
        return {
            "experiment": self.experiment,
            "differs_in": ", ".join(self.differs),
            "dataset": self.task[0],
            "parameters": runs[0].config["parameters"],
            "seeds": len(self.finished),
            "seeds_not_finished": len(self.unfinished),
            f"test_{metric}_mean": self.test.mean(),
            f"test_{metric}_std": self.test.std(),
            f"best_val_{metric}_mean": math.nan if runs[0].train.get("train_val") else np.mean(best),
            "best_epoch_median": np.median([run.best_epoch for run in runs]),
            "epochs": runs[0].train["epochs"],
            "epochs_done": min(len(run.epochs) for run in runs),
            "epoch_time_sec_median": one * pd.concat([run.epochs["epoch_time_sec"] for run in runs]).median(),
            "training_time_sec_median": one * pd.Series([run.seconds for run in self.finished], dtype=float).median(),
            "images_per_sec_median": one * np.median([run.speed for run in runs]),
            "hardware": "; ".join(self.hardware),
        }


def find_runs(root: Path) -> list[Path]:
    """Folders at any depth in root, or root itself, that hold two of config.json, metrics.csv and summary.json.

    Two, so that a run that has lost one of them is found, and named when it cannot be read.
    """
    found = Counter(path.parent for name in SMALL_FILES for path in root.rglob(name))
    return sorted(folder for folder, files in found.items() if files >= 2)


def read_runs(folders: Iterable[Path]) -> list[RunFiles]:
    """The runs that can be read; a warning on stderr names each one that cannot and is left out."""
    runs = []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except Damaged as error:
            print(f"warning: {folder} is left out: {error}", file=sys.stderr)
    return runs


def read_run(folder: Path) -> RunFiles:
    """Reads and checks one run. Raises Damaged."""
    run = RunFiles(folder, read_config(folder), read_metrics(folder), read_summary(folder))
    path = folder / "metrics.csv"
    try:
        numbers = run.epochs[f"val_{run.metric.key}"].to_numpy(float)
    except (ValueError, KeyError) as error:
        raise Damaged(f"{path} is damaged ({first_line(error)}): add --resume to the run's command") from None
    done = run.summary["epochs"] if run.summary else len(numbers)
    if not np.isfinite(numbers).all() or len(numbers) != done:
        raise Damaged(f"{path} has {len(numbers)} epochs, summary.json {done}, or a metric is missing: train it again")
    if run.summary and run.summary["best"]["epoch"] not in run.epochs.index:
        raise Damaged(f"{folder / 'summary.json'} names a best epoch that metrics.csv does not have: train it again")
    _check_results(run)
    return run


def _check_results(run: RunFiles) -> None:
    """Raises Damaged for results that are impossible, or that contradict each other between the run's files."""
    metric, problems = run.metric, []
    key, folder = f"val_{metric.key}", run.folder
    values = {("metrics.csv", key): run.epochs[key].to_numpy(float)}
    if (run.epochs["epoch_time_sec"] < 0).any():
        problems.append(("metrics.csv", "a time is negative"))
    if summary := run.summary:
        best, test = summary["best"], summary["test"]
        values["summary.json", f"best.{key}"] = best.get(key)
        tested = summary.get("images", {}).get("test", 0)
        if test is not None or tested:
            values["summary.json", f"test.{metric.key}"] = (test or {}).get(metric.key)
        if summary["epochs"] != run.train["epochs"]:
            problems.append(("summary.json", "epochs differ from those in config.json"))
        if summary["parameters"] != run.config["parameters"]:
            problems.append(("summary.json", "parameters differ from those in config.json"))
        if not math.isclose(best.get(key) or 0, run.epochs.at[run.best_epoch, key], rel_tol=1e-6, abs_tol=1e-9):
            problems.append(("summary.json", f"best.{key} differs from metrics.csv"))
    for (file, name), value in values.items():
        numbers = np.atleast_1d(np.asarray(value, dtype=float))
        if not np.isfinite(numbers).all() or (metric.percent and not ((numbers >= 0) & (numbers <= 1)).all()):
            problems.append((file, f"{name} is missing or impossible"))
    for file, why in problems[:1]:
        raise Damaged(f"{folder / file} is damaged ({why}): train it again")


def make_rows(runs: Iterable[RunFiles], folder_of: Callable[[RunFiles], str] = lambda run: "") -> list[Row]:
    """Groups runs by experiment and configuration; sorted by data set, then result, best first.

    folder_of: name of the folder that a run is from; runs from different folders are not averaged.
    """
    configurations: dict[str, dict[tuple[str, str], list[RunFiles]]] = {}
    for run in runs:
        key = (folder_of(run), json.dumps(run.fields, sort_keys=True))
        configurations.setdefault(run.config["experiment"], {}).setdefault(key, []).append(run)
    rows = []
    for experiment, groups in configurations.items():
        variants = [group[0].fields for group in groups.values()]
        varied = sorted(key for key in set().union(*variants) if len({str(each.get(key)) for each in variants}) > 1)
        for ((folder, _), group), fields in zip(groups.items(), variants, strict=True):
            differs = tuple(f"{key}={fields.get(key)}" for key in varied)
            rows.append(Row(experiment, differs, _one_run_a_seed(group), folder))
    return sorted(rows, key=lambda row: (row.task, _badness(row), row.parts, row.folder))


def data_title(rows: Sequence[Row]) -> str:
    """The data set of rows of one task, and whether all are runs of reduced size."""
    small = all(run.is_small for row in rows for run in row.runs)
    return f"{rows[0].task[0]}, small runs" if small else rows[0].task[0]


def result_title(rows: Sequence[Row]) -> str:
    """Name of the rows' results: test metric, or best validation metric if the data have no test part."""
    part = "test" if any(len(row.test) for row in rows) or not any(row.finished for row in rows) else "best validation"
    return f"{part} {rows[0].metric.title}"


def shared_parts(rows: Sequence[Row]) -> list[str]:
    """The `parts` that all rows share, without the experiment's name."""
    return [part for part in rows[0].parts[1:] if all(part in row.parts[1:] for row in rows)]


def row_called(experiment: str, rows: Sequence[Row], flag: str, wanted: str = "run") -> Row:
    """The one row of that experiment. Raises UserError if there is none or several, naming the flag and the choices.

    wanted: what the rows are made of, for the message.
    """
    found = [row for row in rows if row.experiment == experiment]
    if not rows:
        raise UserError(f"there is no {wanted}: name another folder with --runs-dir")
    if len(found) == 1:
        return found[0]
    if found:
        settings = "; ".join(", ".join(row.differs) or row.folder for row in found)
        raise UserError(f"{experiment} has runs of several configurations ({settings}): move all but one away")
    others = ", ".join(sorted({row.experiment for row in rows}))
    raise UserError(f"{experiment} has no {wanted}: name another {flag} ({others})")


def _badness(row: Row) -> float:
    """Sorting key: best result first, rows without a result last."""
    sign = -1 if row.metric.higher_is_better else 1
    return sign * row.result.mean() if len(row.result) else math.inf


def _one_run_a_seed(runs: Iterable[RunFiles]) -> tuple[RunFiles, ...]:
    """A copy of a run is not another seed: of several with one seed, the one with most epochs counts."""
    kept: dict[int, RunFiles] = {}
    for run in sorted(runs, key=lambda run: (run.summary is None, -len(run.epochs), run.folder)):
        first = kept.setdefault(run.train["seed"], run)
        if first is not run:
            print(f"warning: {run.folder} is left out: same seed and fields as {first.folder}", file=sys.stderr)
    return tuple(kept[seed] for seed in sorted(kept))
