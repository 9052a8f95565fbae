"""The published rows, the runs that repeat them, and a verdict on each, for claims.py and update_readme.py."""

import csv
import dataclasses
import json
import re
import runpy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
from scipy import stats

import training
from analysis.reading import SMALL, Row, RunFiles, find_runs, make_rows, read_runs
from training.config import ROOT, Experiment, UserError, default_fields, parse_experiment
from training.metrics import METRICS, Metric

PUBLISHED = ROOT / "analysis" / "published_results.csv"
CONFIDENCE = 0.95
MIN_SEEDS = 3
FREE = {"seed", "precision", "compile"}  # fields in which runs of one experiment may differ: chance, and how to compute

REPRODUCED = "reproduced"
BELOW, ABOVE = "measured below the published value", "measured above the published value"
TOO_FEW, NOT_COMPARABLE, NOT_YET_RUN = "too few seeds", "not comparable", "not yet run"
OTHER_KINDS = ("estimate", "literature")  # rows that the published work did not measure: the kind, and no verdict
VERDICTS = (REPRODUCED, BELOW, ABOVE, TOO_FEW, NOT_COMPARABLE, NOT_YET_RUN, *OTHER_KINDS)


@dataclass(frozen=True)
class Published:
    """A line of published_results.csv, its cells as they stand there."""

    source: str
    """document that it is from"""
    kind: str
    """measured, or one of OTHER_KINDS"""
    experiment: str
    """its published name"""
    dataset: str
    epochs: str
    metric: str
    """test_accuracy; best_val_miou, the mean over batches; miou where no script repeats it"""
    value: str
    """in percent; of an estimate perhaps a range"""
    unit: str
    params_published: str
    note: str
    """what else was published of it"""
    script: str
    """that repeats it; empty where none does"""
    flags: str
    """that the script takes for it"""
    flags_as_run: str
    """those that repeat the published code, where it did something else than documented"""
    train_images: str
    """number that it was trained on"""
    test_images: str
    """number that it was tested on; empty where the data have no test part"""
    not_comparable: str
    """names of the reasons, if there are any, for which no run can be set against it"""
    remarks: str
    """names of what else there is to say of it"""

    @property
    def ours(self) -> Metric:
        """The metric of runs here that it is compared with."""
        return METRICS["accuracy" if self.metric == "test_accuracy" else "miou_batch"]

    @property
    def settings(self) -> list[tuple[str, str | None]]:
        """Ways to repeat it: what to call each, and its flags; None where no script repeats it."""
        if not self.script:
            return [("", None)]
        if not self.flags_as_run:
            return [("", self.flags)]
        return [("as documented", self.flags), ("as the code ran", self.flags_as_run)]


@dataclass(frozen=True)
class Claim:
    """A published row in one of its settings, beside runs of one configuration that repeat it."""

    published: Published
    setting: str
    """as documented, or as the code ran; empty where the two are one"""
    asked: Experiment | None
    """what a run has to be; None where no script repeats the row"""
    row: Row | None
    """those that are; None where there are none"""

    @property
    def experiment(self) -> str:
        """Its name here, and what tells the configuration from others of that name."""
        if self.asked is None:
            return "none"
        differs = f" ({', '.join(self.row.differs)})" if self.row and self.row.differs else ""
        return f"`{self.asked.name}`{differs}"

    @property
    def values(self) -> pd.Series:
        """(seeds,) what stands beside the published value, as stored."""
        if self.row is None:
            return pd.Series(dtype=float)
        if self.published.metric == "test_accuracy":
            return self.row.test
        return pd.Series([run.epochs[f"val_{self.published.ours.key}"].max() for run in self.row.runs])

    @property
    def interval(self) -> tuple[float, float] | None:
        """That of `prediction_interval`, where the verdict rests on it."""
        decides = self.published.kind == "measured" and not self.published.not_comparable
        return prediction_interval(self.values) if decides and len(self.values) >= MIN_SEEDS else None

    @property
    def verdict(self) -> str:
        """One of VERDICTS."""
        if self.published.kind != "measured":
            return self.published.kind
        if self.published.not_comparable:
            return NOT_COMPARABLE
        if not self.interval:
            return TOO_FEW if len(self.values) else NOT_YET_RUN
        low, high = self.interval
        value = float(self.published.value) / self.published.ours.scale
        return BELOW if value > high else ABOVE if value < low else REPRODUCED


def prediction_interval(values: Sequence[float]) -> tuple[float, float]:
    """Where one further run falls with 95 % probability, if runs are normal draws. values: (n,), n at least 2.

    mean ± t(n - 1, 0.975) s sqrt(1 + 1 / n), s with n - 1: Hahn and Meeker, Statistical Intervals (1991).
    """
    n = len(values)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(values, ddof=1) * np.sqrt(1 + 1 / n)
    return np.mean(values) - half, np.mean(values) + half


# ---------------------------------------------------------------------------- which runs count


def read_published(path: Path = PUBLISHED) -> list[Published]:
    with path.open(newline="", encoding="utf-8") as file:
        return [Published(**line) for line in csv.DictReader(file)]


def read_results(results: Path) -> list[RunFiles]:
    """All finished runs below this folder. Raises UserError where it is none."""
    if not results.is_dir():
        raise UserError(f"{results} is no folder: name the one that holds the runs with --results-dir")
    return [run for run in read_runs(find_runs(results)) if run.summary is not None]


def is_small(run: RunFiles, results: Path) -> bool:
    """Whether it lies in a folder of runs of reduced size."""
    return any(part.endswith(SMALL) for part in (results.resolve().name, *run.folder.relative_to(results).parts))


def claims_of(runs: Iterable[RunFiles], published: Sequence[Published]) -> list[Claim]:
    """Every published row in each of its settings; a claim for each configuration that runs repeat it with.

    runs: finished, and not small.
    """
    claims, runs = [], list(runs)
    for line in published:
        for setting, flags in line.settings:
            asked = None if flags is None else asked_of(line.script, flags)
            counted = [_called(run, asked.name) for run in runs if asked and not mismatches(run, line, asked)]
            rows = sorted(make_rows(counted), key=lambda row: row.differs) or [None]
            claims += [Claim(line, setting, asked, row) for row in rows]
    return claims


def not_counted(runs: Iterable[RunFiles], claims: Sequence[Claim]) -> dict[Path, list[str]]:
    """Runs that bear the name of a row's experiment and do not repeat it: folder and reasons."""
    reasons = {}
    for run in runs:
        alike = [claim for claim in claims if claim.asked and claim.asked.name == run.config["experiment"]]
        if alike and (differ := mismatches(run, alike[0].published, alike[0].asked)):
            reasons[run.folder] = differ
    return reasons


@cache
def asked_of(script: str, flags: str) -> Experiment:
    """What a script of the repository trains with these flags: its call of launch is noted, not made.

    So the configuration stands in the script alone.
    """
    with mock.patch.object(training, "launch") as launch:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    (name,), configs = launch.call_args
    return parse_experiment(name, **configs, description=script, args=flags.split())


def mismatches(run: RunFiles, published: Published, asked: Experiment) -> list[str]:
    """Why a finished run does not repeat a row in the setting asked: fields and facts that differ; empty if it does.

    Facts are those of the published row, so that a script that was changed since makes no reproductions.
    """
    wanted = _decisive(_plain(asked.fields()), type(asked.model).__name__)
    wanted |= {"data": published.dataset, "epochs": int(published.epochs), "epochs done": int(published.epochs)}
    wanted |= {"training images": int(published.train_images), "test images": int(published.test_images or 0)}
    defaults = {
        "model": default_fields(asked.model),
        "train": default_fields(asked.train),
    }  # of fields younger than the run
    stored = {part: defaults[part] | run.config["config"][part] for part in defaults}
    images = run.summary.get("images", {})
    found = _decisive(stored, run.config["model_class"])
    found |= {"data": run.config["data"]["name"], "epochs done": run.summary["epochs"]}
    found |= {"training images": images.get("train"), "test images": images.get("test")}
    differ = [key for key in sorted(wanted.keys() | found.keys()) if wanted.get(key) != found.get(key)]
    reasons = [f"{key} is {found.get(key)}, not {wanted.get(key)}" for key in differ]
    lacks = f"val_{published.ours.key}" not in run.epochs
    return [*reasons, f"metrics.csv has no val_{published.ours.key}"] if lacks else reasons


def _decisive(fields: dict[str, dict], model_class: str) -> dict[str, Any]:
    """The fields of model and training in which a run must not differ; names are unique over both."""
    decisive = {"model_class": model_class} | fields["model"] | fields["train"]
    if start := decisive.get("start_from"):  # RUN-seedK-best.pt, as config.name_of_file has it
        decisive["start_from"] = re.sub(rf"\+({'|'.join(FREE)})=[^+-]*|-seed\d+", "", start)
    return {key: value for key, value in decisive.items() if key not in FREE}


def _plain(values: dict) -> dict:
    """As config.json gives them back: tuples are lists."""
    return json.loads(json.dumps(values))


def _called(run: RunFiles, name: str) -> RunFiles:
    """The run under that name: what it is, not what it is called, decides which runs are averaged."""
    return dataclasses.replace(run, config=run.config | {"experiment": name})
