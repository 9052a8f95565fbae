"""Vision-BDH: images as patches through the recurrent BDH step, attention in both directions.

The named variants differ in a few fields of `CoreConfig` and in nothing else:

    v1          post-norm, normal weights
    v2          as documented: the stream normalised at the head of each step, Xavier weights
    v2_softmax  v2 with scaled softmax attention, the documents' "baseline"
    v2_as_run   what the published code of v2 computed: v1 with Xavier weights
    v3          affine LN scaled by 1 / sqrt(level) before each step, no other LN
    pre_ln      of the published ablation: LN before each step and around its attention
    post_ln     of the published ablation: LN after each step and nowhere in it
    double_ln   of the published ablation: LN after each step and around its update
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.bdh import WEIGHT_STD, BDHCore, CoreConfig, layer_norm

Grid = tuple[int, int]  # rows and columns of patches
ImageSize = int | tuple[int, int]  # side of a square, or height and width, in pixels


@dataclass(frozen=True, kw_only=True)
class VisionEncoderConfig(CoreConfig):
    """What every BDH on images has: the core, and how an image becomes tokens."""

    img_size: ImageSize = 32
    """side of the images in pixels, or their height and width"""
    patch_size: int = 4
    """side of a patch, in pixels; each patch is a token"""
    in_channels: int = 3
    """colour channels of the images"""
    pos_embed: bool = True
    """a learned position is added to every patch"""

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.img_size, list):  # as JSON gives a tuple back
            object.__setattr__(self, "img_size", tuple(self.img_size))
        for name in ("patch_size", "in_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        check_image_size(self.img_size, self.patch_size, f"patch_size = {self.patch_size}")

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches."""
        height, width = height_and_width(self.img_size)
        return height // self.patch_size, width // self.patch_size


def height_and_width(img_size: ImageSize) -> tuple[int, int]:
    return (img_size, img_size) if isinstance(img_size, int) else img_size


def check_image_size(img_size: ImageSize, unit: int, what: str) -> None:
    """Raises ValueError where a side is no multiple of the unit, called what."""
    if min(height_and_width(img_size)) < 1:
        raise ValueError(f"img_size = {img_size} must be at least 1")
    if any(side % unit for side in height_and_width(img_size)):
        raise ValueError(f"img_size = {img_size} is not a multiple of {what}: change one of them")


@dataclass(frozen=True, kw_only=True)
class VisionBDHConfig(VisionEncoderConfig):
    """A Vision-BDH; the defaults are those for 32 x 32 images."""

    img_size: int = 32
    """height and width of the images, in pixels"""
    num_classes: int = 10
    """outputs of the classification head"""
    pool: Literal["mean", "cls"] = "mean"
    """what the head reads: the mean over the patches, or a class token in front of them"""

    def __post_init__(self):
        super().__post_init__()
        if self.num_classes < 1:
            raise ValueError(f"num_classes = {self.num_classes} must be at least 1")

    def build(self) -> "VisionBDH":
        return VisionBDH(self)


class VisionEncoder(BDHCore):
    """Patch embedding, learned positions, the BDH steps without a mask.

    Images may have any size that the patch divides: learned positions are interpolated where their grid is another than
    the configuration's, rotary ones follow from the grid.
    """

    def __init__(self, config: VisionEncoderConfig):
        super().__init__(config, causal=False)
        self.patch_embed = nn.Conv2d(config.in_channels, config.n_embd, config.patch_size, stride=config.patch_size)
        nn.init.normal_(self.patch_embed.weight, std=WEIGHT_STD)
        nn.init.zeros_(self.patch_embed.bias)
        self.pos_embed = None
        if config.pos_embed:
            self.pos_embed = nn.Parameter(torch.empty(1, math.prod(config.grid), config.n_embd))
            nn.init.normal_(self.pos_embed, std=WEIGHT_STD)

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Patches with their positions. images: (B, C, height, width) -> (B, T, D) and the grid, T = rows * columns.

        Raises ValueError for sides that are no multiples of the patch.
        """
        check_image_size(tuple(images.shape[2:]), self.config.patch_size, f"patch_size = {self.config.patch_size}")
        patches = self.patch_embed(images)  # (B, D, rows, columns)
        grid = tuple(patches.shape[2:])
        x = patches.flatten(2).mT
        if self.pos_embed is not None:
            x = x + interpolate_positions(self.pos_embed, self.config.grid, grid)
        return x, grid

    def forward(self, images: Tensor) -> tuple[list[Tensor], Grid]:
        """What `states` gives, and the grid. images: (B, C, height, width)."""
        x, grid = self.embed(images)
        return self.states(x, grid), grid

    def normalised(self, x: Tensor) -> Tensor:
        """The last state as what follows reads it; scaled_pre has normalised its own already, by S_{n_layer + 1}."""
        return x if self.config.residual == "scaled_pre" else layer_norm(x)


def interpolate_positions(positions: Tensor, before: Grid, after: Grid) -> Tensor:
    """Learned positions for another grid, bicubic. positions: (1, T, D) on the grid before -> (1, T', D)."""
    if before == after:
        return positions
    planes = positions.mT.unflatten(-1, before)  # (1, D, rows, columns)
    planes = F.interpolate(planes.float(), size=after, mode="bicubic", antialias=True)
    return planes.flatten(2).mT.to(positions.dtype)


class VisionBDH(VisionEncoder):
    """The encoder, mean over tokens, LN, linear head.

    A class token has no learned position beyond its own value; by rotary positions it stands before the first patch.
    """

    def __init__(self, config: VisionBDHConfig):
        super().__init__(config)
        self.cls_token = None
        if config.pool == "cls":
            self.cls_token = nn.Parameter(torch.empty(1, 1, config.n_embd))
            nn.init.normal_(self.cls_token, std=WEIGHT_STD)
        self.head = nn.Linear(config.n_embd, config.num_classes)
        nn.init.normal_(self.head.weight, std=WEIGHT_STD)
        nn.init.zeros_(self.head.bias)

    def tokens(self, images: Tensor) -> Tensor:
        """The last state. images: (B, C, height, width) -> (B, T, D), T patches, and 1 for a class token."""
        x, grid = self.embed(images)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        return self.levels(x, grid)

    def pooled(self, tokens: Tensor) -> Tensor:
        """What the head reads of the last state. tokens: (B, T, D) -> (B, D)."""
        return self.normalised(tokens[:, 0] if self.config.pool == "cls" else tokens.mean(1))

    def features(self, images: Tensor) -> Tensor:
        """What the head reads. images: (B, C, height, width) -> (B, D)."""
        return self.pooled(self.tokens(images))

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, C, height, width) -> logits (B, num_classes)."""
        return self.head(self.features(images))


def v1_config(**overrides) -> VisionBDHConfig:
    return VisionBDHConfig(**(dict(residual="post", attention="raw", init="normal") | overrides))


def v2_config(**overrides) -> VisionBDHConfig:
    return VisionBDHConfig(**(dict(residual="pre", attention="raw", init="xavier") | overrides))


def v2_softmax_config(**overrides) -> VisionBDHConfig:
    return v2_config(**(dict(attention="softmax") | overrides))


def v2_as_run_config(**overrides) -> VisionBDHConfig:
    return v2_config(**(dict(residual="post") | overrides))


def v3_config(**overrides) -> VisionBDHConfig:
    fields = dict(residual="scaled_pre", attn_norm=False, update_norm=False, attention="raw", init="xavier")
    return VisionBDHConfig(**(fields | overrides))


def pre_ln_config(**overrides) -> VisionBDHConfig:
    return v2_config(**(dict(residual="true_pre", update_norm=False) | overrides))


def post_ln_config(**overrides) -> VisionBDHConfig:
    return v2_config(**(dict(residual="post", attn_norm=False, update_norm=False) | overrides))


def double_ln_config(**overrides) -> VisionBDHConfig:
    return v2_config(**(dict(residual="post", attn_norm=False) | overrides))


def vision_bdh_v1(**overrides) -> VisionBDH:
    return v1_config(**overrides).build()


def vision_bdh_v2(**overrides) -> VisionBDH:
    return v2_config(**overrides).build()


def vision_bdh_v2_softmax(**overrides) -> VisionBDH:
    return v2_softmax_config(**overrides).build()


def vision_bdh_v2_as_run(**overrides) -> VisionBDH:
    return v2_as_run_config(**overrides).build()


def vision_bdh_v3(**overrides) -> VisionBDH:
    return v3_config(**overrides).build()


def vision_bdh_pre_ln(**overrides) -> VisionBDH:
    return pre_ln_config(**overrides).build()


def vision_bdh_post_ln(**overrides) -> VisionBDH:
    return post_ln_config(**overrides).build()


def vision_bdh_double_ln(**overrides) -> VisionBDH:
    return double_ln_config(**overrides).build()
