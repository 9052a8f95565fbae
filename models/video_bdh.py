"""Vision-BDH for short clips: patches of all frames are tokens of one sequence.

With `tubelet` > 1, a token is the same patch in so many frames in a row (tubelet embedding: Arnab et al. 2021, ViViT,
arXiv 2103.15691), so that the stem itself sees motion. Shapes count such groups as frames.

Time enters in the places where space does: a learned position for each frame (`pos_embed`), rotary positions by frame,
row and column (`rotary = axial`), and, with `mixing`, a depthwise convolution over frames after that over the grid of
patches. Every token attends to those of all frames. With raw scores that takes no T x T matrix, so its cost is linear
in the number of frames; ViViT's "joint space-time attention" is quadratic.

Letters in shapes: B clips, F frames (n_frames / tubelet), T patches of a frame, D width of a token.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.bdh import WEIGHT_STD
from models.vision_bdh import V4_FIELDS, Grid, VisionBDH, VisionBDHConfig, VisionEncoder


@dataclass(frozen=True, kw_only=True)
class VideoBDHConfig(VisionBDHConfig):
    """Vision-BDH for clips of a fixed number of frames; the defaults are for 8 colour frames of 32 x 32 pixels."""

    outside_step: ClassVar[tuple[str, ...]] = ("n_frames", "tubelet")
    axes: ClassVar[int] = 3

    n_frames: int = 8
    """frames of a clip; in_channels must be three times as many"""
    in_channels: int = 24
    """colours of all frames of a clip together: 24 for 8 frames"""
    tubelet: int = 1
    """frames in a row that make a token together, by which n_frames must be divisible"""

    def __post_init__(self):
        super().__post_init__()
        if self.n_frames < 1 or self.in_channels != 3 * self.n_frames:
            raise ValueError(
                f"in_channels = {self.in_channels} is not three times n_frames = {self.n_frames}: clips are read in "
                f"colour, set in_channels to {3 * max(self.n_frames, 1)}"
            )
        if self.tubelet < 1 or self.n_frames % self.tubelet:
            raise ValueError(f"n_frames = {self.n_frames} is not a multiple of tubelet = {self.tubelet}: change one")
        if self.rotary == "axial" and self.n_neurons < 6:
            raise ValueError(f"rotary = axial needs 6 neurons per head or more in a clip, not {self.n_neurons}")

    @property
    def image_channels(self) -> int:
        """Channels of what is cut into patches: one frame, or `tubelet` of them."""
        return self.in_channels // self.n_frames * self.tubelet

    @property
    def time_steps(self) -> int:
        """F: frames, or groups of `tubelet` frames."""
        return self.n_frames // self.tubelet

    def build(self) -> "VideoBDH":
        return VideoBDH(self)


class VideoBDH(VisionBDH):
    """Encoder, mean over the tokens of all frames (or class token), LN, linear head.

    A clip is an image whose channels are those of its frames, one frame after another. So whatever is done to
    an image, such as a random crop, is done to all of its frames alike.
    """

    def __init__(self, config: VideoBDHConfig):
        super().__init__(config)
        self.pos_frame = None
        if config.pos_embed:
            self.pos_frame = nn.Parameter(torch.empty(1, config.time_steps, config.n_embd))
            nn.init.normal_(self.pos_frame, std=WEIGHT_STD)
        if config.mixing != "none":
            self.frame_mixing = nn.ModuleList(FrameMixing(config.n_embd) for _ in self.mixing)

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        """images: (B, in_channels, height, width) -> (B, F T, D), frame by frame, and the grid (F, rows, columns)."""
        steps = self.config.time_steps
        frames = images.unflatten(1, (steps, self.config.image_channels)).flatten(0, 1)
        x, grid = VisionEncoder.embed(self, frames)  # (B F, T, D)
        x = x.unflatten(0, (-1, steps))
        if self.pos_frame is not None:
            x = x + self.pos_frame[:, :, None]
        return self.with_class_token(x.flatten(1, 2)), (steps, *grid)

    def mixed(self, x: Tensor, level: int, grid: Grid) -> Tensor:
        """x: (B, F T, D), the residual stream before a level -> the same with neighbours in space and time mixed."""
        if self.config.mixing == "none":
            return x
        steps, *of_frame = grid
        first = 0 if self.cls_token is None else 1
        frames = x[:, first:].unflatten(1, (steps, -1))  # (B, F, T, D)
        frames = super().mixed(frames.flatten(0, 1), level, tuple(of_frame)).view_as(frames)
        frames = self.of_level(self.frame_mixing, level)(frames)
        return torch.cat((x[:, :first], frames.flatten(1, 2)), dim=1) if first else frames.flatten(1, 2)


class FrameMixing(nn.Conv1d):
    """x + depthwise convolution of x over 3 frames; starts as the identity."""

    def __init__(self, n_embd: int):
        super().__init__(n_embd, n_embd, kernel_size=3, padding=1, groups=n_embd)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, F, T, D) -> (B, F, T, D)."""
        over_frames = x.permute(0, 2, 3, 1)  # (B, T, D, F)
        mixed = super().forward(over_frames.flatten(0, 1)).view_as(over_frames)
        return x + mixed.permute(0, 3, 1, 2)


def v4_video_config(**overrides) -> VideoBDHConfig:
    """Vision-BDH v4 (see `vision_bdh`) for clips."""
    return VideoBDHConfig(**(V4_FIELDS | overrides))
