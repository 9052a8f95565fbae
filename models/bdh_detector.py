"""BDH-Detector for object detection: the Vision-BDH encoder and a DETR head.

DETR: Carion et al. 2020 (arXiv 2005.12872). Learned queries pass through Transformer decoder layers that attend to the
encoder's tokens; of each query, one linear layer says the class or "no object", and a small MLP the box. As in the
program of the paper's appendix, the queries enter the first layer instead of every attention.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from models.bdh import WEIGHT_STD
from models.vision_bdh import V4_FIELDS, Grid, ImageSize, VisionEncoder, VisionEncoderConfig

NO_OBJECT_FIRST = 0.9  # probability of "no object" that an untrained detector gives every query


@dataclass(frozen=True, kw_only=True)
class BDHDetectorConfig(VisionEncoderConfig):
    """BDH-Detector; finds at most n_queries objects in an image."""

    outside_step: ClassVar[tuple[str, ...]] = (
        "num_classes",
        "n_queries",
        "decoder_layers",
        "decoder_heads",
        "decoder_mlp_dim",
        "encoder",
    )

    img_size: ImageSize = 96
    """image size in pixels: one side, or height and width"""
    patch_size: int = 8
    """side of a square patch in pixels; each patch is one token"""
    num_classes: int = 10
    """number of classes, not counting "no object" """
    n_queries: int = 20
    """number of queries: the most objects it can find in an image"""
    decoder_layers: int = 3
    """Transformer layers between the encoder's tokens and the answers; each layer's answers are trained"""
    decoder_heads: int = 4
    """attention heads of a decoder layer"""
    decoder_mlp_dim: int = 256
    """hidden width of a decoder layer's MLP"""
    encoder: Path | None = None
    """checkpoint (best.pt) of a trained Vision-BDH from which the encoder starts; replaces start_from"""

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_classes", "n_queries", "decoder_layers", "decoder_heads", "decoder_mlp_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.n_embd % 4 or self.n_embd % self.decoder_heads:
            raise ValueError(
                f"n_embd = {self.n_embd} must be a multiple of 4 (for the positions) and of decoder_heads = "
                f"{self.decoder_heads}: change one of them"
            )

    def build(self) -> "BDHDetector":
        return BDHDetector(self)


class Detections(NamedTuple):
    """The answers of all Q queries after each of L decoder layers; the last layer's are the prediction."""

    logits: Tensor
    """(B, L, Q, num_classes + 1); the last class is "no object" """
    boxes: Tensor
    """(B, L, Q, 4) float32: centre x, centre y, width, height, as shares of the image"""


class BDHDetector(nn.Module):
    """Detection model for images of any size that is a multiple of the patch size."""

    def __init__(self, config: BDHDetectorConfig):
        super().__init__()
        self.config = config
        D = config.n_embd
        self.encoder = VisionEncoder(config)
        self.query_tokens = nn.Parameter(torch.empty(1, config.n_queries, D))
        nn.init.normal_(self.query_tokens, std=1.0)  # as different as the layer norms make any input
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                D, config.decoder_heads, config.decoder_mlp_dim, config.dropout, batch_first=True, norm_first=True
            )
            for _ in range(config.decoder_layers)
        )
        self.norm = nn.LayerNorm(D)  # of every layer's answers
        self.head = nn.Linear(D, config.num_classes + 1)
        nn.init.normal_(self.head.weight, std=WEIGHT_STD)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            self.head.bias[-1] = math.log(NO_OBJECT_FIRST / (1 - NO_OBJECT_FIRST) * config.num_classes)
        hidden = [nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D), nn.ReLU()]
        self.boxes = nn.ModuleDict({"hidden": nn.Sequential(*hidden), "head": nn.Linear(D, 4)})

    def forward(self, images: Tensor) -> Detections:
        """images: (B, C, height, width). Raises ValueError if a side is not a multiple of the patch size."""
        states, grid = self.encoder(images)
        tokens = self.encoder.normalised(states[-1])
        tokens = tokens + sine_positions(grid, tokens.shape[-1], tokens.device).to(tokens.dtype)
        x, answers = self.query_tokens.expand(len(images), -1, -1), []
        for layer in self.layers:
            x = layer(x, tokens)
            answers.append(self.norm(x))
        answers = torch.stack(answers, dim=1)  # (B, L, Q, D)
        boxes = self.boxes["head"](self.boxes["hidden"](answers))
        return Detections(self.head(answers), boxes.float().sigmoid())


def sine_positions(grid: Grid, width: int, device: torch.device | None = None) -> Tensor:
    """(rows * columns, width): the row's position in the first half, the column's in the second.

    As DETR's: centres of patches as shares of the image, times 2 pi, divided by 10,000 ** (2 i / (width / 2)); sine and
    cosine of each. width: a multiple of 4.
    """
    frequencies = 10_000.0 ** -(torch.arange(width // 4, device=device) / (width // 4))
    rows, columns = ((torch.arange(n, device=device) + 0.5)[:, None] / n * (2 * math.pi) * frequencies for n in grid)
    rows, columns = (torch.cat((angles.sin(), angles.cos()), dim=1) for angles in (rows, columns))
    planes = (rows[:, None].expand(-1, grid[1], -1), columns[None].expand(grid[0], -1, -1))
    return torch.cat(planes, dim=2).flatten(0, 1)


def v4_detector_config(**overrides) -> BDHDetectorConfig:
    """Vision-BDH v4's encoder (see `vision_bdh`) with the DETR head."""
    return BDHDetectorConfig(**(V4_FIELDS | overrides))
