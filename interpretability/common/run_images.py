"""The images that a finished run was trained and tested on."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.config import UserError
from training.data import DataSet, Split, data_folder, draw_split, load_dataset
from training.data.image_files import read_images
from training.data.mask_files import BadFile, MaskFiles, Pair
from training.data.masks import find_masks
from training.data.segmentation import read_pair, refuse, scale_image, scale_mask, training_pairs
from training.runs import Run
from training.stored import changed_data

DATA_WORDS = {
    "class_names": "class names",
    "images": "numbers of images",
    "file_names_and_sizes": "files",
    "sha256": "images or labels",
}


class Samples(NamedTuple):
    """B images and their labels, on the CPU."""

    images: Tensor  # (B, C, height, width) uint8, at the model's size
    labels: Tensor  # (B,) int64 classes, or (B, height, width) for segmentation


class RunImages(ABC):
    """A run's test images (validation images if its data have no test part), and those that it was trained on."""

    part: str
    """test or validation"""
    class_names: tuple[str, ...]

    def __init__(
        self, folder: Path, recorded: dict[str, Any], sizes: Any, train: dict[str, Any], data_dir: Path | None
    ):
        """recorded: the run's description of its data; sizes, train: the configs of its model and its training.

        data_dir: as `Places.data_dir`. Raises UserError if the data cannot be used, or are not those of the run.
        """
        self.folder, self.recorded, self.sizes, self.train = folder, recorded, sizes, train
        self.name: str = train["dataset"]
        self.find(data_dir)

    @abstractmethod
    def find(self, data_dir: Path | None) -> None:
        """Sets what is known of the data before any image is read."""

    @property
    @abstractmethod
    def n_images(self) -> int:
        """Images of the part."""

    @abstractmethod
    def samples(self, indices: Sequence[int]) -> Samples:
        """Images of the part by number."""

    @property
    @abstractmethod
    def training_order(self) -> np.ndarray:
        """Numbers of all training images, in an order in which evenly spaced ones represent all."""

    @abstractmethod
    def training_samples(self, numbers: np.ndarray) -> Samples:
        """Training images by number, not augmented."""

    def require_same(self, found: dict[str, Any]) -> None:
        """Raises UserError unless the data with this description are those of the run, as far as it recorded them."""
        changed = changed_data(self.recorded, found)
        if changed:
            key = next((key for key in DATA_WORDS if key in changed), changed[0])  # the one that says most
            raise UserError(
                f"{self.folder} was trained on other {DATA_WORDS.get(key, key)} of {self.name}: "
                "give its data with --data-dir"
            )


class ClassifiedImages(RunImages):
    """Images with one class each."""

    data: DataSet

    def find(self, data_dir: Path | None) -> None:
        data = load_dataset(self.name, data_dir, self.sizes.img_size, self.sizes.in_channels)
        self.require_same(data.description)
        self.data = data.with_eval_crop(self.train.get("eval_crop", 1.0))
        self.class_names = data.class_names
        self.part = "test" if len(data.test_labels) else "validation"

    @cached_property
    def split(self) -> Split:
        """Which images the run was trained on and validated with; drawn again, by its seed, if split.npz is missing."""
        split = Run(self.folder).read_split()
        if split is None:
            train = self.train
            split = draw_split(self.data, train["val_fraction"], train["train_limit"], train["seed"])
        return split

    @property
    def n_images(self) -> int:
        return len(self.data.test_labels if self.part == "test" else self.split.val)

    def samples(self, indices: Sequence[int]) -> Samples:
        numbers = np.asarray(indices)
        if self.part == "test":
            return self._read(self.data.test_images[numbers], self.data.test_labels[numbers])
        return self._read_part("val", numbers)

    @property
    def training_order(self) -> np.ndarray:
        """By class."""
        return np.argsort(self.data.train_labels[self.split.train], kind="stable")

    def training_samples(self, numbers: np.ndarray) -> Samples:
        return self._read_part("train", numbers)

    def _read_part(self, part: str, numbers: np.ndarray) -> Samples:
        places = getattr(self.split, part)[numbers]
        return self._read(*self.data.part(part, dataclasses.replace(self.split, **{part: places})))

    @staticmethod
    def _read(images: Any, labels: np.ndarray) -> Samples:
        return Samples(torch.from_numpy(read_images(images)), torch.from_numpy(labels))


class SegmentedImages(RunImages):
    """Images with a class for each pixel."""

    files: MaskFiles

    def find(self, data_dir: Path | None) -> None:
        self.files = find_masks(self.name, data_folder(self.name, data_dir), download=False)
        refuse(self.files.problems, self.name)
        self.require_same(self.files.description)
        self.class_names = self.files.classes.names
        self.part = "test" if self.files.pairs.get("test") else "validation"

    @property
    def pairs(self) -> list[Pair]:
        """Image and mask files of the part."""
        return self.files.pairs["test" if self.part == "test" else "val"]

    @cached_property
    def training_pairs(self) -> list[Pair]:
        train = self.train
        return training_pairs(self.files, train.get("train_val", False), train["train_limit"], train["seed"])

    @property
    def n_images(self) -> int:
        return len(self.pairs)

    def samples(self, indices: Sequence[int], full_size: bool = False) -> Samples:
        """full_size: masks at the size that they are stored at, which must be the same for all."""
        return self._read(self.pairs, indices, full_size)

    @property
    def training_order(self) -> np.ndarray:
        return np.arange(len(self.training_pairs))

    def training_samples(self, numbers: np.ndarray) -> Samples:
        return self._read(self.training_pairs, numbers)

    def _read(self, pairs: list[Pair], numbers: Sequence[int] | np.ndarray, full_size: bool = False) -> Samples:
        read = [self._read_one(pairs[number], full_size) for number in numbers]
        return Samples(*(torch.from_numpy(np.stack(each)) for each in zip(*read, strict=True)))

    def _read_one(self, pair: Pair, full_size: bool) -> tuple[np.ndarray, np.ndarray]:
        """(C, height, width) uint8 and (height, width) int64, at the model's size; full_size: the mask at its own."""
        try:
            image, mask = read_pair(pair, self.files)
        except BadFile as error:
            raise UserError(str(error)) from None
        size = self.sizes.img_size
        mask = mask if full_size else scale_mask(mask, size)
        return scale_image(image, size).transpose(2, 0, 1), mask.astype(np.int64)
