"""The generated blocks of README.md and docs/results.md, for analysis/claims.py."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import pandas as pd
import torch

from analysis.published import NOT_RUN, VERDICTS, Claim, is_small
from analysis.reading import Row, RunFiles, make_rows, result_title, shared_parts
from analysis.tables import NONE, markdown_table, mean_and_spread
from training.config import UserError
from training.device import effective_precision
from training.metrics import Metric
from training.session import count_parameters
from training.stored import hardware_of

HEADLINE = (  # experiments in README's table
    "v2_cifar10",
    "v1_cifar10",
    "vit_tiny_cifar10",
    "v1_cifar10+epochs=10",
    "v1_cifar10+epochs=10+mlp_internal_dim_multiplier=4",
    "vit_tiny_cifar10+epochs=10",
    "resnet20_cifar100",
    "bdh_unet",
)
PROTOCOL = ("epochs", "training images", "precision", "hardware")
LEFT = ("published as", "experiment here", "experiment", "data", "metric", "verdict", "notes", "precision", "hardware")


def page_with(path: Path, name: str, lines: Sequence[str]) -> str:
    """The page's text with these lines in the block called name. Raises UserError if its markers are not there once."""
    begin, end = f"<!-- {name}: begin, made by analysis/claims.py -->", f"<!-- {name}: end -->"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, found, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found and found_end) or text.count(begin) + text.count(end) > 2:
        raise UserError(f"{path} needs these two lines, once each, around its generated block:\n{begin}\n{end}")
    return "\n".join([f"{before}{begin}", "", *lines, "", f"{end}{after}"])


def headline_table(claims: Sequence[Claim]) -> list[str]:
    """README's table of the HEADLINE experiments; of several configurations the one with most seeds."""
    titles = ("experiment", "data", "epochs", "published (%)", "measured (%)", "parameters", "seeds", "verdict")
    lines = []
    for name in HEADLINE:
        claim = max((each for each in claims if each.asked and each.asked.name == name), key=lambda c: len(c.values))
        measured = measured_cell(claim.published.ours, claim.values) if len(claim.values) else NOT_RUN
        verdict = NONE if claim.verdict == NOT_RUN else claim.verdict
        published = claim.published
        cells = [claim.experiment, published.dataset, published.epochs, published.value, measured]
        lines.append([*cells, f"{parameters_of(claim):,}", str(len(claim.values)), verdict])
    return markdown_table(titles, lines, left=LEFT)


def results_block(claims: Sequence[Claim], runs: Sequence[RunFiles], results: Path) -> list[str]:
    """The block of docs/results.md: all claims in short, then all runs by folder."""
    lines = [count_verdicts(claims), "", *_short_claims(claims)]
    for title, rows in _folders(runs, results):
        lines += ["", *_folder_table(title, rows)]
    return lines


def _short_claims(claims: Sequence[Claim]) -> list[str]:
    titles = ("experiment", "data", "published (%)", "measured (%)", "seeds", "verdict")
    lines = [
        [
            (claim.experiment if claim.asked else claim.published.experiment) + setting_of(claim),
            claim.published.dataset,
            claim.published.value,
            measured_cell(claim.published.ours, claim.values),
            str(len(claim.values)),
            claim.verdict,
        ]
        for claim in claims
    ]
    return markdown_table(titles, lines, left=LEFT)


def _folders(runs: Sequence[RunFiles], results: Path) -> list[tuple[str, list[Row]]]:
    """A title and rows for each folder; reduced-size folders last, split by data set, whose runs share their sizes."""

    def place(run: RunFiles) -> tuple[bool, tuple[str, ...], str]:
        small, inside = is_small(run, results), run.folder.relative_to(results).parts[:-2]  # without experiment, seed
        return small, inside, run.config["data"]["name"] if small else ""

    folders = []
    for (small, inside, _), group in groupby(sorted(runs, key=place), place):
        size = ": reduced-size runs, not comparable with published results" if small else ""
        folders.append((f"`{'/'.join((results.resolve().name, *inside))}/`{size}", make_rows(group)))
    return folders


def _folder_table(title: str, rows: Sequence[Row]) -> list[str]:
    """The rows of one folder; the title names the changed fields that all of them share."""
    shared = shared_parts(rows) if len(rows) > 1 else []
    common = f"; all with {', '.join(shared)}" if shared else ""
    lines = [
        [
            ", ".join(part for part in row.parts if part not in shared),
            row.task[0],
            result_title([row]),
            measured_cell(row.metric, row.result),
            str(len(row.result)),
            *protocol_cells(row),
        ]
        for row in rows
    ]
    titles = ("experiment", "data", "metric", "measured", "seeds", *PROTOCOL)
    return [f"{title}{common}", "", *markdown_table(titles, lines, left=LEFT)]


# ---------------------------------------------------------------------------- cells, also for CLAIMS.md


def count_verdicts(claims: Sequence[Claim]) -> str:
    """How many lines have which verdict."""
    counts = pd.Series([claim.verdict for claim in claims]).value_counts()
    each = ", ".join(f"{counts[verdict]} *{verdict}*" for verdict in VERDICTS if verdict in counts)
    return f"{len({claim.published for claim in claims})} published rows in {len(claims)} lines: {each}."


def parameters_of(claim: Claim) -> int:
    """Number of parameters, from a run, or counted without allocating memory."""
    if claim.row:
        return claim.row.runs[0].config["parameters"]
    with torch.device("meta"):
        return count_parameters(claim.asked.model.build())


def protocol_cells(row: Row) -> list[str]:
    """A cell for each of PROTOCOL, with all values among the row's finished runs."""
    runs = row.finished
    images = {run.summary.get("images", {}).get("train") for run in runs}
    precisions = {
        effective_precision(run.train["precision"], torch.device(hardware["device"]))
        for run in runs
        for hardware in hardware_of(run.config)
    }
    return [
        str(row.runs[0].train["epochs"]),
        "; ".join(sorted(f"{number:,}" if number else "not stored" for number in images)),
        "; ".join(sorted(precisions)),
        "; ".join(row.hardware),
    ]


def setting_of(claim: Claim) -> str:
    """Suffix of a name, for rows with several settings."""
    return f", {claim.setting}" if claim.setting else ""


def measured_cell(metric: Metric, values: pd.Series) -> str:
    """Mean and standard deviation, or NONE. values: (seeds,) as stored."""
    return mean_and_spread(metric, values) if len(values) else NONE
