"""Transforms of training images.

For classification, of whole batches on the device: every image gets a draw of its own, no image passes through the
host. Draws are made apart from their use, for a whole epoch at once, from a seeded CPU generator. For segmentation, of
an image together with its mask, by the workers that load them.
"""

import math
import os
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.config import SegmentationConfig, UserError

ASPECT_RATIOS = (3 / 4, 4 / 3)  # of torchvision's RandomResizedCrop
CROP_ATTEMPTS = 10


def normalise(images: Tensor) -> Tensor:
    """uint8 pixels to float32 in [-1, 1] (mean and deviation 0.5), the only transform of validation and test images."""
    return images.float().div_(127.5).sub_(1.0)


def draw_crops(n: int, height: int, width: int, scale_min: float, generator: torch.Generator) -> Tensor:
    """n boxes (n, 4) of top, left, height, width, int64, distributed as torchvision's RandomResizedCrop draws them.

    Area uniform between scale_min and 1 of the image, logarithm of the aspect ratio uniform; the first of ten attempts
    that fits, else the whole image (which is what its fallback comes to for images of moderate aspect ratio).
    """
    area = height * width * torch.empty(n, CROP_ATTEMPTS).uniform_(scale_min, 1.0, generator=generator)
    low, high = (math.log(ratio) for ratio in ASPECT_RATIOS)
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


def draw_flips(n: int, generator: torch.Generator) -> Tensor:
    """(n,) bool, each true with probability one half."""
    return torch.rand(n, generator=generator) < 0.5


def crop_and_flip(images: Tensor, boxes: Tensor, flips: Tensor) -> Tensor:
    """Each image's box, resized to the image's size (bilinear, pixels outside the box unseen), mirrored where flips.

    images: (B, C, H, W) float; boxes: (B, 4) top, left, height, width; flips: (B,) bool. One grid_sample for the batch.
    """
    height, width = images.shape[-2:]
    top, left, h, w = boxes.to(images.dtype).unbind(1)
    y = _sample_points(top, h, height)
    x = _sample_points(left, w, width)
    x = torch.where(flips[:, None], x.flip(1), x)
    grid = torch.stack((x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)), dim=-1)
    return F.grid_sample(images, grid, align_corners=True)


def _sample_points(start: Tensor, length: Tensor, size: int) -> Tensor:
    """(B, size) where to read a side of `size` pixels from: pixel centres of the box, in grid_sample's [-1, 1]."""
    centres = (torch.arange(size, device=start.device, dtype=start.dtype) + 0.5) / size
    points = start[:, None] + centres * length[:, None] - 0.5
    points = points.clamp(start[:, None], (start + length - 1)[:, None])
    return points * (2 / max(size - 1, 1)) - 1


class JointTransform:
    """What changes a training image and its mask together, as a seed says.

    What comes into view from outside the image is black, and void in the mask. Labels are never mixed. This is the one
    place that knows albumentations. A class, so that workers which are not forked can be given it.
    """

    def __init__(self, config: SegmentationConfig, void: int):
        """Raises UserError where albumentations is missing."""
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else its import asks the network for a newer version
        try:
            import albumentations
        except ImportError as error:  # also of OpenCV, which it needs
            raise UserError(
                f"images and masks are changed by albumentations, which is missing ({error}): "
                "pip install -r requirements.txt"
            ) from None
        self.compose = albumentations.Compose(
            [
                albumentations.HorizontalFlip(p=config.horizontal_flip),
                albumentations.Affine(  # with the ranges of albumentations' own ShiftScaleRotate, but the rotation's
                    translate_percent={"x": (-0.0625, 0.0625), "y": (-0.0625, 0.0625)},  # drawn apart from each other
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
        """image: (h, w, 3) uint8, mask: (h, w) uint8 -> the same of the changed ones."""
        # one generator for all steps: set_random_seed would give each the same draws
        self.compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
        both = self.compose(image=image, mask=mask)
        return both["image"], both["mask"]
