"""Data sets that are arrays: scikit-learn's digits, CIFAR-10 and CIFAR-100."""

import contextlib
import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torchvision

from training.config import UserError
from training.data.batches import DataSet
from training.data.places import data_folder
from training.files import written_whole


def load_digits(data_dir: Path | None, img_size: int, in_channels: int) -> DataSet:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, grey; every fifth image of each class is the test set."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]  # (N, 1, 8, 8)
    labels = digits.target.astype(np.int64)
    test = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        test[np.flatnonzero(labels == label)[::5]] = True
    return DataSet(
        "digits", images[~test], labels[~test], images[test], labels[test], tuple(map(str, digits.target_names))
    )


def load_cifar(name: str, data_dir: Path | None, img_size: int, in_channels: int) -> DataSet:
    """CIFAR-10 or CIFAR-100 from its npz, which is downloaded and written once. Raises UserError."""
    path = data_folder(name, data_dir) / f"{name}.npz"
    if not path.is_file():
        _download_cifar(name, path)
    mend = f"Delete {path} to download it again, or replace it with an intact copy"
    try:
        with np.load(path) as arrays:
            data = {key: arrays[key] for key in arrays.files}
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zipfile.zlib.error) as error:
        raise UserError(f"{path} cannot be read, perhaps it is truncated ({error}). {mend}") from None
    problem = _cifar_problem(data)
    if problem:
        raise UserError(f"{path} does not hold {name}: {problem}. {mend}")
    images = {part: np.ascontiguousarray(data[f"{part}_images"].transpose(0, 3, 1, 2)) for part in ("train", "test")}
    arrays = images["train"], data["train_labels"], images["test"], data["test_labels"]
    return DataSet(name, *arrays, tuple(str(each) for each in data["class_names"]), sha256=_sha256(arrays))


def _sha256(arrays: Sequence[np.ndarray]) -> str:
    """Of the arrays' bytes. CIFAR's take a fraction of a second."""
    found = hashlib.sha256()
    for each in arrays:
        found.update(np.ascontiguousarray(each))
    return found.hexdigest()


def _cifar_problem(data: dict[str, np.ndarray]) -> str | None:
    """What is wrong with the arrays of the npz, or None."""
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
    """Downloads the official archive (torchvision checks its hash) and writes the npz."""
    source = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    was_there = path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        train, test = (source(path.parent, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong checksum is a RuntimeError
        if not was_there:
            with contextlib.suppress(OSError):  # it holds part of the archive
                path.parent.rmdir()
        raise UserError(
            f"{path} does not exist and {name} could not be downloaded ({error}). Connect to the network and start "
            f"again, or put {path.name} or the official {source.filename} into {path.parent} "
            "(another folder: --data-dir)"
        ) from None
    arrays = {
        "train_images": train.data,
        "train_labels": np.array(train.targets, dtype=np.int64),
        "test_images": test.data,
        "test_labels": np.array(test.targets, dtype=np.int64),
        "class_names": np.array(train.classes),
    }
    with written_whole(path) as partial:
        np.savez(partial, **arrays)
