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

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from models.bdh import WEIGHT_STD, BDHCore, CoreConfig, layer_norm


@dataclass(frozen=True, kw_only=True)
class VisionBDHConfig(CoreConfig):
    """A Vision-BDH; the defaults are those for 32 x 32 images."""

    img_size: int = 32
    """height and width of the images, in pixels"""
    patch_size: int = 4
    """side of a patch, in pixels; each patch is a token"""
    in_channels: int = 3
    """colour channels of the images"""
    num_classes: int = 10
    """outputs of the classification head"""
    pos_embed: bool = True
    """a learned position is added to every patch"""
    pool: Literal["mean", "cls"] = "mean"
    """what the head reads: the mean over the patches, or a class token in front of them"""

    def __post_init__(self):
        super().__post_init__()
        for name in ("img_size", "patch_size", "in_channels", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.img_size % self.patch_size:
            raise ValueError(
                f"img_size = {self.img_size} is not a multiple of patch_size = {self.patch_size}: change one of them"
            )

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.img_size // self.patch_size

    def build(self) -> "VisionBDH":
        return VisionBDH(self)


class VisionBDH(BDHCore):
    """Patch embedding, learned positions, the BDH steps without a mask, mean over tokens, LN, linear head.

    A class token has no learned position beyond its own value; by rotary positions it stands before the first patch.
    """

    def __init__(self, config: VisionBDHConfig):
        super().__init__(config, causal=False)
        self.patch_embed = nn.Conv2d(config.in_channels, config.n_embd, config.patch_size, stride=config.patch_size)
        self.pos_embed = self.cls_token = None
        if config.pos_embed:
            self.pos_embed = nn.Parameter(torch.empty(1, config.grid**2, config.n_embd))
        if config.pool == "cls":
            self.cls_token = nn.Parameter(torch.empty(1, 1, config.n_embd))
        self.head = nn.Linear(config.n_embd, config.num_classes)
        for weight in (self.patch_embed.weight, self.pos_embed, self.cls_token, self.head.weight):
            if weight is not None:
                nn.init.normal_(weight, std=WEIGHT_STD)
        nn.init.zeros_(self.patch_embed.bias)
        nn.init.zeros_(self.head.bias)

    def tokens(self, images: Tensor) -> Tensor:
        """The last state. images: (B, C, img_size, img_size) -> (B, T, D), T = grid ** 2, and 1 for a class token."""
        patches = self.patch_embed(images)  # (B, D, rows, columns)
        x = patches.flatten(2).mT
        if self.pos_embed is not None:
            x = x + self.pos_embed
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        return self.levels(x, grid=tuple(patches.shape[2:]))

    def features(self, images: Tensor) -> Tensor:
        """What the head reads. images: (B, C, img_size, img_size) -> (B, D)."""
        tokens = self.tokens(images)
        pooled = tokens[:, 0] if self.config.pool == "cls" else tokens.mean(1)
        # scaled_pre has normalised its tokens already, by S_{n_layer + 1}
        return pooled if self.config.residual == "scaled_pre" else layer_norm(pooled)

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, C, img_size, img_size) -> logits (B, num_classes)."""
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
