"""The published comparisons: what the documents say of two or more of their rows, and the same difference measured."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd

from analysis.compare import difference_interval
from analysis.published import FREE, MIN_SEEDS, NOT_RUN, TOO_FEW, Claim

HOLDS, OPPOSITE, OPEN = "holds", "the opposite", "cannot be told from none"


@dataclass(frozen=True)
class Difference:
    """A statement that a sum of rows, each with its sign, is above zero."""

    says: str
    source: str
    """document"""
    rows: str
    """rows of published_results.csv as DATASET/EXPERIMENT with their signs"""

    @property
    def terms(self) -> list[tuple[int, str, str]]:
        """Sign, data set and published name of each row."""
        found = re.findall(r"([-+]?) ?(\w+)/(\w+)", self.rows)
        return [(-1 if sign == "-" else 1, dataset, name) for sign, dataset, name in found]


DIFFERENCES = (
    Difference("v2 is better than ViT-Tiny", "spec_current", "cifar10/v2_raw - cifar10/vit_tiny"),
    Difference("v2 is better than v1", "spec_current", "cifar10/v2_raw - cifar10/v1"),
    Difference("raw scores are better than softmax in v2", "spec_current", "cifar10/v2_raw - cifar10/v2_softmax"),
    Difference("v2 with softmax is better than v1", "spec_current", "cifar10/v2_softmax - cifar10/v1"),
    Difference("v3 is worse than v2", "spec_current", "cifar10/v2_raw - cifar10/v3_scaled_ln"),
    Difference("v2 is better than ViT-Tiny on CIFAR-100", "spec_current", "cifar100/v2_raw - cifar100/vit_tiny"),
    Difference(
        "its lead over ViT-Tiny grows from CIFAR-10 to CIFAR-100",
        "spec_current",
        "cifar100/v2_raw - cifar100/vit_tiny - cifar10/v2_raw + cifar10/vit_tiny",
    ),
    Difference("v1 is better than ViT-Tiny after ten epochs", "spec_first", "cifar10/v1_mlp32 - cifar10/vit_tiny"),
    Difference("32 neurons per dimension are better than 128", "spec_first", "cifar10/v1_mlp32 - cifar10/v1_mlp128"),
)


@dataclass(frozen=True)
class Measured:
    """A difference in one setting, with the runs that repeat its rows."""

    difference: Difference
    setting: str
    """as documented, or as the code ran; empty if they are the same"""
    claims: tuple[Claim, ...]
    """one for each term, all in one precision"""

    @property
    def published(self) -> float:
        """In points."""
        return sum(
            sign * float(claim.published.value)
            for (sign, *_), claim in zip(self.difference.terms, self.claims, strict=True)
        )

    @property
    def values(self) -> pd.Series:
        """(seeds,) the difference for each seed that all rows have, as stored."""
        signed = [sign * claim.values for (sign, *_), claim in zip(self.difference.terms, self.claims, strict=True)]
        return pd.concat(signed, axis=1, join="inner").sum(axis=1)

    @property
    def interval(self) -> tuple[float, float, float]:
        """Mean over seeds and the ends of its 95 % interval (Student's t)."""
        return difference_interval(self.values, np.zeros(len(self.values)))

    @property
    def precision(self) -> str:
        """Of the runs; empty if there are none."""
        return next((claim.row.runs[0].train["precision"] for claim in self.claims if claim.row), "")

    @property
    def verdict(self) -> str:
        """By three seeds or more: whether the interval is above zero, below it, or around it."""
        if len(self.values) < MIN_SEEDS:
            return TOO_FEW if len(self.values) else NOT_RUN
        _, low, high = self.interval
        return HOLDS if low > 0 else OPPOSITE if high < 0 else OPEN


def measure_differences(claims: Sequence[Claim]) -> Iterator[Measured]:
    """Every difference in every setting of its rows. claims: of all published rows."""
    for difference in DIFFERENCES:
        of_terms = [_claims_of(claims, difference.source, *place) for _, *place in difference.terms]
        settings = dict.fromkeys(setting for found in of_terms for setting in found if setting)
        for setting in settings or [""]:
            of_setting = [found.get(setting) or found[""] for found in of_terms]
            alike = (Measured(difference, setting, each) for each in product(*of_setting) if _are_alike(each))
            yield max(alike, key=lambda each: (len(each.values), sum(len(claim.values) for claim in each.claims)))


def _are_alike(claims: Sequence[Claim]) -> bool:
    """Whether their runs share precision and whatever else a run may choose freely but the seed."""
    counted = [claim.row.runs[0].train for claim in claims if claim.row]
    return len({tuple(train.get(name) for name in sorted(FREE - {"seed"})) for train in counted}) <= 1


def _claims_of(claims: Sequence[Claim], source: str, dataset: str, name: str) -> dict[str, list[Claim]]:
    """By setting, the claims of a published row, and one without runs."""
    of_row: dict[str, list[Claim]] = {}
    for claim in claims:
        if (claim.published.source, claim.published.dataset, claim.published.experiment) == (source, dataset, name):
            of_row.setdefault(claim.setting, [dataclasses.replace(claim, row=None)]).append(claim)
    return of_row
