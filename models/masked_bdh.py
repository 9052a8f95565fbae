"""Masked-image pretraining of the Vision-BDH encoder, without labels.

SimMIM (Xie et al. 2022, arXiv 2111.09886): masked patches are replaced by a learned mask token plus their positions,
and a linear layer predicts their pixels from the last state. The encoder's weights are named as in Vision-BDH.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.bdh import WEIGHT_STD
from models.vision_bdh import VisionEncoder, VisionEncoderConfig


@dataclass(frozen=True, kw_only=True)
class MaskedBDHConfig(VisionEncoderConfig):
    """Vision-BDH encoder with a linear head that predicts the pixels of masked patches."""

    outside_step: ClassVar[tuple[str, ...]] = ("mask_ratio",)
    size_unit: ClassVar[int | None] = None  # a fixed number of patches is masked

    img_size: int = 32
    """height and width of the images, in pixels"""
    mask_ratio: float = 0.6
    """fraction of the patches that are masked"""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.n_masked < self.n_patches:
            raise ValueError(
                f"mask_ratio = {self.mask_ratio} masks {self.n_masked} of {self.n_patches} patches: "
                "at least one must be masked and one visible"
            )

    @property
    def n_patches(self) -> int:
        rows, columns = self.grid
        return rows * columns

    @property
    def n_masked(self) -> int:
        """Masked patches per image."""
        return round(self.mask_ratio * self.n_patches)

    def build(self) -> "MaskedBDH":
        return MaskedBDH(self)


class Reconstruction(NamedTuple):
    """Pixels of the masked patches; P = patch_size ** 2 * in_channels."""

    predicted: Tensor
    """(B, n_masked, P), the model's output"""
    truth: Tensor
    """(B, n_masked, P), the image's"""


class MaskedBDH(VisionEncoder):
    """Encoder and a linear head from tokens to the pixels of their patches."""

    def __init__(self, config: MaskedBDHConfig):
        super().__init__(config)
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.n_embd))
        self.head = nn.Linear(config.n_embd, config.patch_size**2 * config.in_channels)
        order = torch.randperm(config.n_patches, generator=torch.Generator().manual_seed(0))
        self.register_buffer("eval_masked", order[: config.n_masked], persistent=False)
        for weight in (self.mask_token, self.head.weight):
            nn.init.normal_(weight, std=WEIGHT_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Reconstruction:
        """images: (B, C, img_size, img_size). Masks are random in training; evaluation uses one fixed mask."""
        masked = self.draw_masked(len(images), images.device)  # (B, n_masked) indices of patches
        hidden = torch.zeros(len(images), self.config.n_patches, dtype=torch.bool, device=images.device)
        hidden.scatter_(1, masked, True)
        x, grid = self.embed(self.without(images, hidden) if self.config.stem == "conv" else images)
        positions = 0.0 if self.pos_embed is None else self.pos_embed
        x = torch.where(hidden.unsqueeze(-1), (self.mask_token + positions).to(x.dtype), x)
        states = self.normalised(self.levels(x, grid))
        pixels = F.unfold(images, self.config.patch_size, stride=self.config.patch_size).mT  # (B, T, P)
        return Reconstruction(self.head(_rows(states, masked)), _rows(pixels, masked))

    def without(self, images: Tensor, hidden: Tensor) -> Tensor:
        """Images with hidden (B, T) patches set to 0: filters of a convolutional stem reach over their borders."""
        planes = hidden.unflatten(1, self.config.grid).unsqueeze(1)  # (B, 1, rows, columns)
        size = self.config.patch_size
        return images.masked_fill(planes.repeat_interleave(size, 2).repeat_interleave(size, 3), 0.0)

    def draw_masked(self, n_images: int, device: torch.device) -> Tensor:
        """(B, n_masked) indices of the masked patches."""
        if self.training:
            return torch.rand(n_images, self.config.n_patches, device=device).topk(self.config.n_masked).indices
        return self.eval_masked.expand(n_images, -1)  # fixed, so that epochs can be compared


def _rows(x: Tensor, indices: Tensor) -> Tensor:
    """Selects rows per image. x: (B, T, P), indices: (B, n) -> (B, n, P)."""
    return x.gather(1, indices.unsqueeze(-1).expand(-1, -1, x.shape[2]))
