"""BDH-UNet for semantic segmentation: the Vision-BDH encoder and a convolutional decoder.

The decoder is the published one. For patches of 8 pixels it has three stages with D / 2, D / 4 and D / 8 channels, then
a 1 x 1 convolution. A stage is a transposed convolution that doubles height and width, BatchNorm, ReLU, a 3 x 3
convolution, BatchNorm, ReLU. Despite its name, the published model has no skip connections; `skips` adds them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.bdh import layer_norm
from models.vision_bdh import V2_FIELDS, V4_FIELDS, Grid, ImageSize, VisionEncoder, VisionEncoderConfig


@dataclass(frozen=True, kw_only=True)
class BDHUNetConfig(VisionEncoderConfig):
    """BDH-UNet for segmentation; the default sizes are the published ones."""

    outside_step: ClassVar[tuple[str, ...]] = ("num_classes", "skips", "skip_levels", "encoder")

    img_size: ImageSize = 384
    """image size in pixels: one side, or height and width"""
    patch_size: int = 8
    """side of a square patch in pixels, a power of 2; each patch is one token"""
    num_classes: int = 11
    """number of classes, not counting void"""
    n_embd: int = 256
    """embedding width D of a token"""
    n_head: int = 4
    """attention heads; each has its own neurons"""
    mlp_internal_dim_multiplier: int = 16
    """total number of neurons, over all heads, as a multiple of n_embd"""
    skips: bool = False
    """add skip connections to the decoder, from earlier levels and from a convolutional stem on the image"""
    skip_levels: tuple[int, ...] = (4, 2)
    """levels (from 1) that feed the skip connections, coarsest decoder stage first; used with skips only"""
    encoder: Path | None = None
    """checkpoint (best.pt) of a trained Vision-BDH from which the encoder starts; replaces start_from"""

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "skip_levels", tuple(self.skip_levels))  # JSON has no tuples
        if self.num_classes < 1:
            raise ValueError(f"num_classes = {self.num_classes} must be at least 1")
        if self.patch_size < 2 or self.patch_size & (self.patch_size - 1):
            raise ValueError(f"patch_size = {self.patch_size} must be 2, 4, 8, ...: the decoder doubles the grid")
        if self.n_embd % self.patch_size:
            raise ValueError(
                f"n_embd = {self.n_embd} is not a multiple of patch_size = {self.patch_size}, by which the decoder "
                "divides it: change one of them"
            )
        if self.skips and self.n_stages == 1:
            raise ValueError("skips need a patch_size of 4 or more: with 2, the first stage is the last")
        if self.skips and len(self.skip_levels) != self.n_stages - 1:
            raise ValueError(f"skip_levels = {self.skip_levels} must be {self.n_stages - 1} levels, one for each skip")
        if self.skips and not all(1 <= level <= self.n_layer for level in self.skip_levels):
            raise ValueError(f"skip_levels = {self.skip_levels} must be between 1 and n_layer = {self.n_layer}")

    @property
    def n_stages(self) -> int:
        """Number of decoder stages, each of which doubles the resolution."""
        return self.patch_size.bit_length() - 1

    @property
    def widths(self) -> list[int]:
        """Output channels of the decoder stages, coarse to fine: D / 2, D / 4, ..."""
        return [self.n_embd >> stage for stage in range(1, self.n_stages + 1)]

    def build(self) -> "BDHUNet":
        return BDHUNet(self)


class BDHUNet(nn.Module):
    """Segmentation model for images of any size that is a multiple of the patch size."""

    def __init__(self, config: BDHUNetConfig):
        super().__init__()
        self.config = config
        self.encoder = VisionEncoder(config)
        widths = config.widths
        skip_widths = [2 * width for width in widths[:-1]] + [0] if config.skips else [0] * len(widths)
        before = [config.n_embd, *widths[:-1]]
        self.stages = nn.ModuleList(map(DecoderStage, before, widths, skip_widths))
        self.skips = Skips(config) if config.skips else None
        self.head = nn.Conv2d(widths[-1], config.num_classes, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, C, height, width) -> logits (B, num_classes, height, width).

        Raises ValueError if a side is not a multiple of the patch size.
        """
        states, grid = self.encoder(images)
        x = _as_map(self.encoder.normalised(states[-1]), grid)
        skips = [None] * len(self.stages) if self.skips is None else [*self.skips(images, states, grid), None]
        for stage, skip in zip(self.stages, skips, strict=True):
            x = stage(x, skip)
        return self.head(x)


class DecoderStage(nn.Module):
    """Doubles the resolution; the skip connection is concatenated between the two convolutions."""

    def __init__(self, before: int, width: int, skip_width: int):
        super().__init__()
        self.up = _with_norm(nn.ConvTranspose2d(before, width, kernel_size=2, stride=2))
        self.conv = _with_norm(nn.Conv2d(width + skip_width, width, kernel_size=3, padding=1))

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """x: (B, before, h, w), skip: (B, skip_width, 2 h, 2 w) -> (B, width, 2 h, 2 w)."""
        x = self.up(x)
        return self.conv(x if skip is None else torch.cat((x, skip), dim=1))


class Skips(nn.Module):
    """Skip connections of all decoder stages except the last: an earlier level, and a convolutional stem on the image.

    The stem has one convolution of stride 2 per skip: half the image's resolution, a quarter, ...
    """

    def __init__(self, config: BDHUNetConfig):
        super().__init__()
        widths = config.widths[:-1]  # coarse to fine
        self.levels = config.skip_levels
        self.project = nn.ModuleList(nn.Conv2d(config.n_embd, width, kernel_size=1) for width in widths)
        fine_to_coarse = widths[::-1]
        self.stem = nn.ModuleList(
            _with_norm(nn.Conv2d(before, width, kernel_size=3, stride=2, padding=1))
            for before, width in zip([config.in_channels, *fine_to_coarse[:-1]], fine_to_coarse, strict=True)
        )

    def forward(self, images: Tensor, states: list[Tensor], grid: Grid) -> list[Tensor]:
        """images: (B, C, H, W), states: (B, T, D) after each level -> (B, 2 width, h, w) per skip, coarse to fine."""
        stem, x = [], images
        for convolution in self.stem:
            x = convolution(x)
            stem.append(x)
        skips = []
        for level, project, fine in zip(self.levels, self.project, reversed(stem), strict=True):
            coarse = project(_as_map(layer_norm(states[level - 1]), grid))
            coarse = F.interpolate(coarse, size=fine.shape[2:], mode="bilinear", align_corners=False)
            skips.append(torch.cat((coarse, fine), dim=1))
        return skips


def _as_map(tokens: Tensor, grid: Grid) -> Tensor:
    """(B, T, D) -> (B, D, rows, columns)."""
    return tokens.mT.unflatten(-1, grid)


def _with_norm(convolution: nn.Module) -> nn.Sequential:
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU())


def bdh_unet_config(**overrides) -> BDHUNetConfig:
    """Config with the residual connection and initialisation of the documented v2."""
    return BDHUNetConfig(**(V2_FIELDS | overrides))


def v4_unet_config(**overrides) -> BDHUNetConfig:
    """Vision-BDH v4's encoder (see `vision_bdh`) with skips."""
    return BDHUNetConfig(**(V4_FIELDS | dict(skips=True) | overrides))
