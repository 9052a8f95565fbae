"""Writes the README's section of results from what is under results/, and results/CLAIMS.md with it.

The section has the published numbers beside the measured ones in short, and all finished runs; it lies between two
markers, and nothing else in the README is touched. Run it whenever results/ changes; a test fails until then.

    python analysis/update_readme.py
    python analysis/update_readme.py --check     # changes nothing; exit code 1 where a file is out of date
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis.claims import (
    FILE,
    LEFT,
    PROTOCOL,
    claims_markdown,
    count_verdicts,
    measured_cell,
    protocol_cells,
    setting_of,
)
from analysis.published import Claim, is_small, read_results
from analysis.reading import Row, RunFiles, make_rows, result_title, shared_parts
from analysis.tables import markdown_table
from training.config import ROOT, UserError
from training.script import run_script

BEGIN = "<!-- results: begin, made by analysis/update_readme.py -->"
END = "<!-- results: end -->"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where the runs and the README are, and whether anything is written."""

    results_dir: Path = ROOT / "results"
    """folder with the runs, at any depth; CLAIMS.md goes there"""
    readme: Path = ROOT / "README.md"
    """file with the two markers"""
    check: bool = False
    """change nothing: say what is out of date, and leave with exit code 1 if something is"""


def wanted_files(results: Path, readme: Path) -> dict[Path, str]:
    """README and CLAIMS.md as they ought to be. Raises UserError for a README without markers."""
    before, _, after = parts_of(readme)
    runs = read_results(results)
    claims, text = claims_markdown(runs, results)
    lines = [count_verdicts(claims), "", *_claims_table(claims), "", *_measured(runs, results)]
    return {readme: "\n".join([f"{before}{BEGIN}", "", *lines, f"{END}{after}"]), results / FILE: text}


def parts_of(readme: Path) -> tuple[str, str, str]:
    """What stands before, between and after the markers. Raises UserError unless there is one of each, in order."""
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not (begin and end) or text.count(BEGIN) + text.count(END) > 2:
        raise UserError(
            f"{readme} needs these two lines, once each, between which results are written:\n{BEGIN}\n{END}"
        )
    return before, inside, after


def _claims_table(claims: Sequence[Claim]) -> list[str]:
    """CLAIMS.md in short."""
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


def _measured(runs: Sequence[RunFiles], results: Path) -> list[str]:
    """A table of the runs in each folder, small ones last and by data set, since those share what made them small."""

    def place(run: RunFiles) -> tuple[bool, tuple[str, ...], str]:
        small, inside = is_small(run, results), run.folder.relative_to(results).parts[:-2]  # no experiment and seed
        return small, inside, run.config["data"]["name"] if small else ""

    lines = []
    for (small, inside, _), group in groupby(sorted(runs, key=place), place):
        folder = "/".join((results.resolve().name, *inside))
        size = ": small runs, which reproduce no published row" if small else ""
        lines += [*_folder_table(f"`{folder}/`{size}", make_rows(group)), ""]
    return lines


def _folder_table(title: str, rows: Sequence[Row]) -> list[str]:
    """The rows of one folder, under a line that also tells the changed fields which all of them share."""
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


def main(options: Options) -> None:
    wanted = wanted_files(options.results_dir, options.readme)
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if options.check and stale:
        names = " and ".join(map(str, stale))
        raise UserError(
            f"out of date: {names}; python analysis/update_readme.py writes from {options.results_dir} anew"
        )
    for path in stale:
        path.write_text(wanted[path], encoding="utf-8")
    print("\n".join(f"written: {path}" for path in stale) or "nothing to change: README and claims are up to date")


if __name__ == "__main__":
    run_script(main, __doc__)
