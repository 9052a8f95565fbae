"""Checks a CamVid folder, in either layout, or another segmentation data set before training.

Prints for each part how many images have a mask, their sizes, and each class's share of the pixels; then which images
have an EXIF orientation, hidden files and files left out. Last comes one line for every file that is damaged, lacks its
image or mask, differs from it in size, or has a label or colour of no class; the exit code is then 1.

    python tools/verify_camvid.py
    python tools/verify_camvid.py --data-dir /data/CamVid
    python tools/verify_camvid.py --dataset ade20k
"""

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from training.command_line import run_script
from training.config import UserError
from training.data import data_folder
from training.data.finding import count, printable
from training.data.image_files import orientation
from training.data.mask_files import BadFile, MaskFiles
from training.data.masks import ColourMasks, find_masks
from training.data.segmentation import read_pair

SHOWN_SIZES = 8
SHOWN_TURNED = 3


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to check, and where to look."""

    dataset: Literal["camvid", "voc", "cityscapes", "ade20k"] = "camvid"
    """the data set; none is downloaded"""
    data_dir: Path | None = None
    """its folder, or the one that holds data_camvid and the like; default: $VISION_BDH_DATA, else beside the scripts"""


@dataclass
class Found:
    """Contents of a part."""

    pixels: np.ndarray
    """(classes + 1,) pixels by label, void last"""
    pairs: int = 0
    sizes: Counter[str] = field(default_factory=Counter)
    """images by width x height"""
    turned: list[Path] = field(default_factory=list)
    """images that are stored turned, with an EXIF orientation"""


def verify(files: MaskFiles) -> tuple[dict[str, Found], list[str]]:
    """Reads every file: the contents of each part, and a message for each file that cannot be used."""
    found, problems = {}, list(files.problems)
    for part, pairs in files.pairs.items():
        found[part] = here = Found(np.zeros(len(files.classes.names) + 1, dtype=np.int64))
        for pair in tqdm(pairs, unit="img", desc=part, leave=False, disable=None):
            try:
                image, mask = read_pair(pair, files)
            except BadFile as error:
                problems.append(str(error))
                continue
            here.pairs += 1
            here.sizes[f"{image.shape[1]} x {image.shape[0]}"] += 1
            with Image.open(pair.image) as file:
                if orientation(file) != 1:  # by EXIF; 1 is upright
                    here.turned.append(pair.image)
            here.pixels += np.bincount(mask.ravel(), minlength=len(here.pixels))
    return found, problems


def show(files: MaskFiles, found: dict[str, Found]) -> None:
    """Two tables: images and sizes, then the share of each class."""
    console = Console(width=100)
    table = Table("part", "usable pairs", "sizes (images)")
    for part, here in found.items():
        sizes = ", ".join(f"{size} ({n})" for size, n in here.sizes.most_common(SHOWN_SIZES))
        if (more := len(here.sizes) - SHOWN_SIZES) > 0:
            sizes += f", and {more} more sizes"
        table.add_row(part, str(here.pairs), sizes or "-")
    console.print(table)
    shares = Table("label", "class", *(f"{part}, % of pixels" for part in found))
    for label, name in enumerate([*files.classes.names, "void"]):
        cells = [
            f"{100 * here.pixels[label] / here.pixels.sum():.2f}" if here.pairs else "-" for here in found.values()
        ]
        shares.add_row(str(label), name, *cells)
    console.print(shares)


def notes(files: MaskFiles, found: dict[str, Found]) -> list[str]:
    """What is no problem, but should be known."""
    turned = [str(path) for here in found.values() for path in here.turned]
    if not turned:
        return [*files.notes]
    shown = ", ".join(turned[:SHOWN_TURNED] + ["..."] * (len(turned) > SHOWN_TURNED))
    note = (
        f"EXIF orientation: {count(len(turned), 'image')} stored turned ({shown}) and read upright; a mask has no such "
        "tag and must be stored upright: compare them once"
    )
    return [note, *files.notes]


def main(options: Options) -> None:
    folder = data_folder(options.dataset, options.data_dir)
    files = find_masks(options.dataset, folder, download=False)
    layout = "colours, folded to 11 classes" if isinstance(files.read_mask, ColourMasks) else "labels"
    print(f"{printable(folder)}: {options.dataset} with masks of {layout}")
    found, problems = verify(files)
    show(files, found)
    for note in notes(files, found):
        print(printable(note))
    if problems:
        raise UserError("\n".join([f"{len(problems)} problem{'s' * (len(problems) != 1)}:", *problems]))
    print("no problems: ready to train")


if __name__ == "__main__":
    run_script(main, __doc__)
