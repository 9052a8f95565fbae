"""Images of one's own: files in one folder a class, brought to one size as they are read."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from training.config import UserError

MODES = {1: "L", 3: "RGB"}  # Pillow's names, by channels
DAMAGED = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises at files that are


class UnreadableImage(Exception):
    """A file that is no image; with one text argument, so that it passes from one process to another."""


class ImageFiles:
    """Stands in for an array (N, C, S, S) uint8 of images that are read from their files when asked for.

    Each image is scaled until its shorter side is S, and its middle is cut out.
    """

    def __init__(self, paths: Sequence[str], img_size: int, in_channels: int):
        self.paths = np.array(paths, dtype=object)
        self.shape = (len(paths), in_channels, img_size, img_size)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int | Sequence[int]) -> "np.ndarray | ImageFiles":
        """One image, (C, S, S) uint8, or the files of several. Raises UnreadableImage, also at 16 bits a channel."""
        _, channels, size, _ = self.shape
        if not isinstance(index, int | np.integer):
            return ImageFiles(self.paths[index], size, channels)
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                if image.mode[0] in "IF":  # Pillow would cut off what is above 255, and most of the image be white
                    raise ValueError("more than 8 bits a channel")
                fitted = ImageOps.fit(image.convert(MODES[channels]), (size, size), Image.Resampling.BICUBIC)
        except DAMAGED as error:
            raise UnreadableImage(f"{path} cannot be read as an image ({error}): mend or remove it") from None
        pixels = np.array(fitted).reshape(size, size, channels)  # a copy: PyTorch warns of memory that is Pillow's own
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def find_images(root: Path, img_size: int, in_channels: int) -> tuple[ImageFiles, np.ndarray, tuple[str, ...]]:
    """The images of root/CLASS/, at any depth: files, labels (N,) int64, names of the classes in alphabetical order.

    Raises UserError where there are none, or the model reads neither grey nor colour images.
    """
    if in_channels not in MODES:
        raise UserError(
            f"in_channels = {in_channels}, but images are read as grey (1) or colour (3): set --in-channels"
        )
    try:
        found = ImageFolder(str(root))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{root} must hold a folder of images for each class ({' '.join(str(error).split())})"
        ) from None
    paths, labels = zip(*found.samples, strict=True)
    return ImageFiles(paths, img_size, in_channels), np.array(labels, dtype=np.int64), tuple(found.classes)


def read_images(images: np.ndarray | ImageFiles) -> np.ndarray:
    """All images as one array (N, C, S, S) uint8, files read by several threads. Raises UserError at a damaged file."""
    if isinstance(images, np.ndarray):
        return images
    result = np.empty(images.shape, dtype=np.uint8)

    def read(index: int) -> None:
        result[index] = images[index]

    try:
        with ThreadPoolExecutor() as pool:
            indices = range(len(images))
            list(
                tqdm(pool.map(read, indices), total=len(images), unit="img", desc="reading", leave=False, disable=None)
            )
    except UnreadableImage as error:
        raise UserError(str(error)) from None
    return result
