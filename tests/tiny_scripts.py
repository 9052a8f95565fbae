"""Every training script, found by itself, and the flags that make each one small on made-up data."""

import dataclasses

from training import DetectionConfig, SegmentationConfig, TextConfig
from tests.camvid_data import write_camvid
from tests.clip_data import write_clips
from tests.photos import write_photos
from tests.scenes import write_scenes
from training.command_line import experiment_of, flags_of
from training.config import ROOT

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if "\nEXPERIMENT = " in path.read_text(encoding="utf-8"))
MADE_UP = ("digits", "cifar10", "cifar100", "imagenet", "camvid", "coco", "clips", "a text")
SMALL = dict(n_layer=1, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, mlp_dim=16)
SHORT = dict(epochs=1, train_limit=80, encoder_weights="none", context=16)


def tiny_fields(experiment, text):
    """The changes that make an experiment small, so far as it has fields for it."""
    has = {field.name for config in (experiment.model, experiment.train) for field in dataclasses.fields(config)}
    fields = {key: value for key, value in (SMALL | SHORT).items() if key in has}
    if isinstance(experiment.train, SegmentationConfig):
        fields |= dict(img_size=32, train_limit=4)
        fields |= dict(skip_levels=(1, 1)) if getattr(experiment.model, "skips", False) else {}
    elif isinstance(experiment.train, DetectionConfig):
        fields |= dict(img_size=32, train_limit=4, decoder_layers=1)
    elif getattr(experiment.train, "dataset", None) == "imagenet":
        fields |= dict(img_size=32, num_classes=3, val_fraction=0.2)
    elif getattr(experiment.train, "dataset", None) == "clips":
        fields |= dict(num_classes=3, patch_size=8)
    elif "n_layer" in fields and getattr(experiment.model, "img_size", 0) == 32:
        fields["patch_size"] = 8
    return fields | ({"text": text} if isinstance(experiment.train, TextConfig) else {})


def tiny_flags(folder, data_dir):
    """Writes made-up data into the folder; returns the flags of a script's tiny run on them, by script."""
    for name in ("data_cifar10", "data_cifar100"):
        (folder / name).symlink_to(data_dir / name)
    write_camvid(folder / "data_camvid", n_train=4, n_val=2)
    write_scenes(folder / "data_coco", n_train=4)
    write_photos(folder / "data_imagenet" / "train", 30)
    write_photos(folder / "data_imagenet" / "val", 2)
    (folder / "song.txt").write_bytes(b"".join(b"%d bottles on the wall, " % i for i in range(100)))
    write_clips(folder / "clips" / "train", 30)
    write_clips(folder / "clips" / "test", 2)
    where = ["--runs-dir", str(folder / "runs"), "--device", "cpu", "--num-workers", "0"]

    def flags(script):
        experiment = experiment_of(script)
        data = folder / "clips" if getattr(experiment.train, "dataset", None) == "clips" else folder
        return [*flags_of(tiny_fields(experiment, folder / "song.txt")), "--data-dir", str(data), *where]

    return flags


def has_made_up_data(script):
    return getattr(experiment_of(script).train, "dataset", "a text") in MADE_UP
