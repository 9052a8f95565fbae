"""The published results, the runs that count for each, and a verdict."""

import csv
import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from analysis.reading import SMALL, Row, RunFiles, find_runs, make_rows, read_runs
from analysis.tables import CONFIDENCE
from training.command_line import experiment_of
from training.config import ROOT, UserError
from training.experiment import Configuration, Experiment
from training.metrics import METRICS, Metric

PUBLISHED = ROOT / "analysis" / "published_results.csv"
MIN_SEEDS = 3
# fields in which a run may differ from the published configuration
FREE = {"seed", "precision", "compile", "sync_batchnorm"}

REPRODUCED = "reproduced"
BELOW, ABOVE = "measured below the published value", "measured above the published value"
TOO_FEW, NOT_COMPARABLE, NOT_RUN = "too few seeds", "not comparable", "not run yet"
OTHER_KINDS = ("estimate", "literature")  # rows that the published work did not measure; shown in place of a verdict
VERDICTS = (REPRODUCED, BELOW, ABOVE, TOO_FEW, NOT_COMPARABLE, NOT_RUN, *OTHER_KINDS)


@dataclass(frozen=True)
class Published:
    """A line of published_results.csv, as text."""

    source: str  # document
    kind: str  # measured, estimate or literature
    experiment: str  # published name
    dataset: str
    epochs: str
    metric: str  # test_accuracy; best_val_miou, a mean over batches; miou if no script repeats the row
    value: str  # percent; an estimate may be a range
    unit: str
    params_published: str
    note: str  # what else was published about it
    script: str  # script that repeats it; empty if there is none
    flags: str  # flags of the script, as documented
    flags_as_run: str  # flags that repeat the published code, if it differs from its documentation
    train_images: str  # number of training images
    test_images: str  # number of test images; empty if the data have no test part
    not_comparable: str  # keys of claims.NOTES: reasons why no run can be compared with it
    remarks: str  # keys of claims.NOTES: other remarks

    @property
    def ours(self) -> Metric:
        """Our metric that corresponds to the published one."""
        return METRICS["accuracy" if self.metric == "test_accuracy" else "miou_batch"]

    @property
    def settings(self) -> list[tuple[str, str | None]]:
        """Ways to repeat it: name and flags of each; flags are None if no script repeats it."""
        if not self.script:
            return [("", None)]
        if not self.flags_as_run:
            return [("", self.flags)]
        return [("as documented", self.flags), ("as the code ran", self.flags_as_run)]


@dataclass(frozen=True)
class Claim:
    """A published row in one setting, with the runs of one configuration that repeat it."""

    published: Published
    setting: str
    """as documented, or as the code ran; empty if they are the same"""
    asked: Experiment | None
    """the experiment that repeats it; None if no script does"""
    row: Row | None
    """its runs; None if there are none"""

    @property
    def experiment(self) -> str:
        """The experiment's name here, with the fields that distinguish its configuration."""
        if self.asked is None:
            return "none"
        differs = f" ({', '.join(self.row.differs)})" if self.row and self.row.differs else ""
        return f"`{self.asked.name}`{differs}"

    @property
    def values(self) -> pd.Series:
        """(seeds,) measured values of the published metric, as stored."""
        if self.row is None:
            return pd.Series(dtype=float)
        if self.published.metric == "test_accuracy":
            return self.row.test
        return pd.Series([run.epochs[f"val_{self.published.ours.key}"].max() for run in self.row.runs])

    @property
    def interval(self) -> tuple[float, float] | None:
        """The prediction interval that decides the verdict; None if there is no such verdict."""
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
            return TOO_FEW if len(self.values) else NOT_RUN
        low, high = self.interval
        value = float(self.published.value) / self.published.ours.scale
        return BELOW if value > high else ABOVE if value < low else REPRODUCED


def prediction_interval(values: Sequence[float]) -> tuple[float, float]:
    """Where one more run falls with 95 % probability if runs are normally distributed. values: (n,), n at least 2.

    mean ± t(n - 1, 0.975) s sqrt(1 + 1 / n), s with n - 1: Hahn and Meeker, Statistical Intervals (1991).
    """
    n = len(values)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(values, ddof=1) * np.sqrt(1 + 1 / n)
    return np.mean(values) - half, np.mean(values) + half


# ---------------------------------------------------------------------------- which runs count


def read_published() -> list[Published]:
    with PUBLISHED.open(newline="", encoding="utf-8") as file:
        return [Published(**line) for line in csv.DictReader(file)]


def read_results(results: Path) -> list[RunFiles]:
    """All finished runs in this folder, at any depth. Raises UserError if there is no such folder."""
    if not results.is_dir():
        raise UserError(f"{results} is no folder: name the one that holds the runs with --results-dir")
    return [run for run in read_runs(find_runs(results)) if run.summary is not None]


def is_small(run: RunFiles, results: Path) -> bool:
    """Whether it lies in a folder of reduced-size runs."""
    return any(part.endswith(SMALL) for part in (results.resolve().name, *run.folder.relative_to(results).parts))


def claims_of(runs: Iterable[RunFiles], published: Sequence[Published]) -> list[Claim]:
    """For every published row and setting a claim for each configuration of the runs that repeat it, at least one.

    runs: finished runs at full size.
    """
    claims, runs = [], list(runs)
    for line in published:
        for setting, flags in line.settings:
            asked = None if flags is None else experiment_of(line.script, flags)
            counted = [_called(run, asked.name) for run in runs if asked and not mismatches(run, line, asked)]
            rows = sorted(make_rows(counted), key=lambda row: row.differs) or [None]
            claims += [Claim(line, setting, asked, row) for row in rows]
    return claims


def not_counted(runs: Iterable[RunFiles], claims: Sequence[Claim]) -> dict[Path, list[str]]:
    """Runs that have the name of a published row's experiment but do not repeat it: folder -> reasons."""
    reasons = {}
    for run in runs:
        alike = [claim for claim in claims if claim.asked and claim.asked.name == run.config["experiment"]]
        if alike and (differ := mismatches(run, alike[0].published, alike[0].asked)):
            reasons[run.folder] = differ
    return reasons


def mismatches(run: RunFiles, published: Published, asked: Experiment) -> list[str]:
    """Why a finished run does not repeat a row in the setting asked: fields and facts that differ; empty if it does.

    Facts are those of the published row, so that a run of a script that was changed since does not count.
    """
    images = run.summary.get("images", {})
    facts = {  # name: (measured, published)
        "data": (run.config["data"]["name"], published.dataset),
        "epochs": (run.train["epochs"], int(published.epochs)),
        "epochs done": (run.summary["epochs"], int(published.epochs)),
        "training images": (images.get("train"), int(published.train_images)),
        "test images": (images.get("test"), int(published.test_images or 0)),
    }
    wrong = [f"{name} is {ours}, not {theirs}" for name, (ours, theirs) in facts.items() if ours != theirs]
    ours, theirs = (_any_start(each) for each in (asked.configuration, run.configuration))
    wrong += ["metrics.csv has no val_" + published.ours.key] * (f"val_{published.ours.key}" not in run.epochs)
    wrong += ["BatchNorm saw shares of the batch (several processes)"] * run.normalised_shares
    return [*ours.differences(theirs, FREE | facts.keys()), *wrong]


def _any_start(configuration: Configuration) -> Configuration:
    """The file that a training starts from without seed and FREE fields: RUN+precision=bf16-seed1-best.pt."""
    start = configuration.train.get("start_from")
    if not start:
        return configuration
    start = re.sub(rf"\+({'|'.join(FREE)})=[^+-]*|-seed\d+", "", start)
    return dataclasses.replace(configuration, train=configuration.train | {"start_from": start})


def _called(run: RunFiles, name: str) -> RunFiles:
    """The run under another name: configurations, not names, decide which runs are averaged."""
    return dataclasses.replace(run, config=run.config | {"experiment": name})
