"""Segmentation data sets: where the files of each lie and how its masks are read."""

import csv
from collections import Counter
from collections.abc import Container, Iterable
from functools import partial
from pathlib import Path

import numpy as np
from torchvision import datasets

from training.config import UserError
from training.data.classes import ADE20K, CAMVID, CAMVID_FOLD, CITYSCAPES, CITYSCAPES_CLASSES, VOC
from training.data.finding import Finder, is_image
from training.data.image_files import require_8_bits, why_unreadable
from training.data.mask_files import BadFile, MaskFiles, Pair, bad_file, open_mask, pair_files, pair_up, read_labels

PARTS = ("train", "val", "test")
IMAGE_END, MASK_END = "_leftImg8bit", "_gtFine_labelIds.png"  # of names in Cityscapes


def find_masks(name: str, folder: Path, download: bool = True) -> MaskFiles:
    """The files of the data set `name`. Raises UserError if the folder has none of its layouts.

    download: fetch Pascal VOC if it is missing; the others cannot be downloaded.
    """
    find = {"camvid": _find_camvid, "cityscapes": _find_cityscapes, "ade20k": _find_ade20k}
    try:
        return (_find_voc(folder, download) if name == "voc" else find[name](folder)).without_missing()
    except PermissionError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): make it readable") from None


# ---------------------------------------------------------------------------- CamVid


def _find_camvid(folder: Path) -> MaskFiles:
    """Either layout: train/ with trainannot/ (labels as pixel values) or train_labels/ and class_dict.csv (colours)."""
    layouts = {
        suffix: [name for part in PARTS if (folder / (name := f"{part}{suffix}")).is_dir()]
        for suffix in ("annot", "_labels")
    }
    if all(layouts.values()):
        both = [name for names in layouts.values() for name in names]
        raise UserError(
            f"{folder} holds masks in both CamVid layouts ({', '.join(both)}): move those of one layout elsewhere"
        )
    suffix = "_labels" if layouts["_labels"] else "annot"
    needed = [f"{part}{end}" for part in PARTS[:2] for end in ("", suffix)]
    if missing := [name for name in needed if not (folder / name).is_dir()]:
        why = f"{', '.join(f'{name}/' for name in missing)} missing" if folder.is_dir() else "no such folder"
        raise UserError(
            f"{folder} does not hold CamVid ({why}): there must be train/ and val/ with images, and beside them either "
            "trainannot/ and valannot/ (masks of labels 0 to 11) or train_labels/, val_labels/ and class_dict.csv "
            "(masks of 32 colours). Put them there, or name another place with --data-dir"
        )
    read = _read_camvid_labels if suffix == "annot" else ColourMasks(folder / "class_dict.csv")
    pairs, problems, finder = {}, [], Finder()
    for part in PARTS:
        images, masks = folder / part, folder / f"{part}{suffix}"
        pairs[part], unpaired = pair_files(images, masks, finder)
        if unpaired and images.is_dir() != masks.is_dir():  # only the test part may be absent
            there, absent = (images, masks) if images.is_dir() else (masks, images)
            unpaired = [f"{there} exists, but {absent} does not: add it, or move {there.name}/ elsewhere"]
        problems += unpaired
        if part != "test" and not pairs[part] and not unpaired:
            problems.append(f"{images} holds no images: put the {part} part of CamVid there")
    return MaskFiles("camvid", pairs, read, problems, tuple(finder.notes()))


def _read_camvid_labels(path: Path) -> np.ndarray:
    return read_labels(path, CAMVID, {})


class ColourMasks:
    """Reads CamVid's 32-colour masks as labels of the 11 classes and void."""

    def __init__(self, table: Path):
        """table: class_dict.csv with columns name, r, g, b. Raises UserError if it is not valid."""
        fold = {theirs: label for label, group in enumerate(CAMVID_FOLD.values()) for theirs in group}
        try:
            with table.open(newline="", encoding="utf-8-sig") as file:
                classes = _read_class_dict(file, fold)
        except (OSError, ValueError, csv.Error) as error:
            why = "it is missing" if isinstance(error, FileNotFoundError) else why_unreadable(error)
            raise UserError(
                f"{table} cannot be used ({why}): colour masks need it. Put CamVid's own there: columns "
                "name, r, g, b, one row per class (32)"
            ) from None
        self.table = table
        self.labels = np.full(2**24, 255, dtype=np.uint8)  # by colour; 255: no class
        self.labels[_colour_codes(np.array(list(classes)))] = [fold[name] for name in classes.values()]

    def __call__(self, path: Path) -> np.ndarray:
        """(h, w) uint8 labels. Raises BadFile for a file that is not an image or has an unknown colour."""
        pixels = _read_colours(path)
        labels = self.labels[_colour_codes(pixels)]
        if (labels == 255).any():
            row, column = np.argwhere(labels == 255)[0]
            raise BadFile(
                f"{path} has the colour {tuple(map(int, pixels[row, column]))} in row {row}, column {column}, which is "
                f"not in {self.table}: fix the mask (was it resized or stored as JPEG?), or remove it with its image"
            )
        return labels


def _read_colours(path: Path) -> np.ndarray:
    """(h, w, 3) uint8 of a colour mask. Its colours count even where they are transparent. Raises BadFile."""
    image = open_mask(path)
    try:
        require_8_bits(image)
        return np.array(image.convert("RGB"))
    except Exception as error:
        raise bad_file(path, "an image", error) from None


def _read_class_dict(lines: Iterable[str], known: Container[str]) -> dict[tuple[int, ...], str]:
    """The classes of class_dict.csv by colour. Raises ValueError if it is not valid."""
    rows = csv.DictReader(lines, restval="", skipinitialspace=True)
    if not {"name", *"rgb"} <= set(rows.fieldnames or ()):
        raise ValueError("its first line is not name, r, g, b")
    classes: dict[tuple[int, ...], str] = {}
    for row in rows:
        name, numbers = row["name"].strip(), [row[channel].strip() for channel in "rgb"]
        if name not in known:
            raise ValueError(f"line {rows.line_num}: {name!r} is not a CamVid class")
        if not all(number.isdecimal() and int(number) < 256 for number in numbers):
            raise ValueError(
                f"line {rows.line_num}: {', '.join(numbers)} is not a colour of three numbers from 0 to 255"
            )
        if classes.setdefault(tuple(map(int, numbers)), name) != name:
            raise ValueError(f"line {rows.line_num}: {name} has the colour of another class")
    if not classes:
        raise ValueError("it has no classes")
    return classes


def _colour_codes(colours: np.ndarray) -> np.ndarray:
    """(..., 3) RGB -> (...), one number per colour."""
    red, green, blue = np.moveaxis(colours.astype(np.int32), -1, 0)
    return red << 16 | green << 8 | blue


# ---------------------------------------------------------------------------- Pascal VOC 2012, Cityscapes, ADE20K


def _find_voc(folder: Path, download: bool) -> MaskFiles:
    """Pascal VOC 2012 through torchvision, which downloads it if missing; official validation set."""
    root = folder / "VOCdevkit" / "VOC2012"
    read = partial(datasets.VOCSegmentation, folder, "2012")
    if not root.is_dir():
        try:
            if download:
                folder.mkdir(parents=True, exist_ok=True)
            read("train", download=download)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{folder} does not hold Pascal VOC 2012, and it could not be downloaded ({why_unreadable(error)}). "
                "Connect to the network and start again, or unpack VOCtrainval_11-May-2012.tar there (it makes "
                "VOCdevkit/VOC2012)"
            ) from None
    try:
        parts = {part: read(part) for part in PARTS[:2]}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{root} is incomplete ({why_unreadable(error)}): unpack VOCtrainval_11-May-2012.tar in {folder} again, "
            "or remove the folder to download it at the next start"
        ) from None
    pairs, problems, lists = {}, [], root / "ImageSets" / "Segmentation"
    for part, of in parts.items():
        pairs[part], more = _listed_pairs(of.images, of.masks, lists / f"{part}.txt")
        problems += more
    trained = set(pairs["train"])
    problems += [
        f"{lists / 'val.txt'} lists {pair.image.stem}, which train.txt lists, too: remove it from one of them"
        for pair in pairs["val"]
        if pair in trained
    ]
    read_mask = partial(read_labels, classes=VOC, renamed={VOC.void: 255, 255: VOC.void})
    return MaskFiles("voc", pairs | {"test": []}, read_mask, problems)


def _find_cityscapes(folder: Path) -> MaskFiles:
    """Cityscapes' fine annotations, which have to be requested at its web site; torchvision unpacks the archives."""
    images, masks = folder / "leftImg8bit", folder / "gtFine"
    try:
        for part in PARTS[:2]:
            if not ((images / part).is_dir() and (masks / part).is_dir()):
                datasets.Cityscapes(folder, split=part, mode="fine", target_type="semantic")
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{folder} does not hold Cityscapes ({why_unreadable(error)}). Get leftImg8bit_trainvaltest.zip and "
            "gtFine_trainvaltest.zip from cityscapes-dataset.com (with an account) and unpack both there: they make "
            "leftImg8bit/ and gtFine/ with train/ and val/"
        ) from None
    finder, pairs, problems = Finder(), {}, []
    for part in PARTS[:2]:
        pairs[part], unpaired = _cityscapes_pairs(images / part, masks / part, finder)
        problems += unpaired
        if not pairs[part] and not unpaired:
            problems.append(f"{images / part} holds no images: unpack leftImg8bit_trainvaltest.zip in {folder}")
    places = {each.train_id: label for label, each in enumerate(CITYSCAPES_CLASSES)}
    renamed = {
        each.id: places.get(each.train_id, CITYSCAPES.void) for each in datasets.Cityscapes.classes if each.id >= 0
    }
    read_mask = partial(read_labels, classes=CITYSCAPES, renamed=renamed)
    return MaskFiles("cityscapes", pairs | {"test": []}, read_mask, problems, tuple(finder.notes()))


def _cityscapes_pairs(images: Path, masks: Path, finder: Finder) -> tuple[list[Pair], list[str]]:
    """CITY/NAME_leftImg8bit.png with CITY/NAME_gtFine_labelIds.png, sorted, and a message for each unusable file."""
    found = sorted(Path(file.path) for file in finder.all_images(images))
    named, others = ([path for path in found if path.stem.endswith(IMAGE_END) == good] for good in (True, False))
    problems = [
        f"{path} is not called NAME{IMAGE_END}{path.suffix}, as Cityscapes' images are: rename or remove it"
        for path in others
    ]
    labels = [Path(file.path) for file in Finder().all_images(masks)]  # another finder: other files are expected there
    labels = [path for path in labels if path.name.endswith(MASK_END)]
    pairs, unpaired = pair_up(
        ((str(path.relative_to(images).with_suffix("")).removesuffix(IMAGE_END), path) for path in named),
        ((str(path.relative_to(masks)).removesuffix(MASK_END), path) for path in labels),
        images,
        masks,
    )
    return pairs, problems + unpaired


def _listed_pairs(images: Iterable[str], masks: Iterable[str], file: Path) -> tuple[list[Pair], list[str]]:
    """The pairs that a file of Pascal VOC lists, each once, and a message for each listed twice, or if there are none.

    Empty lines, for which torchvision has files without a name, are left out.
    """
    listed = Counter(Pair(Path(image), Path(mask)) for image, mask in zip(images, masks, strict=True))
    pairs = {pair: n for pair, n in listed.items() if is_image(pair.image)}
    problems = [
        f"{file} lists {pair.image.stem} {n} times: remove the repeated lines" for pair, n in pairs.items() if n > 1
    ]
    return [*pairs], problems if pairs else [f"{file} lists no images: unpack Pascal VOC 2012 again"]


def _find_ade20k(folder: Path) -> MaskFiles:
    """ADE20K with the 150 classes of its scene-parsing benchmark: Zhou et al. 2017 (arXiv 1608.05442).

    Pixels of no class (0) are void. The test part has no public labels.
    """
    root = folder if (folder / "annotations").is_dir() else folder / "ADEChallengeData2016"
    parts = {"train": "training", "val": "validation"}
    missing = [f"{kind}/{name}/" for name in parts.values() for kind in ("images", "annotations")]
    if missing := [name for name in missing if not (root / name).is_dir()]:
        raise UserError(
            f"{folder} does not hold ADE20K ({root.name}/ lacks {', '.join(missing)}). Get ADEChallengeData2016.zip "
            "(0.9 GB) from data.csail.mit.edu/places/ADEchallenge and unpack it there"
        )
    finder, pairs, problems = Finder(), {}, []
    for part, name in parts.items():
        pairs[part], unpaired = pair_files(root / "images" / name, root / "annotations" / name, finder)
        problems += unpaired
        if not pairs[part] and not unpaired:
            problems.append(f"{root / 'images' / name} holds no images: unpack ADEChallengeData2016.zip in {folder}")
    renamed = {0: ADE20K.void} | {label + 1: label for label in range(ADE20K.void)}
    read_mask = partial(read_labels, classes=ADE20K, renamed=renamed)
    return MaskFiles("ade20k", pairs | {"test": []}, read_mask, problems, tuple(finder.notes()))
