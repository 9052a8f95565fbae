"""Runs of several folders side by side, from folders made up here in the format that training writes."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex

from analysis.analyze import by_task, draw_final
from analysis.compare_existing_results import compare_results, read_rows, short_names
from analysis.plotting.style import COLORS
from tests.pictures import check_picture, share_of_color
from tests.trials import markdown_rows, read_table

SCRIPT = "analysis/compare_existing_results.py"


@pytest.fixture
def run_in(make_run, tmp_path):
    """make_run in another folder than runs."""

    def make(place, name, seed=0, **keywords):
        return make_run(name, seed, folder=tmp_path / place / name / f"seed{seed}", **keywords)

    return make


def test_an_experiment_in_two_folders_has_a_line_for_each(run_in, tmp_path):
    """Seeds are averaged within a folder, not across; the folders of one experiment come below each other."""
    mine, others = (0.70, 0.76), (0.81, 0.83, 0.80)
    for seed, test in enumerate(mine):
        run_in("runs", "v2", seed, test=test)
    for seed, test in enumerate(others):
        run_in("results", "v2", seed, test=test)
    run_in("runs", "v1", test=0.78)
    markdown, table, picture, _ = compare_results([tmp_path / "runs", tmp_path / "results"], tmp_path / "out" / "c")
    lines = read_table(table)
    assert [(line["folder"], line["experiment"], line["seeds"]) for line in lines] == [
        ("results", "v2", "3"),
        ("runs", "v2", "2"),
        ("runs", "v1", "1"),
    ]
    for line, tests in zip(lines, (others, mine), strict=False):
        assert float(line["test_accuracy_mean"]) == pytest.approx(np.mean(tests))
        assert float(line["test_accuracy_std"]) == pytest.approx(np.std(tests, ddof=1))
    cells = markdown_rows(markdown)
    assert [each[:4] for each in cells] == [
        ["results", "v2", "3,233,482", "3"],
        ["runs", "v2", "3,233,482", "2"],
        ["runs", "v1", "3,233,482", "1"],
    ]
    assert cells[1][4] == f"{100 * np.mean(mine):.2f} ± {100 * np.std(mine, ddof=1):.2f}"
    pixels = check_picture(picture)
    assert all(share_of_color(pixels, color) > 0.01 for color in COLORS[:2])


def drawn(*paths):
    """The blocks of the figure."""
    return draw_final(by_task(read_rows(paths))).subfigs


def test_bars_are_named_by_folder_where_needed_and_coloured_by_it(run_in, tmp_path):
    run_in("runs", "v2", test=0.6), run_in("results", "v2", test=0.8), run_in("runs", "v1", test=0.7)
    run_in("runs", "begun", done=2)
    (block,) = drawn(tmp_path / "runs", tmp_path / "results")
    ax = block.axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["v2, in results", "v2, in runs", "v1", "begun"]
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([80, 60, 70])
    assert [to_hex(bar.get_facecolor()).upper() for bar in ax.patches] == [COLORS[0], COLORS[1], COLORS[1]]
    (legend,) = block.legends
    pairs = zip(legend.get_texts(), legend.get_lines(), strict=True)
    assert {text.get_text(): mark.get_color() for text, mark in pairs} == {"results": COLORS[0], "runs": COLORS[1]}


def test_a_single_folder_needs_no_names_of_folders(run_in, tmp_path):
    run_in("runs", "v2", test=0.6), run_in("runs", "v1", test=0.7)
    (block,) = drawn(tmp_path / "runs")
    assert [label.get_text() for label in block.axes[0].get_yticklabels()] == ["v1", "v2"]
    assert not block.legends
    assert len({bar.get_facecolor() for bar in block.axes[0].patches}) == 2


def test_configurations_that_differ_between_folders_say_so(run_in, tmp_path):
    run_in("runs", "v2", batch_size=64)
    run_in("results", "v2")
    rows = read_rows([tmp_path / "runs", tmp_path / "results"])
    assert {row.folder: row.parts for row in rows} == {
        "runs": ["v2", "batch_size=64"],
        "results": ["v2", "batch_size=32"],
    }


def test_runs_seeds_and_folders_can_be_mixed_and_none_counts_twice(run_in, tmp_path):
    """A run, an experiment's folder and a folder of experiments; what lies in several counts for the first."""
    for seed in (0, 1):
        run_in("runs", "v1", seed)
        run_in("runs", "v2", seed)
    runs = tmp_path / "runs"
    rows = read_rows([runs / "v2" / "seed1", runs / "v1", runs, runs / "v1"])
    found = {(row.folder, row.experiment): [run.train["seed"] for run in row.runs] for row in rows}
    assert found == {("seed1", "v2"): [1], ("v1", "v1"): [0, 1], ("runs", "v2"): [0]}


def test_names_are_the_shortest_ends_that_tell_paths_apart(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    paths = [tmp_path / each for each in ("a/runs", "b/runs", "c/d/results", "e/d/results", "f")]
    names = short_names([*paths, tmp_path / "b" / "x" / ".." / "runs"])
    assert [names[path] for path in paths] == ["a/runs", "b/runs", "c/d/results", "e/d/results", "f"]
    assert set(names.values()) == {"a/runs", "b/runs", "c/d/results", "e/d/results", "f"}
    assert short_names([Path(), tmp_path / "b"]) == {Path(): "a", tmp_path / "b": "b"}


def test_the_script(run_in, call_script, tmp_path, capsys):
    run_in("runs", "v2", test=0.75), run_in("results", "v2", test=0.8)
    assert call_script(SCRIPT, "runs", "results", "--output", "out/both.1") == 0
    shown = capsys.readouterr().out
    assert "| runs | v2 |" in shown and "| results | v2 |" in shown
    names = [f"both.1.{kind}" for kind in ("md", "csv", "png", "svg")]
    assert shown.splitlines()[-4:] == [f"out/{name}" for name in names]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        ((), "nothing to compare"),
        (("runs", "nowhere"), "nowhere is no folder"),
        (("runs", "empty"), "empty holds no run"),
    ],
)
def test_what_cannot_be_compared_is_one_message(paths, words, run_in, call_script, tmp_path, capsys):
    run_in("runs", "v2")
    (tmp_path / "empty").mkdir()
    assert call_script(SCRIPT, *paths, "--output", "out/c") == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and words in shown.err and shown.err.count("\n") == 1 and not shown.out
    assert not (tmp_path / "out").exists()


def test_an_output_without_a_name_is_one_message(run_in, call_script, capsys):
    run_in("runs", "v2_cifar10")
    for output in (".", "/"):
        assert call_script(SCRIPT, "runs", "--output", output) == 1
        assert "is a folder: add a file name" in capsys.readouterr().err
