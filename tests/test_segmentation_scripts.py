"""The segmentation scripts as a user runs them, on made-up CamVid: what they configure, write and say."""

import ast
import csv
import dataclasses
import json
import re
import shutil

import pytest
import torch
from camvid_data import write_camvid

import training
from training import SegmentationConfig
from models.baselines import ResNetUNetConfig
from models.bdh_unet import bdh_unet_config
from training.config import ROOT
from training.data.masks import CAMVID
from training.runs import load_model

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPTS = ["train_bdh_unet.py", "finetune_bdh_unet.py", "train_resnet34_unet.py", "train_resnet50_unet.py"]
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


def read_rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------- what they configure


@pytest.fixture
def captured_launch(call_script, monkeypatch):
    """Calls a script whose launch() only notes its arguments: (name, model, train)."""

    def capture(script):
        noted = []
        with monkeypatch.context() as patch:
            patch.setattr(training, "launch", lambda name, model, train: noted.extend((name, model, train)))
            assert call_script(script) == 0
        return noted

    return capture


@pytest.mark.parametrize(
    ("script", "name", "model", "parameters", "train"),
    [
        ("train_bdh_unet.py", "bdh_unet", bdh_unet_config(), 4_152_235, dict(epochs=80)),
        (
            "finetune_bdh_unet.py",
            "bdh_unet_finetune",
            bdh_unet_config(),
            4_152_235,
            dict(epochs=10, learning_rate=3e-5, start_from=ROOT / "runs/bdh_unet/seed0/best.pt"),
        ),
        ("train_resnet34_unet.py", "resnet34_unet", ResNetUNetConfig(depth=34), 24_437_819, dict(epochs=40)),
        ("train_resnet50_unet.py", "resnet50_unet", ResNetUNetConfig(depth=50), 32_522_555, dict(epochs=40)),
    ],
)
def test_the_published_configuration(script, name, model, parameters, train, captured_launch):
    protocol = dict(
        dataset="camvid",
        batch_size=4,
        learning_rate=3e-4,
        weight_decay=0.01,
        warmup_steps=0,
        max_grad_norm=1.0,
        dice_weight=0.5,
        horizontal_flip=0.5,
        brightness_contrast=0.5,
        shift_scale_rotate=0.3,
    )
    assert captured_launch(script) == [name, model, SegmentationConfig(**(protocol | train))]
    with torch.device("meta"):
        assert sum(each.numel() for each in model.build().parameters()) == parameters


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_field(script, call, captured_launch, monkeypatch, capsys):
    _, model, train = captured_launch(script)
    monkeypatch.setenv("COLUMNS", "120")
    assert call(script, "--help") == 0
    shown = capsys.readouterr().out
    for config in (model, train):
        for field in dataclasses.fields(config):
            assert re.search(rf"--{field.name.replace('_', '-')}[ ,]", shown), field.name
    assert "--val-fraction" not in shown and "--horizontal-flip" in shown


@pytest.mark.parametrize(
    ("script", "flags", "word"),
    [
        ("train_bdh_unet.py", "--img-size 100", "img_size = 100 is not a multiple of patch_size = 8"),
        ("train_bdh_unet.py", "--img-size 96 100", "(96, 100) is not a multiple of patch_size = 8"),
        ("train_bdh_unet.py", "--encoder-weights none", "encoder-weights"),
        ("train_bdh_unet.py", "--val-fraction 0.1", "val-fraction"),
        ("train_bdh_unet.py", "--pool cls", "pool"),
        ("train_bdh_unet.py", "--dataset cifar10", "camvid"),
        ("train_bdh_unet.py", "--dice-weight 2", "dice_weight = 2.0 must be between 0 and 1"),
        ("train_resnet34_unet.py", "--img-size 48", "img_size = 48 is not a multiple of 32"),
        ("train_resnet34_unet.py", "--encoder-weights imagnet", "imagenet"),
        ("train_resnet50_unet.py", "--n-embd 8", "n-embd"),
    ],
)
def test_a_wrong_flag_is_refused_with_a_hint(script, flags, word, call, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    assert call(script, *flags.split()) == 2
    captured = capsys.readouterr()
    assert word in captured.out + captured.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--num-classes 12", ["11 classes", "--num-classes 11"]),
        ("--in-channels 1", ["colour images", "--in-channels 3"]),
        ("--eval-batch-size 16", ["leave out --eval-batch-size"]),
    ],
)
def test_a_model_that_does_not_fit_the_data(flags, words, call, tmp_path, capsys):
    assert call("train_bdh_unet.py", *TINY, *flags.split()) == 1
    said = capsys.readouterr().err
    assert all(word in said for word in words) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_short_and_shows_its_configuration(script):
    text = (ROOT / script).read_text()
    assert 20 <= len(text.splitlines()) <= 50
    tree = ast.parse(text)
    assert f"python {script}" in ast.get_docstring(tree)
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.For | ast.While | ast.FunctionDef)]


# ---------------------------------------------------------------------------- what they write


def test_a_run_of_bdh_unet_and_its_fine_tuning(call, tmp_path, capsys):
    assert call("train_bdh_unet.py", *TINY, "--epochs", 2, "--name", "unet") == 0
    folder = tmp_path / "runs" / "unet" / "seed0"
    said = capsys.readouterr().out
    rows, summary = read_rows(folder), json.loads((folder / "summary.json").read_text())
    assert [list(row) for row in rows] == [COLUMNS] * 2 and "split.npz" not in {path.name for path in folder.iterdir()}
    assert summary["test"] is None and summary["images"] == {"train": 8, "val": 4, "test": 0}
    best = rows[summary["best"]["epoch"] - 1]
    assert set(summary["best"]) == {"epoch", *(name for name in COLUMNS if name.startswith("val_"))}
    for name, value in summary["best"].items():
        assert (None if best[name] == "" else float(best[name])) == value, name
    ious = [value for name, value in summary["best"].items() if name.startswith("val_iou_") and value is not None]
    assert summary["best"]["val_miou"] == pytest.approx(sum(ious) / len(ious))
    assert f"{summary['best']['val_miou']:.2%}" in said and "IoU bicyclist" in said and "no test part" in said
    config = json.loads((folder / "config.json").read_text())
    assert config["data"] == {"name": "camvid", "class_names": [*CAMVID.names], "images": summary["images"]}
    assert config["origin"] is None
    model, _ = load_model(folder)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 11, 32, 32)

    start = folder / "best.pt"
    assert call("finetune_bdh_unet.py", *TINY, "--epochs", 1, "--start-from", start, "--name", "tuned") == 0
    assert "starting from" in capsys.readouterr().out
    tuned = json.loads((tmp_path / "runs" / "tuned" / "seed0" / "config.json").read_text())
    assert tuned["origin"] == {"file": "unet-seed0-best.pt", "epoch": summary["best"]["epoch"]}


def test_it_learns_and_resumes_to_the_same_result(call, tmp_path):
    """The made-up classes have colours: a few epochs tell most of them apart. Stopped, it ends where it would have."""
    size = "--img-size 32 --n-layer 2 --n-embd 32 --n-head 2 --mlp-internal-dim-multiplier 4 --init normal".split()
    training = "--epochs 20 --learning-rate 2e-2 --batch-size 2 --num-workers 0 --device cpu".split()
    flags = [*size, "--skips", "--skip-levels", 2, 1, *training]
    assert call("train_bdh_unet.py", *flags, "--name", "whole") == 0
    whole = tmp_path / "runs" / "whole" / "seed0"
    rows = read_rows(whole)
    mious = [float(row["val_miou"]) for row in rows]
    assert max(mious) > 0.15 and max(mious) > 3 * mious[0]  # guessing among the 12 labels gives 0.045
    assert float(rows[-1]["train_loss"]) < 0.8 * float(rows[0]["train_loss"])

    cut = tmp_path / "runs" / "cut" / "seed0"
    shutil.copytree(whole, cut)
    for name in ("summary.json", "last.pt"):
        (cut / name).unlink()  # previous.pt is of the epoch before the last
    assert call("train_bdh_unet.py", *flags, "--name", "cut", "--resume") == 0
    measured = {"epoch_time_sec", "images_per_sec", "peak_memory_mb"}
    for one, other in zip(rows, read_rows(cut), strict=True):
        assert {k: v for k, v in one.items() if k not in measured} == {
            k: v for k, v in other.items() if k not in measured
        }
    weights = [torch.load(each / "last.pt", weights_only=True)["model"] for each in (whole, cut)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_the_original_size(call, tmp_path):
    """The same weights, another measurement: masks of 48 x 32 instead of 32 x 32."""
    for name, flags in (("scaled", []), ("full", ["--eval-full-size"])):
        assert call("train_bdh_unet.py", *TINY, "--epochs", 1, "--name", name, *flags) == 0
    scaled, full = (tmp_path / "runs" / name / "seed0" for name in ("scaled", "full"))
    weights = [torch.load(each / "last.pt", weights_only=True)["model"] for each in (scaled, full)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert read_rows(scaled)[0]["val_loss"] != read_rows(full)[0]["val_loss"]


def test_resnet34_from_scratch(call, tmp_path):
    flags = "--img-size 32 --encoder-weights none --epochs 1 --device cpu --name resnet --train-limit 4".split()
    assert call("train_resnet34_unet.py", *flags) == 0
    model, config = load_model(tmp_path / "runs" / "resnet" / "seed0")
    assert config["parameters"] == 24_437_819 and config["origin"] is None
    assert model(torch.zeros(1, 3, 64, 32)).shape == (1, 11, 64, 32)


def test_other_data_are_refused_at_resume(call, call_script, tmp_path, capsys):
    flags = [*TINY, "--epochs", 1, "--name", "one"]
    assert call("train_bdh_unet.py", *flags) == 0
    (tmp_path / "runs" / "one" / "seed0" / "summary.json").unlink()
    write_camvid(tmp_path / "data_camvid", n_train=5, n_val=4, size=(48, 32))
    where = ["--data-dir", tmp_path / "data_camvid", "--runs-dir", tmp_path / "runs"]
    assert call_script("train_bdh_unet.py", *flags, *where, "--resume") == 1
    assert "started on other data" in capsys.readouterr().err
