"""BDH-UNet for semantic segmentation: the Vision-BDH encoder and a convolutional decoder.

The decoder is the published one. For patches of 8 pixels it has three stages with D / 2, D / 4 and D / 8 channels, then
a 1 x 1 convolution. A stage is a transposed convolution that doubles height and width, BatchNorm, ReLU, a 3 x 3
convolution, BatchNorm, ReLU. Despite its name, the published model has no skip connections; `skips` adds them, and
`bridges` gates them by attention. `decoder` chooses UPerNet's decoder instead (`models.upernet`).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.bdh import layer_norm
from models.upernet import STRIDES, UPerNet
from models.vision_bdh import (
    V2_FIELDS,
    V4_FIELDS,
    Grid,
    ImageSize,
    VisionEncoder,
    VisionEncoderConfig,
    height_and_width,
)

OPEN_GATE = 2.0  # initial bias of an attention bridge: its sigmoid is 0.88, near a skip connection without a bridge


@dataclass(frozen=True, kw_only=True)
class BDHUNetConfig(VisionEncoderConfig):
    """BDH-UNet for segmentation; the default sizes are the published ones."""

    outside_step: ClassVar[tuple[str, ...]] = (
        "num_classes",
        "skips",
        "skip_levels",
        "bridges",
        "decoder",
        "upernet_levels",
        "upernet_channels",
        "encoder",
    )

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
    bridges: Literal["none", "attention"] = "none"
    """gate on the skip connections: none, or attention, which weights each position by the skip connection and the
    decoder's map together (Attention U-Net); needs skips"""
    decoder: Literal["unet", "upernet"] = "unet"
    """unet: doubles the last level's grid up to the image; upernet: pyramid pooling of the last level and a feature
    pyramid over four levels"""
    upernet_levels: tuple[int, ...] | None = None
    """levels (from 1) that feed decoder=upernet, one for each of the strides 4, 8, 16 and 32; default: spread evenly
    over the depth"""
    upernet_channels: int | None = None
    """channels of every map in decoder=upernet; default: half of n_embd"""
    encoder: Path | None = None
    """checkpoint (best.pt) of a trained Vision-BDH from which the encoder starts; replaces start_from"""

    def __post_init__(self):
        super().__post_init__()
        for name in ("skip_levels", "upernet_levels"):  # JSON has no tuples
            levels = getattr(self, name)
            object.__setattr__(self, name, None if levels is None else tuple(levels))
        if self.num_classes < 1:
            raise ValueError(f"num_classes = {self.num_classes} must be at least 1")
        if self.patch_size < 2 or self.patch_size & (self.patch_size - 1):
            raise ValueError(f"patch_size = {self.patch_size} must be 2, 4, 8, ...: the decoder doubles the grid")
        if self.bridges != "none" and not self.skips:
            raise ValueError(f"bridges = {self.bridges} needs skip connections: add skips = True (--skips)")
        if self.decoder == "upernet":
            self._check_upernet()
        else:
            self._check_unet()

    def _check_unet(self) -> None:
        for name in ("upernet_levels", "upernet_channels"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is for decoder = upernet: leave it out, or set decoder = upernet")
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

    def _check_upernet(self) -> None:
        levels, channels = self.levels_of_strides, self.upernet_channels
        if self.skips:
            raise ValueError("skips belong to decoder = unet: set skips = False (--no-skips) for upernet")
        if len(levels) != len(STRIDES):
            raise ValueError(f"upernet_levels = {levels} must be {len(STRIDES)} levels, one for each stride")
        if not all(1 <= level <= self.n_layer for level in levels):
            raise ValueError(f"upernet_levels = {levels} must be between 1 and n_layer = {self.n_layer}")
        if self.n_layer not in levels:
            raise ValueError(f"upernet_levels = {levels} must contain the last level, n_layer = {self.n_layer}")
        if channels is not None and channels < 1:
            raise ValueError(f"upernet_channels = {channels} must be at least 1")
        if min(height_and_width(self.img_size)) <= STRIDES[-1]:
            raise ValueError(
                f"img_size = {self.img_size} is too small for decoder = upernet, whose coarsest map has a value for "
                f"every {STRIDES[-1]} pixels: it must be above {STRIDES[-1]}"
            )

    @property
    def levels_of_strides(self) -> tuple[int, ...]:
        """Levels that feed UPerNet, finest stride first."""
        quarters = range(1, len(STRIDES) + 1)
        spread = tuple(math.ceil(self.n_layer * each / len(STRIDES)) for each in quarters)
        return spread if self.upernet_levels is None else self.upernet_levels

    @property
    def least_patches(self) -> int:
        """Patches along a side from which every map of the decoder has two rows or columns."""
        return max(2, STRIDES[-1] // self.patch_size + 1) if self.decoder == "upernet" else 2

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
        if config.decoder == "upernet":
            width = config.upernet_channels or max(1, config.n_embd // 2)
            self.upernet = UPerNet(config.n_embd, config.patch_size, width)
        else:
            width = self._add_stages(config)
        self.head = nn.Conv2d(width, config.num_classes, kernel_size=1)

    def _add_stages(self, config: BDHUNetConfig) -> int:
        """The U-Net's decoder; returns the channels of its last stage."""
        widths = config.widths
        skip_widths = [2 * width for width in widths[:-1]] + [0] if config.skips else [0] * len(widths)
        before = [config.n_embd, *widths[:-1]]
        bridges = [config.bridges == "attention" and skip_width > 0 for skip_width in skip_widths]
        self.stages = nn.ModuleList(map(DecoderStage, before, widths, skip_widths, bridges))
        self.skips = Skips(config) if config.skips else None
        return widths[-1]

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, C, height, width) -> logits (B, num_classes, height, width).

        Raises ValueError if a side is not a multiple of the patch size.
        """
        states, grid = self.encoder(images)
        if self.config.decoder == "upernet":
            logits = self.head(self.upernet(self._maps(states, grid)))
            return F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False)
        x = _as_map(self.encoder.normalised(states[-1]), grid)
        skips = [None] * len(self.stages) if self.skips is None else [*self.skips(images, states, grid), None]
        for stage, skip in zip(self.stages, skips, strict=True):
            x = stage(x, skip)
        return self.head(x)

    def _maps(self, states: list[Tensor], grid: Grid) -> list[Tensor]:
        """The normalised levels that feed UPerNet. states: (B, T, D) after each level -> (B, D, rows, columns) each."""
        *inner, last = states
        normalised = [*map(layer_norm, inner), self.encoder.normalised(last)]
        return [_as_map(normalised[level - 1], grid) for level in self.config.levels_of_strides]


class DecoderStage(nn.Module):
    """Doubles the resolution; the skip connection is concatenated between the two convolutions."""

    def __init__(self, before: int, width: int, skip_width: int, bridge: bool):
        super().__init__()
        self.up = _with_norm(nn.ConvTranspose2d(before, width, kernel_size=2, stride=2))
        self.bridge = AttentionBridge(skip_width, width) if bridge else None
        self.conv = _with_norm(nn.Conv2d(width + skip_width, width, kernel_size=3, padding=1))

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """x: (B, before, h, w), skip: (B, skip_width, 2 h, 2 w) -> (B, width, 2 h, 2 w)."""
        x = self.up(x)
        if self.bridge is not None:
            skip = self.bridge(skip, x)
        return self.conv(x if skip is None else torch.cat((x, skip), dim=1))


class AttentionBridge(nn.Module):
    """Additive attention gate on a skip connection (Attention U-Net, Oktay et al. 2018, arXiv 1804.03999):

        alpha = sigmoid(psi relu(W_x skip + W_g gate + b_g) + b_psi),    skip * alpha

    with one alpha per position. The gate is the decoder's coarser map after its transposed convolution, so that both
    have one resolution; the paper resamples between the two.
    """

    def __init__(self, skip_width: int, gate_width: int):
        super().__init__()
        self.of_skip = nn.Conv2d(skip_width, gate_width, kernel_size=1, bias=False)
        self.of_gate = nn.Conv2d(gate_width, gate_width, kernel_size=1)
        self.psi = nn.Conv2d(gate_width, 1, kernel_size=1)
        nn.init.constant_(self.psi.bias, OPEN_GATE)

    def forward(self, skip: Tensor, gate: Tensor) -> Tensor:
        """skip: (B, skip_width, h, w), gate: (B, gate_width, h, w) -> (B, skip_width, h, w)."""
        return skip * self.psi(F.relu(self.of_skip(skip) + self.of_gate(gate))).sigmoid()


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
