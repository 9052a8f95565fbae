"""The README's section of results: it says what results/ holds, here and now, and nothing else is touched."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from analysis.update_readme import BEGIN, END
from tests.claimed_runs import write_run, write_seeds

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "analysis/update_readme.py"
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
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"{BEFORE}{BEGIN}\nold\n{END}{AFTER}", encoding="utf-8")
    return path


@pytest.fixture
def update(results, readme, call_script, capsys):
    """Runs the script on them: exit code, what it printed, what it complained of."""

    def call(*flags):
        code = call_script(SCRIPT, "--results-dir", results, "--readme", readme, *flags)
        return code, *capsys.readouterr()

    return call


def lines_between(readme):
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(BEFORE) and text.endswith(AFTER)
    return text.partition(BEGIN)[2].partition(END)[0].splitlines()


def test_this_repository_tells_what_its_results_are(call_script, capsys):
    assert call_script(SCRIPT, "--check") == 0, capsys.readouterr().err


def test_the_numbers_in_this_repository_are_those_of_its_files():
    """Read without this project's code: means and deviations of every folder of seeds, in percent."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
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


def test_the_section_has_the_claims_and_every_run(update, readme, results):
    code, out, _ = update()
    assert code == 0 and str(readme) in out and str(results / "CLAIMS.md") in out
    lines = lines_between(readme)
    assert "| `v2_cifar10`, as documented | cifar10 | 81.73 | 81.70 ± 0.10 | 3 | reproduced |" in lines
    assert any(line.startswith("| `vit_tiny_cifar10` | cifar10 | 76.05 |") for line in lines)
    assert "| resnet50_scratch_literature | camvid | 54.1 | – | 0 | literature |" in lines  # noqa: RUF001
    main, small = (
        next(at for at, line in enumerate(lines) if line.startswith(f"`results/{folder}")) for folder in ("`", "a")
    )
    assert lines[main] == "`results/`" and main < small
    assert lines[small] == (
        "`results/ablation_small_cpu/`: small runs, which reproduce no published row; all with n_embd=96"
    )
    protocol = "| 50 | 40,000 | tf32 | GPU X |"
    assert f"| v2_cifar10 | cifar10 | test accuracy (%) | 81.70 ± 0.10 | 3 {protocol}" in lines[main:small]
    assert lines[small + 4 :][:2] == [
        f"| v1_cifar10, n_layer=4 | cifar10 | test accuracy (%) | 32.00 ± 2.83 | 2 {protocol}",
        f"| v1_cifar10, n_layer=3 | cifar10 | test accuracy (%) | 31.50 ± 2.12 | 2 {protocol}",
    ]


def test_small_runs_on_two_data_sets_have_a_table_each(update, readme, results):
    for seed in (0, 1):
        flags = "--epochs 8 --img-size 96 --precision bf16"
        write_run(results / "small_cpu" / "bdh_unet" / f"seed{seed}", "train_bdh_unet.py", flags, seed)
        flags = "--epochs 8 --n-embd 96 --precision bf16"
        write_run(results / "small_cpu" / "v2_cifar10" / f"seed{seed}", "train_v2_cifar10.py", flags, seed)
    write_run(results / "small_cpu" / "v1_cifar10" / "seed0", "train_v1_cifar10.py", flags)
    assert update()[0] == 0
    lines = lines_between(readme)
    titles = [line for line in lines if line.startswith("`results/small_cpu/`")]
    assert len(titles) == 2 and titles[1].endswith("; all with epochs=8, n_embd=96, precision=bf16")
    assert any(line.startswith("| bdh_unet, epochs=8, img_size=96, precision=bf16 | camvid |") for line in lines)


def test_a_second_time_changes_nothing(update, readme, results):
    update()
    files = (readme, results / "CLAIMS.md")
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    code, out, _ = update()
    assert code == 0 and "nothing to change" in out
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in files] == before
    assert update("--check")[0] == 0


def stale_block(results, readme):
    readme.write_text(readme.read_text(encoding="utf-8").replace("81.70 ± 0.10", "81.73 ± 0.10", 1), encoding="utf-8")


def stale_claims(results, readme):
    (results / "CLAIMS.md").write_text("# other\n")


def no_claims(results, readme):
    (results / "CLAIMS.md").unlink()


def another_run(results, readme):
    write_run(results / "v1_cifar10" / "seed0", "train_v1_cifar10.py")


def another_small_run(results, readme):
    write_run(results / "small_cpu" / "v1_cifar10" / "seed0", "train_v1_cifar10.py", "--epochs 5")


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        (stale_block, ["README.md"]),
        (stale_claims, ["CLAIMS.md"]),
        (no_claims, ["CLAIMS.md"]),
        (another_run, ["README.md", "CLAIMS.md"]),
        (another_small_run, ["README.md"]),
    ],
)
def test_the_check_names_what_is_out_of_date_and_changes_nothing(change, stale, update, readme, results):
    update()
    change(results, readme)
    before = {path: path.read_bytes() for path in (readme, results / "CLAIMS.md") if path.exists()}
    code, out, err = update("--check")
    assert code == 1 and not out and len(err.splitlines()) == 1
    assert [name for name in ("README.md", "CLAIMS.md") if name in err] == stale and SCRIPT in err
    assert {path: path.read_bytes() for path in (readme, results / "CLAIMS.md") if path.exists()} == before
    assert update()[0] == 0 and update("--check")[0] == 0


@pytest.mark.parametrize(
    "text", ["", BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}{END}{END}", f"{BEGIN}{BEGIN}{END}", None], ids=repr
)
def test_a_readme_without_its_markers_is_refused_and_left_alone(text, update, readme, results):
    if text is None:
        readme.unlink()
    else:
        readme.write_text(text)
    for flags in ([], ["--check"]):
        code, _, err = update(*flags)
        assert code == 1 and "README.md needs these two lines" in err and BEGIN in err and END in err
    assert text is None or readme.read_text() == text
    assert not (results / "CLAIMS.md").exists()


def test_results_that_are_not_there_lose_nothing(readme, tmp_path, call_script, capsys):
    before = readme.read_bytes()
    assert call_script(SCRIPT, "--readme", readme, "--results-dir", tmp_path / "nowhere") == 1
    assert "nowhere is no folder" in capsys.readouterr().err and readme.read_bytes() == before
