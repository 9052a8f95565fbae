"""Images with a class for every pixel: where the files of each data set lie, and how its masks are read.

Void, the label of pixels that no class has or that do not count, is always the number after the last class.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision import datasets

from training.config import UserError
from training.folder import DAMAGED

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
PARTS = ("train", "val", "test")


class BadFile(Exception):
    """A file that cannot be used; the message names it and says what to do."""


@dataclass(frozen=True)
class Classes:
    """The classes of a data set, in the order of their labels."""

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    """RGB, for pictures"""
    void_colour: tuple[int, int, int] = (0, 0, 0)

    @property
    def void(self) -> int:
        return len(self.names)

    @property
    def palette(self) -> np.ndarray:
        """(classes + 1, 3) uint8, void's last."""
        return np.array([*self.colours, self.void_colour], dtype=np.uint8)


CAMVID = Classes(  # the 11 classes of SegNet (arXiv 1511.00561) in their usual order and colours
    *zip(
        ("sky", (128, 128, 128)),
        ("building", (128, 0, 0)),
        ("pole", (192, 192, 128)),
        ("road", (128, 64, 128)),
        ("pavement", (60, 40, 222)),
        ("tree", (128, 128, 0)),
        ("sign", (192, 128, 128)),
        ("fence", (64, 64, 128)),
        ("car", (64, 0, 128)),
        ("pedestrian", (64, 64, 0)),
        ("bicyclist", (0, 128, 192)),
        strict=True,
    )
)
CAMVID_FOLD = {  # the 32 classes of CamVid (Brostow et al. 2009) folded to those 11
    "sky": ("Sky",),
    "building": ("Building", "Wall", "Bridge", "Tunnel", "Archway"),
    "pole": ("Column_Pole", "TrafficCone"),
    "road": ("Road", "LaneMkgsDriv", "LaneMkgsNonDriv"),
    "pavement": ("Sidewalk", "ParkingBlock", "RoadShoulder"),
    "tree": ("Tree", "VegetationMisc"),
    "sign": ("SignSymbol", "Misc_Text", "TrafficLight"),
    "fence": ("Fence",),
    "car": ("Car", "SUVPickupTruck", "Truck_Bus", "Train", "OtherMoving"),
    "pedestrian": ("Pedestrian", "Child", "CartLuggagePram", "Animal"),
    "bicyclist": ("Bicyclist", "MotorcycleScooter"),
    "void": ("Void",),
}


def _voc_colour(label: int) -> tuple[int, int, int]:
    """The colour of a label in Pascal VOC's palette: its bits, dealt to red, green and blue in turn, highest first."""
    return tuple(sum((label >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)) for channel in range(3))


VOC_NAMES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow dining_table dog horse motorbike person "
    "potted_plant sheep sofa train tv_monitor"
).split()
VOC = Classes(tuple(VOC_NAMES), tuple(map(_voc_colour, range(len(VOC_NAMES)))), void_colour=_voc_colour(255))

_CITYSCAPES = sorted(
    (each for each in datasets.Cityscapes.classes if each.train_id not in (255, -1)), key=lambda each: each.train_id
)
CITYSCAPES = Classes(
    tuple(each.name.replace(" ", "_") for each in _CITYSCAPES), tuple(each.color for each in _CITYSCAPES)
)

CLASSES = {"camvid": CAMVID, "voc": VOC, "cityscapes": CITYSCAPES}


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
    """what keeps files from being used: one message each"""

    @property
    def classes(self) -> Classes:
        return CLASSES[self.name]


def find_masks(name: str, folder: Path) -> MaskFiles:
    """The files of the data set called name. Raises UserError where the folder is none of its layouts."""
    return {"camvid": _find_camvid, "voc": _find_voc, "cityscapes": _find_cityscapes}[name](folder)


def read_image(path: Path) -> np.ndarray:
    """(h, w, 3) uint8. Raises BadFile."""
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except DAMAGED as error:
        raise BadFile(f"{path} cannot be read as an image ({error}): replace it by a whole copy") from None


# ---------------------------------------------------------------------------- CamVid


def _find_camvid(folder: Path) -> MaskFiles:
    """Either layout: train/ with trainannot/ (labels as pixel values) or train_labels/ and class_dict.csv (colours)."""
    layouts = {"annot": "index masks", "_labels": "colour masks"}
    found = [suffix for suffix in layouts if (folder / f"train{suffix}").is_dir()]
    if not (folder / "train").is_dir() or len(found) != 1:
        raise UserError(
            f"{folder} does not hold CamVid: there must be train/ and val/ with images, and beside them either "
            "trainannot/ and valannot/ (masks of labels 0 to 11) or train_labels/, val_labels/ and class_dict.csv "
            "(masks of 32 colours). Put them there, or name another place with --data-dir"
        )
    suffix = found[0]
    read = _read_camvid_labels if suffix == "annot" else ColourMasks(folder / "class_dict.csv")
    pairs, problems = {}, []
    for part in PARTS:
        pairs[part], unpaired = pair_files(folder / part, folder / f"{part}{suffix}")
        problems += unpaired
        if part != "test" and not pairs[part] and not unpaired:
            problems.append(f"{folder / part} holds no images: put the {part} part of CamVid there")
    return MaskFiles("camvid", pairs, read, problems)


def pair_files(images: Path, masks: Path) -> tuple[list[Pair], list[str]]:
    """Images with the masks of the same name (or that name and _L), sorted; and a message for each that has none."""
    by_stem = {path.stem: path for path in _image_files(images)}
    masks_by_stem = {path.stem.removesuffix("_L"): path for path in _image_files(masks)}
    problems = [
        f"{by_stem[stem]} has no mask in {masks}: add it, or remove the image"
        for stem in sorted(by_stem.keys() - masks_by_stem)
    ]
    problems += [
        f"{masks_by_stem[stem]} has no image in {images}: add it, or remove the mask"
        for stem in sorted(masks_by_stem.keys() - by_stem)
    ]
    pairs = [Pair(by_stem[stem], masks_by_stem[stem]) for stem in sorted(by_stem.keys() & masks_by_stem)]
    return pairs, problems


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def _read_camvid_labels(path: Path) -> np.ndarray:
    return read_labels(path, CAMVID, {})


def read_labels(path: Path, classes: Classes, renamed: dict[int, int]) -> np.ndarray:
    """The labels of a mask that has them as pixel values. renamed: those of the file that are other ones here.

    Raises BadFile for a file that is no such mask, and for a label that no class has.
    """
    try:
        with Image.open(path) as image:
            mode, pixels = image.mode, np.array(image)
    except DAMAGED as error:
        raise BadFile(f"{path} cannot be read as a mask ({error}): replace it by a whole copy") from None
    if mode not in ("L", "P"):
        raise BadFile(f"{path} is no mask of labels (its mode is {mode}, not one byte a pixel): replace it")
    table = np.full(256, 255, dtype=np.uint8)
    table[: classes.void + 1] = np.arange(classes.void + 1)
    for theirs, ours in renamed.items():
        table[theirs] = ours
    labels = table[pixels]
    if (labels == 255).any():
        row, column = np.argwhere(labels == 255)[0]
        raise BadFile(
            f"{path} has the label {pixels[row, column]} in row {row}, column {column}, which no class has "
            f"({classes.void} is void): mend the mask, or remove it together with its image"
        )
    return labels


class ColourMasks:
    """Reads CamVid's masks of 32 colours as labels of the 11 classes and void."""

    def __init__(self, table: Path):
        """table: class_dict.csv with the columns name, r, g, b. Raises UserError where it is not that."""
        fold = {theirs: label for label, group in enumerate(CAMVID_FOLD.values()) for theirs in group}
        try:
            with table.open(newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file, skipinitialspace=True))
            names = [row["name"].strip() for row in rows]
            colours = np.array([[int(row[channel]) for channel in "rgb"] for row in rows]).reshape(-1, 3)
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:  # the last two of short rows
            raise UserError(
                f"{table} cannot be read ({' '.join(str(error).split())}): masks of colours need it, with the columns "
                "name, r, g, b"
            ) from None
        unknown = sorted(set(names) - set(fold))
        if unknown or ((colours < 0) | (colours > 255)).any():
            what = f"{', '.join(unknown)} is no class of CamVid" if unknown else "a colour is not between 0 and 255"
            raise UserError(f"{table}: {what}; put CamVid's own class_dict.csv there")
        self.table = table
        self.labels = np.full(2**24, 255, dtype=np.uint8)  # by colour; 255 where no class has it
        self.labels[_colour_codes(colours)] = [fold[name] for name in names]

    def __call__(self, path: Path) -> np.ndarray:
        """(h, w) uint8 labels. Raises BadFile for a file that is no image, and for a colour that no class has."""
        pixels = read_image(path)
        labels = self.labels[_colour_codes(pixels)]
        if (labels == 255).any():
            row, column = np.argwhere(labels == 255)[0]
            raise BadFile(
                f"{path} has the colour {tuple(map(int, pixels[row, column]))} in row {row}, column {column}, which is "
                f"not in {self.table}: mend the mask (was it scaled or stored as JPEG?), or remove it with its image"
            )
        return labels


def _colour_codes(colours: np.ndarray) -> np.ndarray:
    """(..., 3) RGB -> (...) one number a colour."""
    red, green, blue = np.moveaxis(colours.astype(np.int32), -1, 0)
    return red << 16 | green << 8 | blue


# ---------------------------------------------------------------------------- Pascal VOC 2012 and Cityscapes


def _find_voc(folder: Path) -> MaskFiles:
    """torchvision's reader of Pascal VOC 2012, which downloads it where it is not there. The val part is its own."""
    there = (folder / "VOCdevkit" / "VOC2012").is_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        parts = {
            part: datasets.VOCSegmentation(folder, "2012", part, download=not there and part == "train")
            for part in ("train", "val")
        }
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{folder} does not hold Pascal VOC 2012, and it could not be downloaded ({error}). Connect to the network "
            "and start again, or unpack VOCtrainval_11-May-2012.tar there (it makes VOCdevkit/VOC2012)"
        ) from None
    pairs = {
        part: [Pair(Path(image), Path(mask)) for image, mask in zip(of.images, of.masks, strict=True)]
        for part, of in parts.items()
    }
    read = partial(read_labels, classes=VOC, renamed={VOC.void: 255, 255: VOC.void})
    return MaskFiles("voc", pairs | {"test": []}, read, [])


def _find_cityscapes(folder: Path) -> MaskFiles:
    """torchvision's reader of Cityscapes' fine annotations, which have to be asked for at its web site."""
    try:
        parts = {
            part: datasets.Cityscapes(folder, split=part, mode="fine", target_type="semantic")
            for part in ("train", "val")
        }
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{folder} does not hold Cityscapes ({' '.join(str(error).split())}). Get leftImg8bit_trainvaltest.zip and "
            "gtFine_trainvaltest.zip from cityscapes-dataset.com (with an account) and unpack both there"
        ) from None
    pairs = {
        part: [Pair(Path(image), Path(targets[0])) for image, targets in zip(of.images, of.targets, strict=True)]
        for part, of in parts.items()
    }
    places = {each.train_id: label for label, each in enumerate(_CITYSCAPES)}
    renamed = {
        each.id: places.get(each.train_id, CITYSCAPES.void) for each in datasets.Cityscapes.classes if each.id >= 0
    }
    return MaskFiles("cityscapes", pairs | {"test": []}, partial(read_labels, classes=CITYSCAPES, renamed=renamed), [])
