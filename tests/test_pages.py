"""The generated blocks of README.md and docs/results.md: they show what is in results/, and nothing else is touched."""

import json
import re

import numpy as np
import pytest

from analysis.pages import HEADLINE
from tests.claimed_runs import write_run, write_seeds
from training.config import ROOT

SCRIPT = "analysis/claims.py"
MARKERS = {
    name: (f"<!-- {name}: begin, made by analysis/claims.py -->", f"<!-- {name}: end -->")
    for name in ("headline", "results")
}
BEFORE, AFTER = "# A title\n\nwords ± ᵀ\n\n", "\n\n## More\n\n`a | b`"


@pytest.fixture
def results(tmp_path):
    """Three seeds of v2, and a folder of small runs that differ in one field."""
    write_seeds(tmp_path / "results", [0.816, 0.817, 0.818])
    small = tmp_path / "results" / "ablation_small_cpu"
    for n_layer in (3, 4):
        flags = f"--n-embd 96 --n-layer {n_layer}"
        write_seeds(small, [0.3, 0.3 + n_layer / 100], "train_v1_cifar10.py", flags)
    return tmp_path / "results"


@pytest.fixture
def pages(tmp_path):
    """README.md and docs/results.md with old blocks, by the name of the block."""
    paths = {"headline": tmp_path / "README.md", "results": tmp_path / "results.md"}
    for name, path in paths.items():
        path.write_text(f"{BEFORE}{MARKERS[name][0]}\nold\n{MARKERS[name][1]}{AFTER}", encoding="utf-8")
    return paths


@pytest.fixture
def update(results, pages, call_script, capsys):
    """Runs the script on them: exit code, what it printed, what it complained of."""
    where = ["--results-dir", results, "--readme", pages["headline"], "--results-page", pages["results"]]

    def call(*flags):
        code = call_script(SCRIPT, *where, *flags)
        return code, *capsys.readouterr()

    return call


def block_of(path, name):
    """The lines between the markers."""
    text, (begin, end) = path.read_text(encoding="utf-8"), MARKERS[name]
    return text.partition(begin)[2].partition(end)[0].strip().splitlines()


def test_this_repository_tells_what_its_results_are(call_script, capsys):
    assert call_script(SCRIPT, "--check") == 0, capsys.readouterr().err


def test_the_numbers_in_this_repository_are_those_of_its_files():
    """Read without this project's code: means and deviations of every folder of seeds, in percent."""
    text = "\n".join(block_of(ROOT / "docs" / "results.md", "results"))
    folders = sorted({path.parent.parent for path in (ROOT / "results").rglob("summary.json")})
    assert folders
    for folder in folders:
        summaries = [json.loads(path.read_text()) for path in folder.glob("*/summary.json")]
        values = [100 * each["test"]["accuracy"] for each in summaries if "accuracy" in (each["test"] or {})]
        values = values or [100 * each["best"]["val_miou"] for each in summaries if "val_miou" in each["best"]]
        if values:
            spread = [np.std(values, ddof=1)] if len(values) > 1 else []
            assert any(
                np.allclose(cell, [np.mean(values), *spread], rtol=0, atol=0.00501)  # 54.015 may be rounded either way
                for cell in cells_with(len(values), text)
            ), folder


def cells_with(n_seeds, text):
    """The numbers of every cell "mean" or "mean ± deviation" that stands before that number of seeds."""
    cells = re.findall(rf"\| ([\d.]+)(?: ± ([\d.]+))? \| {n_seeds} \|", text)
    return [[float(number) for number in cell if number] for cell in cells]


def test_the_headline_has_eight_rows(update, pages, results):
    """With the configuration of most seeds, and numbers of parameters also of what has not been run."""
    write_seeds(results, [0.65], "train_vit_tiny_cifar10.py", "--epochs 10 --precision bf16", parameters=5_362_762)
    write_seeds(results, [0.66, 0.64], "train_vit_tiny_cifar10.py", "--epochs 10 --compile", parameters=5_362_762)
    code, out, _ = update()
    assert code == 0 and all(str(path) in out for path in (*pages.values(), results / "CLAIMS.md"))
    text = pages["headline"].read_text(encoding="utf-8")
    assert text.startswith(BEFORE) and text.endswith(AFTER)
    lines = block_of(pages["headline"], "headline")[2:]
    assert [line.split("`")[1] for line in lines] == list(HEADLINE) and len(lines) == 8
    assert lines[0] == "| `v2_cifar10` | cifar10 | 50 | 81.73 | 81.70 ± 0.10 | 3,562,570 | 3 | reproduced |"
    assert lines[3] == "| `v1_cifar10+epochs=10` | cifar10 | 10 | 72.68 | not run yet | 3,562,570 | 0 | – |"  # noqa: RUF001
    assert "compile=True" in lines[5] and lines[5].endswith("| 65.96 | 65.00 ± 1.41 | 5,362,762 | 2 | too few seeds |")
    assert lines[7].endswith("| not run yet | 4,152,235 | 0 | not comparable |")


def test_the_results_have_the_claims_and_every_run(update, pages):
    assert update()[0] == 0
    lines = block_of(pages["results"], "results")
    assert "| `v2_cifar10`, as documented | cifar10 | 81.73 | 81.70 ± 0.10 | 3 | reproduced |" in lines
    assert any(line.startswith("| `vit_tiny_cifar10` | cifar10 | 76.05 |") for line in lines)
    assert "| resnet50_scratch_literature | camvid | 54.1 | – | 0 | literature |" in lines  # noqa: RUF001
    main, small = (
        next(at for at, line in enumerate(lines) if line.startswith(f"`results/{folder}")) for folder in ("`", "a")
    )
    assert lines[main] == "`results/`" and main < small
    assert lines[small] == (
        "`results/ablation_small_cpu/`: reduced-size runs, not comparable with published results; all with n_embd=96"
    )
    protocol = "| 50 | 40,000 | tf32 | GPU X |"
    assert f"| v2_cifar10 | cifar10 | test accuracy (%) | 81.70 ± 0.10 | 3 {protocol}" in lines[main:small]
    assert lines[small + 4 :][:2] == [
        f"| v1_cifar10, n_layer=4 | cifar10 | test accuracy (%) | 32.00 ± 2.83 | 2 {protocol}",
        f"| v1_cifar10, n_layer=3 | cifar10 | test accuracy (%) | 31.50 ± 2.12 | 2 {protocol}",
    ]


def test_small_runs_on_two_data_sets_have_a_table_each(update, pages, results):
    for seed in (0, 1):
        flags = "--epochs 8 --img-size 96 --precision bf16"
        write_run(results / "small_cpu" / "bdh_unet" / f"seed{seed}", "train_bdh_unet.py", flags, seed)
        flags = "--epochs 8 --n-embd 96 --precision bf16"
        write_run(results / "small_cpu" / "v2_cifar10" / f"seed{seed}", "train_v2_cifar10.py", flags, seed)
    write_run(results / "small_cpu" / "v1_cifar10" / "seed0", "train_v1_cifar10.py", flags)
    assert update()[0] == 0
    lines = block_of(pages["results"], "results")
    titles = [line for line in lines if line.startswith("`results/small_cpu/`")]
    assert len(titles) == 2 and titles[1].endswith("; all with epochs=8, n_embd=96, precision=bf16")
    assert any(line.startswith("| bdh_unet, epochs=8, img_size=96, precision=bf16 | camvid |") for line in lines)


def test_a_second_time_changes_nothing(update, pages, results):
    update()
    files = (*pages.values(), results / "CLAIMS.md")
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    code, out, _ = update()
    assert code == 0 and "up to date" in out
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in files] == before


def stale_blocks(results, pages):
    for path in pages.values():
        path.write_text(path.read_text(encoding="utf-8").replace("81.70 ±", "81.73 ±"), encoding="utf-8")


CHANGES = {  # what is done, and the files that it makes out of date
    "stale blocks": (stale_blocks, ["README.md", "results.md"]),
    "no claims": (lambda results, pages: (results / "CLAIMS.md").unlink(), ["CLAIMS.md"]),
    "another run": (
        lambda results, pages: write_run(results / "v3_cifar10" / "seed0", "train_v3_cifar10.py"),
        ["results.md", "CLAIMS.md"],
    ),
    "another small run": (
        lambda results, pages: write_run(results / "small_cpu" / "v1" / "seed0", "train_v1_cifar10.py", "--epochs 5"),
        ["results.md"],
    ),
}


@pytest.mark.parametrize(("change", "stale"), CHANGES.values(), ids=CHANGES)
def test_the_check_names_what_is_out_of_date_and_changes_nothing(change, stale, update, pages, results):
    update()
    change(results, pages)
    paths = (*pages.values(), results / "CLAIMS.md")
    before = {path: path.read_bytes() for path in paths if path.exists()}
    code, out, err = update("--check")
    assert code == 1 and not out and len(err.splitlines()) == 1
    assert [path.name for path in paths if f"{path}" in err] == stale and SCRIPT in err
    assert {path: path.read_bytes() for path in paths if path.exists()} == before
    assert update()[0] == 0 and update("--check")[0] == 0


@pytest.mark.parametrize("text", ["", "{0}", "{1}", "{1}\n{0}", "{0}{1}{1}", "{0}{0}{1}", None], ids=repr)
@pytest.mark.parametrize("name", MARKERS)
def test_a_page_without_its_markers_is_refused_and_left_alone(name, text, update, pages, results):
    if text is None:
        pages[name].unlink()
    else:
        pages[name].write_text(text.format(*MARKERS[name]))
    before = {path: path.read_bytes() for path in pages.values() if path.exists()}
    code, _, err = update()
    assert code == 1 and f"{pages[name]} needs these two lines" in err and all(mark in err for mark in MARKERS[name])
    assert {path: path.read_bytes() for path in pages.values() if path.exists()} == before
    assert not (results / "CLAIMS.md").exists()
