"""The tables of exported forms and of pruning, from a tiny run."""

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import export_table, pruning_curve
from interpretability.common.trained import TrainedRun
from tests.inspecting import check_error, train_unet
from tools.export import Export, Options
from tools.exporting.evaluation import score


def test_the_table_of_forms(trained_run, data_dir, call_script, tmp_path):
    options = ("--data-dir", data_dir, "--output-dir", tmp_path, "--repeats", 1, "--batch-size", 2, "--threads", 1)
    assert call_script("benchmarks/export_table.py", trained_run, *options) == 0
    (path,) = tmp_path.glob("*.csv")
    table = pd.read_csv(path).set_index(["engine", "form"])
    assert len(table) == 6 and (table.test_images == 40).all() and table.hardware.str.contains("1 thread").all()
    whole = table.loc["onnxruntime", "float32"]
    assert (whole.filter(like="ratio_") == 1).all()
    expected = score(TrainedRun(trained_run, data_dir, "cpu"), TrainedRun(trained_run, data_dir, "cpu").model)
    assert whole.accuracy == table.loc["PyTorch", "float32"].accuracy == pytest.approx(expected.value)
    assert whole.low == pytest.approx(expected.interval[0], abs=1e-6)
    pruned = table.loc["onnxruntime", "pruned to 8 neurons a head, float32"]
    assert pruned.ratio_file_mb == pytest.approx(pruned.file_mb / whole.file_mb, abs=1e-4)
    assert table.loc["PyTorch", "bf16"].file_mb < table.loc["PyTorch", "float32"].file_mb
    measured = table[["file_mb", "memory_mb", "seconds_1_image", "seconds_batch"]]
    assert (
        np.isfinite(measured).all().all()
        and (measured[["file_mb", "seconds_1_image", "seconds_batch"]] > 0).all().all()
    )


def test_the_curve_of_pruning(trained_run, data_dir, call_script, tmp_path):
    options = ("--run", trained_run, "--data-dir", data_dir, "--output-dir", tmp_path, "--points", 3)
    assert call_script("benchmarks/pruning_curve.py", *options) == 0
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv", ".png", ".svg"}
    (path,) = tmp_path.glob("*.csv")
    table = pd.read_csv(path)
    assert sorted(set(table.neurons_per_head)) == [4, 12, 16] and len(table) == 9
    opened = TrainedRun(trained_run, data_dir, "cpu")
    whole = table[table.neurons_per_head == 16].accuracy
    assert (whole == score(opened, opened.model).value).all()  # nothing pruned, in any order


def test_the_curves_are_labelled_by_their_order():
    rows = [
        dict(order=order, neurons_per_head=4, accuracy=value, low=value, high=value)
        for order, value in (("use", 0.9), ("activity", 0.6), ("random", 0.1))
    ]
    (ax,) = pruning_curve.draw(pd.DataFrame(rows), "title").axes
    shown = {line.get_label(): line.get_ydata()[0] for line in ax.lines}
    assert shown == {"most needed": 90, "most active": 60, "at random": 10}


def test_activity_is_read_from_training_images(trained_run, data_dir, monkeypatch):
    """For int8, for pruning, and in both benchmarks."""
    run, seen = TrainedRun(trained_run, data_dir, "cpu"), []

    def importance(model, images, order):
        seen.extend(images)
        return torch.zeros(2, 16)

    monkeypatch.setattr(pruning_curve, "importance", importance)
    pruning_curve.orders(run, pruning_curve.Options(run=trained_run, calibration_images=20))
    export = Export(Options(run=trained_run, data_dir=data_dir, calibration_images=20))
    known = torch.cat([images for images, _ in run.training_batches(np.arange(192))])
    for images in (seen, export._training_images(), export_table.training_images(run)):
        for image in torch.cat(list(images)):
            assert (known == image).flatten(1).all(1).any()


def test_runs_that_do_not_classify_get_one_message(call_script, tmp_path, capsys):
    folder = train_unet(tmp_path)
    for script in (["pruning_curve.py", "--run"], ["export_table.py"]):
        assert call_script(f"benchmarks/{script[0]}", *script[1:], folder, "--data-dir", tmp_path) == 1
        check_error(capsys, "does not classify images")
