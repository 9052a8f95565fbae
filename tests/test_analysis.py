"""Tables and figures of made-up runs."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from training import UserError
from analysis.analyze import analyze, by_task, draw_curves, draw_final, write_results
from analysis.plotting.curves import labels_of
from analysis.plotting.style import plain_text
from analysis.reading import RunFiles, find_runs, make_rows, read_runs
from tests.pictures import check_picture
from tests.trials import markdown_rows, read_table

ALWAYS = [f"{name}.{kind}" for name in ("learning_curves", "final_accuracy") for kind in ("png", "svg")]
ALWAYS += ["results.md", "results.csv"]
OPTIONAL = ["accuracy_against_parameters", "accuracy_against_time", "speed", "mlp_multiplier"]


def tables_of(runs, output):
    """results.md and results.csv, without the slow figures."""
    return write_results(by_task(make_rows(read_runs(runs))), output / "results", "Results")


def test_averages_over_seeds(make_run, tmp_path):
    made = [make_run(seed=seed) for seed in (0, 1, 5)]
    paths = analyze([folder for folder, _ in made], tmp_path / "out")
    assert [path.name for path in paths] == ALWAYS

    tests = [json.loads((folder / "summary.json").read_text())["test"]["accuracy"] for folder, _ in made]
    accuracy = np.array([[row["val_accuracy"] for row in rows] for _, rows in made])  # (seeds, epochs)
    seconds = [row["epoch_time_sec"] for _, rows in made for row in rows]
    (line,) = read_table(paths[-1])
    assert float(line["test_accuracy_mean"]) == pytest.approx(np.mean(tests))
    assert float(line["test_accuracy_std"]) == pytest.approx(np.std(tests, ddof=1))
    assert float(line["best_val_accuracy_mean"]) == pytest.approx(accuracy.max(1).mean())
    assert float(line["best_epoch_median"]) == np.median(accuracy.argmax(1) + 1)
    assert float(line["epoch_time_sec_median"]) == pytest.approx(np.median(seconds))
    assert {key: line[key] for key in ("experiment", "differs_in", "dataset", "hardware")} == {
        "experiment": "v2_cifar10",
        "differs_in": "",
        "dataset": "cifar10",
        "hardware": "GPU X",
    }
    counts = ("parameters", "seeds", "seeds_not_finished", "epochs", "epochs_done")
    assert [int(line[key]) for key in counts] == [3_233_482, 3, 0, 5, 5]

    (cells,) = markdown_rows(paths[-2])
    assert cells[:4] == [
        "v2_cifar10",
        "3,233,482",
        "3",
        f"{100 * np.mean(tests):.2f} ± {100 * np.std(tests, ddof=1):.2f}",
    ]
    assert cells[4] == f"{100 * accuracy.max(1).mean():.2f}"


def test_bars_have_one_standard_deviation(make_run):
    tests = (0.70, 0.76, 0.75)
    folders = [make_run(seed=seed, test=test)[0] for seed, test in enumerate(tests)]
    ax = draw_final(by_task(make_rows(read_runs(folders)))).subfigs[0].axes[0]
    (bar,) = [each for each in ax.containers if getattr(each, "has_xerr", False)]
    mean, deviation = 100 * np.mean(tests), 100 * np.std(tests, ddof=1)
    assert bar[2][0].get_segments()[0][:, 0] == pytest.approx([mean - deviation, mean + deviation])


def test_one_seed_has_no_deviation(make_run, tmp_path):
    paths = tables_of([make_run(test=0.7654)[0]], tmp_path)
    (line,) = read_table(paths[-1])
    assert float(line["test_accuracy_mean"]) == 0.7654 and line["test_accuracy_std"] == ""
    assert markdown_rows(paths[-2])[0][2:4] == ["1", "76.54"]


def test_the_best_epoch_is_the_one_that_was_tested(make_run, tmp_path):
    folder, rows = make_run()
    summary = json.loads((folder / "summary.json").read_text())
    other = summary["best"]["epoch"] % 5 + 1
    summary["best"] |= {"epoch": other, "val_accuracy": rows[other - 1]["val_accuracy"]}
    (folder / "summary.json").write_text(json.dumps(summary))
    (line,) = read_table(tables_of([folder], tmp_path)[-1])
    assert float(line["best_epoch_median"]) == other
    assert float(line["best_val_accuracy_mean"]) == rows[other - 1]["val_accuracy"]


@pytest.mark.parametrize(
    ("metric", "values", "losses", "best"),
    [
        ("accuracy", [0.5, 0.7, 0.7], [1.0, 0.9, 0.8], 3),  # of equals the one of lower loss
        ("bits_per_byte", [3.0, 2.0, 2.5], [3.0, 2.0, 2.5], 2),  # lower is better
    ],
)
def test_the_best_epoch_of_a_run_without_a_summary(metric, values, losses, best):
    epochs = pd.DataFrame({"val_loss": losses, f"val_{metric}": values}, index=[1, 2, 3])
    assert RunFiles(Path(), {"config": {"train": {}}}, epochs, None).best_epoch == best


def test_different_configs_are_separate_rows(make_run, tmp_path):
    """Under one name, and told apart by what differs; only the seed may differ within a row."""
    make_run(seed=0)
    make_run(seed=1)
    make_run(folder=tmp_path / "runs" / "elsewhere" / "a", seed=2, n_layer=12)
    make_run(folder=tmp_path / "runs" / "elsewhere" / "b", seed=3, n_layer=12, batch_size=64)
    make_run(folder=tmp_path / "runs" / "elsewhere" / "c", seed=4, n_layer=12, batch_size=64)
    lines = read_table(tables_of(find_runs(tmp_path / "runs"), tmp_path / "out")[-1])
    assert {(line["differs_in"], line["seeds"]) for line in lines} == {
        ("batch_size=32, n_layer=6", "2"),
        ("batch_size=32, n_layer=12", "1"),
        ("batch_size=64, n_layer=12", "2"),
    }
    assert {line["experiment"] for line in lines} == {"v2_cifar10"}


def test_equal_configs_under_two_names_stay_apart(make_run, tmp_path):
    runs = [make_run(name)[0] for name in ("before", "after")]
    assert sorted(line["experiment"] for line in read_table(tables_of(runs, tmp_path)[-1])) == ["after", "before"]


def test_a_copy_of_a_run_is_no_second_seed(make_run, tmp_path, capsys):
    make_run(seed=0)
    make_run(seed=1)
    copy, _ = make_run(seed=1, folder=tmp_path / "runs" / "z_copy")
    (line,) = read_table(tables_of(find_runs(tmp_path / "runs"), tmp_path / "out")[-1])
    assert line["seeds"] == "2"
    assert str(copy) in capsys.readouterr().err


def test_epochs_done_are_those_of_every_seed(make_run, tmp_path):
    runs = [make_run(seed=seed, done=done)[0] for seed, done in enumerate((4, 2, 3))]
    (line,) = read_table(tables_of(runs, tmp_path)[-1])
    assert line["epochs_done"] == "2"


def test_runs_that_are_not_finished(make_run, tmp_path):
    _, rows = make_run(seed=0)
    make_run(seed=1, done=2)
    _, begun = make_run("v3_cifar10", done=3)
    paths = tables_of(find_runs(tmp_path / "runs"), tmp_path / "out")
    first, second = read_table(paths[-1])
    assert (first["seeds"], first["seeds_not_finished"], first["epochs_done"]) == ("1", "1", "5")
    assert float(first["best_val_accuracy_mean"]) == max(row["val_accuracy"] for row in rows)  # of the finished alone
    assert (second["seeds"], second["seeds_not_finished"], second["epochs_done"]) == ("0", "1", "3")
    assert second["test_accuracy_mean"] == second["test_accuracy_std"] == ""
    assert float(second["best_val_accuracy_mean"]) == max(row["val_accuracy"] for row in begun)
    assert int(float(second["best_epoch_median"])) == max(begun, key=lambda row: row["val_accuracy"])["epoch"]
    cells = markdown_rows(paths[-2])
    assert cells[0][2] == "1 and 1 not finished" and " ± " not in cells[0][3]
    assert cells[1][2:4] == ["1 not finished", "not finished"] and cells[1][6] == "3 of 5"


def test_curves_mark_runs_that_are_not_finished(make_run, tmp_path):
    """Mean, band and the dashed curve are what matplotlib was given."""
    made = [make_run(seed=seed)[1] for seed in (0, 1)]
    begun = make_run(seed=2, done=3)[1]
    rows = make_rows(read_runs(find_runs(tmp_path / "runs")))
    (block,) = draw_curves({rows[0].task: rows}).subfigs
    accuracy = np.array([[100 * row["val_accuracy"] for row in each] for each in made])
    solid, dashed = block.axes[0].lines
    assert np.allclose(solid.get_ydata(), accuracy.mean(0)) and list(solid.get_xdata()) == [1, 2, 3, 4, 5]
    assert np.allclose(dashed.get_ydata(), [100 * row["val_accuracy"] for row in begun])
    assert (solid.get_linestyle(), dashed.get_linestyle()) == ("-", "--")
    (band,) = block.axes[0].collections
    corners = band.get_paths()[0].vertices
    upper = [corners[corners[:, 0] == epoch, 1].max() for epoch in range(1, 6)]
    lower = [corners[corners[:, 0] == epoch, 1].min() for epoch in range(1, 6)]
    assert np.allclose(upper, accuracy.mean(0) + accuracy.std(0, ddof=1))
    assert np.allclose(lower, accuracy.mean(0) - accuracy.std(0, ddof=1))
    texts = [text.get_text() for text in block.legends[0].get_texts()]
    assert texts == ["v2_cifar10 (2\N{NO-BREAK SPACE}seeds)", "v2_cifar10, seed 2: not finished, epoch 3 of 5"]
    losses = [np.mean([[row[name] for row in each] for each in made], 0) for name in ("val_loss", "train_loss")]
    assert all(np.allclose(ax.lines[0].get_ydata(), loss) for ax, loss in zip(block.axes[1:], losses, strict=True))


def on_lines(change):
    """A change of the lines of a file as a change of its bytes."""
    return lambda content: b"".join(change(content.splitlines(keepends=True)))


DAMAGES = {  # the file, and what becomes of its content
    "cut_json": ("config.json", lambda content: content[:-9]),
    "cut_summary": ("summary.json", lambda content: b'{"test": '),
    "drop_field": ("config.json", lambda content: content.replace(b'"epochs": 5, ', b"")),
    "empty_csv": ("metrics.csv", lambda content: b""),
    "header_only": ("metrics.csv", on_lines(lambda lines: lines[:1])),
    "binary_csv": ("metrics.csv", lambda content: bytes(range(256))),
    "word_in_csv": ("metrics.csv", on_lines(lambda lines: [*lines[:2], b"2,much,0.5,0.7,50,800\n", *lines[3:]])),
    # the last line ends, but lacks the numbers behind val_loss
    "short_line": ("metrics.csv", on_lines(lambda lines: [*lines[:-1], *lines[-1].rsplit(b",", 5)[:1], b"\n"])),
    "lost_epoch": ("metrics.csv", on_lines(lambda lines: lines[:2] + lines[3:])),
    "lost_last_epoch": ("metrics.csv", on_lines(lambda lines: lines[:-1])),
}


@pytest.mark.parametrize(("name", "change"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_runs_are_skipped_with_one_line(make_run, tmp_path, capsys, name, change):
    def damage(folder):
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    whole, broken = make_run(seed=0)[0], make_run(seed=1)[0]
    damage(broken)
    assert [run.folder for run in read_runs([broken, whole])] == [whole]
    error = capsys.readouterr().err
    assert error.startswith("warning: ") and str(broken) in error and error.count("\n") == 1
    damage(whole)
    with pytest.raises(UserError):
        tables_of([whole, broken], tmp_path / "out")


def test_other_metrics_and_data_sets(make_run, tmp_path):
    """A block for each data set; the metric is named by its column; a data set may lack a test part."""
    make_run()
    make_run("unet", dataset="camvid", metric="miou")
    make_run("unet", seed=1, dataset="voc", metric="miou", test=None)
    paths = tables_of(find_runs(tmp_path / "runs"), tmp_path / "out")
    by_dataset = {line["dataset"]: line for line in read_table(paths[-1])}
    expected = json.loads((tmp_path / "runs/unet/seed0/summary.json").read_text())["test"]["miou"]
    assert float(by_dataset["camvid"]["test_miou_mean"]) == expected
    assert by_dataset["camvid"]["test_accuracy_mean"] == by_dataset["voc"]["test_miou_mean"] == ""
    text = paths[-2].read_text()
    assert "test mIoU (%)" in text and "test accuracy (%)" in text and "no test part" in text
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## camvid", "## cifar10", "## voc"]


def test_pictures(make_run, tmp_path):
    """From one run of one epoch to twelve experiments with long names."""
    paths = analyze([make_run("short", epochs=1)[0]], tmp_path / "one")
    small = [check_picture(path).shape for path in paths if path.suffix == ".png"]
    for index in range(12):
        name = f"v2_cifar10+mlp_internal_dim_multiplier={index}+n_embd=48+learning_rate=0.001"
        for seed in range(1 + index % 3):
            make_run(name, seed)
    paths = analyze(find_runs(tmp_path / "runs"), tmp_path / "many")
    large = [check_picture(path).shape for path in paths if path.suffix == ".png"]
    assert large[0][1] == small[0][1] and large[0][0] > small[0][0] + 100  # the legend takes room of its own
    assert large[1][0] > small[1][0] + 100


def test_skipped_figures_are_named_and_old_ones_removed(make_run, tmp_path):
    """Time and speed need two experiments; parameters and multiplier are the same in both here."""
    first, second = make_run("v1")[0], make_run("v2", n_layer=12)[0]
    said = []
    paths = analyze([first, second], tmp_path / "out", say=said.append)
    there = [path.stem for path in paths if path.suffix == ".png"]
    assert there[2:] == ["accuracy_against_time", "speed"]
    names = ("accuracy_against_parameters", "mlp_multiplier")
    assert [line.partition(" needs")[0] for line in said] == [f"skipped: {name}" for name in names]
    said.clear()
    (tmp_path / "out" / "notes.png").write_text("the user's own")
    analyze([first], tmp_path / "out", say=said.append)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*ALWAYS, "notes.png"])
    assert [line.partition(" needs")[0] for line in said] == [f"skipped: {name}" for name in OPTIONAL]


def test_the_loss_has_a_unit_where_it_is_a_cross_entropy(make_run, tmp_path):
    make_run()
    make_run("unet", dataset="camvid", metric="miou")
    rows = make_rows(read_runs(find_runs(tmp_path / "runs")))
    figure = draw_curves({row.task: [row] for row in rows})
    labels = [[ax.get_ylabel() for ax in block.axes] for block in figure.subfigs]
    assert labels == [
        ["validation mIoU (%)", "validation loss", "training loss"],
        ["validation accuracy (%)", "validation loss (nats)", "training loss (nats)"],
    ]


def test_labels_leave_out_what_all_share(make_run, tmp_path):
    make_run("v1+epochs=5+n_embd=48")
    make_run("v2+epochs=5+n_embd=48", n_layer=3)
    make_run("v2+epochs=5+n_embd=48", seed=1)
    rows = make_rows(read_runs(find_runs(tmp_path / "runs")))
    labels, title = labels_of(rows)
    assert sorted(labels) == ["v1", "v2, n_layer=3", "v2, n_layer=6"]
    assert title == "cifar10, all with epochs=5, n_embd=48"


@pytest.mark.parametrize("name", [r"$\frac$", "_v2", "a$b", r"\$x$", "one $x$ and $y"])
def test_names_are_shown_as_they_are(make_run, tmp_path, name):
    """Neither read as formulas, nor left out of a legend."""
    make_run(name), make_run("v1", n_layer=3)
    rows = make_rows(read_runs(find_runs(tmp_path / "runs")))
    figure = draw_curves({rows[0].task: rows})
    FigureCanvasAgg(figure).draw()
    texts = figure.subfigs[0].legends[0].get_texts()
    assert len(texts) == 2 and any(name in text.get_text().replace(r"\$", "$") for text in texts)
    for text in (Text(text=plain_text(name)), *texts):
        shown, is_formula = text._preprocess_math(text.get_text())
        assert not is_formula and (name not in text.get_text().replace(r"\$", "$") or name in shown)


def test_titles_say_of_small_runs_that_they_are(make_run, tmp_path, call_script):
    """Where all of them are: in plots and in the table's heading."""
    small = tmp_path / "small_cpu"
    make_run("v1", folder=small / "v1" / "seed0")
    make_run("v2", folder=small / "v2" / "seed0", n_layer=3)
    rows = make_rows(read_runs(find_runs(small)))
    assert labels_of(rows)[1] == "cifar10, small runs"
    assert call_script("analysis/analyze.py", "--runs-dir", small, "--output-dir", tmp_path / "out") == 0
    assert "## cifar10, small runs\n" in (tmp_path / "out" / "results.md").read_text()
    make_run("v3", folder=tmp_path / "runs" / "v3" / "seed0")
    assert labels_of(make_rows(read_runs(find_runs(tmp_path))))[1] == "cifar10"


def test_no_runs_is_one_message(call_script, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    assert call_script("analysis/analyze.py", "--runs-dir", "runs", "--output-dir", "out") == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: ") and shown.err.count("\n") == 1
    assert "train_quickstart.py" in shown.err and not (tmp_path / "out").exists()


def test_command_line(make_run, call_script, tmp_path, capsys):
    make_run()
    assert call_script("analysis/analyze.py", "--runs-dir", "runs", "--output-dir", "out") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith("skipped: ")] == [f"out/{name}" for name in ALWAYS]
    assert len(lines) == len(ALWAYS) + len(OPTIONAL)
    assert read_table(tmp_path / "out" / "results.csv")[0]["experiment"] == "v2_cifar10"


def test_without_a_test_part_the_best_validation_is_the_result(make_run):
    best = {}
    for name in ("one", "other"):
        runs = [make_run(name=name, seed=seed, metric="miou", test=None) for seed in (0, 1)]
        best[name] = [max(row["val_miou"] for row in rows) for _, rows in runs]
        root = runs[0][0].parents[1]
    rows = make_rows(read_runs(find_runs(root)))
    order = sorted(best, key=lambda name: -np.mean(best[name]))
    assert [row.experiment for row in rows] == order
    figure = draw_final({rows[0].task: rows})
    assert figure.axes[0].get_xlabel().startswith("best validation mIoU (%)")
    assert [bar.get_width() for bar in figure.axes[0].patches] == pytest.approx([100 * np.mean(best[n]) for n in order])
    labels = [label.get_text() for ax in figure.axes for label in ax.get_yticklabels()]
    assert all(
        f"{100 * np.mean(best[name]):.2f} ± {100 * np.std(best[name], ddof=1):.2f} %" in "".join(labels)
        for name in order
    )


def test_times_on_different_hardware_are_not_averaged(make_run, tmp_path):
    make_run("one"), make_run("two", 0), make_run("two", 1, hardware={"device": "cuda", "name": "another GPU"})
    _, table = tables_of(sorted((tmp_path / "runs").glob("*/*")), tmp_path)
    by_name = {line["experiment"]: line for line in read_table(table)}
    times = ("epoch_time_sec_median", "training_time_sec_median", "images_per_sec_median")
    assert all(by_name["one"][name] and not by_name["two"][name] for name in times)


def test_runs_that_trained_on_their_validation_images_have_no_validation_result(make_run, tmp_path):
    make_run("honest", metric="miou"), make_run("all", metric="miou", train_val=True)
    report, table = tables_of(sorted((tmp_path / "runs").glob("*/*")), tmp_path)
    by_name = {line["experiment"]: line["best_val_miou_mean"] for line in read_table(table)}
    assert by_name["honest"] and not by_name["all"]
    (cells,) = [cells for cells in markdown_rows(report) if cells[0].startswith("all")]
    assert cells[4] == "trained on it"


def test_runs_on_other_data_or_other_batches_are_not_averaged(make_run):
    def with_config(folder, change):
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    seeds = [make_run(seed=seed)[0] for seed in range(5)]
    own = [make_run(name="own", seed=seed, dataset="folder")[0] for seed in range(3)]
    resnet = [make_run(name="resnet", seed=seed)[0] for seed in range(2)]
    everything = [*seeds, *own, *resnet]
    assert sorted(len(row.runs) for row in make_rows(read_runs(everything))) == [2, 3, 5]
    with_config(seeds[1], lambda config: config["data"].update(sha256="other text"))
    with_config(seeds[2], lambda config: config["data"].update(images={"train": 600, "test": 100}))
    with_config(own[1], lambda config: config["data"].update(file_names_and_sizes="other files"))
    with_config(own[2], lambda config: config["data"].update(boxes="other boxes"))  # of detection
    architecture = {"num_classes": 10, "img_size": 32}
    for seed, processes in enumerate((1, 8)):
        changed = {"model_class": "ResNet20Config"}
        with_config(resnet[seed], lambda config, new=changed: config.update(new))
        with_config(resnet[seed], lambda config: config["config"].update(model=architecture))
        with_config(resnet[seed], lambda config, n=processes: config["hardware"].update(processes=n))
    rows = make_rows(read_runs(everything))
    assert sorted((row.experiment, len(row.runs)) for row in rows) == [
        *[("own", 1)] * 3,
        *[("resnet", 1)] * 2,
        *[("v2_cifar10", 1)] * 2,
        ("v2_cifar10", 3),
    ]
    assert {row.differs for row in rows if row.experiment == "resnet"} == {
        *[("batchnorm_of_shares=False",), ("batchnorm_of_shares=True",)]
    }


def test_each_seed_may_start_from_the_run_with_its_own_seed(make_run):
    tuned = [make_run(seed=seed, start_from=f"bdh_unet-seed{seed}-best.pt")[0] for seed in (0, 1, 12)]
    (row,) = make_rows(read_runs(tuned))
    assert len(row.runs) == 3
    other = make_run(seed=2, start_from="bdh_unet-seed1-best.pt")[0]
    assert sorted(len(row.runs) for row in make_rows(read_runs([*tuned, other]))) == [1, 3]
