"""A classification data set, its seeded split, and batches of its images on the device."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training import processes, seeds
from training.augment import Augmentation, normalise
from training.config import ClassificationConfig, UserError
from training.data.finding import count
from training.data.image_files import ImageFiles, read_images
from training.data.streaming import Images, Reader, StreamedPart
from training.device import fits_in_memory
from training.views import Size, resized

Part = tuple[np.ndarray | ImageFiles, np.ndarray]  # images and labels


@dataclass(frozen=True)
class DataSet:
    """Images (N, C, H, W) uint8 and labels (N,) int64 of the official training, validation and test sets.

    The test set may be empty; without a validation set, images of the training set validate. Images of a folder are
    `ImageFiles`, which index like such an array.
    """

    name: str
    train_images: np.ndarray | ImageFiles
    train_labels: np.ndarray
    test_images: np.ndarray | ImageFiles
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    val_images: np.ndarray | ImageFiles | None = None
    val_labels: np.ndarray | None = None
    files: str | None = None
    """fingerprint of the files' names and sizes, for data that are not one archive"""
    sha256: str | None = None
    """of images and labels, for data that are one archive"""
    notes: tuple[str, ...] = ()
    """lines to print at the start of a run"""
    eval_crop: float = 1.0
    """side of the centre crop of validation and test images, as a share of the shorter side; image files only"""

    @property
    def description(self) -> dict[str, Any]:
        """Identifies the data: stored in config.json and compared at resume."""
        labels = {"train": self.train_labels, "val": self.val_labels, "test": self.test_labels}
        images = {part: len(of) for part, of in labels.items() if of is not None}
        description = {"name": self.name, "class_names": list(self.class_names), "images": images}
        if self.val_labels is not None:
            description["validation"] = "own part"
        if self.files is not None:
            description["file_names_and_sizes"] = self.files
        if self.sha256 is not None:
            description["sha256"] = self.sha256
        return description

    def own_split(self, limit: int | None, seed: int) -> "Split":
        """The split of data with a validation set: that set, and all training images or a stratified draw of limit."""
        train = _draw_limit(self.train_labels, limit, np.random.default_rng(seeds.derive("split", seed)))
        return Split(train=train, val=len(self.train_labels) + np.arange(len(self.val_labels)))

    def with_eval_crop(self, share: float) -> "DataSet":
        """The same data, validation and test images center-cropped to that share. Raises UserError for arrays."""
        if share == 1:
            return self
        if isinstance(self.train_images, np.ndarray):
            raise UserError(f"--eval-crop is for image files, which {self.name} does not have: leave it out")
        val = None if self.val_images is None else self.val_images.centred(share)
        return dataclasses.replace(self, test_images=self.test_images.centred(share), val_images=val, eval_crop=share)

    def part(self, name: str, split: "Split") -> "Part":
        """Images and labels of "train" or "val", in the order of the split, or of "test"."""
        if name == "test":
            return self.test_images, self.test_labels
        places = getattr(split, name)
        if name == "val" and self.val_labels is not None:
            places = places - len(self.train_labels)
            return self.val_images[places], self.val_labels[places]
        images = self.train_images[places]
        if name == "val" and self.eval_crop != 1:
            images = images.centred(self.eval_crop)
        return images, self.train_labels[places]


@dataclass(frozen=True)
class Split:
    """Which images train and which validate: two disjoint sets of indices into the training set.

    The indices of a validation set of the data's own count on from the end of the training set.
    """

    train: np.ndarray
    val: np.ndarray


def draw_split(dataset: DataSet, val_fraction: float, limit: int | None, seed: int) -> Split:
    """The split of a new run: the data's own validation set, or `split_train`."""
    if dataset.val_labels is not None:
        return dataset.own_split(limit, seed)
    return split_train(dataset.train_labels, val_fraction, limit, seed)


def split_train(labels: np.ndarray, val_fraction: float, limit: int | None, seed: int) -> Split:
    """A stratified split of the training images, drawn from the seed alone.

    labels: (N,). Each class gives the same share to validation; of classes with equal remainders, the first ones give
    an image more. A limit draws that many images first, stratified too.
    Raises UserError if a part would be empty.
    """
    generator = np.random.default_rng(seeds.derive("split", seed))
    indices = _draw_limit(labels, limit, generator)
    n_val = round(val_fraction * len(indices))
    if not 0 < n_val < len(indices):
        raise UserError(
            f"val_fraction = {val_fraction} of {count(len(indices), 'image')} leaves no image to train on or none to "
            f"validate with: {'add images' if limit is None else 'raise --train-limit'} or change --val-fraction"
        )
    val = _draw_stratified(indices, labels, n_val, generator)
    return Split(train=np.setdiff1d(indices, val), val=val)


def _draw_limit(labels: np.ndarray, limit: int | None, generator: np.random.Generator) -> np.ndarray:
    """Indices of all labels, or of a stratified draw of limit, sorted."""
    indices = np.arange(len(labels))
    return indices if limit is None or limit >= len(labels) else _draw_stratified(indices, labels, limit, generator)


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

    def batches(self, orders: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, C, H, W) uint8 and labels (B,) of each order, both on the device."""
        for here in torch.cat(list(orders)).to(self.images.device).split([len(order) for order in orders]):
            yield self.images[here], self.labels[here]


class ImageBatches:
    """Batches of a classification data set, ready for the model: `tasks.Batches`.

    Order and augmentation of an epoch are drawn at its start from the run's seed and the epoch; validation and test
    images are only normalised. Images stay on the device as uint8 and are augmented there, a batch at a time. Of
    several processes, each reads and augments its share of a batch, and the mirrored share if images are mixed.
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
        for note in dataset.notes:
            print(note)
        parts = {name: dataset.part(name, split) for name in ("train", "val", "test")}
        _check_parts(parts, config, len(dataset.class_names))
        in_memory = isinstance(dataset.train_images, np.ndarray) or (
            not config.crop_original and fit_in_memory([images for images, _ in parts.values()], device)
        )
        self.config = config
        self.augmentations = config.make_augmentations(len(dataset.class_names))
        self.eval_batch_size = eval_batch_size
        self.device = device
        self.split = split
        if in_memory:
            self.parts = {
                name: MemoryPart(read_images(images), labels, device) for name, (images, labels) in parts.items()
            }
        else:
            files = {name: images for name, (images, _) in parts.items()}
            reader = Reader(Images(files, config.crop_scale_min), device, num_workers)
            self.parts = {name: StreamedPart(name, reader, labels, device) for name, (_, labels) in parts.items()}

    def size(self, part: str) -> int:
        """Number of images in "train", "val" or "test"."""
        return len(self.parts[part])

    def train_batches(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Every training image once: images (B, C, H, W) float32 in [-1, 1]; labels (B,) or soft ones (B, classes).

        first: number of the batch to begin with.
        """
        config, part = self.config, self.parts["train"]
        n, (height, width) = len(part), part.images.shape[-2:]
        order = torch.randperm(n, generator=seeds.generator("order", config.seed, epoch))
        if (copies := config.repeat_augment) > 1:  # as many samples as images, each drawn image several times
            order = order[: -(-n // copies)].repeat_interleave(copies)[:n]
        if config.crop_original:  # each is cropped when it is read, by a seed of its own
            draws = seeds.generator("crops", config.seed, epoch)
            order = torch.stack((order, torch.randint(2**63 - 1, (n,), generator=draws)), dim=1)
        steps = [(each.apply, self._draws(each, n, height, width, epoch)) for each in self.augmentations]
        mixes = any(getattr(each, "mixes", False) for each in self.augmentations)
        batches = order.split(config.batch_size)[first:]
        shares = [processes.share_with_partners(len(batch)) if mixes else _share(len(batch)) for batch in batches]
        sizes = self._sizes(epoch, -(-n // config.batch_size))
        read = self._read(part, [_rows(batch, rows) for batch, (rows, _) in zip(batches, shares, strict=True)])
        for i, ((images, labels), (rows, mine)) in enumerate(zip(read, shares, strict=True), first):
            here = slice(i * config.batch_size, (i + 1) * config.batch_size)
            images = normalise(images)
            for apply, draws in steps:
                images, labels = apply(images, labels, *(_rows(draw[here], rows) for draw in draws))
            yield resized(images[mine], sizes[i] or images.shape[2:], antialias=True), labels[mine]

    def _read(self, part: MemoryPart | StreamedPart, orders: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of each order; an empty one, a share of a last batch, is not asked of the part."""
        filled = [order for order in orders if len(order)]
        read = part.batches(filled) if filled else iter(())
        for order in orders:
            if len(order):
                yield next(read)
            else:
                images = torch.empty(0, *part.images.shape[1:], dtype=torch.uint8, device=self.device)
                yield images, part.labels[:0].to(self.device)

    def _sizes(self, epoch: int, n_batches: int) -> list[Size | None]:
        """The size of each batch of an epoch, drawn by the run's seed; None for images as they are."""
        if not self.config.train_sizes:
            return [None] * n_batches
        generator = seeds.generator("sizes", self.config.seed, epoch)
        drawn = torch.randint(len(self.config.train_sizes), (n_batches,), generator=generator).tolist()
        return [(self.config.train_sizes[place],) * 2 for place in drawn]

    def _draws(self, step: Augmentation, n: int, height: int, width: int, epoch: int) -> list[Tensor]:
        draws = step.draw(n, height, width, seeds.generator(step.stream, self.config.seed, epoch))
        device = "cpu" if getattr(step, "draws_on_cpu", False) else self.device
        return [draw.to(device) for draw in draws]

    def eval_batches(self, part: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image of a part once, in order, not augmented."""
        batches = torch.arange(self.size(part)).split(self.eval_batch_size)
        for images, labels in self._read(self.parts[part], [batch[processes.share(len(batch))] for batch in batches]):
            yield normalise(images), labels


def _check_parts(parts: dict[str, Part], config: ClassificationConfig, n_classes: int) -> None:
    """Says how many classes have no training image. Raises UserError if crop_padding shifts whole images away."""
    images, labels = parts["train"]
    height, width = images.shape[-2:]
    if config.crop_padding >= min(height, width):
        raise UserError(
            f"--crop-padding {config.crop_padding} would shift images of {height} x {width} pixels out of sight: "
            f"choose less than {min(height, width)}, as {min(height, width) // 8}"
        )
    if missing := n_classes - len(np.unique(labels)):
        print(f"no image to train on in {count(missing, 'class', 'classes')} of {n_classes}: the data set is too small")


def _share(n: int) -> tuple[list[slice], slice]:
    """Rows of a batch of n that this process makes, and where in them its share lies: `processes.share_with_partners`
    for augmentations that do not mix."""
    mine = processes.share(n)
    return [mine], slice(0, mine.stop - mine.start)


def _rows(values: Tensor, rows: Sequence[slice]) -> Tensor:
    return values[rows[0]] if len(rows) == 1 else torch.cat([values[each] for each in rows])


def fit_in_memory(parts: Iterable[Any], device: torch.device) -> bool:
    """Whether image files are read once and kept in memory; if not, says so. parts: images, with the shape of each."""
    n_bytes = sum(math.prod(images.shape) for images in parts)
    places = {device, torch.device("cpu")}  # images pass through host memory on their way to a GPU
    fits = all(fits_in_memory(n_bytes, place) for place in places)
    if not fits:
        print(f"{n_bytes / 1e9:.1f} GB of images do not fit in memory: they are read again in every epoch")
    return fits
