"""Image files read as arrays of one size."""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from training.augment import draw_crop
from training.config import UserError

MODES = {1: "L", 3: "RGB"}  # Pillow's names, by channels
BACKGROUND = (255, 255, 255)  # what transparent pixels show
TURNS = {  # by EXIF orientation: what makes the stored picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(Exception):
    """Not a readable image. One text argument, so that it can be pickled between processes."""


def check_channels(in_channels: int) -> None:
    """Raises UserError for a number of channels that images cannot be read in."""
    if in_channels not in MODES:
        raise UserError(
            f"in_channels = {in_channels}, but images are read as grey (1) or colour (3): set --in-channels 1 or 3"
        )


def open_upright(path: str | Path | BinaryIO) -> Image.Image:
    """The first picture in the file, in its own mode, turned as its EXIF orientation says.

    Raises errors of many kinds for a damaged file, as Pillow does. ImageOps.exif_transpose would do the same, but fails
    at damaged metadata of intact pictures.
    """
    with Image.open(path) as image:
        return upright(image)


def upright(image: Image.Image) -> Image.Image:
    """An opened image, read and turned as its EXIF orientation says; `open_upright` says what is raised."""
    if is_turned_tiff(image):
        image.filename = ""  # else Pillow maps uncompressed pixels into memory as if stored upright
    image.load()  # turns a TIFF
    turn = TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def is_turned_tiff(image: Image.Image) -> bool:
    """Whether an opened, unread image is a TIFF stored on its side: Pillow gives its size as it is upright."""
    return image.format == "TIFF" and orientation(image) >= 5


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened image, 1 to 8; 1, upright, if it has none."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata, for which Pillow raises errors of many kinds
        return 1


def open_image(path: str | Path | BinaryIO, mode: str, deep: bool = False) -> Image.Image:
    """The picture as a viewer shows it, in mode L or RGB: upright, transparent pixels on white.

    Colours hidden under full transparency are not read. deep: scale 16 bits a channel to 8. Raises errors of many kinds
    for a damaged file, ValueError for more bits a channel.
    """
    image = open_upright(path)
    if deep:
        image = scale_16_bits(image)
    require_8_bits(image)
    return as_seen(image, mode)


def as_seen(image: Image.Image, mode: str) -> Image.Image:
    """The image in mode L or RGB, transparent pixels on white."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
    return image.convert(mode)


def scale_16_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits as one of 8; others unchanged."""
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray(np.round(np.asarray(image).astype(np.float32) / 257).astype(np.uint8))


def require_8_bits(image: Image.Image) -> None:
    """Raises ValueError for grey values of more than 8 bits, which Pillow would clip to 255; it scales colours."""
    if image.mode[0] in "IF":
        raise ValueError("it has more than 8 bits a channel")


def why_unreadable(error: Exception) -> str:
    """The reason on one line, without errno."""
    if isinstance(error, UnidentifiedImageError):  # its message only repeats the path
        return "not an image format"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def unreadable(path: str | Path, kind: str, error: Exception, remedy: str) -> str:
    """The message for a file at which Pillow raised the error. kind: what it should be, such as "an image"."""
    if isinstance(error, FileNotFoundError):
        return f"{path} is missing: restore it"
    if isinstance(error, PermissionError):
        return f"{path} cannot be read ({error.strerror}): make it readable"
    return f"{path} cannot be read as {kind} ({why_unreadable(error)}): {remedy}"


class ImageFiles:
    """Indexes like an array (N, C, S, S) uint8, but reads images from their files when asked.

    Each image is scaled until its shorter side is S / share, then center-cropped. deep: read images of 16
    bits a channel, too.
    """

    def __init__(self, paths: Sequence[str], img_size: int, in_channels: int, share: float = 1.0, deep: bool = False):
        """share: of the shorter side that is kept."""
        # an array of bytes, not of strings, whose reference counts would copy memory into each worker process
        self._paths = np.array([path.encode("utf-8", "surrogateescape") for path in paths], dtype=np.bytes_)
        self.deep = deep
        self.shape = (len(paths), in_channels, img_size, img_size)
        self.share = share

    @property
    def paths(self) -> np.ndarray:
        """(N,) strings."""
        return np.array([self._path(index) for index in range(len(self))], dtype=object)

    def _path(self, index: int) -> str:
        return self._paths[index].decode("utf-8", "surrogateescape")

    def _open(self, index: int, mode: str) -> Image.Image:
        return open_image(self._path(index), mode, self.deep)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int | Sequence[int]) -> "np.ndarray | ImageFiles":
        """One image (C, S, S) uint8, or the ImageFiles of several. Raises UnreadableImage, also for 16-bit images."""
        if not isinstance(index, int | np.integer):
            return self._changed(self._paths[index], self.share)
        border = (1 - self.share) / 2  # 0 for all of the shorter side
        return self._read(index, lambda image, size: ImageOps.fit(image, size, Image.Resampling.BICUBIC, bleed=border))

    def random_crop(self, index: int, scale_min: float, seed: int) -> np.ndarray:
        """A random crop (`draw_crop`) of the original image, scaled to (C, S, S) uint8. Raises UnreadableImage."""

        def crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
            draws = torch.Generator().manual_seed(seed)
            top, left, h, w = draw_crop(image.height, image.width, scale_min, draws)
            return image.crop((left, top, left + w, top + h)).resize(size, Image.Resampling.BICUBIC)

        return self._read(index, crop)

    def centred(self, share: float) -> "ImageFiles":
        """The same files, center-cropped to that share of the shorter side."""
        return self._changed(self._paths, share)

    def _changed(self, paths: np.ndarray, share: float) -> "ImageFiles":
        changed = copy.copy(self)
        changed._paths, changed.share, changed.shape = paths, share, (len(paths), *self.shape[1:])
        return changed

    def _read(self, index: int, fit: Callable[[Image.Image, tuple[int, int]], Image.Image]) -> np.ndarray:
        _, channels, size, _ = self.shape
        try:
            fitted = fit(self._open(index, MODES[channels]), (size, size))
        except Exception as error:  # Pillow raises errors of many kinds for damaged files
            message = unreadable(self._path(index), "an image", error, "replace or remove it")
            raise UnreadableImage(message) from None
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
