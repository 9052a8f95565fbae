"""Golden record: three tiny runs whose losses must not change. `python tests/golden.py` compares with the record;
`--write` makes it anew, which only a deliberate change of the published protocol justifies.

The digits are exact on one CPU; another CPU rounds differently, so the test allows 1e-4 of each number.
"""

import csv
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from camvid_data import write_camvid
from conftest import made_up_cifar

from training import ClassificationConfig, Experiment, RunOptions, SegmentationConfig, TextConfig, fit
from models.bdh import BDHConfig
from models.bdh_unet import bdh_unet_config
from models.vision_bdh import v2_config

RECORD = Path(__file__).with_suffix(".json")
COLUMNS = ("train_loss", "val_loss", "learning_rate")  # and the metric, whose column depends on the task
SIZE = dict(n_layer=3, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4)


def experiments(folder: Path) -> list[Experiment]:
    """v2 on images, BDH-UNet on street scenes, the language model on text: all made up, in the folder."""
    (folder / "data_cifar10").mkdir(parents=True)
    np.savez(folder / "data_cifar10" / "cifar10.npz", **made_up_cifar())
    write_camvid(folder / "data_camvid", n_train=8, n_val=4)
    text = folder / "song.txt"
    lines = (b"%d bottles on the wall, and if one of them should fall, " % (i % 11) for i in range(90))
    text.write_bytes(b"".join(lines))
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


if __name__ == "__main__":
    now = measure()
    if "--write" in sys.argv[1:]:
        RECORD.write_text(json.dumps(now, indent=1) + "\n")
    before = json.loads(RECORD.read_text())
    for name, run in now.items():
        print(f"{name}: {'equal to the last digit' if run == before[name] else f'DIFFERS: {before[name]} -> {run}'}")
    raise SystemExit(now != before)
