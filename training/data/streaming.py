"""Image files that are read again in every epoch, by worker processes that live as long as the run."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from training.config import UserError
from training.data.image_files import ImageFiles, UnreadableImage
from training.device import cpu_count

WORKER_ENDED = (
    "a process that reads images has ended, perhaps for lack of memory (or of /dev/shm in a container): "
    "try fewer --num-workers or a smaller --batch-size"
)
Key = tuple[str, int, int | None]  # part, number of an image in it, seed of its crop or augmentation


class StreamedPart:
    """Image files of one part, read when they are asked for; same interface as MemoryPart."""

    def __init__(self, name: str, reader: "Reader", labels: np.ndarray, device: torch.device):
        self.name, self.reader, self.device = name, reader, device
        self.images = reader.dataset.parts[name]
        self.labels = torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, orders: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, C, H, W) uint8 and labels (B,) of each order, both on the device.

        orders: numbers of images (B,), or (B, 2) with the seed of each image's random crop.
        """
        for images, order in zip(self.reader.read(self.name, orders), orders, strict=True):
            labels = self.labels[order if order.ndim == 1 else order[:, 0]]
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


class Reader:
    """Worker processes that read the images of all parts, started once and fed with the batches to read.

    What a worker makes depends on the image and its seed alone, so their number does not matter. Only one part
    can be read at a time; reading another one drops what was read ahead.
    """

    def __init__(
        self,
        dataset: Dataset,
        device: torch.device,
        num_workers: int,
        prepare_worker: Callable[[int], None] | None = None,
    ):
        """dataset: gives a sample for a `Key`; raises UnreadableImage. prepare_worker: called first in each worker."""
        self.dataset = dataset
        self.batches = _Batches()
        workers = min(num_workers, cpu_count())
        self.loader = DataLoader(
            dataset,
            batch_sampler=self.batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            worker_init_fn=prepare_worker,
            generator=torch.Generator(),  # not PyTorch's default generator, which dropout uses
        )

    def read(self, part: str, orders: Sequence[Tensor]) -> Iterator[Any]:
        """The samples of each order, collated: as tensors with B rows. Raises UserError for a damaged file.

        orders: not empty; numbers of images (B,), or (B, 2) with the seed of each.
        """
        self.batches.part, self.batches.orders = part, orders
        try:
            yield from self.loader
        except UnreadableImage as error:
            self.stop()
            message = str(error).rpartition(f"{UnreadableImage.__name__}: ")[2]  # without the worker's traceback
            raise UserError(message.strip()) from None
        except GeneratorExit:  # the rest is not wanted
            raise
        except (RuntimeError, OSError, EOFError) as error:
            self.stop()
            if isinstance(error, RuntimeError) and not is_ended_worker(error):
                raise
            raise UserError(WORKER_ENDED) from None
        except BaseException:  # Ctrl-C
            self.stop()
            raise

    def stop(self) -> None:
        """Ends the workers, which DataLoader itself would only do when it is collected."""
        with contextlib.suppress(Exception):  # of a worker or queue that has ended; the others are ended all the same
            iterator, self.loader._iterator = self.loader._iterator, None
            if iterator:
                iterator._shutdown_workers()


def is_ended_worker(error: RuntimeError) -> bool:
    """Whether a worker process was killed: PyTorch raises this wherever the main process then is."""
    return "DataLoader worker" in str(error)


class _Batches:
    """Batch sampler: the keys of each of the orders that are to be read next."""

    part: str = ""
    orders: Sequence[Tensor] = ()

    def __iter__(self) -> Iterator[list[Key]]:
        for order in self.orders:
            numbers, seeds = (order, None) if order.ndim == 1 else order.unbind(1)
            drawn = [None] * len(order) if seeds is None else seeds.tolist()
            yield [(self.part, *each) for each in zip(numbers.tolist(), drawn, strict=True)]

    def __len__(self) -> int:
        return len(self.orders)


class Images(Dataset):
    """What the workers read: images (C, H, W) uint8."""

    def __init__(self, parts: dict[str, ImageFiles], crop_scale_min: float):
        """crop_scale_min: smallest area of a random crop, as a share of the image."""
        self.parts, self.crop_scale_min = parts, crop_scale_min

    def __getitem__(self, key: Key) -> np.ndarray:
        part, number, seed = key
        if seed is None:
            return self.parts[part][number]
        return self.parts[part].random_crop(number, self.crop_scale_min, seed)
