"""Data sets, their seeded split, and batches of images that live on the device."""

import contextlib
import math
import os
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader

from training import augment, seeds
from training.config import ROOT, ClassificationConfig, UserError
from training.device import fits_in_memory
from training.folder import ImageFiles, UnreadableImage, find_images, read_images


@dataclass(frozen=True)
class DataSet:
    """Images (N, C, H, W) uint8 and labels (N,) int64 of the official training and test parts.

    The test part may be empty. Images of a folder are files that stand in for such an array until they are read.
    """

    name: str
    train_images: np.ndarray | ImageFiles
    train_labels: np.ndarray
    test_images: np.ndarray | ImageFiles
    test_labels: np.ndarray
    class_names: tuple[str, ...]

    @property
    def description(self) -> dict[str, Any]:
        """What tells these data from others, for the run's config.json."""
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


def load_dataset(name: str, data_dir: Path | None, img_size: int = 32, in_channels: int = 3) -> DataSet:
    """The data set called name. CIFAR is read from its folder, or downloaded into it once. Raises UserError.

    img_size, in_channels: what the images of a folder are brought to; the other data sets are as they are.
    """
    if name == "digits":
        return _load_digits()
    if name == "folder":
        return _load_folder(data_dir, img_size, in_channels)
    return _load_cifar(name, data_folder(name, data_dir))


def data_folder(name: str, data_dir: Path | None) -> Path:
    """Where the files of a data set are: data_<name> in data_dir, $VISION_BDH_DATA or beside the scripts.

    data_dir may also be that folder itself.
    """
    root = data_dir or Path(os.environ.get("VISION_BDH_DATA") or ROOT)
    inside = root / f"data_{name}"
    signs = {
        "camvid": ("trainannot", "train_labels", "val"),
        "voc": ("VOCdevkit",),
        "cityscapes": ("leftImg8bit",),
    }.get(name, (f"{name}.npz",))
    is_folder_itself = root.name == inside.name or any((root / each).exists() for each in signs)
    return root if is_folder_itself and not inside.is_dir() else inside


def split_train(labels: np.ndarray, val_fraction: float, limit: int | None, seed: int) -> Split:
    """A stratified split of the training images, drawn from the seed alone.

    labels: (N,). Each class gives the same share to validation. With a limit, that many images are drawn first,
    stratified too. Raises UserError where a part would be empty.
    """
    generator = np.random.default_rng(seeds.derive("split", seed))
    indices = np.arange(len(labels))
    if limit is not None and limit < len(labels):
        indices = _draw_stratified(indices, labels, limit, generator)
    n_val = round(val_fraction * len(indices))
    if not 0 < n_val < len(indices):
        raise UserError(
            f"val_fraction = {val_fraction} of {len(indices)} images leaves none to train on or none to validate with: "
            "raise --train-limit or change --val-fraction"
        )
    val = _draw_stratified(indices, labels, n_val, generator)
    return Split(train=np.setdiff1d(indices, val), val=val)


def _draw_stratified(indices: np.ndarray, labels: np.ndarray, n: int, generator: np.random.Generator) -> np.ndarray:
    """n of the indices, sorted, each class in proportion; what rounding leaves over goes to the largest remainders."""
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
    """Image files that other processes read ahead, for what does not fit in memory; gives what MemoryPart gives."""

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
            generator=torch.Generator(),  # else it draws from PyTorch's own, which dropout follows
        )
        try:
            for images, here in zip(loader, orders, strict=True):
                yield images.to(self.device, non_blocking=True), self.labels[here].to(self.device)
        except UnreadableImage as error:
            message = str(error).rpartition(f"{UnreadableImage.__name__}: ")[2]  # a worker puts its traceback in front
            error.__traceback__ = None  # it holds the workers, which would end only seconds later
            raise UserError(message.strip()) from None


class ImageBatches:
    """A data set given out in batches ready for the model: `tasks.Batches`.

    Order, crops and flips of an epoch are drawn at its start from the run's seed and the epoch; validation and test
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
        ways = {device, torch.device("cpu")}  # images pass through the computer's memory to a GPU's
        in_memory = isinstance(dataset.train_images, np.ndarray) or all(fits_in_memory(n_bytes, way) for way in ways)
        self.config = config
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
            print(f"{n_bytes / 1e9:.1f} GB of images do not fit in memory: they are read anew in every epoch")

    def size(self, part: str) -> int:
        """Images of "train", "val" or "test"."""
        return len(self.parts[part])

    def train_batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every training image once: images (B, C, H, W) float32 in [-1, 1], labels (B,)."""
        config, part = self.config, self.parts["train"]
        n, (height, width) = len(part), part.images.shape[-2:]
        draws = seeds.generator("augmentation", config.seed, epoch)
        order = torch.randperm(n, generator=seeds.generator("order", config.seed, epoch))
        boxes = augment.draw_crops(n, height, width, config.crop_scale_min, draws).to(self.device)
        flips = augment.draw_flips(n, draws).to(self.device)
        crop = config.crop_scale_min < 1
        if not crop:
            boxes[:] = boxes.new_tensor((0, 0, height, width))
        flips &= config.horizontal_flip
        for i, (images, labels) in enumerate(part.batches(order, config.batch_size)):
            here = slice(i * config.batch_size, (i + 1) * config.batch_size)
            images = augment.normalise(images)
            if crop or config.horizontal_flip:
                images = augment.crop_and_flip(images, boxes[here], flips[here])
            yield images, labels

    def eval_batches(self, part: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image of a part once, in order, without augmentation."""
        in_order = torch.arange(self.size(part))
        for images, labels in self.parts[part].batches(in_order, self.eval_batch_size):
            yield augment.normalise(images), labels


def _load_digits() -> DataSet:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, grey; every fifth of each class is the test part."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the digits come with scikit-learn: pip install scikit-learn") from None
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]  # (N, 1, 8, 8)
    labels = digits.target.astype(np.int64)
    test = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        test[np.flatnonzero(labels == label)[::5]] = True
    return DataSet(
        "digits", images[~test], labels[~test], images[test], labels[test], tuple(map(str, digits.target_names))
    )


def _load_folder(data_dir: Path | None, img_size: int, in_channels: int) -> DataSet:
    """DIR/train/CLASS/IMAGE with DIR/test (or DIR/val) beside it, or DIR/CLASS/IMAGE and no test part."""
    if data_dir is None:
        raise UserError("--dataset folder reads your own images: say where with --data-dir DIR")
    train_root = data_dir / "train" if (data_dir / "train").is_dir() else data_dir
    test_root = next((data_dir / part for part in ("test", "val") if (data_dir / part).is_dir()), None)
    if train_root == data_dir and test_root is not None:
        raise UserError(f"{test_root} is there, but {data_dir / 'train'} is not: put the training images into it")
    train, labels, names = find_images(train_root, img_size, in_channels)
    test, test_labels = train[[]], labels[:0]
    if test_root is not None:
        test, test_labels, test_names = find_images(test_root, img_size, in_channels)
        if test_names != names:
            odd = ", ".join(sorted(set(names) ^ set(test_names)))
            raise UserError(f"{train_root} and {test_root} hold different classes ({odd}): give both the same folders")
    return DataSet(f"folder {data_dir.resolve().name}", train, labels, test, test_labels, names)


def _load_cifar(name: str, folder: Path) -> DataSet:
    path = folder / f"{name}.npz"
    if not path.is_file():
        _download_cifar(name, path)
    mend = f"Delete {path} and start again to download it anew, or put a whole one in its place"
    try:
        with np.load(path) as arrays:
            data = {key: arrays[key] for key in arrays.files}
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zipfile.zlib.error) as error:
        raise UserError(f"{path} cannot be read, perhaps it was cut short ({error}). {mend}") from None
    problem = _cifar_problem(data)
    if problem:
        raise UserError(f"{path} does not hold {name}: {problem}. {mend}")
    images = {part: np.ascontiguousarray(data[f"{part}_images"].transpose(0, 3, 1, 2)) for part in ("train", "test")}
    class_names = tuple(str(each) for each in data["class_names"])
    return DataSet(name, images["train"], data["train_labels"], images["test"], data["test_labels"], class_names)


def _cifar_problem(data: dict[str, np.ndarray]) -> str | None:
    """What is wrong with the arrays of an npz, or None."""
    wanted = ("train_images", "train_labels", "test_images", "test_labels", "class_names")
    missing = [key for key in wanted if key not in data]
    if missing:
        return f"it lacks {', '.join(missing)}"
    if data["class_names"].ndim != 1:
        return f"class_names has the shape {data['class_names'].shape}, not (classes,)"
    for part in ("train", "test"):
        images, labels = data[f"{part}_images"], data[f"{part}_labels"]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3):
            return f"{part}_images is {images.dtype} {images.shape}, not uint8 (N, 32, 32, 3)"
        if labels.dtype != np.int64 or labels.shape != (len(images),):
            return f"{part}_labels is {labels.dtype} {labels.shape}, not int64 ({len(images)},)"
        if len(images) == 0:
            return f"{part}_images is empty"
        low, high, n_classes = labels.min(), labels.max(), len(data["class_names"])
        if low < 0 or high >= n_classes:
            return f"{part}_labels run from {low} to {high}, but there are {n_classes} class_names"
    return None


def _download_cifar(name: str, path: Path) -> None:
    """Fetches the official archive, which torchvision checks, and writes the npz once."""
    source = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        train, test = (source(path.parent, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong checksum is a RuntimeError
        raise UserError(
            f"{path} is not there, and {name} could not be downloaded ({error}). Either connect to the network and "
            f"start again, or put {path.name} or the official {source.filename} into {path.parent} "
            "(for another folder: --data-dir)"
        ) from None
    arrays = {
        "train_images": train.data,
        "train_labels": np.array(train.targets, dtype=np.int64),
        "test_images": test.data,
        "test_labels": np.array(test.targets, dtype=np.int64),
        "class_names": np.array(train.classes),
    }
    descriptor, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, **arrays)
        Path(partial).replace(path)
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror}): free some space and start again") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            Path(partial).unlink()
