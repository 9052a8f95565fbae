"""Baselines, from libraries."""

from dataclasses import dataclass

from torch import nn
from torchvision.models import VisionTransformer


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """A Vision Transformer; the defaults are ViT-Tiny for 32 x 32 images."""

    n_layer: int = 12
    """transformer layers, each with weights of its own"""
    n_embd: int = 192
    """width of a token"""
    n_head: int = 3
    """attention heads"""
    mlp_dim: int = 768
    """width inside the MLP"""
    dropout: float = 0.0
    """after the positions, the attention and in the MLP"""
    img_size: int = 32
    """height and width of the images, in pixels"""
    patch_size: int = 4
    """side of a patch, in pixels; each patch is a token"""
    num_classes: int = 10
    """outputs of the classification head"""

    def __post_init__(self):
        for name in ("n_layer", "n_embd", "n_head", "mlp_dim", "img_size", "patch_size", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout = {self.dropout} must be at least 0 and below 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd} is not a multiple of n_head = {self.n_head}: change one of them")
        if self.img_size % self.patch_size:
            raise ValueError(
                f"img_size = {self.img_size} is not a multiple of patch_size = {self.patch_size}: change one of them"
            )

    @property
    def in_channels(self) -> int:
        """Colour channels of the images, fixed in torchvision's model."""
        return 3

    def build(self) -> nn.Module:
        return VisionTransformer(
            image_size=self.img_size,
            patch_size=self.patch_size,
            num_layers=self.n_layer,
            num_heads=self.n_head,
            hidden_dim=self.n_embd,
            mlp_dim=self.mlp_dim,
            dropout=self.dropout,
            num_classes=self.num_classes,
        )


def vit_tiny_config(**overrides) -> ViTConfig:
    return ViTConfig(**overrides)


def vit_tiny(**overrides) -> nn.Module:
    return vit_tiny_config(**overrides).build()
