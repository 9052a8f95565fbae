"""Golden record: runs whose losses must not change. `python tests/golden.py` compares with the record; `--add` adds
scripts that it lacks; `--write` makes it anew, which only a deliberate change of the published protocol justifies.

Three tiny runs in detail; the losses of the first 20 optimizer steps of every script, with its own protocol but for a
small model (where it has flags for that) and so few samples that an epoch is one step; and every script's configuration
as it is without flags, in a file of its own.

The digits are exact on one CPU; another CPU rounds differently, so the test allows 1e-4 of most numbers.
"""

import csv
import dataclasses
import hashlib
import json
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import (
    ClassificationConfig,
    DetectionConfig,
    Experiment,
    RunOptions,
    SegmentationConfig,
    TextConfig,
    fit,
)
from models.bdh_unet import bdh_unet_config
from models.language import BDHConfig
from models.vision_bdh import v2_config
from tests.camvid_data import write_camvid
from tests.clip_data import write_clips
from tests.conftest import made_up_cifar
from tests.photos import write_photos
from tests.scenes import write_scenes
from tests.tiny_scripts import SCRIPTS
from training.command_line import experiment_of, flags_of

RECORD = Path(__file__).with_suffix(".json")
CONFIGURATIONS = RECORD.with_name("golden_configurations.json")
COLUMNS = ("train_loss", "val_loss", "learning_rate")  # and the metric, whose column depends on the task
STEPS = 20
SIZE = dict(n_layer=3, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4)


def write_data(folder: Path, n_masks: int = 2 * STEPS) -> Path:
    """Made-up images, photographs, street scenes and a text in the folder; returns the text."""
    for n_classes in (10, 100):
        (folder / f"data_cifar{n_classes}").mkdir(parents=True)
        np.savez(folder / f"data_cifar{n_classes}" / f"cifar{n_classes}.npz", **made_up_cifar(n_classes=n_classes))
    write_camvid(folder / "data_camvid", n_train=n_masks, n_val=4)
    write_scenes(folder / "data_coco", n_train=2 * STEPS)
    write_photos(folder / "data_imagenet" / "train", 70)
    write_photos(folder / "data_imagenet" / "val", 2)
    write_clips(folder / "clips" / "train", 70)
    write_clips(folder / "clips" / "test", 2)
    text = folder / "song.txt"
    lines = (b"%d bottles on the wall, and if one of them should fall, " % (i % 11) for i in range(90))
    text.write_bytes(b"".join(lines))
    return text


def experiments(folder: Path) -> list[Experiment]:
    """v2 on images, BDH-UNet on street scenes, the language model on text: all made up, in the folder."""
    text = write_data(folder, n_masks=8)
    options = RunOptions(data_dir=folder, runs_dir=folder / "runs", device="cpu", num_workers=0)
    common = dict(epochs=3, learning_rate=2e-3, weight_decay=0.05, warmup_steps=4, precision="float32")
    images = ClassificationConfig(
        dataset="cifar10", batch_size=24, crop_scale_min=0.8, horizontal_flip=True, grad_accum=2, **common
    )
    masks = SegmentationConfig(
        batch_size=3, horizontal_flip=0.5, brightness_contrast=0.5, shift_scale_rotate=0.3, **common
    )
    words = TextConfig(text=text, context=16, batch_size=8, val_fraction=0.1, **common)
    unet = bdh_unet_config(img_size=(32, 48), skips=True, skip_levels=(2, 1), **SIZE)
    return [
        Experiment("v2", v2_config(patch_size=8, **SIZE), images, options),
        Experiment("bdh_unet", unet, masks, options),
        Experiment("text", BDHConfig(**SIZE), words, options),
    ]


def script_flags(script: str, folder: Path) -> list[str]:
    """What makes a script one epoch of 20 small steps on the data in the folder."""
    experiment = experiment_of(script)
    has = {field.name for config in (experiment.model, experiment.train) for field in dataclasses.fields(config)}
    small = SIZE | dict(mlp_dim=32, encoder_weights="none", epochs=1)
    fields = {name: value for name, value in small.items() if name in has}
    if isinstance(experiment.train, SegmentationConfig):
        fields |= dict(img_size=32, batch_size=2, train_limit=2 * STEPS)
        fields |= dict(skip_levels=(2, 1)) if getattr(experiment.model, "skips", False) else {}
    elif isinstance(experiment.train, DetectionConfig):
        fields |= dict(img_size=32, batch_size=2, train_limit=2 * STEPS, decoder_layers=1, decoder_mlp_dim=32)
    elif isinstance(experiment.train, TextConfig):
        fields |= dict(text=folder / "song.txt", context=16, batch_size=12)
    else:
        fields |= dict(train_limit=10 * STEPS, batch_size=8)  # a fifth validates
    if getattr(experiment.train, "dataset", None) == "imagenet":
        fields |= dict(img_size=32, num_classes=3, val_fraction=0.2)
    if experiment.train.start_from:
        fields["start_from"] = folder / "runs" / "train_bdh_unet" / "seed0" / "best.pt"
    data = folder
    if getattr(experiment.train, "dataset", None) == "clips":
        fields |= dict(num_classes=3, patch_size=8)
        data = folder / "clips"
    where = ["--data-dir", str(data), "--runs-dir", str(folder / "runs"), "--device", "cpu", "--num-workers", "0"]
    return [*flags_of(fields), "--precision", "float32", "--name", Path(script).stem, *where]


def configurations() -> dict[str, dict]:
    """All fields of model and training by script."""
    return {script: experiment_of(script).configuration.flat() for script in SCRIPTS}


def measure_scripts(scripts: Collection[str] = SCRIPTS) -> dict[str, list[float]]:
    """The losses of the first 20 steps of each of the scripts, on one thread."""
    torch.set_num_threads(1)
    losses = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_data(folder)
        for script in sorted(scripts, key=lambda name: name.startswith("finetune")):  # after what it goes on from
            losses[script] = first_losses(experiment_of(script, " ".join(script_flags(script, folder))))
    return losses


def first_losses(experiment: Experiment) -> list[float]:
    losses, make_task = [], type(experiment.train).make_task

    def make_recorded(train):
        task = make_task(train)

        def loss(outputs, targets):
            value = type(task).loss(task, outputs, targets)
            if value.requires_grad:  # not in validation
                losses.append(value.item())
            return value

        task.loss = loss
        return task

    with mock.patch.object(type(experiment.train), "make_task", make_recorded):
        fit(experiment)
    return losses[-STEPS:]  # the task is tried on two samples before the first step


def measure() -> dict[str, dict]:
    """Trains all three on one thread; the numbers of metrics.csv by run, and a hash of the last weights."""
    torch.set_num_threads(1)
    measured = {}
    with tempfile.TemporaryDirectory() as place:
        for experiment in experiments(Path(place)):
            fit(experiment)
            with (experiment.folder / "metrics.csv").open() as file:
                rows = list(csv.DictReader(file))
            metric = next(name for name in rows[0] if name.startswith("val_") and name != "val_loss")
            weights = torch.load(experiment.folder / "last.pt", weights_only=True)["model"]
            digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in weights.values())).hexdigest()
            numbers = {name: [float(row[name]) for row in rows] for name in (*COLUMNS, metric)}
            measured[experiment.name] = {"numbers": numbers, "weights": digest}
    return measured


def write(record: dict[str, dict], of_scripts: dict[str, dict]) -> None:
    record["first_losses"] = dict(sorted(record["first_losses"].items()))
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    lines = [f"{json.dumps(script)}: {json.dumps(of_scripts[script])}" for script in sorted(of_scripts)]
    CONFIGURATIONS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def add() -> None:
    """Measures the scripts that the record lacks; everything else in it stays."""
    record, of_scripts = json.loads(RECORD.read_text()), json.loads(CONFIGURATIONS.read_text())
    new = [script for script in SCRIPTS if script not in record["first_losses"]]
    record["first_losses"] |= measure_scripts(new)
    write(record, of_scripts | {script: configurations()[script] for script in new})
    print(f"added: {', '.join(new) or 'nothing'}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--add"]:
        raise SystemExit(add())
    if sys.argv[1:] not in ([], ["--write"]):
        raise SystemExit(__doc__)
    now = {"runs": measure(), "first_losses": measure_scripts()}
    if "--write" in sys.argv[1:]:
        write(now, configurations())
    before = json.loads(RECORD.read_text())
    for part, entries in now.items():
        for name, entry in entries.items():
            same = entry == before[part].get(name)
            print(f"{name}: {'equal to the last digit' if same else f'DIFFERS: {before[part].get(name)} -> {entry}'}")
    raise SystemExit(now != before)
