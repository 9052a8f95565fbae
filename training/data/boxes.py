"""Detection data: images with boxes in COCO's format (arXiv 1405.0312); `box_batches` makes batches of them.

A batch's boxes are one tensor (B, M, 6), M the most of any image: class, centre x, centre y, width, height as shares of
the image, and 1 for a crowd. Rows of class -1 are padding.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NotRequired

import numpy as np
from PIL import Image
from pydantic import ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from models.vision_bdh import ImageSize, height_and_width
from training.config import UserError
from training.data.finding import fingerprint, size_of
from training.data.image_files import (
    UnreadableImage,
    open_image,
    orientation,
    unreadable,
    why_unreadable,
)

PARTS = ("train", "val", "test")  # the last may be absent
PADDING = -1  # class of a row that is no box
COLUMNS = 6  # of a box
BEYOND = 1.0  # pixels by which rounding may push a box over the border
BOM = b"\xef\xbb\xbf"  # which some editors put before UTF-8 text
Size = Annotated[int, Field(ge=1, strict=False)]  # 48.0 is 48
Boxes = np.ndarray  # (n, 6) float32, columns as in a batch


class _Image(TypedDict):
    id: int
    file_name: str
    width: Size
    height: Size


class _Annotation(TypedDict):
    image_id: int
    category_id: int
    bbox: Annotated[list[FiniteFloat], Field(min_length=4, max_length=4)]
    iscrowd: NotRequired[int | bool]


class _Category(TypedDict):
    id: int
    name: str


class _Annotations(TypedDict):
    """What is read of an annotation file; masks, key points and licences are passed over."""

    __pydantic_config__ = ConfigDict(strict=True)
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


class SceneImages:
    """Indexes like an array (N, 3, height, width) uint8, but reads an image from its file when asked."""

    def __init__(self, paths: Sequence[Path], sizes: Sequence[tuple[int, int]], img_size: ImageSize):
        """sizes: width and height of each, as annotated. Images are resized, their aspect ratio is not kept."""
        # arrays, not lists, whose reference counts would copy memory into each worker process
        self._paths = np.array([str(path).encode("utf-8", "surrogateescape") for path in paths], dtype=np.bytes_)
        self._sizes = np.array(sizes, dtype=np.int64).reshape(-1, 2)
        self.shape = (len(self._paths), 3, *height_and_width(img_size))

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> np.ndarray:
        """One image (3, height, width). Raises UnreadableImage, also for another size than the annotated one."""
        path = self._paths[index].decode("utf-8", "surrogateescape")
        try:
            image = open_image(path, "RGB")
        except Exception as error:  # Pillow raises errors of many kinds for damaged files
            raise UnreadableImage(unreadable(path, "an image", error, "replace or remove it")) from None
        if image.size != (annotated := tuple(self._sizes[index].tolist())):
            sizes = (" x ".join(map(str, each)) for each in (image.size, annotated))
            remedy = _remedy(path) if image.size == annotated[::-1] else "replace one of them"
            raise UnreadableImage("{} is {} pixels, but annotated as {}: {}".format(path, *sizes, remedy))
        resized = image.resize(self.shape[:1:-1], Image.Resampling.BILINEAR)
        return np.ascontiguousarray(np.array(resized).transpose(2, 0, 1))


def _remedy(path: str) -> str:
    """For an image whose width and height are annotated the other way round."""
    with Image.open(path) as image:
        if orientation(image) == 1:
            return "turn the image or correct its annotation"
    return (
        "it is read upright, as its EXIF orientation says. Annotate the upright image (width, height and boxes), or, "
        "if the boxes fit the stored one, remove that tag"
    )


@dataclass(frozen=True)
class Scenes:
    """The images of a part, not yet read, and their boxes."""

    paths: list[Path]
    sizes: list[tuple[int, int]]
    """width and height of each image in pixels"""
    boxes: list[Boxes]

    def __len__(self) -> int:
        return len(self.paths)

    def chosen(self, indices: Sequence[int]) -> "Scenes":
        return Scenes(*([each[i] for i in indices] for each in (self.paths, self.sizes, self.boxes)))

    def targets(self, n_boxes: int) -> np.ndarray:
        """(N, n_boxes, 6) float32, padded."""
        padded = np.zeros((len(self), n_boxes, COLUMNS), dtype=np.float32)
        padded[..., 0] = PADDING
        for row, boxes in zip(padded, self.boxes, strict=True):
            row[: len(boxes)] = boxes
        return padded


@dataclass(frozen=True)
class SceneFiles:
    """A detection data set, its images not yet read."""

    class_names: tuple[str, ...]
    parts: dict[str, Scenes]
    """by part: train, val, test; the last may be empty"""
    problems: list[str]
    """one message for each unusable file or annotation"""
    notes: tuple[str, ...]
    """lines to print at the start of a run"""

    @property
    def n_boxes(self) -> int:
        """The most of any image, at least 1."""
        return max([1, *(len(boxes) for part in self.parts.values() for boxes in part.boxes)])

    @cached_property
    def description(self) -> dict[str, Any]:
        """Identifies the data: stored in config.json and compared at resume."""
        files = [(f"{part}/{path.name}", size_of(path)) for part, of in self.parts.items() for path in of.paths]
        boxes = hashlib.sha256(b"".join(each.tobytes() for of in self.parts.values() for each in of.boxes))
        return {
            "name": "coco",
            "class_names": list(self.class_names),
            "images": {part: len(of) for part, of in self.parts.items()},
            "file_names_and_sizes": fingerprint(files),
            "boxes": boxes.hexdigest(),
        }


def find_scenes(folder: Path) -> SceneFiles:
    """The images and boxes in a folder of COCO's format. Raises UserError if it is none, or a file is damaged.

    Images are train/ and val/ with annotations/instances_train.json and instances_val.json, or train2017/ and so on, as
    COCO itself has them. Crowds do not train; in other parts, what lies in one counts neither for nor against.
    """
    places, notes = _find_places(folder)
    read = {part: _read_annotations(file) for part, (_, file) in places.items()}
    categories = {part: {each["id"]: each["name"] for each in of["categories"]} for part, of in read.items()}
    file, first = places["train"][1], categories["train"]
    if not first:
        raise UserError(f"{file} has no categories: name the classes there")
    for part, theirs in categories.items():
        if len(theirs) < len(read[part]["categories"]):
            raise UserError(f"{places[part][1]} has categories with the same id: give each its own")
        if twice := _repeated(theirs.values()):
            raise UserError(f"{places[part][1]} has two categories called {twice[0]!r}: rename or merge them")
        if theirs != first:
            raise UserError(f"{places[part][1]} has other categories than {file}: give both the same")
    labels = {category: label for label, category in enumerate(sorted(first))}
    problems, parts = [], {}
    for part, (images, annotations) in places.items():
        reading = _Reading(images, annotations, labels, with_crowds=part != "train")
        parts[part] = reading.scenes(read.pop(part))
        problems += reading.problems
        notes += reading.notes
    return SceneFiles(tuple(first[category] for category in labels), parts, problems, tuple(notes))


def _find_places(folder: Path) -> tuple[dict[str, tuple[Path, Path]], list[str]]:
    """Image folder and annotation file of each part, and notes. Raises UserError for a part that is not clear.

    Train and val must be there. A test part may be, but images without annotations, as COCO has them, are only noted.
    """
    places, notes = {}, []
    for part in PARTS:
        both = [(folder / name, folder / "annotations" / f"instances_{name}.json") for name in (part, f"{part}2017")]
        found = [(images, file) for images, file in both if images.is_dir() and file.is_file()]
        if len(found) > 1:
            raise UserError(
                f"{folder} holds {part}/ and {part}2017/, both with annotations: move one of them and its file "
                f"({found[0][1].name}, {found[1][1].name}) elsewhere"
            )
        if found:
            places[part] = found[0]
        elif files := [(images, file) for images, file in both if file.is_file()]:
            images, file = files[0]
            raise UserError(f"{file} exists, but {images} with its images does not: add it, or move the file elsewhere")
        elif part == "test":
            notes += [f"there is no test on {images}: {file} is missing" for images, file in both if images.is_dir()]
    if missing := [part for part in PARTS[:2] if part not in places]:
        raise UserError(
            f"{folder} does not hold detection data in COCO's format ({' and '.join(missing)} missing): there must be "
            "train/ and val/ with images, and annotations/instances_train.json and instances_val.json (or train2017/, "
            "val2017/ and so on). Put them there, name another place with --data-dir, or make some with "
            "python tools/make_detection_data.py"
        )
    return places, notes


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, n in Counter(names).items() if n > 1]


def _read_annotations(path: Path) -> _Annotations:
    """A COCO annotation file. Raises UserError if it cannot be read or has another structure."""
    try:
        found = TypeAdapter(_Annotations).validate_json(path.read_bytes().removeprefix(BOM))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "content"
        raise UserError(f"{path} is not in COCO's format ({where}: {first['msg']}): repair or replace it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({why_unreadable(error)}): make it readable") from None
    if not found["images"]:
        raise UserError(f"{path} lists no images: replace it")
    return found


class _Reading:
    """Turns the annotations of one part into boxes; collects problems and notes."""

    def __init__(self, images: Path, file: Path, labels: dict[int, int], with_crowds: bool):
        """labels: class by category id."""
        self.images, self.file, self.labels, self.with_crowds = images, file, labels, with_crowds
        self.problems: list[str] = []
        self.notes: list[str] = []

    def scenes(self, found: _Annotations) -> Scenes:
        images = {each["id"]: each for each in found["images"]}
        if len(images) < len(found["images"]):
            self.problems.append(f"{self.file} lists two images of one id: give each its own")
        self.problems += [
            f"{self.file} lists {name} under more than one id: give its annotations one id, and list it once"
            for name in _repeated(os.path.normpath(each["file_name"]) for each in images.values())
        ]
        self._find_missing([each["file_name"] for each in images.values()])
        boxes: dict[int, list[list[float]]] = {each: [] for each in images}
        empty = 0
        for number, annotation in enumerate(found["annotations"]):
            crowd = bool(annotation.get("iscrowd", 0))
            if problem := self._problem(annotation, images):
                self.problems.append(f"{self.file}: annotation {number} {problem}")
            elif crowd and not self.with_crowds:
                continue
            elif (box := _as_shares(annotation["bbox"], images[annotation["image_id"]])) is None:
                empty += 1
            else:
                boxes[annotation["image_id"]].append([self.labels[annotation["category_id"]], *box, float(crowd)])
        if empty:
            self.notes.append(f"left out: {_boxes(empty)} without an area in {self.file}")
        if repeated := _repetitions(found["annotations"]):
            self.notes.append(f"{_boxes(repeated)} in {self.file} repeat another one: each counts as an object")
        corners = [(x + w, y + h) for x, y, w, h in (each["bbox"] for each in found["annotations"])]
        if corners and max(map(max, corners)) <= 1:
            self.problems.append(
                f"{self.file} has no box beyond the first pixel, as if they were shares of the image: "
                "give x, y, width and height in pixels"
            )
        to_find = any(not box[-1] for of_image in boxes.values() for box in of_image)  # crowds alone are none
        if not to_find and not self.problems:
            self.problems.append(f"{self.file} has no boxes to find: replace it")
        arrays = [np.array(each, dtype=np.float32).reshape(-1, COLUMNS) for each in boxes.values()]
        sizes = [(each["width"], each["height"]) for each in images.values()]
        return Scenes([self.images / each["file_name"] for each in images.values()], sizes, arrays)

    def _find_missing(self, names: list[str]) -> None:
        self.problems += [
            f"{self.images / name} is missing, but listed in {self.file}: restore it, or remove it there"
            for name in names
            if not (self.images / name).is_file()
        ]

    def _problem(self, annotation: _Annotation, images: dict[int, _Image]) -> str | None:
        if annotation["category_id"] not in self.labels:
            return f"is of category {annotation['category_id']}, which is not in the list of categories: correct it"
        if annotation["image_id"] not in images:
            return f"is of image {annotation['image_id']}, which is not in the list of images: correct it"
        (x, y, w, h), image = annotation["bbox"], images[annotation["image_id"]]
        beyond = max(-x, -y, x + w - image["width"], y + h - image["height"], -w, -h)
        if beyond > BEYOND:
            size = f"{image['width']} x {image['height']}"
            box = ", ".join(f"{each:g}" for each in (x, y, w, h))
            return f"has the box [{box}] (x, y, width, height), which is not inside its image of {size}: correct it"
        return None


def _boxes(n: int) -> str:
    return f"{n:,} box{'es' * (n != 1)}"


def _repetitions(annotations: list[_Annotation]) -> int:
    """Annotations that are equal to an earlier one."""
    keys = (
        (each["image_id"], each["category_id"], *each["bbox"], bool(each.get("iscrowd", 0))) for each in annotations
    )
    return sum(n - 1 for n in Counter(keys).values())


def _as_shares(box: list[float], image: _Image) -> tuple[float, float, float, float] | None:
    """x, y, width, height in pixels -> centre, width and height as shares; None if no area is left in the image."""
    x, y, w, h = box
    left, right = (min(max(each, 0.0), image["width"]) / image["width"] for each in (x, x + w))
    top, bottom = (min(max(each, 0.0), image["height"]) / image["height"] for each in (y, y + h))
    if right <= left or bottom <= top:
        return None
    return (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
