"""Convolutions around the BDH step: a convolutional stem, and depthwise convolutions on the grid of tokens.

Small convolutions give a transformer on images the locality that it lacks: Hassani et al. 2021 (CCT, arXiv 2104.05704)
for the stem, Chu et al. 2021 (CPVT, arXiv 2102.10882) for depthwise convolutions in place of learned positions.
"""

import torch
from torch import Tensor, nn


class ConvStem(nn.Module):
    """3 x 3 convolutions of stride 2 with ReLU between them; each halves height and width and doubles the channels.

    The first one has n_embd * 2 / patch_size output channels, the last one n_embd.
    """

    def __init__(self, in_channels: int, n_embd: int, patch_size: int):
        super().__init__()
        halvings = patch_size.bit_length() - 1
        widths = [n_embd >> halving for halving in reversed(range(halvings))]
        self.first = _halving(in_channels, widths[0])
        self.hidden = nn.ModuleList(map(_halving, widths[:-1], widths[1:]))

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, C, height, width) -> (B, D, height / patch_size, width / patch_size)."""
        x = self.first(images)
        for convolution in self.hidden:
            x = convolution(x.relu())
        return x


def _halving(before: int, after: int) -> nn.Conv2d:
    convolution = nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1)
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
    nn.init.zeros_(convolution.bias)
    return convolution


class TokenMixing(nn.Conv2d):
    """x + depthwise 3 x 3 convolution of x on the grid of tokens; starts as the identity."""

    def __init__(self, n_embd: int):
        super().__init__(n_embd, n_embd, kernel_size=3, padding=1, groups=n_embd)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x: (B, T, D) -> (B, T, D). grid: (rows, columns) of the last tokens; a class token stays as it is."""
        n_patches = grid[0] * grid[1]
        patches = x[:, -n_patches:]
        planes = patches.mT.unflatten(-1, grid)  # (B, D, rows, columns), channels last in memory
        patches = patches + super().forward(planes).flatten(2).mT
        return patches if n_patches == x.shape[1] else torch.cat((x[:, :-n_patches], patches), dim=1)
