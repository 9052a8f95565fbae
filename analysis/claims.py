"""Every published number beside what the runs under results/ measured, with a verdict: results/CLAIMS.md.

The published rows are in published_results.csv, each with the script and the flags that repeat it. A run counts for a
row where it is that experiment by every field that decides its result, whatever it is called; small runs never count.
How verdicts are made stands at the end of CLAIMS.md. (update_readme.py writes CLAIMS.md, too.)

    python analysis/claims.py
    python analysis/claims.py --results-dir elsewhere/results --output claims.md
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
import torch

from analysis.published import (
    ABOVE,
    BELOW,
    MIN_SEEDS,
    NOT_COMPARABLE,
    REPRODUCED,
    TOO_FEW,
    VERDICTS,
    Claim,
    claims_of,
    is_small,
    not_counted,
    read_published,
    read_results,
)
from analysis.reading import SMALL, Row, RunFiles
from analysis.tables import markdown_table, mean_and_spread
from training.command_line import run_script
from training.config import ROOT
from training.device import effective_precision
from training.metrics import METRICS, Metric

FILE = "CLAIMS.md"
SOURCES = {"spec_current": "the newer document", "spec_first": "the first document"}
PROTOCOL = ("epochs", "training images", "precision", "hardware")
LEFT = ("published as", "experiment here", "experiment", "data", "metric", "verdict", "notes", "precision", "hardware")
NONE = "–"  # noqa: RUF001 (a dash, in a cell with nothing to show)

NOTES = {  # what the columns not_comparable and remarks of published_results.csv name
    "as_run": "The published code of v2 did not compute what the documents describe. Each of its steps ended with "
    "LN(x + y), which makes it v1's function with Xavier weights, and it warmed up for 1000 steps; the documents put "
    "the LN at the head of a step, x + y at its end, and say 500 steps. The number is the code's. So there are two "
    "lines: as documented (does what the document describes reach the number?) and as the code ran (does the number "
    "come again?).",
    "warmup": "The published code of v3 warmed up for 1000 steps, the documents say 500: two lines, likewise.",
    "expected": "The document expects its number again within ± 0.2 points (CIFAR-10) or ± 0.5 (CIFAR-100), and does "
    "not say where these come from. They play no part in the verdict.",
    "last_epoch": "The published baseline was tested after its last epoch, BDH with the weights of the best validation "
    "epoch. Here every model is tested with those of the best epoch, which should favour a baseline a little over its "
    "published number.",
    "imagenet_sizes": "The published setting has the library's sizes for ImageNet: of a 32 x 32 image DeiT-Tiny sees 4 "
    "tokens, MobileNetV2 and EfficientNet-B0 end at 1 x 1 before pooling. It is repeated as it was. The fairer "
    "baseline is `--setting fitted`, for which no number was published.",
    "labels": "What the published models learned to tell apart is not known. Their labels were the ranks of the values "
    "in the first channel of the masks: classes only if the masks were index masks. They had 12 outputs, void among "
    "them; here there are 11, and void counts nowhere.",
    "configuration": "Which configuration made the number is not known: the published code has 256 x 256 pixels, rate "
    "5e-4 and batch 8, the document 384 x 384, 3e-4 and 4. Here it is the document's.",
    "rotary": "The published BDH-UNet is another model: its rotary frequencies had the wrong sign of the exponent, no "
    "1 / (2 pi) and mismatched pairs, so that its attention was not a function of relative position. Here it is one.",
    "batches": "The published mIoU is the mean over batches of the mean over the classes in a batch's masks. It is "
    "measured in that way, at the best epoch by it. The standard, mIoU of one confusion matrix over all validation "
    "images, at the best epoch by that, stands beside it.",
    "same_images": "The published fine-tuning goes on with the images that its weights were trained on: it is more "
    "training, no transfer.",
    "estimate": "An estimate in the document. Nobody ran it, so that there is nothing to reproduce.",
    "cited": "A number of other authors, as the document cites it; the citation was not checked. No script here "
    "repeats their model.",
    "test_or_validation": "The document gives the number as test accuracy and also as validation accuracy of an epoch "
    "(the 9th of 10 for multiplier 32, else the 10th). Which images it is from is not known; it is compared as test "
    "accuracy.",
    "parameters": "The number of parameters that the document gives is not that of the model it describes.",
}

WHICH_COUNT = f"""\
A run counts for a row where it is finished and agrees with the row's script and flags in every field but the seed,
`precision` and `compile`, which change how a number is computed, not what is. Runs that differ in the latter two are
not averaged: each such configuration has a line of its own. Batch size and gradient accumulation have to agree, since
BatchNorm and mIoU by batches depend on them. Data, number of images and epochs have to be the published ones. What a
run is called decides nothing, but runs in a folder whose name ends in `{SMALL}` never count."""
HOW = f"""\
Let m be the mean and s the standard deviation (n - 1) of n runs with different seeds. A single further run falls into
m ± t(n - 1, 0.975) s sqrt(1 + 1/n) with 95 % probability if runs are draws from one normal distribution; and each
published number is a single run. With fewer than {MIN_SEEDS} seeds the verdict is *{TOO_FEW}*. If the published value
lies in the interval it is *{REPRODUCED}*; if it lies above, *{BELOW}*; if it lies below, *{ABOVE}*. At three
seeds the interval is m ± 5.0 s: *{REPRODUCED}* then says that the number is no surprise, not that it is exact. Where
something that made the number is unknown or cannot be had again, the verdict is *{NOT_COMPARABLE}*, whatever was
measured, with the notes that say why. Estimates and numbers from the literature are not results of the published work,
and are called what they are."""
COMMON = """\
All published numbers are of one seed each; those on CIFAR are from 40,000 training images, as here. Validation images
were augmented in the published runs, so that the best epoch was chosen by a noisier measure. Where a row has two lines,
the published code did something else than the documents say. The numbers of reasons and notes are those of the list
below the tables."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where the runs are, and where the table goes."""

    results_dir: Path = ROOT / "results"
    """folder with the runs that count, at any depth"""
    output: Path | None = None
    """file of the table; default: CLAIMS.md in results-dir"""


def claims_markdown(runs: Iterable[RunFiles], results: Path) -> tuple[list[Claim], str]:
    """The claims beside these runs, which `read_results` gave of the folder results, and the text of CLAIMS.md."""
    runs = [run for run in runs if not is_small(run, results)]
    claims = claims_of(runs, read_published())
    lines = ["<!-- made by python analysis/update_readme.py (or analysis/claims.py): do not edit -->", ""]
    lines += ["# Published numbers beside measured ones", "", count_verdicts(claims), "", COMMON, ""]
    for (source, dataset), group in groupby(claims, lambda claim: (claim.published.source, claim.published.dataset)):
        lines += [f"## {dataset}, {SOURCES[source]}", "", *_claims_table(list(group)), ""]
    lines += ["## Protocol of what was measured", "", *_protocol_table([claim for claim in claims if claim.row]), ""]
    if left_out := not_counted(runs, claims):
        lines += ["## Runs that bear the name of an experiment above and are another", ""]
        lines += [f"- `{folder.relative_to(results)}`: {'; '.join(why)}" for folder, why in left_out.items()] + [""]
    lines += ["## Notes", "", *(f"{number}. {text}" for number, text in enumerate(NOTES.values(), 1)), ""]
    lines += ["## Which runs count", "", WHICH_COUNT, "", "## How a verdict is made", "", HOW]
    return claims, "\n".join(lines) + "\n"


def count_verdicts(claims: Sequence[Claim]) -> str:
    """How many lines have which verdict."""
    counts = pd.Series([claim.verdict for claim in claims]).value_counts()
    each = ", ".join(f"{counts[verdict]} *{verdict}*" for verdict in VERDICTS if verdict in counts)
    return f"{len({claim.published for claim in claims})} published rows in {len(claims)} lines: {each}."


def _claims_table(claims: Sequence[Claim]) -> list[str]:
    """Of claims with one metric; beside mIoU by batches stands the standard one."""
    metrics = _metrics(claims[0])
    titles = ["published as", "experiment here", "epochs", "published (%)"]
    titles += [*(f"measured {metric.title}" for metric in metrics), "seeds", "95 % of new runs", "verdict", "notes"]
    return markdown_table(titles, map(_claim_cells, claims), left=LEFT)


def _metrics(claim: Claim) -> list[Metric]:
    return [claim.published.ours, *([METRICS["miou"]] if claim.published.ours.key == "miou_batch" else [])]


def _claim_cells(claim: Claim) -> list[str]:
    published, metrics = claim.published, _metrics(claim)
    values = [claim.values, claim.row.result if claim.row else claim.values]
    reasons = f" ({_numbers(published.not_comparable)})" if published.not_comparable else ""
    return [
        published.experiment + setting_of(claim),
        claim.experiment,
        published.epochs or NONE,
        published.value,
        *(measured_cell(metric, each) for metric, each in zip(metrics, values, strict=False)),
        str(len(claim.values)),
        " to ".join(published.ours.number(end) for end in claim.interval) if claim.interval else NONE,
        claim.verdict + reasons,
        _numbers(published.remarks),
    ]


def _numbers(notes: str) -> str:
    """The numbers under which these notes stand."""
    return ", ".join(str(number) for number, name in enumerate(NOTES, 1) if name in notes.split())


def _protocol_table(claims: Sequence[Claim]) -> list[str]:
    if not claims:
        return ["No run counts for any of these rows yet."]
    titles = ["experiment", *PROTOCOL, "parameters", "as published"]
    counted = [f"{claim.row.runs[0].config['parameters']:,}" for claim in claims]
    lines = [
        [claim.experiment, *protocol_cells(claim.row), parameters, claim.published.params_published or NONE]
        for claim, parameters in zip(claims, counted, strict=True)
    ]
    return markdown_table(titles, lines, left=LEFT)


# ---------------------------------------------------------------------------- cells and tables, also the README's


def protocol_cells(row: Row) -> list[str]:
    """A cell for each of PROTOCOL, with all that the row's finished runs have."""
    runs = row.finished
    images = {run.summary.get("images", {}).get("train") for run in runs}
    devices = [torch.device(run.config["hardware"]["device"]) for run in runs]
    precisions = {
        effective_precision(run.train["precision"], device) for run, device in zip(runs, devices, strict=True)
    }
    return [
        str(row.runs[0].train["epochs"]),
        "; ".join(sorted(f"{number:,}" if number else "not stored" for number in images)),
        "; ".join(sorted(precisions)),
        "; ".join(sorted({run.hardware for run in runs})),
    ]


def setting_of(claim: Claim) -> str:
    """What follows a name in the line of one setting of several."""
    return f", {claim.setting}" if claim.setting else ""


def measured_cell(metric: Metric, values: pd.Series) -> str:
    """`mean_and_spread`, or the sign for nothing. values: (seeds,) as stored."""
    return mean_and_spread(metric, values) if len(values) else NONE


def main(options: Options) -> None:
    claims, text = claims_markdown(read_results(options.results_dir), options.results_dir)
    path = options.output or options.results_dir / FILE
    path.write_text(text, encoding="utf-8")
    print(f"{count_verdicts(claims)}\n{path}")


if __name__ == "__main__":
    run_script(main, __doc__)
