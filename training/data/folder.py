"""A data set of your own images: one folder per class.

DIR/train/CLASS/IMAGE   beside it DIR/val and DIR/test, one of them, or neither
DIR/CLASS/IMAGE         no parts: validation images are drawn from all, and there is no test
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from training.config import UserError
from training.data.batches import DataSet
from training.data.finding import Finder, ImageFile, count, fingerprint, printable
from training.data.image_files import ImageFiles, check_channels
from training.data.places import data_folder

PART_NAMES = re.compile(  # Train, training_set, valid, test-images, test1, ...
    r"((?P<train>train(ing)?)|(?P<val>val(id(ation)?)?)|(?P<test>test(ing)?))([ _-]?(set|data|images))?[ _-]?\d*", re.I
)
ONE_FOLDER_PER_CLASS = "must hold one folder of images per class"

OpenFiles = Callable[[list[str]], ImageFiles]
Find = Callable[[Finder, str], list[ImageFile]]  # the files below a class folder


@dataclass(frozen=True)
class Part:
    """The images of one part."""

    root: Path
    classes: dict[str, list[ImageFile]]
    """by class folder, in alphabetical order; images by folder, then by name"""
    loose: list[ImageFile]
    """images that lie beside the class folders, and so belong to no class"""

    @property
    def names(self) -> set[str]:
        """Classes that have images."""
        return {name for name, files in self.classes.items() if files}

    @property
    def files(self) -> list[ImageFile]:
        return [file for files in self.classes.values() for file in files]

    def arrays(self, names: list[str], open_files: OpenFiles) -> tuple[ImageFiles, np.ndarray]:
        """Images, and their labels (N,) int64, positions in names."""
        labels = [names.index(name) for name, files in self.classes.items() if files]
        sizes = [len(files) for files in self.classes.values() if files]
        return open_files([file.path for file in self.files]), np.repeat(np.array(labels, dtype=np.int64), sizes)


def load_folder(data_dir: Path | None, img_size: int, in_channels: int) -> DataSet:
    """The images below data_dir. Raises UserError if they are not sorted into two or more classes."""
    if data_dir is None:
        raise UserError("your own images (--dataset folder) are needed: name their folder with --data-dir DIR")
    finder = Finder()
    roots = find_parts(data_dir, finder)
    open_files = image_files(img_size, in_channels)
    return read_folders(f"folder {printable(data_dir.resolve().name)}", data_dir, roots, finder, open_files)


def load_imagenet(data_dir: Path | None, img_size: int, in_channels: int) -> DataSet:
    """ILSVRC2012 (arXiv 1409.0575) in class folders, the official validation part as the test set.

    Its own test part has no public labels. Images of the training part validate, so that no choice is made on what is
    tested. Raises UserError if the folders are missing.
    """
    folder = data_folder("imagenet", data_dir)
    roots = {"train": folder / "train", "test": folder / "val"}
    for root in roots.values():
        if not root.is_dir():
            raise UserError(
                f"{root} is missing: put the images of ILSVRC2012 into {folder}/train/<class>/ and "
                f"{folder}/val/<class>/ (another folder: --data-dir)"
            )
    return read_folders("imagenet", folder, roots, Finder(), image_files(img_size, in_channels))


def image_files(img_size: int, in_channels: int) -> OpenFiles:
    """Opens files as images of that size. Raises UserError for a number of channels that they cannot be read in."""
    check_channels(in_channels)
    return partial(ImageFiles, img_size=img_size, in_channels=in_channels)


def read_folders(
    name: str,
    data_dir: Path,
    roots: dict[str, Path],
    finder: Finder,
    open_files: OpenFiles,
    find: Find = Finder.all_images,
) -> DataSet:
    """The images of the parts "train", and "val" and "test" if they are there. Raises UserError."""
    parts = {part: read_part(root, finder, find) for part, root in roots.items()}
    check_classes(data_dir, parts, finder)
    names = list(parts["train"].classes)
    arrays = {part: files.arrays(names, open_files) for part, files in parts.items()}
    images, labels = arrays["train"]
    return DataSet(
        name,
        images,
        labels,
        *arrays.get("test", (images[[]], labels[:0])),
        tuple(map(printable, names)),
        *arrays.get("val", (None, None)),
        files=fingerprint(_relative(name, part, file) for name, part in parts.items() for file in part.files),
        notes=_notes(parts, finder),
    )


def find_parts(data_dir: Path, finder: Finder) -> dict[str, Path]:
    """Folders of the parts "train", "val" and "test" that are there; data_dir itself is "train" if it has no parts.

    Parts are recognised by their usual names in any case, and are never taken for classes. Raises UserError.
    """
    if not data_dir.is_dir():
        raise UserError(f"{data_dir} {ONE_FOLDER_PER_CLASS}, but there is no such folder: name another with --data-dir")
    folders = [entry.name for entry in finder.list_folder(data_dir) if entry.is_dir()]
    named = {part: [name for name in folders if part_of(name) == part] for part in ("train", "val", "test")}
    for part, names in named.items():
        if len(names) > 1:
            raise UserError(
                f"{data_dir} holds several folders for its {part} part ({', '.join(names)}): keep one, and move the "
                "others elsewhere"
            )
    parts = {part: data_dir / names[0] for part, names in named.items() if names}
    if not parts:
        return {"train": data_dir}
    if "train" not in parts:
        raise UserError(
            f"{next(iter(parts.values()))} exists, but no folder of training images: put them into {data_dir / 'train'}"
        )
    if others := [name for name in folders if part_of(name) is None]:
        finder.remarks.append(f"not used: {', '.join(others)}, beside {parts['train']}")
    return parts


def part_of(name: str) -> str | None:
    """ "train", "val" or "test" if a folder of this name is such a part."""
    match = PART_NAMES.fullmatch(name)
    return match and next(part for part in ("train", "val", "test") if match[part])


def read_part(root: Path, finder: Finder, find: Find = Finder.all_images) -> Part:
    """The images below the class folders of root, at any depth."""
    entries = finder.list_folder(root)
    classes = {entry.name: find(finder, entry.path) for entry in entries if entry.is_dir()}
    return Part(root, classes, finder.list_images(entries))


def check_classes(data_dir: Path, parts: dict[str, Part], finder: Finder) -> None:
    """Raises UserError unless there are two or more classes with images, and the same ones in train and test.

    A validation part may lack some of the classes; that becomes a remark.
    """
    for part in parts.values():
        if not part.classes:
            raise UserError(_no_classes(data_dir, part))
    train = parts["train"]
    if len(train.classes) == 1:
        raise UserError(_one_class(data_dir, train))
    if empty := [name for name, files in train.classes.items() if not files]:
        seen = "".join(f"; {note}" for note in finder.notes())
        raise UserError(
            f"{train.root} {ONE_FOLDER_PER_CLASS}, but {', '.join(empty)} has none{seen}: add images or remove it"
        )
    for name, part in parts.items():
        odd = train.names ^ part.names if name == "test" else part.names - train.names
        if odd:
            raise UserError(
                f"{train.root} and {part.root} hold different classes ({', '.join(sorted(odd))}): make them the same"
            )
        if not part.names:
            raise UserError(f"{part.root} holds no images: add some, or remove the folder")
        if missing := sorted(train.names - part.names):
            finder.remarks.append(f"no images of {', '.join(missing)} in {part.root}")


def _no_classes(data_dir: Path, part: Part) -> str:
    """The message for a part without class folders."""
    if not part.loose:
        return f"{part.root} {ONE_FOLDER_PER_CLASS}, but holds no folders: name another place with --data-dir"
    start = f"{part.root} {ONE_FOLDER_PER_CLASS}, but holds {count(len(part.loose), 'image')} and no folders"
    if part.root == data_dir:
        return f"{start}: sort them into folders, or name the folder above with --data-dir if this is one class"
    return f"{start}: sort them into folders, or, if {part.root.name} is a class, move all classes into a folder train"


def _one_class(data_dir: Path, train: Part) -> str:
    """The message for a single class; it names the folder that was meant, if data lie a folder deeper."""
    (name,) = train.classes
    start = f"{train.root} holds a single folder, {name}, and so a single class"
    right = _data_below(train.root / name)
    if right is None:
        return f"{start}: add the folders of the other classes beside it"
    if train.root == data_dir:
        return f"{start}. The data look to be in {right}: name it with --data-dir {right}"
    return f"{start}. The classes look to be in {right}: move them up into {train.root}"


def _data_below(folder: Path) -> Path | None:
    """The folder, or the first below it, that holds parts or several folders, going down through single folders."""
    finder = Finder()
    while folders := [entry for entry in finder.list_folder(folder) if entry.is_dir()]:
        if len(folders) > 1 or part_of(folders[0].name):
            return folder
        folder = folder / folders[0].name
    return None


def _relative(name: str, part: Part, file: ImageFile) -> tuple[str, int]:
    """The file's name below the data set, whatever its folder and its part are called, and its size."""
    return name + os.sep + file.path.removeprefix(os.fspath(part.root)).lstrip(os.sep), file.size


def _notes(parts: dict[str, Part], finder: Finder) -> tuple[str, ...]:
    """What to say at the start of a run, one line each."""
    notes = []
    if val := parts.get("val"):
        notes.append(f"validation: {count(len(val.files), 'image')} of {val.root}; --val-fraction is not used")
    if loose := [file for part in parts.values() for file in part.loose]:
        notes.append(f"left out: {count(len(loose), 'image')} outside the class folders, such as {loose[0].path}")
    return tuple(map(printable, [*notes, *finder.notes()]))
