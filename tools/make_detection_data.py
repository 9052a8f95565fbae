"""Makes a small detection data set in COCO's format from CIFAR-10 or CamVid, for train_bdh_detector.py.

    python tools/make_detection_data.py                     # scenes of 1 to 4 CIFAR-10 images on noise
    python tools/make_detection_data.py --source camvid     # cars, pedestrians, bicyclists and signs of CamVid

cifar10: images of random size, which may overlap a little, on a canvas of noise around a random grey. Scenes for
training have training images only, those for validation test images. camvid: boxes of connected regions of the masks.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from training.command_line import run_script
from training.config import UserError, require
from training.data import data_folder, load_dataset
from training.data.classes import CAMVID
from training.data.mask_files import BadFile
from training.data.masks import find_masks
from training.data.segmentation import read_pair, refuse
from training.files import whole_folder

SMALLEST, LARGEST = 24, 44  # sides of pasted images in pixels
MOST_OBJECTS = 4
OVERLAP = 0.1  # largest share of the smaller one of two images that the other may cover
ATTEMPTS = 50
NOISE = 25  # standard deviation of the canvas, in grey levels of 256
COUNTABLE = ("sign", "car", "pedestrian", "bicyclist")  # classes of CamVid whose regions are objects
Box = tuple[int, int, int, int]  # x, y, width, height in pixels
Scene = tuple[np.ndarray, list[tuple[int, Box]]]  # image (h, w, 3) uint8; class and box of each object


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to make."""

    source: Literal["cifar10", "camvid"] = "cifar10"
    """what objects are cut from"""
    output: Path | None = None
    """folder to write, which must not exist; default: data_coco, where train_bdh_detector.py looks for it"""
    train: int = 5000
    """scenes to train on (cifar10)"""
    val: int = 1000
    """scenes to validate with (cifar10)"""
    size: int = 96
    """height and width of a scene in pixels (cifar10)"""
    min_area: int = 100
    """smallest region that is an object, in pixels (camvid)"""
    seed: int = 0
    """seed of all draws"""
    data_dir: Path | None = None
    """folder that contains data_cifar10 or data_camvid; default: $VISION_BDH_DATA, else beside the scripts"""

    def __post_init__(self):
        for name in ("train", "val", "min_area"):
            require(getattr(self, name) >= 1, self, name, "must be at least 1")
        require(self.size >= LARGEST, self, "size", f"must be at least {LARGEST}, the largest object")
        require(self.seed >= 0, self, "seed", "must not be negative")


def draw_scene(images: np.ndarray, labels: np.ndarray, size: int, draws: np.random.Generator) -> Scene:
    """1 to 4 of the images (N, 3, h, w) uint8, resized and pasted in random places; fewer where there is no room."""
    canvas = draws.normal(draws.uniform(64, 192), NOISE, (size, size, 3)).clip(0, 255).astype(np.uint8)
    objects: list[tuple[int, Box]] = []
    wanted = draws.integers(1, MOST_OBJECTS + 1)
    for _ in range(ATTEMPTS):
        if len(objects) == wanted:
            break
        side = int(draws.integers(SMALLEST, LARGEST + 1))
        x, y = (int(each) for each in draws.integers(size - side + 1, size=2))
        box = (x, y, side, side)
        if any(_covered(box, other) > OVERLAP for _, other in objects):
            continue
        index = int(draws.integers(len(images)))
        image = Image.fromarray(images[index].transpose(1, 2, 0)).resize((side, side), Image.Resampling.BILINEAR)
        canvas[y : y + side, x : x + side] = np.asarray(image)
        objects.append((int(labels[index]), box))
    return canvas, objects


def _covered(one: Box, other: Box) -> float:
    """Area of the overlap as a share of the smaller box."""
    sides = [
        max(0, min(one[axis] + one[axis + 2], other[axis] + other[axis + 2]) - max(one[axis], other[axis]))
        for axis in (0, 1)
    ]
    return sides[0] * sides[1] / min(one[2] * one[3], other[2] * other[3])


def cifar_scenes(options: Options) -> tuple[tuple[str, ...], dict[str, tuple[int, Iterator[Scene]]]]:
    """Class names, and by part the number of scenes and the scenes."""
    data = load_dataset("cifar10", options.data_dir)
    sources = {"train": (data.train_images, data.train_labels), "val": (data.test_images, data.test_labels)}
    parts = {}
    for number, (part, (images, labels)) in enumerate(sources.items()):
        draws, n = np.random.default_rng([options.seed, number]), getattr(options, part)
        parts[part] = n, (draw_scene(images, labels, options.size, draws) for _ in range(n))
    return data.class_names, parts


def regions(mask: np.ndarray, min_area: int) -> list[tuple[int, Box]]:
    """Class (of COUNTABLE) and box of each connected region of a CamVid mask (h, w) with at least that many pixels."""
    objects = []
    for label, name in enumerate(COUNTABLE):
        places, _ = ndimage.label(mask == CAMVID.names.index(name))
        areas = np.bincount(places.ravel())[1:]
        for area, (rows, columns) in zip(areas, ndimage.find_objects(places), strict=True):
            if area >= min_area:
                box = (columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start)
                objects.append((label, box))
    return objects


def camvid_scenes(options: Options) -> tuple[tuple[str, ...], dict[str, tuple[int, Iterator[Scene]]]]:
    """As `cifar_scenes`. Raises UserError for a damaged file."""
    files = find_masks("camvid", data_folder("camvid", options.data_dir))
    refuse(files.problems, "camvid")

    def read(pairs: list) -> Iterator[Scene]:
        for pair in pairs:
            try:
                image, mask = read_pair(pair, files)
            except BadFile as error:
                raise UserError(str(error)) from None
            yield image, regions(mask, options.min_area)

    return COUNTABLE, {part: (len(pairs), read(pairs)) for part, pairs in files.pairs.items() if pairs}


def write_part(folder: Path, part: str, n: int, scenes: Iterator[Scene], class_names: tuple[str, ...]) -> int:
    """Writes the images as PNG and annotations/instances_PART.json; returns the number of boxes."""
    images, annotations = [], []
    (folder / part).mkdir(parents=True)
    for number, (image, objects) in enumerate(tqdm(scenes, total=n, unit="img", desc=part, leave=False, disable=None)):
        name = f"{number:06d}.png"
        Image.fromarray(image).save(folder / part / name)
        height, width = image.shape[:2]
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for label, box in objects:
            entry = {"id": len(annotations) + 1, "image_id": number, "category_id": label, "bbox": list(box)}
            annotations.append(entry | {"area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": label, "name": name} for label, name in enumerate(class_names)]
    found = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(found))
    return len(annotations)


def main(options: Options) -> None:
    output = options.output or data_folder("coco", options.data_dir)
    if output.exists():
        raise UserError(f"{output} exists: remove it, or name another folder with --output")
    class_names, parts = (cifar_scenes if options.source == "cifar10" else camvid_scenes)(options)
    with whole_folder(output):
        for part, (n, scenes) in parts.items():
            boxes = write_part(output, part, n, scenes, class_names)
            print(f"{part}: {n:,} images, {boxes:,} boxes")
    print(f"{output}: {len(class_names)} classes ({', '.join(class_names)})")


if __name__ == "__main__":
    run_script(main, __doc__)
