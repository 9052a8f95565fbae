"""A data set of your own images: one folder per class."""

from pathlib import Path

import numpy as np
from torchvision.datasets import ImageFolder

from training.config import UserError
from training.data.batches import DataSet
from training.data.image_files import MODES, ImageFiles


def load_folder(data_dir: Path | None, img_size: int, in_channels: int) -> DataSet:
    """DIR/train/CLASS/IMAGE with DIR/test (or DIR/val) beside it, or DIR/CLASS/IMAGE without a test set."""
    if data_dir is None:
        raise UserError("--dataset folder reads your own images: name their folder with --data-dir DIR")
    train_root = data_dir / "train" if (data_dir / "train").is_dir() else data_dir
    test_root = next((data_dir / part for part in ("test", "val") if (data_dir / part).is_dir()), None)
    if train_root == data_dir and test_root is not None:
        raise UserError(f"{test_root} exists, but {data_dir / 'train'} does not: put the training images there")
    train, labels, names = find_images(train_root, img_size, in_channels)
    test, test_labels = train[[]], labels[:0]
    if test_root is not None:
        test, test_labels, test_names = find_images(test_root, img_size, in_channels)
        if test_names != names:
            odd = ", ".join(sorted(set(names) ^ set(test_names)))
            raise UserError(f"{train_root} and {test_root} hold different classes ({odd}): make them the same")
    return DataSet(f"folder {data_dir.resolve().name}", train, labels, test, test_labels, names)


def find_images(root: Path, img_size: int, in_channels: int) -> tuple[ImageFiles, np.ndarray, tuple[str, ...]]:
    """The images of root/CLASS/, at any depth: files, labels (N,) int64, class names in alphabetical order.

    Raises UserError if there are none, or if in_channels is neither 1 nor 3.
    """
    if in_channels not in MODES:
        raise UserError(
            f"in_channels = {in_channels}, but images are read as grey (1) or colour (3): set --in-channels 1 or 3"
        )
    try:
        found = ImageFolder(str(root))
    except (OSError, ValueError) as error:
        raise UserError(f"{root} must hold one folder of images per class ({' '.join(str(error).split())})") from None
    paths, labels = zip(*found.samples, strict=True)
    return ImageFiles(paths, img_size, in_channels), np.array(labels, dtype=np.int64), tuple(found.classes)
