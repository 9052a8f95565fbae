"""Compares every published number with the runs under results/ and writes the verdicts.

Writes results/CLAIMS.md and the generated blocks of README.md (headline table) and docs/results.md (all results); a
test fails while one of them is out of date. Published rows are in analysis/published_results.csv, each with the script
and flags that repeat it. A run counts for a row by its configuration, whatever its name; reduced-size runs never count.
CLAIMS.md explains the verdicts.

    python analysis/claims.py
    python analysis/claims.py --check     # writes nothing; exit code 1 if a file is out of date
    python analysis/claims.py --results-dir elsewhere/results --output claims.md     # only this file
"""

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis import pages
from analysis.differences import HOLDS, OPEN, OPPOSITE, measure_differences
from analysis.published import (
    ABOVE,
    BELOW,
    FREE,
    MIN_SEEDS,
    NOT_COMPARABLE,
    REPRODUCED,
    TOO_FEW,
    Claim,
    claims_of,
    is_small,
    not_counted,
    read_published,
    read_results,
)
from analysis.reading import SMALL, RunFiles
from analysis.tables import markdown_table
from training.command_line import run_script
from training.config import ROOT, UserError
from training.files import written_whole
from training.metrics import METRICS, Metric

FILE = "CLAIMS.md"
README, RESULTS_PAGE = ROOT / "README.md", ROOT / "docs" / "results.md"
SOURCES = {"spec_current": "the newer document", "spec_first": "the first document"}

NOTES = {  # texts for the columns not_comparable and remarks of published_results.csv
    "as_run": "The published code of v2 differs from the documents. Its steps end with LN(x + y), which makes it v1's "
    "function with Xavier weights, and it warms up for 1000 steps. The documents put LN at the head of a step and x + "
    "y at its end, and say 500 steps. The published number comes from the code. Hence two lines: *as documented* and "
    "*as the code ran*.",
    "warmup": "The published code of v3 warms up for 1000 steps; the documents say 500. Hence two lines.",
    "expected": "The document gives a tolerance of ± 0.2 points (CIFAR-10) or ± 0.5 (CIFAR-100), without a source. "
    "The verdict does not use it.",
    "last_epoch": "The published baseline was tested after its last epoch, BDH with the weights of the best validation "
    "epoch. Here every model is tested with the weights of the best epoch, which should slightly favour the baseline "
    "over its published number.",
    "imagenet_sizes": "The published setting uses the library's sizes for ImageNet: on 32 x 32 images DeiT-Tiny has 4 "
    "tokens, and MobileNetV2 and EfficientNet-B0 shrink to 1 x 1 before pooling. It is repeated as it was. The fairer "
    "baseline, `--setting fitted`, has no published number.",
    "labels": "The classes of the published models are unknown. Their labels were the ranks of the values in the first "
    "channel of the masks, which are classes only if the masks were index masks. They had 12 outputs, including void; "
    "here there are 11, and void never counts.",
    "configuration": "The published configuration is unknown: the code has 256 x 256 pixels, learning rate 5e-4 and "
    "batch size 8; the document has 384 x 384, 3e-4 and 4. Here it is the document's.",
    "rotary": "The published BDH-UNet is a different model: in its rotary embedding the exponent has the wrong sign, "
    "the factor 1 / (2 pi) is missing and the pairs are mismatched, so its attention is not a function of relative "
    "position. Here it is.",
    "batches": "The published mIoU is the mean over batches of the mean IoU of the classes in a batch's masks. It is "
    "measured in the same way, at the best epoch by it. The standard mIoU (one confusion matrix over all validation "
    "images, at the best epoch by that) is in the column beside it.",
    "same_images": "The published fine-tuning continues on the same images: more training, not transfer.",
    "estimate": "An estimate in the document, never run: there is nothing to reproduce.",
    "cited": "A number by other authors, as the document cites it. The citation was not checked, and no script here "
    "repeats their model.",
    "test_or_validation": "The document gives this number both as test accuracy and as validation accuracy of an epoch "
    "(epoch 9 of 10 for multiplier 32, epoch 10 otherwise). It is compared as test accuracy.",
    "rate": "The learning rate of the fine-tuning is not documented: 3e-5 was chosen here.",
    "parameters": "The document's number of parameters is not that of the model it describes.",
}
COMMON = """\
Every published number is from one seed. Those on CIFAR are from 40,000 training images, as here. The published runs
augmented the validation images, which makes their choice of the best epoch noisier. Rows with two lines are those whose
published code differs from the documents. Numbers in the columns *verdict* and *notes* refer to the notes below."""
_FREE = ", ".join(f"`{name}`" for name in sorted(FREE - {"seed"}))  # of a run that counts
WHICH_COUNT = f"""\
A run counts for a row if it is finished and equals the row's script and flags in every field but these: seed, {_FREE}.
Runs that differ in more than the seed are not averaged: each setting has its own line. Batch size and gradient
accumulation must match, since BatchNorm and mIoU by batches depend on them; runs whose BatchNorm saw shares of a batch
(several processes without `sync_batchnorm`) do not count. Data set, number of images and epochs must be the published
ones. Names play no part, except that runs in a folder whose name ends in `{SMALL}` never count."""
DIFFERENCE = f"""\
Differences in points of accuracy between runs of one precision, paired by seed, with 95 % intervals (Student's t over
seeds). From {MIN_SEEDS} seeds on, a statement *{HOLDS}* if the interval is above zero; if it is below zero,
*{OPPOSITE}*; else it *{OPEN}*. Published values are differences of single runs."""
HOW = f"""\
Let m be the mean and s the standard deviation (n - 1) of n runs with different seeds. If runs are normally distributed,
one more run falls into m ± t(n - 1, 0.975) s sqrt(1 + 1/n) with 95 % probability. Every published number is one run.

- Fewer than {MIN_SEEDS} seeds: *{TOO_FEW}*.
- Published value inside the interval: *{REPRODUCED}*. At three seeds the interval is m ± 5.0 s, so this means
  "consistent", not "exact".
- Above the interval: *{BELOW}*. Below it: *{ABOVE}*.
- Published result made in a way that is unknown or cannot be repeated: *{NOT_COMPARABLE}*, whatever was measured, with
  the notes that say why.
- *estimate* and *literature*: not results of the published work."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Input folder and output files. Another --results-dir needs --output, or pages of its own."""

    results_dir: Path = ROOT / "results"
    """folder with runs, at any depth; CLAIMS.md is written there"""
    readme: Path = README
    """page with the headline block"""
    results_page: Path = RESULTS_PAGE
    """page with the results block"""
    output: Path | None = None
    """write only the claims, to this file"""
    check: bool = False
    """write nothing; exit with code 1 if a file is out of date"""


def wanted_files(options: Options) -> dict[Path, str]:
    """The text that each file should have. Raises UserError for a folder without runs or a page without markers."""
    results = options.results_dir
    runs = read_results(results)
    if not runs:
        raise UserError(f"{results} holds no finished run: name another --results-dir")
    is_other = results.resolve() != Options.results_dir.resolve()
    if (
        is_other
        and not options.output
        and {options.readme.resolve(), options.results_page.resolve()} & {README, RESULTS_PAGE}
    ):
        raise UserError(
            "the pages of this repository are about its own results: with another --results-dir, give --output FILE "
            "for the claims alone, or --readme and --results-page"
        )
    claims, text = claims_markdown(runs, results)
    if options.output:
        return {options.output: text}
    return {
        options.readme: pages.page_with(options.readme, "headline", pages.headline_table(claims)),
        options.results_page: pages.page_with(
            options.results_page, "results", pages.results_block(claims, runs, results)
        ),
        results / FILE: text,
    }


def claims_markdown(runs: Iterable[RunFiles], results: Path) -> tuple[list[Claim], str]:
    """The claims and the text of CLAIMS.md. runs: from `read_results(results)`."""
    runs = [run for run in runs if not is_small(run, results)]
    claims = claims_of(runs, read_published())
    lines = ["<!-- made by python analysis/claims.py: do not edit -->", ""]
    lines += ["# Published and measured results", "", pages.count_verdicts(claims), "", COMMON, ""]
    for (source, dataset), group in groupby(claims, lambda claim: (claim.published.source, claim.published.dataset)):
        lines += [f"## {dataset}, {SOURCES[source]}", "", *_claims_table(list(group)), ""]
    lines += ["## What the documents say of their rows", "", DIFFERENCE, "", *_differences_table(claims), ""]
    lines += ["## Protocol of the measured runs", "", *_protocol_table([claim for claim in claims if claim.row]), ""]
    if left_out := not_counted(runs, claims):
        lines += ["## Runs that share a name with an experiment above but do not count", ""]
        lines += [f"- `{folder.relative_to(results)}`: {'; '.join(why)}" for folder, why in left_out.items()] + [""]
    lines += ["## Notes", "", *(f"{number}. {text}" for number, text in enumerate(NOTES.values(), 1)), ""]
    lines += ["## Which runs count", "", WHICH_COUNT, "", "## Verdicts", "", HOW]
    return claims, "\n".join(lines) + "\n"


def _claims_table(claims: Sequence[Claim]) -> list[str]:
    """Claims with the same metric; standard mIoU beside mIoU by batches."""
    metrics = _metrics(claims[0])
    titles = ["published as", "experiment here", "epochs", "published (%)"]
    titles += [*(f"measured {metric.title}" for metric in metrics), "seeds", "95 % interval", "verdict", "notes"]
    return markdown_table(titles, map(_claim_cells, claims), left=pages.LEFT)


def _differences_table(claims: Sequence[Claim]) -> list[str]:
    number = METRICS["accuracy"].number
    lines = []
    for measured in measure_differences(claims):
        mean, low, high = measured.interval if len(measured.values) else (math.nan,) * 3
        setting = f" ({measured.setting})" if measured.setting else ""
        cells = [measured.difference.says + setting, f"{measured.published:+.2f}"]
        precision = f" ({measured.precision})" if measured.precision else ""
        cells += [pages.NONE if math.isnan(mean) else number(mean, "+") + precision]
        cells += [pages.NONE if math.isnan(low) else f"{number(low, '+')} to {number(high, '+')}"]
        lines.append([*cells, str(len(measured.values)), measured.verdict])
    titles = ["statement", "published", "measured", "95 % interval", "seeds", "verdict"]
    return markdown_table(titles, lines, left=("statement", *pages.LEFT))


def _metrics(claim: Claim) -> list[Metric]:
    return [claim.published.ours, *([METRICS["miou"]] if claim.published.ours.key == "miou_batch" else [])]


def _claim_cells(claim: Claim) -> list[str]:
    published, metrics = claim.published, _metrics(claim)
    values = [claim.values, claim.row.result if claim.row else claim.values]
    reasons = f" ({_numbers(published.not_comparable)})" if published.not_comparable else ""
    return [
        published.experiment + pages.setting_of(claim),
        claim.experiment,
        published.epochs or pages.NONE,
        published.value,
        *(pages.measured_cell(metric, each) for metric, each in zip(metrics, values, strict=False)),
        str(len(claim.values)),
        " to ".join(published.ours.number(end) for end in claim.interval) if claim.interval else pages.NONE,
        claim.verdict + reasons,
        _numbers(published.remarks),
    ]


def _numbers(notes: str) -> str:
    """The numbers of these notes in the list."""
    return ", ".join(str(number) for number, name in enumerate(NOTES, 1) if name in notes.split())


def _protocol_table(claims: Sequence[Claim]) -> list[str]:
    if not claims:
        return ["No run counts for any of these rows yet."]
    titles = ["experiment", *pages.PROTOCOL, "parameters", "published parameters"]
    counted = [f"{claim.row.runs[0].config['parameters']:,}" for claim in claims]
    lines = [
        [claim.experiment, *pages.protocol_cells(claim.row), parameters, claim.published.params_published or pages.NONE]
        for claim, parameters in zip(claims, counted, strict=True)
    ]
    return markdown_table(titles, lines, left=pages.LEFT)


def main(options: Options) -> None:
    wanted = wanted_files(options)
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if options.check and stale:
        raise UserError(f"out of date: {', '.join(map(str, stale))}; write them with python analysis/claims.py")
    for path in stale:
        with written_whole(path) as partial:
            partial.write_text(wanted[path], encoding="utf-8")
    print("\n".join(f"written: {path}" for path in stale) or "up to date: " + ", ".join(map(str, wanted)))


if __name__ == "__main__":
    run_script(main, __doc__)
