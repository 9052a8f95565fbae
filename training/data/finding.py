"""Finding image files: which endings are images, what is hidden, and a fingerprint of what was found."""

import hashlib
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from training.config import UserError

SYSTEM_FOLDERS = {"__MACOSX", "@eaDir"}  # made by macOS archives and by Synology disks, not by the user
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow knows these but needs other programs to read them
SHOWN_ENDINGS = 8


class ImageFile(NamedTuple):
    path: str
    size: int
    """bytes; -1 if the file cannot be looked at, for example a broken link"""


class Place(NamedTuple):
    """A folder on a walk through folders and links to folders."""

    path: str
    way: frozenset[str]
    """real paths of the folders that led here, and its own"""

    @classmethod
    def of(cls, root: str | Path) -> "Place":
        return cls(os.fspath(root), frozenset([os.path.realpath(root)]))

    def below(self, entries: Iterable[os.DirEntry]) -> list["Place"]:
        """The folders among its entries, without links that lead back to where the walk came from or above it."""
        found = []
        for entry in entries:
            if entry.is_dir():
                real = os.path.realpath(entry.path)
                if not any(Path(each).is_relative_to(real) for each in self.way):
                    found.append(Place(entry.path, self.way | {real}))
        return found


class Finder:
    """Lists folders, and counts what it does not return: hidden files and folders, files that are no images."""

    def __init__(self):
        self.remarks: list[str] = []
        self.hidden: set[str] = set()
        self.endings: Counter[str] = Counter()  # of the files left out

    def list_folder(self, folder: str | Path) -> list[os.DirEntry]:
        """What the folder holds, without hidden files and folders, sorted by name. Raises UserError."""
        try:
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            remedy = "make it readable" if isinstance(error, PermissionError) else "name a folder that exists"
            raise UserError(f"{folder} cannot be read ({error.strerror or error}): {remedy}") from None
        self.hidden |= {entry.path for entry in found if is_hidden(entry.name)}
        return [entry for entry in found if not is_hidden(entry.name)]

    def list_images(self, entries: Iterable[os.DirEntry]) -> list[ImageFile]:
        """The image files among the entries; other files are counted, folders are not."""
        found = []
        for entry in entries:
            if entry.is_dir():
                continue
            _, dot, ending = entry.name.lower().rpartition(".")
            ending = dot + ending if dot else ""
            if ending in image_endings():
                found.append(ImageFile(entry.path, size_of(entry)))
            else:
                self.endings[ending] += 1
        return found

    def all_images(self, root: str | Path) -> list[ImageFile]:
        """The image files below root at any depth, sorted by folder, then by name: torchvision's ImageFolder order."""
        by_folder, waiting = {}, [Place.of(root)]
        while waiting:
            place = waiting.pop()
            entries = self.list_folder(place.path)
            by_folder[place.path] = self.list_images(entries)
            waiting += place.below(entries)
        return [file for folder in sorted(by_folder) for file in by_folder[folder]]

    def notes(self) -> list[str]:
        """The remarks, one line about what is hidden and one about files left out, if there are any."""
        notes = [*self.remarks]
        if n := len(self.hidden):
            what = "file or folder" if n == 1 else "files or folders"
            notes.append(f"passed over: {n:,} hidden {what}, such as {min(self.hidden)}")
        if n := self.endings.total():
            endings = [ending or "no ending" for ending, _ in self.endings.most_common()]
            shown = ", ".join(endings[:SHOWN_ENDINGS] + ["..."] * (len(endings) > SHOWN_ENDINGS))
            notes.append(f"left out: {count(n, 'file')} ({shown}): not images")
        return notes


@cache
def image_endings() -> frozenset[str]:
    """Lower-case endings of the image formats that the installed Pillow can read."""
    known = Image.registered_extensions()  # before Image.OPEN, which it fills
    readable = (Image.OPEN.keys() | {"MPO"}) - NOT_DECODED  # MPO: several JPEGs in one file, read by the JPEG plugin
    return frozenset(ending for ending, kind in known.items() if kind in readable)


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM_FOLDERS


def is_image(path: Path) -> bool:
    """Whether the name is that of an image file; hidden files, such as macOS leaves behind (._a.png), are not."""
    return path.suffix.lower() in image_endings() and not is_hidden(path.name)


def fingerprint(files: Iterable[tuple[str, int]]) -> str:
    """SHA-256 of names and sizes. files: names relative to the data set, sizes in bytes; their order does not count."""
    lines = sorted(b"%s %d\n" % (_bytes(name.replace(os.sep, "/")), size) for name, size in files)
    return hashlib.sha256(b"".join(lines)).hexdigest()


def printable(name: str | Path) -> str:
    """A file name as text that can be printed and stored whatever its bytes are: \\xe9 for those that are not UTF-8."""
    return _bytes(str(name)).decode("utf-8", errors="backslashreplace")


def cut_name(name: str, longest: int = 240) -> str:
    """A file name of at most `longest` bytes; in one that is cut, a checksum keeps it apart from others.

    longest: default, what leaves room for a suffix in the 255 bytes of common file systems.
    """
    encoded = _bytes(name)
    if len(encoded) <= longest:
        return name
    return f"{encoded[: longest - 9].decode(errors='ignore')}-{zlib.crc32(encoded):08x}"


def count(n: int, what: str, several: str | None = None) -> str:
    """As "1 file" or "3 files"; several: a plural other than with s."""
    return f"{n:,} {what if n == 1 else several or what + 's'}"


def first_ones(messages: list[str], n: int) -> list[str]:
    """The first n messages, and a last one that says how many more there are."""
    more = len(messages) - n
    return [*messages[:n], f"and {more:,} more"] if more > 0 else messages


def _bytes(name: str) -> bytes:
    """The bytes of a file name, UTF-8 where they are; os.fsencode depends on the locale."""
    return name.encode("utf-8", errors=sys.getfilesystemencodeerrors())


def size_of(file: os.DirEntry | Path) -> int:
    """In bytes; -1 for a file that cannot be looked at, which is reported when it is read."""
    try:
        return file.stat().st_size
    except OSError:
        return -1
