"""Augmentation of training images.

Classification augments whole batches on the device; each image has its own draw. All draws of an epoch are made at its
start, from a seeded CPU generator, so that nothing waits for the device and a resumed run repeats them. Segmentation
augments each image together with its mask, in the loader's worker processes.
"""

import math
import os
import random
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.config import SegmentationConfig

ASPECT_RATIOS = (3 / 4, 4 / 3)  # as torchvision's RandomResizedCrop
CROP_ATTEMPTS = 10


class Augmentation(Protocol):
    """One step of `ClassificationConfig.make_augmentations`."""

    stream: str
    """name of its random stream, an entry of `seeds.STREAMS`; each augmentation has its own, so that switching one on
    leaves the draws of the others alone"""

    def draw(self, n: int, height: int, width: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Everything random for an epoch of n images: CPU tensors (n, ...)."""

    def apply(self, images: Tensor, labels: Tensor, *draws: Tensor) -> tuple[Tensor, Tensor]:
        """Augments a batch. images: (B, C, H, W) in [-1, 1]; labels: (B,) or (B, classes); draws: the batch's rows.

        Draws are on the device, unless the class has `draws_on_cpu = True`. With several processes, the batch is this
        one's share of it; with `mixes = True` also the mirrored share, so that images.flip(0) holds their partners.
        """


class CropAndFlip:
    """Random crops resized to the image's size (`draw_boxes`), and mirroring of half of the images."""

    stream = "augmentation"

    def __init__(self, crop_scale_min: float, flip: bool):
        self.crop_scale_min, self.flip = crop_scale_min, flip

    def draw(self, n: int, height: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        boxes = draw_boxes(n, height, width, (self.crop_scale_min, 1.0), generator)
        if self.crop_scale_min == 1:
            boxes[:] = boxes.new_tensor((0, 0, height, width))
        return boxes, draw_flips(n, generator) & self.flip

    def apply(self, images: Tensor, labels: Tensor, boxes: Tensor, flips: Tensor) -> tuple[Tensor, Tensor]:
        return crop_and_flip(images, boxes, flips), labels


class PadAndCrop:
    """Shifts each image by up to `padding` pixels both ways; what comes into view is black."""

    stream = "padding"

    def __init__(self, padding: int):
        self.padding = padding

    def draw(self, n: int, height: int, width: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.randint(-self.padding, self.padding + 1, (n, 2), generator=generator),)

    def apply(self, images: Tensor, labels: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor]:
        height, width = images.shape[-2:]
        rows = torch.arange(height, device=images.device) + shifts[:, :1]  # (B, H)
        columns = torch.arange(width, device=images.device) + shifts[:, 1:]  # (B, W)
        inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
        batch = torch.arange(len(images), device=images.device)[:, None, None]
        shifted = images.permute(0, 2, 3, 1)[
            batch, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None]
        ]
        return torch.where(inside[:, None], shifted.permute(0, 3, 1, 2), -1.0), labels


class RandomErasing:
    """Replaces a box of an image by grey with a probability: Zhong et al. 2020 (arXiv 1708.04896)."""

    stream = "erasing"

    def __init__(self, probability: float):
        self.probability = probability

    def draw(self, n: int, height: int, width: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        boxes = draw_boxes(n, height, width, (0.02, 1 / 3), generator, ratios=(0.3, 1 / 0.3))
        chosen = torch.rand(n, generator=generator) < self.probability
        return boxes, chosen & (boxes[:, 2:] < torch.tensor((height, width))).any(1)  # not the fallback, a whole image

    def apply(self, images: Tensor, labels: Tensor, boxes: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.arange(images.shape[-2], device=images.device)
        columns = torch.arange(images.shape[-1], device=images.device)
        top, left, h, w = (edge[:, None] for edge in boxes.unbind(1))
        box = ((rows >= top) & (rows < top + h))[:, :, None] & ((columns >= left) & (columns < left + w))[:, None, :]
        return images.masked_fill((box & chosen[:, None, None])[:, None], 0.0), labels


def normalise(images: Tensor) -> Tensor:
    """uint8 pixels to float32 in [-1, 1]: all that validation and test images go through."""
    return images.float().div_(127.5).sub_(1.0)


def draw_boxes(
    n: int,
    height: int,
    width: int,
    scale: tuple[float, float],
    generator: torch.Generator,
    ratios: tuple[float, float] = ASPECT_RATIOS,
) -> Tensor:
    """n boxes (n, 4) of top, left, height, width, int64, distributed as in torchvision's RandomResizedCrop.

    Area uniform within scale, as a share of the image; logarithm of the aspect ratio uniform; the first of ten attempts
    that fits, else the whole image (torchvision's fallback, for images of moderate aspect ratio).
    """
    area = height * width * torch.empty(n, CROP_ATTEMPTS).uniform_(*scale, generator=generator)
    low, high = (math.log(ratio) for ratio in ratios)
    ratio = torch.empty(n, CROP_ATTEMPTS).uniform_(low, high, generator=generator).exp_()
    w, h = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)  # 0 where none fits
    found = fits.gather(1, first)[:, 0]
    h = torch.where(found, h.gather(1, first)[:, 0], height)
    w = torch.where(found, w.gather(1, first)[:, 0], width)
    top, left = (
        (torch.rand(n, generator=generator) * (size - part + 1)).long() for size, part in ((height, h), (width, w))
    )
    return torch.stack((top, left, h, w), dim=1)


def draw_crop(height: int, width: int, scale_min: float, generator: torch.Generator) -> tuple[int, int, int, int]:
    """One box of `draw_boxes` as top, left, height, width; for an image too long or too high for any, its centre.

    That centre is the largest box of a permitted aspect ratio, as in torchvision's RandomResizedCrop.
    """
    top, left, h, w = draw_boxes(1, height, width, (scale_min, 1.0), generator)[0].tolist()
    low, high = ASPECT_RATIOS
    if (h, w) == (height, width) and not low <= width / height <= high:
        h, w = min(height, round(width / low)), min(width, round(height * high))
        top, left = (height - h) // 2, (width - w) // 2
    return top, left, h, w


def draw_flips(n: int, generator: torch.Generator) -> Tensor:
    """(n,) bool, true with probability 1/2."""
    return torch.rand(n, generator=generator) < 0.5


def crop_and_flip(images: Tensor, boxes: Tensor, flips: Tensor) -> Tensor:
    """Resizes each image's box to the image's size (bilinear, reads no pixel outside the box); mirrors where flips.

    images: (B, C, H, W) float; boxes: (B, 4) top, left, height, width; flips: (B,) bool. One grid_sample per batch.
    """
    height, width = images.shape[-2:]
    top, left, h, w = boxes.to(images.dtype).unbind(1)
    y = _sample_points(top, h, height)
    x = _sample_points(left, w, width)
    x = torch.where(flips[:, None], x.flip(1), x)
    grid = torch.stack((x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)), dim=-1)
    return F.grid_sample(images, grid, align_corners=True)


def _sample_points(start: Tensor, length: Tensor, size: int) -> Tensor:
    """(B, size) sampling points along one side: the box's pixel centres in grid_sample's coordinates [-1, 1]."""
    centres = (torch.arange(size, device=start.device, dtype=start.dtype) + 0.5) / size
    points = start[:, None] + centres * length[:, None] - 0.5
    points = points.clamp(start[:, None], (start + length - 1)[:, None])
    return points * (2 / max(size - 1, 1)) - 1


class JointTransform:
    """Augments an image and its mask together, by a seed; the only place that uses albumentations.

    Pixels from outside the image are black, and void in the mask. Masks are never interpolated. Picklable, for worker
    processes that are not forked.
    """

    def __init__(self, config: SegmentationConfig, void: int, img_size: tuple[int, int]):
        """img_size: height and width of the images, and of crops after a random scale."""
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else importing it asks the network for a newer version
        import albumentations

        scaled = []
        if config.scale_min < 1 or config.scale_max > 1:
            scaled = [
                albumentations.RandomScale((config.scale_min - 1, config.scale_max - 1), p=1.0),
                albumentations.PadIfNeeded(*img_size, fill=0, fill_mask=void),
                albumentations.RandomCrop(*img_size),
            ]
        self.compose = albumentations.Compose(
            [
                *scaled,
                albumentations.HorizontalFlip(p=config.horizontal_flip),
                albumentations.Affine(  # ranges of albumentations' own ShiftScaleRotate, except the rotation's
                    translate_percent={"x": (-0.0625, 0.0625), "y": (-0.0625, 0.0625)},  # x and y drawn separately
                    scale=(0.9, 1.1),
                    keep_ratio=True,
                    rotate=(-15, 15),
                    fill=0,
                    fill_mask=void,
                    p=config.shift_scale_rotate,
                ),
                albumentations.RandomBrightnessContrast(0.2, 0.2, p=config.brightness_contrast),
            ]
        )

    def __call__(self, image: np.ndarray, mask: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """image: (h, w, 3) uint8, mask: (h, w) uint8 -> both augmented."""
        # one generator for all steps: set_random_seed would give each step the same draws
        self.compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
        both = self.compose(image=image, mask=mask)
        return both["image"], both["mask"]
