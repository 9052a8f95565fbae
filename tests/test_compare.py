"""Differences to a default, paired by seed."""

import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from training import UserError
from analysis.analyze import by_task, write_results
from analysis.compare import compare, difference_interval
from analysis.reading import find_runs, make_rows, read_runs
from tests.trials import read_table
from training.config import ROOT


def lines_of(path):
    return {line["experiment"]: line for line in read_table(path)}


@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_interval_is_that_of_a_paired_t_test(n):
    rng = np.random.default_rng(n)
    defaults = rng.normal(0.7, 0.05, n)
    values = defaults + rng.normal(0.01, 0.02, n)
    mean, low, high = difference_interval(values, defaults)
    expected = stats.ttest_rel(values, defaults).confidence_interval(0.95)
    assert mean == pytest.approx((values - defaults).mean(), rel=1e-12)
    assert (low, high) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_one_pair_has_a_difference_and_no_interval():
    mean, low, high = difference_interval([0.5], [0.4])
    assert mean == pytest.approx(0.1) and np.isnan(low) and np.isnan(high)


def test_differences_are_paired_by_seed(make_run, tmp_path, capsys):
    results = {0: 0.70, 1: 0.80, 2: 0.60}
    for seed, test in results.items():
        make_run("ablation", seed, test=test)
    for seed, better in {2: 0.03, 0: 0.01, 5: 0.5}.items():  # seed 5 has no partner, the default's seed 1 neither
        make_run("ablation+n_layer=12", seed, n_layer=12, test=results.get(seed, 0.2) + better)
    folders = sorted((tmp_path / "runs").glob("*/*"))
    compare(folders, "ablation", tmp_path / "out" / "table")
    lines = lines_of(tmp_path / "out" / "table.csv")
    changed, default = lines["ablation+n_layer=12"], lines["ablation"]
    assert float(changed["difference"]) == pytest.approx(0.02)
    half = stats.t.ppf(0.975, 1) * 0.01  # differences 0.01 and 0.03: deviation 0.01 sqrt(2), over sqrt(2)
    assert float(changed["difference_low"]) == pytest.approx(0.02 - half)
    assert float(changed["difference_high"]) == pytest.approx(0.02 + half)
    assert (changed["seeds"], changed["pairs"], default["seeds"]) == ("3", "2", "3")
    assert float(changed["mean"]) == pytest.approx((0.63 + 0.71 + 0.7) / 3)
    assert float(default["std"]) == pytest.approx(np.std(list(results.values()), ddof=1))
    assert default["difference"] == ""
    shown = capsys.readouterr().out
    assert "| n_layer=12 | 3,233,482 | 3 | 68.00 | " in shown and "| +2.00 | " in shown
    assert "| default | 3,233,482 | 3 | 70.00 | 10.00 |  |  |" in shown


def test_data_without_a_test_part_are_compared_by_validation(make_run, tmp_path, capsys):
    _, default = make_run("ablation", test=None)
    _, other = make_run("other", test=None, n_layer=12)
    compare(sorted((tmp_path / "runs").glob("*/*")), "ablation", tmp_path / "table")
    best = [max(row["val_accuracy"] for row in rows) for rows in (other, default)]
    assert float(lines_of(tmp_path / "table.csv")["other"]["difference"]) == pytest.approx(best[0] - best[1])
    assert "| seeds | best validation accuracy (%) |" in capsys.readouterr().out


def test_a_test_result_is_not_compared_with_a_validation_result(make_run, tmp_path, capsys):
    make_run("ablation"), make_run("tested"), make_run("untested", test=None)
    compare(sorted((tmp_path / "runs").glob("*/*")), "ablation", tmp_path / "table")
    assert lines_of(tmp_path / "table.csv").keys() == {"ablation", "tested"}
    assert "untested is left out: its data have no test part, the default's a test part" in capsys.readouterr().err


def test_only_finished_runs_on_the_same_data_count(make_run, tmp_path):
    make_run("ablation"), make_run("ablation", 1, done=2), make_run("c100", dataset="cifar100"), make_run("b", done=1)
    compare(sorted((tmp_path / "runs").glob("*/*")), "ablation", tmp_path / "table")
    assert {name: line["seeds"] for name, line in lines_of(tmp_path / "table.csv").items()} == {"ablation": "1"}


def test_a_metric_not_in_percent_keeps_its_unit_and_its_direction(make_run, tmp_path, capsys):
    make_run("bdh_text", test=2.0, metric="bits_per_byte")
    make_run("bdh_text+n_layer=12", test=1.75, metric="bits_per_byte", n_layer=12)
    folders = sorted((tmp_path / "runs").glob("*/*"))
    compare(folders, "bdh_text", tmp_path / "table")
    shown = capsys.readouterr().out
    assert "test bits per byte" in shown and "| 1.7500 |" in shown and "| -0.2500 |" in shown
    assert "%" not in shown.replace("95 %", "")
    table = write_results(by_task(make_rows(read_runs(folders))), tmp_path / "out", "Results")[0].read_text()
    assert table.index("n_layer=12") < table.index("| bdh_text |")  # lower is better, and the best comes first
    assert "test bits per byte" in table and "%" not in table.split("Mean over")[0]


@pytest.mark.parametrize(("default", "words"), [("v9", "no finished run"), ("two", "several configurations")])
def test_a_default_that_is_not_one_is_refused(default, words, make_run, tmp_path):
    make_run("two"), make_run("two", folder=tmp_path / "runs" / "elsewhere", n_layer=3), make_run("one")
    with pytest.raises(UserError, match=f"{default} has .*{words}"):
        compare([*(tmp_path / "runs").rglob("seed*"), tmp_path / "runs" / "elsewhere"], default, tmp_path / "t")
    with pytest.raises(UserError, match=r"^there is no finished run: name another folder with --runs-dir$"):
        compare([], default, tmp_path / "t")
    assert not list(tmp_path.glob("t*"))


@pytest.mark.parametrize(
    ("table", "folders"),
    [
        ("small_cpu/cifar10_against_v2", ["small_cpu"]),
        ("small_cpu/camvid_against_bdh_unet", ["small_cpu"]),
        ("v4_small_cpu/camvid_against_resnet34", ["small_cpu", "v4_small_cpu"]),
        ("ablation_small_cpu/table", ["ablation_small_cpu"]),
    ],
)
def test_the_tables_in_results_are_those_of_their_runs(table, folders, tmp_path, capsys):
    kept = (ROOT / "results" / f"{table}.md").read_text(encoding="utf-8")
    default = re.search(r"^Default: `(.*)`, on", kept, re.MULTILINE)[1]
    compare([run for name in folders for run in find_runs(ROOT / "results" / name)], default, tmp_path / "table")
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == kept
    files = (ROOT / "results" / f"{table}.csv", tmp_path / "table.csv")
    pd.testing.assert_frame_equal(*map(pd.read_csv, files), rtol=1e-9)


def test_the_script(make_run, tmp_path, call_script, capsys):
    make_run("ablation"), make_run("ablation+n_layer=12", folder=tmp_path / "more" / "seed0", n_layer=12, test=0.8)
    where = ["--runs-dir", tmp_path / "runs", tmp_path / "more", "--output", tmp_path / "out" / "t"]
    assert call_script("analysis/compare.py", "--default", "ablation", *where) == 0
    assert "| +5.00 |" in capsys.readouterr().out
    assert (tmp_path / "out" / "t.md").exists() and (tmp_path / "out" / "t.csv").exists()
    assert call_script("analysis/compare.py", "--default", "ablation", *where[:2], "--output", ".") == 1
    assert "--output . is a folder: add a file name" in capsys.readouterr().err
    assert call_script("analysis/compare.py", "--default", "v9", *where) == 1
    assert "ablation, ablation+n_layer=12" in capsys.readouterr().err
