"""A classification data set, its seeded split, and batches of its images on the device."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from training import seeds
from training.augment import Augmentation, normalise
from training.config import ClassificationConfig, UserError
from training.data.image_files import ImageFiles, UnreadableImage, read_images
from training.device import fits_in_memory


@dataclass(frozen=True)
class DataSet:
    """Images (N, C, H, W) uint8 and labels (N,) int64 of the official training and test sets.

    The test set may be empty. Images of a folder are `ImageFiles`, which index like such an array.
    """

    name: str
    train_images: np.ndarray | ImageFiles
    train_labels: np.ndarray
    test_images: np.ndarray | ImageFiles
    test_labels: np.ndarray
    class_names: tuple[str, ...]

    @property
    def description(self) -> dict[str, Any]:
        """Identifies the data: stored in config.json and compared at resume."""
        return {
            "name": self.name,
            "class_names": list(self.class_names),
            "images": {"train": len(self.train_labels), "test": len(self.test_labels)},
        }


@dataclass(frozen=True)
class Split:
    """Which of the training images train and which validate: two disjoint sets of indices."""

    train: np.ndarray
    val: np.ndarray


def split_train(labels: np.ndarray, val_fraction: float, limit: int | None, seed: int) -> Split:
    """A stratified split of the training images, drawn from the seed alone.

    labels: (N,). Each class gives the same share to validation. A limit draws that many images first, stratified too.
    Raises UserError if a part would be empty.
    """
    generator = np.random.default_rng(seeds.derive("split", seed))
    indices = np.arange(len(labels))
    if limit is not None and limit < len(labels):
        indices = _draw_stratified(indices, labels, limit, generator)
    n_val = round(val_fraction * len(indices))
    if not 0 < n_val < len(indices):
        raise UserError(
            f"val_fraction = {val_fraction} of {len(indices)} images leaves no image to train on or none to "
            "validate with: raise --train-limit or change --val-fraction"
        )
    val = _draw_stratified(indices, labels, n_val, generator)
    return Split(train=np.setdiff1d(indices, val), val=val)


def _draw_stratified(indices: np.ndarray, labels: np.ndarray, n: int, generator: np.random.Generator) -> np.ndarray:
    """n of the indices, sorted, each class in proportion (largest remainders)."""
    classes = [indices[labels[indices] == label] for label in np.unique(labels[indices])]
    exact = np.array([n * len(members) / len(indices) for members in classes])
    take = np.floor(exact).astype(int)
    take[np.argsort(take - exact, kind="stable")[: n - take.sum()]] += 1
    drawn = [generator.permutation(members)[:k] for members, k in zip(classes, take, strict=True)]
    return np.sort(np.concatenate(drawn))


class MemoryPart:
    """Images on the device as uint8."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, device: torch.device):
        self.images = torch.from_numpy(images).to(device)
        self.labels = torch.from_numpy(labels).to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, C, H, W) uint8 and labels (B,) in that order, both on the device."""
        for here in order.to(self.images.device).split(batch_size):
            yield self.images[here], self.labels[here]


class StreamedPart:
    """Image files read ahead by worker processes, for data that do not fit in memory; same interface as MemoryPart."""

    def __init__(self, images: ImageFiles, labels: np.ndarray, device: torch.device, num_workers: int):
        self.images, self.device, self.num_workers = images, device, num_workers
        self.labels = torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        orders = order.split(batch_size)
        loader = DataLoader(
            self.images,
            batch_sampler=[each.tolist() for each in orders],
            num_workers=min(self.num_workers, os.cpu_count() or 1),
            generator=torch.Generator(),  # not PyTorch's default generator, which dropout uses
        )
        try:
            for images, here in zip(loader, orders, strict=True):
                yield images.to(self.device, non_blocking=True), self.labels[here].to(self.device)
        except UnreadableImage as error:
            message = str(error).rpartition(f"{UnreadableImage.__name__}: ")[2]  # without the worker's traceback
            error.__traceback__ = None  # it would keep the workers alive for seconds
            raise UserError(message.strip()) from None


class ImageBatches:
    """Batches of a classification data set, ready for the model: `tasks.Batches`.

    Order and augmentation of an epoch are drawn at its start from the run's seed and the epoch; validation and test
    images are only normalised. Images stay on the device as uint8 and are augmented there, a batch at a time.
    """

    def __init__(
        self,
        dataset: DataSet,
        split: Split,
        config: ClassificationConfig,
        eval_batch_size: int,
        device: torch.device,
        num_workers: int = 0,
    ):
        parts = {
            "train": (dataset.train_images[split.train], dataset.train_labels[split.train]),
            "val": (dataset.train_images[split.val], dataset.train_labels[split.val]),
            "test": (dataset.test_images, dataset.test_labels),
        }
        n_bytes = sum(math.prod(images.shape) for images, _ in parts.values())
        places = {device, torch.device("cpu")}  # images pass through host memory on their way to a GPU
        in_memory = isinstance(dataset.train_images, np.ndarray) or all(
            fits_in_memory(n_bytes, place) for place in places
        )
        self.config = config
        self.augmentations = config.make_augmentations(len(dataset.class_names))
        self.eval_batch_size = eval_batch_size
        self.device = device
        self.split = split
        self.description = dataset.description
        self.parts = {
            name: MemoryPart(read_images(images), labels, device)
            if in_memory
            else StreamedPart(images, labels, device, num_workers)
            for name, (images, labels) in parts.items()
        }
        if not in_memory:
            print(f"{n_bytes / 1e9:.1f} GB of images do not fit in memory: they are read again in every epoch")

    def size(self, part: str) -> int:
        """Number of images in "train", "val" or "test"."""
        return len(self.parts[part])

    def train_batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every training image once: images (B, C, H, W) float32 in [-1, 1]; labels (B,) or soft ones (B, classes)."""
        config, part = self.config, self.parts["train"]
        n, (height, width) = len(part), part.images.shape[-2:]
        order = torch.randperm(n, generator=seeds.generator("order", config.seed, epoch))
        if (copies := config.repeat_augment) > 1:  # as many samples as images, each drawn image several times
            order = order[: -(-n // copies)].repeat_interleave(copies)[:n]
        steps = [(each.apply, self._draws(each, n, height, width, epoch)) for each in self.augmentations]
        for i, (images, labels) in enumerate(part.batches(order, config.batch_size)):
            here = slice(i * config.batch_size, (i + 1) * config.batch_size)
            images = normalise(images)
            for apply, draws in steps:
                images, labels = apply(images, labels, *(draw[here] for draw in draws))
            yield images, labels

    def _draws(self, step: Augmentation, n: int, height: int, width: int, epoch: int) -> list[Tensor]:
        draws = step.draw(n, height, width, seeds.generator(step.stream, self.config.seed, epoch))
        device = "cpu" if getattr(step, "draws_on_cpu", False) else self.device
        return [draw.to(device) for draw in draws]

    def eval_batches(self, part: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image of a part once, in order, not augmented."""
        in_order = torch.arange(self.size(part))
        for images, labels in self.parts[part].batches(in_order, self.eval_batch_size):
            yield normalise(images), labels
