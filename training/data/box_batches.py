"""Batches of images with boxes."""

from collections.abc import Iterator

import torch
from torch import Tensor

from training import processes, seeds
from models.vision_bdh import ImageSize
from training.augment import draw_flips, normalise
from training.config import DetectionConfig
from training.data.batches import ImageBatches, MemoryPart, fit_in_memory
from training.data.boxes import SceneFiles, SceneImages, Scenes
from training.data.image_files import read_images
from training.data.segmentation import limited, refuse
from training.data.streaming import Images, Reader, StreamedPart


class FlipWithBoxes:
    """Mirrors half of the images, and their boxes: an `Augmentation`."""

    stream = "augmentation"

    def draw(self, n: int, height: int, width: int, generator: torch.Generator) -> list[Tensor]:
        """(n,) booleans."""
        return [draw_flips(n, generator)]

    def apply(self, images: Tensor, targets: Tensor, flipped: Tensor) -> tuple[Tensor, Tensor]:
        """images: (B, C, h, w), targets: (B, M, 6), flipped: (B,)."""
        images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        centres = torch.where(flipped[:, None], 1 - targets[..., 1], targets[..., 1])
        return images, torch.cat((targets[..., :1], centres[..., None], targets[..., 2:]), dim=-1)


class BoxBatches(ImageBatches):
    """Batches of a detection data set, ready for the model: `tasks.Batches`.

    Images are kept in memory at the model's size, or read by worker processes in every epoch if they do not fit. Order
    and flips depend on seed and epoch alone.
    """

    split = None  # the data have a validation set of their own

    def __init__(
        self,
        files: SceneFiles,
        config: DetectionConfig,
        img_size: ImageSize,
        eval_batch_size: int,
        device: torch.device,
        num_workers: int = 0,
    ):
        """Raises UserError for unusable files."""
        refuse(files.problems, "the data")
        for note in files.notes:
            print(note)
        self.config, self.eval_batch_size, self.device = config, eval_batch_size, device
        self.flip = FlipWithBoxes() if config.horizontal_flip else None
        train = files.parts["train"]
        chosen = limited(len(train), config.train_limit, config.seed)
        parts = {"test": Scenes([], [], [])} | files.parts | {"train": train.chosen(chosen)}
        images = {name: SceneImages(of.paths, of.sizes, img_size) for name, of in parts.items()}
        targets = {name: of.targets(files.n_boxes) for name, of in parts.items()}
        if fit_in_memory(images.values(), device):
            self.parts = {name: MemoryPart(read_images(of), targets[name], device) for name, of in images.items()}
        else:
            reader = Reader(Images(images, 1.0), device, num_workers)
            self.parts = {name: StreamedPart(name, reader, targets[name], device) for name in images}

    def train_batches(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Every training image once: images (B, 3, h, w) float32 in [-1, 1], boxes (B, M, 6).

        first: number of the batch to begin with.
        """
        config, part = self.config, self.parts["train"]
        n, (height, width) = len(part), part.images.shape[-2:]
        order = torch.randperm(n, generator=seeds.generator("order", config.seed, epoch))
        draws = self._draws(self.flip, n, height, width, epoch) if self.flip else []
        places = [batch[processes.share(len(batch))] for batch in torch.arange(n).split(config.batch_size)[first:]]
        for (images, targets), here in zip(self._read(part, [order[each] for each in places]), places, strict=True):
            images = normalise(images)
            if self.flip:
                here = here.to(self.device)
                images, targets = self.flip.apply(images, targets, *(draw[here] for draw in draws))
            yield images, targets
