"""Images with masks: their files, paired and read, for any segmentation data set; `masks` finds those of each.

Void, the label of pixels that are not evaluated, is always the number after the last class.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from training.data.classes import CLASSES, Classes
from training.data.finding import Finder, fingerprint, size_of
from training.data.image_files import open_image, open_upright, orientation, unreadable


class BadFile(Exception):
    """An unusable file; the message names it and says what to do."""


@dataclass(frozen=True)
class Pair:
    image: Path
    mask: Path


@dataclass(frozen=True)
class MaskFiles:
    """The files of a data set, not yet read."""

    name: str
    pairs: dict[str, list[Pair]]
    """by part: train, val, test; the last may be empty"""
    read_mask: Callable[[Path], np.ndarray]
    """(h, w) uint8 labels of a mask; raises BadFile"""
    problems: list[str]
    """one message for each unusable file"""
    notes: tuple[str, ...] = ()
    """lines to print at the start of a run"""

    @property
    def classes(self) -> Classes:
        return CLASSES[self.name]

    @cached_property
    def description(self) -> dict[str, Any]:
        """Identifies the data: stored in config.json and compared at resume."""
        images = {part: len(pairs) for part, pairs in self.pairs.items()}
        files = [
            (f"{part}/{path.parent.name}/{path.name}", size_of(path))
            for part, pairs in self.pairs.items()
            for pair in pairs
            for path in (pair.image, pair.mask)
        ]
        return {
            "name": self.name,
            "class_names": list(self.classes.names),
            "images": images,
            "file_names_and_sizes": fingerprint(files),
        }


def pair_files(images: Path, masks: Path, finder: Finder) -> tuple[list[Pair], list[str]]:
    """Images with the masks of the same name (or NAME_L), sorted, and a message for each file without a partner."""
    by_stem, problems = _by_stem(images, "", finder)
    masks_by_stem, more = _by_stem(masks, "_L", finder)
    problems += more
    problems += [
        f"{by_stem[stem]} has no mask in {masks}: add it, or remove the image"
        for stem in sorted(by_stem.keys() - masks_by_stem)
    ]
    problems += [
        f"{masks_by_stem[stem]} has no image in {images}: add it, or remove the mask"
        for stem in sorted(masks_by_stem.keys() - by_stem)
    ]
    pairs = [Pair(by_stem[stem], masks_by_stem[stem]) for stem in sorted(by_stem.keys() & masks_by_stem)]
    return pairs, problems


def _by_stem(folder: Path, end: str, finder: Finder) -> tuple[dict[str, Path], list[str]]:
    """Image files of a folder by name without suffix and `end`, and a message for each name used twice."""
    by_stem: dict[str, Path] = {}
    problems = []
    entries = finder.list_folder(folder) if folder.is_dir() else []
    for path in (Path(file.path) for file in finder.list_images(entries)):
        if (before := by_stem.setdefault(path.stem.removesuffix(end), path)) != path:
            problems.append(f"{before} and {path.name} have the same name: remove one of them")
    return by_stem, problems


def read_image(path: Path) -> np.ndarray:
    """(h, w, 3) uint8 as a viewer shows it (see `open_image`). Raises BadFile, also at 16 bits a channel."""
    try:
        return np.array(open_image(path, "RGB"))
    except Exception as error:  # Pillow raises errors of many kinds for damaged files
        raise bad_file(path, "an image", error) from None


def read_labels(path: Path, classes: Classes, renamed: dict[int, int]) -> np.ndarray:
    """The labels of a mask that stores them as pixel values. renamed: file label -> our label.

    Raises BadFile for a file that is no such mask, or a label that is neither a class nor void.
    """
    try:
        image = open_upright(path)
        mode, pixels = image.mode, np.array(image)
    except Exception as error:
        raise bad_file(path, "a mask", error) from None
    if mode not in ("L", "P"):
        raise BadFile(f"{path} is not a label mask (image mode {mode}, not one byte per pixel): replace it with one")
    table = np.full(256, 255, dtype=np.uint8)
    table[: classes.void + 1] = np.arange(classes.void + 1)
    for theirs, ours in renamed.items():
        table[theirs] = ours
    labels = table[pixels]
    if (labels == 255).any():
        row, column = np.argwhere(labels == 255)[0]
        raise BadFile(
            f"{path} has the label {pixels[row, column]} in row {row}, column {column}, which is neither a class nor "
            f"void (those are {_spans(np.flatnonzero(table != 255))}): fix the mask, or remove it with its image"
        )
    return labels


def mask_shape(path: Path) -> tuple[int, int]:
    """Height and width of a mask, from its header alone. Raises BadFile."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            return (width, height) if orientation(image) >= 5 else (height, width)  # stored on its side
    except Exception as error:
        raise bad_file(path, "a mask", error) from None


def _spans(numbers: np.ndarray) -> str:
    """Sorted numbers as ranges: "0 to 20 and 255"."""
    spans = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return " and ".join(f"{span[0]} to {span[-1]}" if len(span) > 1 else f"{span[0]}" for span in spans)


def bad_file(path: Path, kind: str, error: Exception) -> BadFile:
    return BadFile(unreadable(path, kind, error, "replace it with an intact copy of 8 bits a channel"))
