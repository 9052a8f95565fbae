"""Draws what training images look like: a contact sheet of 64 augmented images for every augmentation, and for all.

python tools/show_augmentations.py                          # CIFAR-10, into augmentations/
python tools/show_augmentations.py --magnitude 15 --dataset cifar100
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torchvision.utils import make_grid, save_image

from training import ClassificationConfig
from training.command_line import run_script
from training.config import ROOT, require
from training.data import ImageBatches, load_dataset, split_train

SHOWN, PER_ROW, SCALE = 64, 16, 3


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which images, and how strong."""

    dataset: Literal["cifar10", "cifar100"] = "cifar10"
    """images to show"""
    magnitude: int = 9
    """magnitude of RandAugment, 0 to 30"""
    data_dir: Path | None = None
    """folder that holds data_cifar10 and the like; default: $VISION_BDH_DATA, else beside the scripts"""
    output_dir: Path = ROOT / "augmentations"
    """folder of the pictures"""
    seed: int = 0
    """seed of the draws"""

    def __post_init__(self):
        require(0 <= self.magnitude <= 30, self, "magnitude", "must be between 0 and 30")
        require(self.seed >= 0, self, "seed", "must not be negative")


def settings(magnitude: int) -> dict[str, dict[str, Any]]:
    """Fields of the train config by name of the picture."""
    single = {
        "none": {},
        "crop_and_flip": dict(crop_scale_min=0.8, horizontal_flip=True),
        "padding": dict(crop_padding=4),
        "randaugment": dict(randaugment=2, randaugment_magnitude=magnitude),
        "erasing": dict(random_erasing=0.5),
        "mixup": dict(mixup=0.8),
        "cutmix": dict(cutmix=1.0),
        "repeated": dict(repeat_augment=4, randaugment=2, randaugment_magnitude=magnitude),
    }
    together = ("padding", "randaugment", "erasing", "mixup", "cutmix")
    everything = {key: value for name in together for key, value in single[name].items()}
    return single | {"everything": everything | dict(horizontal_flip=True, label_smoothing=0.1)}


def main(options: Options) -> None:
    dataset = load_dataset(options.dataset, options.data_dir)
    split = split_train(dataset.train_labels, 0.2, None, options.seed)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    common = dict(dataset=options.dataset, epochs=1, batch_size=SHOWN, learning_rate=1e-3, weight_decay=0.0)
    for name, fields in settings(options.magnitude).items():
        config = ClassificationConfig(**common, seed=options.seed, **fields)
        batches = ImageBatches(dataset, split, config, SHOWN, torch.device("cpu"))
        images, _ = next(iter(batches.train_batches(0)))
        sheet = make_grid((images + 1) / 2, nrow=PER_ROW, padding=2, pad_value=1)
        path = options.output_dir / f"{options.dataset}_{name}.png"
        save_image(sheet.repeat_interleave(SCALE, 1).repeat_interleave(SCALE, 2), path)
        print(path)


if __name__ == "__main__":
    run_script(main, __doc__)
