"""Batches of images with masks; `masks` says where the files lie."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from training import processes, seeds
from models.vision_bdh import ImageSize, height_and_width
from training.augment import JointTransform, normalise
from training.config import SegmentationConfig, UserError
from training.data.masks import BadFile, MaskFiles, Pair, read_image
from training.device import cpu_count, fits_in_memory

SHOWN_PROBLEMS = 5


class MaskPart:
    """Decoded images and masks of a part at the model's size, and optionally masks at their original size."""

    def __init__(self, files: MaskFiles, pairs: list[Pair], img_size: ImageSize, full_masks: bool):
        """Afterwards `problems` has a message for each unusable file."""
        height, width = height_and_width(img_size)
        self.images = np.empty((len(pairs), height, width, 3), dtype=np.uint8)
        self.masks = np.empty((len(pairs), height, width), dtype=np.uint8)
        self.full_masks: list[np.ndarray | None] = [None] * len(pairs)

        def read(index: int) -> str | None:
            try:
                image, mask = read_pair(pairs[index], files)
            except BadFile as error:
                return str(error)
            self.images[index] = scale_image(image, img_size)
            self.masks[index] = scale_mask(mask, img_size)
            if full_masks:
                self.full_masks[index] = mask
            return None

        with ThreadPoolExecutor(cpu_count()) as pool:
            work = pool.map(read, range(len(pairs)))
            read_all = list(
                tqdm(work, total=len(pairs), unit="img", desc="reading", leave=False, disable=processes.no_bar())
            )
        self.problems = [problem for problem in read_all if problem]

    def __len__(self) -> int:
        return len(self.images)


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
        more = len(problems) - SHOWN_PROBLEMS
        shown = problems[:SHOWN_PROBLEMS] + [f"and {more} more"] * (more > 0)
        check = "; python tools/verify_camvid.py lists all" if name == "camvid" else ""
        raise UserError(f"{len(problems)} of the files of {name} cannot be used{check}\n" + "\n".join(shown))


class _Augmented(Dataset):
    """Augmented images and masks, made in the loader's workers."""

    def __init__(self, part: MaskPart, transform: JointTransform):
        self.part, self.transform = part, transform

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """item: index and seed -> (3, h, w) and (h, w), uint8."""
        index, seed = item
        image, mask = self.transform(self.part.images[index], self.part.masks[index], seed)
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(mask)


class _EpochOrder:
    """Batch sampler: sample indices in the order of the current epoch, each with its own augmentation seed.

    Of several processes, those of this one's share, which is left out if it is empty. first: batch to begin with.
    """

    def __init__(self, n: int, config: SegmentationConfig):
        self.n, self.config, self.epoch, self.first = n, config, 0, 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        seed, epoch, size = self.config.seed, self.epoch, self.config.batch_size
        order = torch.randperm(self.n, generator=seeds.generator("order", seed, epoch)).tolist()
        draws = seeds.generator("augmentation", seed, epoch)
        items = list(zip(order, torch.randint(2**63 - 1, (self.n,), generator=draws).tolist(), strict=True))
        batches = [items[start : start + size] for start in range(self.first * size, self.n, size)]
        yield from filter(None, (batch[processes.share(len(batch))] for batch in batches))

    def __len__(self) -> int:
        return -(-self.n // self.config.batch_size) - self.first


class MaskBatches:
    """Batches of a segmentation data set, ready for the model: `tasks.Batches`.

    All images are decoded once, resized to the model's size and kept in memory. Order and augmentation depend on seed
    and epoch alone, not on the number of workers; validation and test images are only normalised.
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
        """Raises UserError for unusable files and for data larger than half of the memory.

        That estimate leaves out masks kept at their original size, which is not known before reading.
        """
        refuse(files.problems, files.name)
        for note in files.notes:
            print(note)
        transform = JointTransform(config, files.classes.void, height_and_width(img_size))
        self.batch_size = config.batch_size
        self.device = device
        pairs = files.pairs | {"train": training_pairs(files, config.train_val, config.train_limit, config.seed)}
        height, width = height_and_width(img_size)
        n_bytes = sum(map(len, pairs.values())) * height * width * 4
        if not fits_in_memory(n_bytes, torch.device("cpu")):
            raise UserError(
                f"the images of {files.name} take {n_bytes / 1e9:.0f} GB at this size, over half of the memory: "
                "choose a smaller --img-size"
            )
        self.parts = {
            part: MaskPart(files, of, img_size, config.eval_full_size and part != "train") for part, of in pairs.items()
        }
        refuse([problem for part in self.parts.values() for problem in part.problems], files.name)
        workers = min(num_workers, cpu_count())
        self.order = _EpochOrder(len(self.parts["train"]), config)
        self.loader = DataLoader(
            _Augmented(self.parts["train"], transform),
            batch_sampler=self.order,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            worker_init_fn=_one_thread,
            generator=torch.Generator(),  # not PyTorch's default generator, which dropout uses
        )

    def size(self, part: str) -> int:
        """Number of images in "train", "val" or "test"."""
        return len(self.parts[part])

    def train_batches(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Every training image once: images (B, 3, h, w) float32 in [-1, 1], masks (B, h, w) int64.

        first: number of the batch to begin with.
        """
        self.order.epoch, self.order.first = epoch, first
        made = 0
        for images, masks in self.loader:
            yield self._on_device(images, masks)
            made += 1
        if made < len(self.order):  # this process's share of the last batch is empty
            part = self.parts["train"]
            images = torch.from_numpy(part.images[:0]).permute(0, 3, 1, 2)
            yield self._on_device(images, torch.from_numpy(part.masks[:0]))

    def eval_batches(self, part: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image of a part once, in order; with masks at original size, a batch holds masks of one size."""
        of = self.parts[part]
        first = 0
        while first < len(of):
            here = slice(first, first + self.batch_size)
            masks = [
                mask if full is None else full for mask, full in zip(of.masks[here], of.full_masks[here], strict=True)
            ]
            masks = list(takewhile(lambda mask, shape=masks[0].shape: mask.shape == shape, masks))
            share = processes.share(len(masks))
            images = torch.from_numpy(of.images[first : first + len(masks)][share]).permute(0, 3, 1, 2)
            yield self._on_device(images.contiguous(), torch.from_numpy(np.stack(masks)[share]))
            first += len(masks)

    def _on_device(self, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        images, masks = (each.to(self.device, non_blocking=True) for each in (images, masks))
        return normalise(images), masks.long()


def training_pairs(files: MaskFiles, train_val: bool, limit: int | None, seed: int) -> list[Pair]:
    """Pairs that a run trains on: of both parts with train_val; at most limit, drawn by the seed, in original order."""
    pairs = files.pairs["train"] + files.pairs["val"] * train_val
    if limit is None or limit >= len(pairs):
        return pairs
    generator = np.random.default_rng(seeds.derive("split", seed))
    return [pairs[index] for index in np.sort(generator.permutation(len(pairs))[:limit])]


def _one_thread(worker: int) -> None:
    """Keeps OpenCV from starting one thread per core in every worker."""
    import cv2

    cv2.setNumThreads(0)
