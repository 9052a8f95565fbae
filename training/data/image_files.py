"""Image files read as arrays of one size."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from training.config import UserError

MODES = {1: "L", 3: "RGB"}  # Pillow's names, by channels
DAMAGED = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises for bad files


class UnreadableImage(Exception):
    """Not a readable image. One text argument, so that it can be pickled between processes."""


class ImageFiles:
    """Indexes like an array (N, C, S, S) uint8, but reads images from their files when asked.

    Each image is scaled until its shorter side is S, then center-cropped.
    """

    def __init__(self, paths: Sequence[str], img_size: int, in_channels: int):
        self.paths = np.array(paths, dtype=object)
        self.shape = (len(paths), in_channels, img_size, img_size)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int | Sequence[int]) -> "np.ndarray | ImageFiles":
        """One image (C, S, S) uint8, or the ImageFiles of several. Raises UnreadableImage, also for 16-bit images."""
        _, channels, size, _ = self.shape
        if not isinstance(index, int | np.integer):
            return ImageFiles(self.paths[index], size, channels)
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                if image.mode[0] in "IF":  # Pillow would clip to 255: an almost white image
                    raise ValueError("more than 8 bits a channel")
                fitted = ImageOps.fit(image.convert(MODES[channels]), (size, size), Image.Resampling.BICUBIC)
        except DAMAGED as error:
            raise UnreadableImage(f"{path} cannot be read as an image ({error}): replace or remove it") from None
        pixels = np.array(fitted).reshape(size, size, channels)  # a copy: PyTorch warns about Pillow's read-only memory
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def read_images(images: np.ndarray | ImageFiles) -> np.ndarray:
    """All images as one array (N, C, S, S) uint8; files are read by threads. Raises UserError for a damaged file."""
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
