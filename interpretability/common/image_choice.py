"""Which image files a command line names, and what the pictures made of them are called."""

from itertools import chain, count
from pathlib import Path
from typing import Annotated

import tyro

from training.config import UserError
from training.data.finding import Finder, cut_name, first_ones

SHOWN_PROBLEMS = 20

_WORDS = tyro.conf.arg(metavar="PATH [PATH ...]", help_behavior_hint="(required)")
ImagePaths = Annotated[tuple[Path, ...], tyro.conf.Positional, _WORDS]  # on a command line


def image_files(paths: tuple[Path, ...]) -> list[Path]:
    """The files, and those in the folders at any depth, each once, without hidden ones.

    Raises UserError if one does not exist or there are none.
    """
    files = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist: name an image or a folder of images")
        files += sorted(Path(found.path) for found in Finder().all_images(path)) if path.is_dir() else [path]
    if not files:
        raise UserError("no images: name image files, or folders that contain some")
    return list({path.resolve(): path for path in files}.values())


def picture_names(files: list[Path]) -> list[str]:
    """FOLDER_NAME.png for each file, numbered where that is not unique."""
    names: dict[str, str] = {}
    for path in files:
        start = cut_name(f"{path.parent.resolve().name}_{path.stem}")
        numbered = chain([start], (f"{start}-{number}" for number in count(2)))
        name = next(name for name in numbered if name.casefold() not in names)
        names[name.casefold()] = name  # some file systems do not tell cases apart
    return [f"{name}.png" for name in names.values()]


def raise_for_bad(bad: list[str], n_good: int, done: str) -> None:
    """Raises UserError if images could not be read. bad: a message for each; done: what was done to the others."""
    if bad:
        others = [f"{done} all the same: {n_good:,}"] if n_good else []
        raise UserError("\n".join([*first_ones(bad, SHOWN_PROBLEMS), *others]))
