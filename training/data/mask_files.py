"""Images with masks: their files, paired and read, for any segmentation data set; `masks` finds those of each.

Void, the label of pixels that are not evaluated, is always the number after the last class.
"""

import unicodedata
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from training.data.classes import CLASSES, Classes
from training.data.finding import Finder, fingerprint, size_of
from training.data.image_files import is_turned_tiff, open_image, orientation, unreadable, upright

LOSSY = {"JPEG", "MPO", "JPEG2000"}  # formats; the last can be lossless, but a file does not say so


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
    def sizes(self) -> dict[str, list[tuple[Path, int]]]:
        """By part: the files of all pairs with their sizes in bytes, -1 for those that are missing."""
        return {
            part: [(path, size_of(path)) for pair in pairs for path in (pair.image, pair.mask)]
            for part, pairs in self.pairs.items()
        }

    def without_missing(self) -> "MaskFiles":
        """Without pairs of which a file is missing (or a broken link), but with a problem for each such file."""
        missing = {path: _missing(path) for files in self.sizes.values() for path, size in files if size < 0}
        if not missing:
            return self
        left = {
            part: [pair for pair in of if not {pair.image, pair.mask} & missing.keys()]
            for part, of in self.pairs.items()
        }
        return replace(self, pairs=left, problems=[*self.problems, *missing.values()])

    @cached_property
    def description(self) -> dict[str, Any]:
        """Identifies the data: stored in config.json and compared at resume."""
        images = {part: len(pairs) for part, pairs in self.pairs.items()}
        files = [
            (f"{part}/{path.parent.name}/{path.name}", size) for part, here in self.sizes.items() for path, size in here
        ]
        return {
            "name": self.name,
            "class_names": list(self.classes.names),
            "images": images,
            "file_names_and_sizes": fingerprint(files),
        }


def _missing(path: Path) -> str:
    try:
        path.stat()
    except OSError as error:
        return unreadable(path, "a file", error, "restore it")
    return f"{path} is missing: restore it"  # it has come back since


def pair_files(images: Path, masks: Path, finder: Finder) -> tuple[list[Pair], list[str]]:
    """Images with the masks of the same name (or NAME_L), sorted, and a message for each unusable file or folder."""
    image_paths, problems = _listed(images, finder)
    mask_paths, more = _listed(masks, finder)
    names = [_name(path) for path in image_paths]
    mask_names = _image_names([_name(path) for path in mask_paths], set(names))
    pairs, unpaired = pair_up(
        zip(names, image_paths, strict=True), zip(mask_names, mask_paths, strict=True), images, masks
    )
    return pairs, problems + more + unpaired


def pair_up(
    images: Iterable[tuple[str, Path]], masks: Iterable[tuple[str, Path]], images_at: Path, masks_at: Path
) -> tuple[list[Pair], list[str]]:
    """Images and masks of the same name as pairs, in the images' order, and a message for each file without a partner.

    Of files with the same name, the first counts; each other has a message, too. images_at, masks_at: their folders.
    """
    by_name, problems = _unique(images)
    masks_by_name, more = _unique(masks)
    problems += more
    problems += [
        f"{path} has no mask in {masks_at}: add it, or remove the image"
        for name, path in by_name.items()
        if name not in masks_by_name
    ]
    problems += [
        f"{path} has no image in {images_at}: add it, or remove the mask"
        for name, path in masks_by_name.items()
        if name not in by_name
    ]
    return [Pair(path, masks_by_name[name]) for name, path in by_name.items() if name in masks_by_name], problems


def _listed(folder: Path, finder: Finder) -> tuple[list[Path], list[str]]:
    """The image files of a folder, sorted by name without suffix, and a message for each folder in it that has some."""
    entries = finder.list_folder(folder) if folder.is_dir() else []
    problems = [
        f"{entry.path} is a folder with images, which are not read: move them to {folder}, or the folder elsewhere"
        for entry in entries
        if entry.is_dir() and Finder().all_images(entry.path)
    ]
    return sorted((Path(file.path) for file in finder.list_images(entries)), key=lambda path: path.stem), problems


def _name(path: Path) -> str:
    """Without suffix, and with composed letters: some systems store an \u00e9 as two characters."""
    return unicodedata.normalize("NFC", path.stem)


def _image_names(masks: list[str], images: Collection[str]) -> list[str]:
    """The name of each mask's image: its own, or without _L at the end. An image's name may end in _L, too."""
    short = [name.removesuffix("_L") for name in masks]
    if all(name.endswith("_L") for name in masks) and len({*short} & {*images}) > len({*masks} & {*images}):
        return short
    return [name if name in images else cut for name, cut in zip(masks, short, strict=True)]


def _unique(files: Iterable[tuple[str, Path]]) -> tuple[dict[str, Path], list[str]]:
    """The files by name, and a message for each name used twice."""
    by_name: dict[str, Path] = {}
    problems = []
    for name, path in files:
        if (before := by_name.setdefault(name, path)) != path:
            problems.append(f"{before} and {path.name} have the same name: remove one of them")
    return by_name, problems


def read_image(path: Path) -> np.ndarray:
    """(h, w, 3) uint8 as a viewer shows it (see `open_image`). Raises BadFile, also at 16 bits a channel."""
    try:
        return np.array(open_image(path, "RGB"))
    except Exception as error:  # Pillow raises errors of many kinds for damaged files
        raise bad_file(path, "an image", error) from None


def open_mask(path: Path) -> Image.Image:
    """A mask, upright, in its own mode, grey values of 2 or 4 bits as stored. Raises BadFile, also for JPEG."""
    try:
        with Image.open(path) as image:
            kind = image.format
            lossy = kind in LOSSY or (kind == "TIFF" and "jpeg" in image.info["compression"])
            step = _grey_step(image)
            image = upright(image)
    except Exception as error:
        raise bad_file(path, "a mask", error) from None
    if lossy:
        raise BadFile(
            f"{path} is compressed as JPEG, which changes labels and colours: replace it with a PNG file made from the "
            "original mask"
        )
    return image if step == 1 else image.point(lambda grey: grey // step)


def _grey_step(image: Image.Image) -> int:
    """What Pillow multiplies the grey values of an opened image by: it stretches those of 2 and 4 bits to 0 to 255."""
    mode: Any = image.tile[0].args if image.tile else None
    mode = mode[0] if isinstance(mode, tuple) and mode else mode
    return {"L;2": 85, "L;4": 17}.get(str(mode)[:3], 1)


def read_labels(path: Path, classes: Classes, renamed: dict[int, int]) -> np.ndarray:
    """The labels of a mask that stores them as pixel values. renamed: file label -> our label.

    With a palette, the values count if it shows them as grey, else its colours, which must be the classes' own. Raises
    BadFile for a file that is no such mask, or a label that is neither a class nor void.
    """
    image = open_mask(path)
    if image.mode not in ("L", "P"):
        raise BadFile(
            f"{path} is not a label mask (image mode {image.mode}, not one byte per pixel): replace it with one"
        )
    pixels = np.array(image)
    if image.mode == "P":
        colours = _colours(pixels, image.getpalette() or [])
        if any(colour != (value,) * 3 for value, colour in colours.items()):
            return _labels_of_colours(path, pixels, colours, classes)
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


def _colours(pixels: np.ndarray, palette: list[int]) -> dict[int, tuple[int, ...]]:
    """The colour of each value in pixels (h, w), () where the palette is too short. palette: red, green, blue, ..."""
    values = np.flatnonzero(np.bincount(pixels.ravel())).tolist()
    return {value: tuple(palette[3 * value : 3 * value + 3]) for value in values}


def _labels_of_colours(
    path: Path, pixels: np.ndarray, colours: dict[int, tuple[int, ...]], classes: Classes
) -> np.ndarray:
    """(h, w) labels by the colours of the values, whose order is lost when a program makes a file smaller.

    Raises BadFile for a colour that no class has.
    """
    known = {tuple(colour): label for label, colour in enumerate(classes.palette.tolist())}
    table = np.zeros(256, dtype=np.uint8)
    for value, colour in colours.items():
        if colour not in known:
            raise BadFile(
                f"{path} has {f'the colour {colour}' if colour else 'no colour'} for the value {value} in its palette, "
                "but no class has that: replace it with the original mask; if its values are the labels, store them "
                "without a palette (in Python, Image.fromarray(np.array(Image.open(path))).save(path))"
            )
        table[value] = known[colour]
    return table[pixels]


def mask_shape(path: Path) -> tuple[int, int]:
    """Height and width of a mask, from its header alone. Raises BadFile."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            on_its_side = orientation(image) >= 5 and not is_turned_tiff(image)
            return (width, height) if on_its_side else (height, width)
    except Exception as error:
        raise bad_file(path, "a mask", error) from None


def _spans(numbers: np.ndarray) -> str:
    """Sorted numbers as ranges: "0 to 20 and 255"."""
    spans = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return " and ".join(f"{span[0]} to {span[-1]}" if len(span) > 1 else f"{span[0]}" for span in spans)


def bad_file(path: Path, kind: str, error: Exception) -> BadFile:
    return BadFile(unreadable(path, kind, error, "replace it with an intact copy of 8 bits a channel"))
