"""Training time and operations to an accuracy, held to numbers computed by hand."""

import math

import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from analysis.reading import make_rows, read_runs
from analysis.time_to_accuracy import Options, draw, main, training_pflop, training_seconds
from models.flops import flop_of
from models.vision_bdh import v2_config
from tests.trials import markdown_rows
from training.config import UserError


def test_the_table_has_the_time_and_the_operations_of_training_alone(make_run, tmp_path, capsys):
    speeds, accuracies = [100.0, 200.0, 100.0, 100.0, 50.0], [[0.2, 0.5, 0.4, 0.7, 0.8], [0.1, 0.2, 0.3, 0.4, 0.5]]
    for seed, accuracy in enumerate(accuracies):
        make_run(seed=seed, columns={"images_per_sec": speeds, "val_accuracy": accuracy}, test=0.6 + seed / 10)
    make_run(name="v1_cifar10", done=3)
    main(Options(runs_dir=tmp_path / "runs", target=0.5))
    (row,) = pd.read_csv(tmp_path / "runs" / "time_to_accuracy.csv").itertuples()  # the unfinished run is left out
    with FlopCounterMode(display=False) as counter:
        v2_config().build().to("meta")(torch.zeros(1, 3, 32, 32, device="meta")).sum().backward()
    images, pflop = 40_000, counter.get_total_flops() / 1e15
    assert (row.seeds, row.epochs, row.parameters) == (2, 5, 3_233_482)
    assert row.minutes == pytest.approx(images * (1 / 100 + 1 / 200 + 1 / 100 + 1 / 100 + 1 / 50) / 60)
    assert row.pflop == pytest.approx(5 * images * pflop)
    assert row.test_accuracy == pytest.approx(0.65) and row.test_accuracy_lowest == pytest.approx(0.6)
    assert row.minutes_to_target == pytest.approx(images * ((1 / 100 + 1 / 200) + (0.035 + 0.02)) / 2 / 60)
    assert row.pflop_to_target == pytest.approx((2 + 5) / 2 * images * pflop)
    assert (tmp_path / "runs" / "time_to_accuracy.png").stat().st_size > 10_000
    assert "| v2_cifar10 | 3,233,482 | 2 | 5 |" in capsys.readouterr().out
    (cells,) = markdown_rows(tmp_path / "runs" / "time_to_accuracy.md")
    assert cells[-3:] == [f"{row.minutes_to_target:.1f}", f"{row.pflop_to_target:.2f}", "GPU X"]
    main(Options(runs_dir=tmp_path / "runs", target=0.75))
    (row,) = pd.read_csv(tmp_path / "runs" / "time_to_accuracy.csv").itertuples()
    assert math.isnan(row.minutes_to_target)  # one seed does not reach it


def test_the_figure_has_minutes_on_the_left_and_operations_on_the_right(make_run):
    (run,) = read_runs([make_run(columns={"val_accuracy": [0.2, 0.5, 0.4, 0.7, 0.8]})[0]])
    left, right = draw(make_rows([run]), 0.5).axes
    assert (left.get_xlabel(), right.get_xlabel()) == ("minutes of training", "training operations (1e15)")
    assert left.lines[0].get_xdata() == pytest.approx(training_seconds(run) / 60)
    assert right.lines[0].get_xdata() == pytest.approx(training_pflop(run))


def test_images_of_several_sizes_cost_their_mean(make_run):
    run = read_runs([make_run(train_sizes=[24, 40])[0]])[0]
    mean = flop_of(v2_config(), (24, 40))
    assert training_pflop(run).iloc[-1] == pytest.approx(5 * 40_000 * mean / 1e15)
    assert mean == pytest.approx((flop_of(v2_config(), (24,)) + flop_of(v2_config(), (40,))) / 2)
    assert mean != pytest.approx(flop_of(v2_config()))


def test_lines_on_different_hardware_say_which(make_run):
    runs = [make_run()[0], make_run("v1_cifar10", hardware={"device": "cuda", "name": "GPU Y"})[0]]
    left, _ = draw(make_rows(read_runs(runs)), 0.5).axes
    assert {line.get_label() for line in left.lines} >= {"v2_cifar10 (GPU X)", "v1_cifar10 (GPU Y)"}


def test_long_names_stay_inside_the_figure(make_run):
    long = dict(
        learning_rate=3e-3, n_embd=96, n_head=4, mlp_internal_dim_multiplier=4, warmup_steps=100, weight_decay=0.3
    )
    runs = [make_run()[0], make_run(name="v2_cifar10+" + "+".join(f"{k}={v}" for k, v in long.items()), **long)[0]]
    figure = draw(make_rows(read_runs(runs)), 0.5)
    figure.canvas.draw()
    (legend,) = [legend for block in figure.subfigs for legend in block.legends]
    assert len(legend.get_texts()) == 2
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y0 >= 0


def test_a_folder_without_finished_runs_is_refused(make_run, tmp_path):
    make_run(done=2)
    with pytest.raises(UserError, match="must hold finished runs of classification on one data set"):
        main(Options(runs_dir=tmp_path / "runs"))


def test_runs_on_grey_images_and_without_speeds(make_run, tmp_path, capsys):
    make_run(in_channels=1, columns={"images_per_sec": [100.0] * 5, "val_accuracy": [0.5] * 5})
    for value in (0.0, float("nan")):
        make_run(name=f"at_{value}", columns={"images_per_sec": [100.0, value] + [100.0] * 3})
    path = make_run(name="v1_cifar10")[0] / "metrics.csv"
    pd.read_csv(path).drop(columns="images_per_sec").to_csv(path, index=False)
    main(Options(runs_dir=tmp_path / "runs", target=0.5))
    (row,) = pd.read_csv(tmp_path / "runs" / "time_to_accuracy.csv").itertuples()
    assert row.pflop > 0
    said = capsys.readouterr().err
    assert "v1_cifar10/seed0 is left out: metrics.csv has no column images_per_sec" in said
    assert said.count("is left out: images_per_sec is not above 0 in every epoch") == 2


def test_a_target_in_percent_is_refused():
    with pytest.raises(ValueError, match=r"target = 81.73 must be above 0 and at most 1: 0.9 is 90 %"):
        Options(target=81.73)


def test_minutes_on_different_hardware_are_not_averaged(make_run, tmp_path):
    for seed, name in enumerate(("GPU X", "GPU Y")):
        make_run(seed=seed, hardware={"device": "cuda", "name": name})
    main(Options(runs_dir=tmp_path / "runs", target=0.5))
    (row,) = pd.read_csv(tmp_path / "runs" / "time_to_accuracy.csv").itertuples()
    assert math.isnan(row.minutes) and math.isnan(row.minutes_to_target) and row.pflop_to_target > 0
