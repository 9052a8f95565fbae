"""Vision-BDH: image patches as tokens of the recurrent BDH step, with bidirectional attention.

The published variants are values of a few `CoreConfig` fields. `<name>_config(**overrides)` returns the config of:

    v1          post-norm, normal initialisation
    v2          as documented: LN on the residual stream before each step, Xavier initialisation
    v2_softmax  v2 with scaled softmax attention, called "baseline" in the documents
    v2_as_run   what the published code of v2 computed: v1 with Xavier initialisation
    v3          affine LN scaled by 1 / sqrt(level) before each step, no other LN
    pre_ln      published ablation: LN before each step and on the attention output
    post_ln     published ablation: LN after each step only
    double_ln   published ablation: LN after each step and on the update
    v4          not published: convolutional stem, neighbouring tokens mixed before each step, axial positions, a
                residual stream that is not normalised, a gain and bias for each level
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.bdh import LN_EPS, WEIGHT_STD, BDHCore, CoreConfig, layer_norm
from models.locality import ConvStem, TokenMixing

Grid = tuple[int, ...]  # rows and columns of patches; in clips, frames first
ImageSize = int | tuple[int, int]  # side of a square image, or (height, width), in pixels


@dataclass(frozen=True, kw_only=True)
class VisionEncoderConfig(CoreConfig):
    """The BDH step and the patch embedding: common to all BDH models on images."""

    outside_step: ClassVar[tuple[str, ...]] = (
        "img_size",
        "patch_size",
        "in_channels",
        "pos_embed",
        "stem",
        "init_projections",
        "mixing",
        "blocks_before",
        "blocks_after",
    )

    img_size: ImageSize = 32
    """image size in pixels: one side, or height and width"""
    patch_size: int = 4
    """side of a square patch in pixels; each patch is one token"""
    in_channels: int = 3
    """number of image channels"""
    pos_embed: bool = True
    """add a learned position embedding to each patch"""
    stem: Literal["patch", "conv"] = "patch"
    """from pixels to tokens: one projection of each patch, or 3 x 3 convolutions of stride 2 (patch_size 2, 4, 8)"""
    init_projections: Literal["normal", "xavier"] = "normal"
    """initial weights of the patch projection and the classification head: N(0, 0.02), or Xavier's uniform ones"""
    mixing: Literal["none", "conv", "conv_per_level"] = "none"
    """before each level, add a depthwise 3 x 3 convolution of the grid of tokens: the same one at every level, or one
    per level"""
    blocks_before: int = 0
    """hybrid: number of Transformer blocks before the first level (softmax attention with n_head heads, MLP); they have
    no rotary positions"""
    blocks_after: int = 0
    """hybrid: number of Transformer blocks after the last level"""

    def __post_init__(self):
        super().__post_init__()
        for name in ("blocks_before", "blocks_after"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 0")
        if self.stem == "conv" and (self.patch_size < 2 or self.patch_size & (self.patch_size - 1)):
            raise ValueError(f"stem = conv halves the image: patch_size = {self.patch_size} must be 2, 4, 8, ...")
        if self.stem == "conv" and self.n_embd % (self.patch_size // 2):
            raise ValueError(
                f"n_embd = {self.n_embd} must be a multiple of patch_size / 2 = {self.patch_size // 2} for stem = conv"
            )
        if isinstance(self.img_size, list):  # JSON has no tuples
            object.__setattr__(self, "img_size", tuple(self.img_size))
        for name in ("patch_size", "in_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        check_image_size(self.img_size, self.patch_size, f"patch_size = {self.patch_size}")

    @property
    def size_unit(self) -> int | None:
        """Images of other sizes are taken, too, if their sides are multiples of this; None: only img_size."""
        return self.patch_size

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches."""
        height, width = height_and_width(self.img_size)
        return height // self.patch_size, width // self.patch_size

    @property
    def image_channels(self) -> int:
        """Channels of what is cut into patches: an image, or a frame of a clip."""
        return self.in_channels

    def drop_probability(self, level: int) -> float:
        """As `CoreConfig.drop_probability`, with the blocks counted as levels: before 0, and from n_layer on."""
        depth = self.blocks_before + self.n_layer + self.blocks_after
        return self.drop_path * (self.blocks_before + level + 1) / depth


def height_and_width(img_size: ImageSize) -> tuple[int, int]:
    return (img_size, img_size) if isinstance(img_size, int) else img_size


def check_image_size(img_size: ImageSize, unit: int, what: str) -> None:
    """Raises ValueError if a side is not a multiple of unit; what: the unit's name in the message."""
    if min(height_and_width(img_size)) < 1:
        raise ValueError(f"img_size = {img_size} must be at least 1")
    if any(side % unit for side in height_and_width(img_size)):
        raise ValueError(f"img_size = {img_size} is not a multiple of {what}: change one of them")


@dataclass(frozen=True, kw_only=True)
class VisionBDHConfig(VisionEncoderConfig):
    """Vision-BDH, an image classifier; the defaults are for 32 x 32 images."""

    outside_step: ClassVar[tuple[str, ...]] = ("num_classes", "pool", "encoder")

    img_size: int = 32
    """height and width of the images, in pixels"""
    num_classes: int = 10
    """number of classes"""
    pool: Literal["mean", "cls", "seq"] = "mean"
    """input of the classification head: the mean over the patch tokens, a learned class token, or a weighted mean with
    learned attention (CCT's sequence pooling)"""
    encoder: Path | None = None
    """checkpoint (best.pt) of a trained Vision-BDH or of its pretraining, to start from with a new classification head;
    replaces start_from"""

    def __post_init__(self):
        super().__post_init__()
        if self.num_classes < 1:
            raise ValueError(f"num_classes = {self.num_classes} must be at least 1")

    def build(self) -> "VisionBDH":
        return VisionBDH(self)


class VisionEncoder(BDHCore):
    """Patch embedding, learned positions, the BDH levels without a mask, and a hybrid's Transformer blocks around them.

    Takes images of any size that is a multiple of the patch size: learned positions are interpolated to the new grid,
    rotary positions are computed for it.
    """

    def __init__(self, config: VisionEncoderConfig):
        super().__init__(config, causal=False)
        if config.stem == "conv":
            self.patch_embed = ConvStem(config.image_channels, config.n_embd, config.patch_size)
        else:
            self.patch_embed = nn.Conv2d(config.image_channels, config.n_embd, config.patch_size, config.patch_size)
            init_projection(self.patch_embed, config.init_projections)
        self.pos_embed = None
        if config.pos_embed:
            self.pos_embed = nn.Parameter(torch.empty(1, math.prod(config.grid), config.n_embd))
            nn.init.normal_(self.pos_embed, std=WEIGHT_STD)
        if config.mixing != "none":
            count = config.n_layer if config.mixing == "conv_per_level" else 1
            self.mixing = nn.ModuleList(TokenMixing(config.n_embd) for _ in range(count))
        self.blocks_before = transformer_blocks(config, range(-config.blocks_before, 0))
        self.blocks_after = transformer_blocks(config, range(config.n_layer, config.n_layer + config.blocks_after))

    def states(self, x: Tensor, grid: Grid | None = None) -> list[Tensor]:
        """As the core's, with `blocks_before` on x first."""
        return super().states(self.through(self.blocks_before, x), grid)

    def finished(self, x: Tensor) -> Tensor:
        """`blocks_after`, then the final norm (scaled_pre only). x: (B, T, D), the residual stream after any level."""
        return super().finished(self.through(self.blocks_after, x))

    def through(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        """x: (B, T, D) -> (B, T, D)."""
        for block in blocks:
            again = self.recompute and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if again else block(x)
        return x

    def mixed(self, x: Tensor, level: int, grid: Grid) -> Tensor:
        """x: (B, T, D), the residual stream before a level -> the same with neighbouring tokens mixed."""
        if self.config.mixing == "none":
            return x
        return self.of_level(self.mixing, level)(x, grid)

    def of_level(self, mixing: nn.ModuleList, level: int) -> nn.Module:
        """The convolution before a level: its own, or that of all."""
        return mixing[level if self.config.mixing == "conv_per_level" else 0]

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Tokens with learned positions. images: (B, C, height, width) -> (B, T, D) and the grid, T = rows * columns.

        Raises ValueError if a side is not a multiple of the patch size.
        """
        check_image_size(tuple(images.shape[2:]), self.config.patch_size, f"patch_size = {self.config.patch_size}")
        patches = self.patch_embed(images)  # (B, D, rows, columns)
        grid = tuple(patches.shape[2:])
        x = patches.flatten(2).mT
        if self.pos_embed is not None:
            x = x + interpolate_positions(self.pos_embed, self.config.grid, grid)
        return x, grid

    def forward(self, images: Tensor) -> tuple[list[Tensor], Grid]:
        """images: (B, C, height, width) -> the residual stream after each level (see `states`), and the grid."""
        x, grid = self.embed(images)
        return self.states(x, grid), grid

    def normalised(self, x: Tensor) -> Tensor:
        """LN on the last state, for the head or decoder; scaled_pre has already applied its own, S_{n_layer + 1}."""
        return x if self.config.residual == "scaled_pre" else layer_norm(x)


def transformer_blocks(config: VisionEncoderConfig, places: range) -> nn.ModuleList:
    """Pre-norm blocks as in a ViT (Dosovitskiy et al. 2021, arXiv 2010.11929), with DeiT's initial weights.

    x = x + attention(LN(x)); x = x + MLP(LN(x)), with learned LNs and an MLP 4 D wide with GELU. `dropout` acts after
    the attention and in the MLP. places: the blocks' numbers for `drop_probability`.
    """
    if not places:
        return nn.ModuleList()
    from timm.models.vision_transformer import Block  # here, because the import takes seconds

    blocks = nn.ModuleList(
        Block(
            config.n_embd,
            config.n_head,
            qkv_bias=True,
            proj_drop=config.dropout,
            drop_path=config.drop_probability(place),
            norm_layer=partial(nn.LayerNorm, eps=LN_EPS),
        )
        for place in places
    )
    for module in blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=WEIGHT_STD)
            nn.init.zeros_(module.bias)
    return blocks


def init_projection(layer: nn.Conv2d | nn.Linear, init: str) -> None:
    """Initial weights of a patch projection or head. init: `VisionEncoderConfig.init_projections`."""
    if init == "xavier":
        nn.init.xavier_uniform_(layer.weight)
    else:
        nn.init.normal_(layer.weight, std=WEIGHT_STD)
    nn.init.zeros_(layer.bias)


def interpolate_positions(positions: Tensor, before: Grid, after: Grid) -> Tensor:
    """Bicubic interpolation to another grid. positions: (1, T, D) on the grid `before` -> (1, T', D) on `after`."""
    if all(isinstance(side, int) for side in after) and before == after:  # a size left open in torch.export is no int
        return positions
    planes = positions.mT.unflatten(-1, before)  # (1, D, rows, columns)
    planes = F.interpolate(planes.float(), size=after, mode="bicubic", antialias=True)
    return planes.flatten(2).mT.to(positions.dtype)


class VisionBDH(VisionEncoder):
    """Encoder, mean over tokens (or class token), LN, linear head.

    The class token has no learned position; in rotary positions it comes before the first patch.
    """

    def __init__(self, config: VisionBDHConfig):
        super().__init__(config)
        self.cls_token = None
        if config.pool == "cls":
            self.cls_token = nn.Parameter(torch.empty(1, 1, config.n_embd))
            nn.init.normal_(self.cls_token, std=WEIGHT_STD)
        if config.pool == "seq":
            self.pool_query = nn.Parameter(torch.zeros(config.n_embd))  # starts as the mean
        self.head = nn.Linear(config.n_embd, config.num_classes)
        init_projection(self.head, config.init_projections)

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        """As the encoder's, with the class token first if there is one: T patches plus 1."""
        x, grid = super().embed(images)
        return self.with_class_token(x), grid

    def with_class_token(self, x: Tensor) -> Tensor:
        """x: (B, T, D) -> the same with the class token first, if there is one."""
        return x if self.cls_token is None else torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)

    def tokens(self, images: Tensor) -> Tensor:
        """Last state. images: (B, C, height, width) -> (B, T, D)."""
        return self.levels(*self.embed(images))

    def pool_weights(self, tokens: Tensor) -> Tensor:
        """Weights of pool=seq: Hassani et al. 2021, arXiv 2104.05704, equation 4. tokens: (B, T, D) -> (B, T)."""
        return (self.normalised(tokens) @ self.pool_query).softmax(1)

    def pooled(self, tokens: Tensor) -> Tensor:
        """Pooled and normalised last state, the head's input. tokens: (B, T, D) -> (B, D)."""
        if self.config.pool == "cls":
            return self.normalised(tokens[:, 0])
        if self.config.pool == "seq":
            return self.normalised((self.pool_weights(tokens)[:, None] @ tokens)[:, 0])
        return self.normalised(tokens.mean(1))

    def features(self, images: Tensor) -> Tensor:
        """The head's input. images: (B, C, height, width) -> (B, D)."""
        return self.pooled(self.tokens(images))

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, C, height, width) -> logits (B, num_classes)."""
        return self.head(self.features(images))


V2_FIELDS = dict(residual="pre", attention="raw", init="xavier", init_projections="xavier")


def v1_config(**overrides) -> VisionBDHConfig:
    return VisionBDHConfig(**(dict(residual="post", attention="raw", init="normal") | overrides))


def v2_config(**overrides) -> VisionBDHConfig:
    return VisionBDHConfig(**(V2_FIELDS | overrides))


def v2_softmax_config(**overrides) -> VisionBDHConfig:
    return v2_config(**(dict(attention="softmax") | overrides))


def v2_as_run_config(**overrides) -> VisionBDHConfig:
    return v2_config(**(dict(residual="post") | overrides))


def v3_config(**overrides) -> VisionBDHConfig:
    return v2_config(**(dict(residual="scaled_pre", attn_norm=False, update_norm=False) | overrides))


def pre_ln_config(**overrides) -> VisionBDHConfig:
    return v2_config(**(dict(residual="true_pre", update_norm=False) | overrides))


def post_ln_config(**overrides) -> VisionBDHConfig:
    return v2_config(**(dict(residual="post", attn_norm=False, update_norm=False) | overrides))


def double_ln_config(**overrides) -> VisionBDHConfig:
    return v2_config(**(dict(residual="post", attn_norm=False) | overrides))


V4_FIELDS = dict(stem="conv", mixing="conv_per_level", rotary="axial", pos_embed=False, level_gain=True)
V4_FIELDS |= dict(residual="true_pre", update_norm=False, attention="raw", init="xavier_per_head")


def v4_config(**overrides) -> VisionBDHConfig:
    return VisionBDHConfig(**(V4_FIELDS | overrides))
