"""The segmentation scripts as a user runs them, on made-up CamVid: what they write and say."""

import json

import pytest
import torch

from tests.camvid_data import write_camvid
from tests.trials import interrupt, read_rows, same_weights, weights
from training.command_line import experiment_of
from training.data.classes import CAMVID
from training.runs import load_model

TINY = "--img-size 32 --n-layer 2 --n-embd 16 --n-head 2 --mlp-internal-dim-multiplier 4 --device cpu".split()
COLUMNS = (
    "epoch train_loss val_loss val_miou learning_rate epoch_time_sec images_per_sec peak_memory_mb train_miou "
    "val_pixel_accuracy val_miou_batch"
).split() + [f"val_iou_{name}" for name in CAMVID.names]


@pytest.fixture(scope="module")
def camvid(tmp_path_factory):
    """Made-up images of 48 x 32 pixels: 8 to train on, 4 to validate with."""
    folder = tmp_path_factory.mktemp("data_camvid")
    write_camvid(folder, n_train=8, n_val=4, size=(48, 32))
    return folder


@pytest.fixture
def call(call_script, camvid, tmp_path):
    """Runs a script on the made-up images; returns its exit code."""

    def run(script, *args):
        return call_script(script, *args, "--data-dir", camvid, "--runs-dir", tmp_path / "runs")

    return run


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--num-classes 12", ["11 classes", "--num-classes 11"]),
        ("--in-channels 1", ["colour images", "--in-channels 3"]),
        ("--eval-batch-size 16", ["leave out --eval-batch-size"]),
        ("--data-dir {tmp_path}", ["does not hold CamVid"]),
    ],
)
def test_data_that_are_missing_or_do_not_fit(flags, words, call_script, camvid, tmp_path, capsys):
    where = ["--data-dir", camvid, "--runs-dir", tmp_path / "runs"]
    assert call_script("train_bdh_unet.py", *TINY, *where, *flags.format(tmp_path=tmp_path).split()) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and all(word in said for word in words)
    assert not (tmp_path / "runs").exists()


def test_a_run_of_bdh_unet_and_its_fine_tuning(call, tmp_path, capsys):
    assert call("train_bdh_unet.py", *TINY, "--epochs", 2, "--name", "unet") == 0
    folder = tmp_path / "runs" / "unet" / "seed0"
    said = capsys.readouterr().out
    rows, summary = read_rows(folder), json.loads((folder / "summary.json").read_text())
    assert [list(row) for row in rows] == [COLUMNS] * 2 and not (folder / "split.npz").exists()
    assert summary["test"] is None and summary["images"] == {"train": 8, "val": 4, "test": 0}
    best = rows[summary["best"]["epoch"] - 1]
    assert set(summary["best"]) == {"epoch", *(name for name in COLUMNS if name.startswith("val_"))}
    for name, value in summary["best"].items():
        assert (None if best[name] == "" else float(best[name])) == value, name
    ious = [value for name, value in summary["best"].items() if name.startswith("val_iou_") and value is not None]
    assert summary["best"]["val_miou"] == pytest.approx(sum(ious) / len(ious))
    assert f"{summary['best']['val_miou']:.2%}" in said and "IoU bicyclist" in said and "no test set" in said
    config = json.loads((folder / "config.json").read_text())
    assert len(config["data"].pop("file_names_and_sizes")) == 64
    assert config["data"] == {"name": "camvid", "class_names": [*CAMVID.names], "images": summary["images"]}
    assert config["origin"] is None
    model, _ = load_model(folder)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 11, 32, 32)

    start = folder / "best.pt"
    assert call("finetune_bdh_unet.py", *TINY, "--epochs", 1, "--start-from", start, "--name", "tuned") == 0
    assert "starting from" in capsys.readouterr().out
    tuned = json.loads((tmp_path / "runs" / "tuned" / "seed0" / "config.json").read_text())
    assert tuned["origin"] == {"file": "unet-seed0-best.pt"}


def test_it_learns_and_resumes_to_the_same_result(call, camvid, tmp_path):
    """The made-up classes have colours: a few epochs tell most of them apart. Stopped, it ends where it would have."""
    size = "--img-size 32 --n-layer 2 --n-embd 32 --n-head 2 --mlp-internal-dim-multiplier 4 --init normal".split()
    training = "--epochs 20 --learning-rate 2e-2 --batch-size 2 --num-workers 0 --device cpu".split()
    flags = [*size, "--skips", "--skip-levels", "2", "1", *training]
    assert call("train_bdh_unet.py", *flags, "--name", "whole") == 0
    rows = read_rows(tmp_path / "runs" / "whole" / "seed0")
    mious = [float(row["val_miou"]) for row in rows]
    assert max(mious) > 0.15 and max(mious) > 3 * mious[0]  # guessing among the 12 labels gives 0.045
    assert float(rows[-1]["train_loss"]) < 0.8 * float(rows[0]["train_loss"])

    flags = [*flags, "--name", "cut"]
    where = ["--data-dir", str(camvid), "--runs-dir", str(tmp_path / "runs")]
    interrupt(experiment_of("train_bdh_unet.py", " ".join([*flags, *where])), 3)
    assert call("train_bdh_unet.py", *flags, "--resume") == 0
    whole, cut = (tmp_path / "runs" / name / "seed0" for name in ("whole", "cut"))
    assert read_rows(whole, measured=False) == read_rows(cut, measured=False)
    assert same_weights(weights(whole), weights(cut))


def test_the_original_size(call, tmp_path):
    """The same weights, another measurement: masks of 48 x 32 instead of 32 x 32."""
    for name, flags in (("scaled", []), ("full", ["--eval-full-size"])):
        assert call("train_bdh_unet.py", *TINY, "--epochs", 1, "--name", name, *flags) == 0
    scaled, full = (tmp_path / "runs" / name / "seed0" for name in ("scaled", "full"))
    assert same_weights(weights(scaled), weights(full))
    assert read_rows(scaled)[0]["val_loss"] != read_rows(full)[0]["val_loss"]


def test_other_data_are_refused_at_resume(call, call_script, tmp_path, capsys):
    flags = [*TINY, "--epochs", 1, "--name", "one"]
    assert call("train_bdh_unet.py", *flags) == 0
    (tmp_path / "runs" / "one" / "seed0" / "summary.json").unlink()
    write_camvid(tmp_path / "data_camvid", n_train=5, n_val=4, size=(48, 32))
    where = ["--data-dir", tmp_path / "data_camvid", "--runs-dir", tmp_path / "runs"]
    assert call_script("train_bdh_unet.py", *flags, *where, "--resume") == 1
    assert "started on other data" in capsys.readouterr().err
