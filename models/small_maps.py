"""Depthwise and 1 x 1 convolutions of small feature maps as matrix products, for training on a CPU.

For maps of few pixels the library's convolutions are slow, and most of all the backward pass of a depthwise one: with
1,152 channels and 5 x 5 weights it takes 15 to 30 ms for a batch of 32 images of one pixel. MobileNetV2 and
EfficientNet-B0 spend most of their time there on 32 x 32 images; benchmarks/small_maps.py measures what is gained.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SmallMapConv2d(nn.Conv2d):
    """The convolution `conv`, with its weights; where `training` on a CPU, small maps take `as_products`."""

    few_pixels = 4  # in a map: up to here products are faster, from 16 on the library's convolution is

    def __init__(self, conv: nn.Conv2d):
        sizes = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        super().__init__(*sizes, conv.groups, bias=conv.bias is not None, device="meta")  # draws no random weights
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_channels, height, width) -> (B, out_channels, rows, columns)."""
        if self.training and x.device.type == "cpu" and x.shape[2] * x.shape[3] <= self.few_pixels:
            return self.as_products(x)
        return super().forward(x)

    def as_products(self, x: Tensor) -> Tensor:
        """As the library's forward, of a depthwise or 1 x 1 convolution."""
        if self.groups > 1:
            return self._depthwise(x)
        y = self.weight.flatten(1) @ x.flatten(2)
        y = y if self.bias is None else y + self.bias[:, None].to(y.dtype)
        return y.unflatten(2, x.shape[2:])

    def _depthwise(self, x: Tensor) -> Tensor:
        """A channel's map is a vector of P pixels, its convolution a matrix. (B, C, h, w) -> (B, C, rows, columns)."""
        taps = self._taps(*x.shape[2:])
        matrices = (self.weight.flatten(1) @ taps.flatten(1)).unflatten(1, (taps.shape[1], -1))  # (C, P, rows columns)
        y = x.flatten(2).transpose(0, 1) @ matrices  # (C, B, rows columns)
        return y.transpose(0, 1).unflatten(2, taps.shape[2:])

    def _taps(self, height: int, width: int) -> Tensor:
        """1 where a weight connects a pixel with an output, else 0: (weights, height width, rows, columns)."""
        like = dict(dtype=self.weight.dtype, device=self.weight.device)
        impulses = torch.eye(height * width, **like).view(-1, 1, height, width)
        each_weight = torch.eye(math.prod(self.kernel_size), **like).view(-1, 1, *self.kernel_size)
        return F.conv2d(impulses, each_weight, None, self.stride, self.padding, self.dilation).transpose(0, 1)


def with_fast_small_maps(model: nn.Module) -> nn.Module:
    """Puts `SmallMapConv2d` in the place of the convolutions that it serves; names and weights stay. Returns model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d) and _is_served(module):
            model.set_submodule(name, SmallMapConv2d(module))
    return model


def _is_served(conv: nn.Conv2d) -> bool:
    depthwise = conv.groups == conv.in_channels == conv.out_channels > 1 and conv.bias is None
    pointwise = conv.groups == 1 and conv.kernel_size == conv.stride == (1, 1) and conv.padding == (0, 0)
    return conv.padding_mode == "zeros" and (depthwise or pointwise)
