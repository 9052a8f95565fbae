"""Batches of images with masks; `masks` says where the files lie."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from training import processes, seeds
from models.vision_bdh import ImageSize, height_and_width
from training.augment import JointTransform, normalise
from training.config import SegmentationConfig, UserError
from training.data.classes import CLASSES
from training.data.finding import first_ones
from training.data.image_files import UnreadableImage
from training.data.mask_files import BadFile, MaskFiles, Pair, mask_shape, read_image
from training.data.streaming import Key, Reader
from training.device import cpu_count, fits_in_memory

READ_AHEAD = 256  # masks read together where a pass over all masks is needed
SHOWN_PROBLEMS = 5


class MaskPart:
    """Decoded images and masks of a part at the model's size, and optionally masks at their original size."""

    def __init__(self, files: MaskFiles, pairs: list[Pair], img_size: ImageSize, full_masks: bool):
        """Afterwards `problems` has a message for each unusable file."""
        height, width = height_and_width(img_size)
        self.images = np.empty((len(pairs), height, width, 3), dtype=np.uint8)
        self.masks = np.empty((len(pairs), height, width), dtype=np.uint8)
        self.full_masks: list[np.ndarray | None] = [None] * len(pairs)

        def read(index: int) -> None:
            image, mask = read_pair(pairs[index], files)
            self.images[index] = scale_image(image, img_size)
            self.masks[index] = scale_mask(mask, img_size)
            if full_masks:
                self.full_masks[index] = mask

        _, self.problems = _each(read, range(len(pairs)), "reading")

    def __len__(self) -> int:
        return len(self.images)

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (h, w, 3) and mask (h, w), uint8, at the model's size."""
        return self.images[index], self.masks[index]

    def eval_pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The same, but the mask at the size that is evaluated."""
        full = self.full_masks[index]
        return self.images[index], self.masks[index] if full is None else full

    @property
    def mask_shapes(self) -> list[tuple[int, int]]:
        """Height and width of each mask of `eval_pair`."""
        pairs = zip(self.masks, self.full_masks, strict=True)
        return [mask.shape if full is None else full.shape for mask, full in pairs]

    def each_mask(self) -> Iterable[np.ndarray]:
        return self.masks


class FilesPart:
    """Images and masks of a part that are read when they are asked for; same interface as MaskPart."""

    def __init__(self, files: MaskFiles, pairs: list[Pair], img_size: ImageSize, full_masks: bool):
        """Afterwards `problems` has a message for each mask whose size cannot be read."""
        self.files, self.pairs, self.img_size, self.full_masks = files, pairs, img_size, full_masks
        self.mask_shapes, self.problems = [height_and_width(img_size)] * len(pairs), []
        if full_masks:
            self.mask_shapes, self.problems = _each(lambda pair: mask_shape(pair.mask), pairs, "sizes of masks")

    def __len__(self) -> int:
        return len(self.pairs)

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, mask = read_pair(self.pairs[index], self.files)
        return scale_image(image, self.img_size), scale_mask(mask, self.img_size)

    def eval_pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, mask = read_pair(self.pairs[index], self.files)
        return scale_image(image, self.img_size), mask if self.full_masks else scale_mask(mask, self.img_size)

    def each_mask(self) -> Iterable[np.ndarray]:
        """Raises UserError for unusable files."""
        for first in range(0, len(self.pairs), READ_AHEAD):  # not all at once
            read, problems = _each(self._mask, self.pairs[first : first + READ_AHEAD], "masks")
            refuse(problems, self.files.name)
            yield from read

    def _mask(self, pair: Pair) -> np.ndarray:
        return scale_mask(self.files.read_mask(pair.mask), self.img_size)


def _each(read: Callable[[Any], Any], items: Sequence[Any], text: str) -> tuple[list[Any], list[str]]:
    """What read gives for each item, in threads, None at a BadFile, and the messages of those."""

    def attempt(item: Any) -> tuple[Any, str | None]:
        try:
            return read(item), None
        except BadFile as error:
            return None, str(error)

    with ThreadPoolExecutor(cpu_count()) as pool:
        work = pool.map(attempt, items)
        bar = tqdm(work, total=len(items), unit="img", desc=text, leave=False, disable=processes.no_bar())
        results = list(bar)
    return [result for result, _ in results], [problem for _, problem in results if problem]


def scale_image(image: np.ndarray, img_size: ImageSize) -> np.ndarray:
    """(h, w, 3) uint8 resized to the model's size (bilinear, aspect ratio not kept)."""
    height, width = height_and_width(img_size)
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def scale_mask(mask: np.ndarray, img_size: ImageSize) -> np.ndarray:
    """(h, w) uint8 labels resized to the model's size (nearest)."""
    height, width = height_and_width(img_size)
    return np.array(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))


def read_pair(pair: Pair, files: MaskFiles) -> tuple[np.ndarray, np.ndarray]:
    """Image (h, w, 3) and mask (h, w), uint8. Raises BadFile, also if their sizes differ."""
    image, mask = read_image(pair.image), files.read_mask(pair.mask)
    if image.shape[:2] != mask.shape:
        sizes = [" x ".join(map(str, each.shape[1::-1])) for each in (image, mask)]
        turned = image.shape[1::-1] == mask.shape
        remedy = "turn one of them (an image is read upright, as its EXIF says)" if turned else "resize one of them"
        raise BadFile(f"{pair.image} is {sizes[0]} pixels, but its mask {pair.mask} is {sizes[1]}: {remedy}")
    return image, mask


def refuse(problems: list[str], name: str) -> None:
    """Raises UserError with the first problems, if there are any."""
    if problems:
        check = f"; python tools/verify_camvid.py{f' --dataset {name}' if name != 'camvid' else ''} lists all"
        check = check if name in CLASSES else ""
        title = f"{len(problems)} of the files of {name} cannot be used{check}"
        raise UserError("\n".join([title, *first_ones(problems, SHOWN_PROBLEMS)]))


class _Samples(Dataset):
    """What the workers make: images with masks, augmented for training."""

    def __init__(self, parts: dict[str, MaskPart | FilesPart], transform: JointTransform):
        self.parts, self.transform = parts, transform

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor]:
        """(3, h, w) and (h, w), uint8. Raises UnreadableImage."""
        part, number, seed = key
        try:
            if seed is None:
                image, mask = self.parts[part].eval_pair(number)
            else:
                image, mask = self.transform(*self.parts[part].pair(number), seed)
        except BadFile as error:
            raise UnreadableImage(str(error)) from None
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(mask)


class MaskBatches:
    """Batches of a segmentation data set, ready for the model: `tasks.Batches`.

    Images are resized to the model's size; if they fit in memory, all are decoded once and kept there. Order and
    augmentation depend on seed and epoch alone, not on the number of workers; validation and test images are only
    normalised.
    """

    split = None  # the data sets have official validation sets

    def __init__(
        self,
        files: MaskFiles,
        config: SegmentationConfig,
        img_size: ImageSize,
        device: torch.device,
        num_workers: int = 0,
    ):
        """Raises UserError for unusable files; those that are not kept in memory are looked at when they are read."""
        refuse(files.problems, files.name)
        for note in files.notes:
            print(note)
        self.config, self.device = config, device
        self.img_size = height_and_width(img_size)
        pairs = files.pairs | {"train": training_pairs(files, config.train_val, config.train_limit, config.seed)}
        kind = MaskPart if _fits(sum(map(len, pairs.values())), self.img_size) else FilesPart
        self.parts = {
            part: kind(files, of, img_size, config.eval_full_size and part != "train") for part, of in pairs.items()
        }
        refuse([problem for part in self.parts.values() for problem in part.problems], files.name)
        samples = _Samples(self.parts, JointTransform(config, files.classes.void, self.img_size))
        self.reader = Reader(samples, device, num_workers, _one_thread)

    def size(self, part: str) -> int:
        """Number of images in "train", "val" or "test"."""
        return len(self.parts[part])

    def train_batches(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Every training image once: images (B, 3, h, w) float32 in [-1, 1], masks (B, h, w) int64.

        first: number of the batch to begin with.
        """
        seed, n = self.config.seed, self.size("train")
        order = torch.randperm(n, generator=seeds.generator("order", seed, epoch))
        drawn = torch.randint(2**63 - 1, (n,), generator=seeds.generator("augmentation", seed, epoch))
        batches = torch.stack((order, drawn), dim=1).split(self.config.batch_size)[first:]
        yield from self._read("train", batches, [self.img_size] * len(batches))

    def eval_batches(self, part: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image of a part once, in order; with masks at original size, a batch holds masks of one size."""
        shapes = self.parts[part].mask_shapes
        of_one_shape = [torch.tensor(list(group)) for _, group in groupby(range(len(shapes)), shapes.__getitem__)]
        batches = [batch for numbers in of_one_shape for batch in numbers.split(self.config.batch_size)]
        yield from self._read(part, batches, [shapes[batch[0]] for batch in batches])

    def _read(
        self, part: str, batches: Sequence[Tensor], shapes: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of each batch, empty where the batch has too few. shapes: of the batches' masks."""
        shares = [batch[processes.share(len(batch))] for batch in batches]
        filled = [share for share in shares if len(share)]
        read = self.reader.read(part, filled) if filled else iter(())
        for share, shape in zip(shares, shapes, strict=True):
            nothing = (torch.empty(0, *size, dtype=torch.uint8) for size in ((3, *self.img_size), shape))
            images, masks = next(read) if len(share) else nothing
            yield self._on_device(images, masks)

    def _on_device(self, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        images, masks = (each.to(self.device, non_blocking=True) for each in (images, masks))
        return normalise(images), masks.long()


def _fits(n_images: int, img_size: tuple[int, int]) -> bool:
    """Whether so many images and masks are kept in memory; if not, says so.

    Leaves out masks kept at their original size, which is not known before reading.
    """
    n_bytes = n_images * math.prod(img_size) * 4
    fits = fits_in_memory(n_bytes, torch.device("cpu"))
    if not fits:
        print(f"{n_bytes / 1e9:.1f} GB of images and masks do not fit in memory: they are read again in every epoch")
    return fits


def training_pairs(files: MaskFiles, train_val: bool, limit: int | None, seed: int) -> list[Pair]:
    """Pairs that a run trains on: of both parts with train_val; at most limit, drawn by the seed, in original order."""
    pairs = files.pairs["train"] + files.pairs["val"] * train_val
    return [pairs[index] for index in limited(len(pairs), limit, seed)]


def limited(n: int, limit: int | None, seed: int) -> list[int]:
    """Numbers of n samples, or of at most limit of them, drawn by the seed, in their original order."""
    if limit is None or limit >= n:
        return list(range(n))
    generator = np.random.default_rng(seeds.derive("split", seed))
    return np.sort(generator.permutation(n)[:limit]).tolist()


def _one_thread(worker: int) -> None:
    """Keeps OpenCV from starting one thread per core in every worker."""
    import cv2

    cv2.setNumThreads(0)
