"""UPerNet's decoder (Xiao et al. 2018, arXiv 1807.10221) on levels that all have the grid of patches.

Four levels are resized to strides of 4, 8, 16 and 32 pixels, which the paper's encoder has by itself, as in BEiT's
segmentation (Bao et al. 2021, arXiv 2106.08254): transposed convolutions to a finer stride, max pooling to a coarser
one. The coarsest map is averaged over 1 x 1, 2 x 2, 3 x 3 and 6 x 6 regions (pyramid pooling), a feature pyramid adds
coarse maps to finer ones, and a convolution fuses all four.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDES = (4, 8, 16, 32)  # of the pyramid's maps, in pixels
POOLS = (1, 2, 3, 6)  # regions along a side, in pyramid pooling


class UPerNet(nn.Module):
    """From one map of each of four levels to features at a quarter of the image's height and width."""

    def __init__(self, width: int, patch_size: int, channels: int):
        """width: D of the levels; channels: of every map in the decoder."""
        super().__init__()
        self.resize = nn.ModuleList(_resizing(width, patch_size, stride) for stride in STRIDES)
        self.pooling = PyramidPooling(width, channels)
        self.lateral = nn.ModuleList(_convolution(width, channels, 1) for _ in STRIDES[:-1])
        self.smooth = nn.ModuleList(_convolution(channels, channels, 3) for _ in STRIDES[:-1])
        self.fuse = _convolution(len(STRIDES) * channels, channels, 3)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """levels: four maps (B, width, rows, columns) of the patch grid, finest stride first -> (B, channels, h, w).

        h and w are a quarter of the image's height and width, rounded up.
        """
        *fine, coarsest = (resize(level) for resize, level in zip(self.resize, levels, strict=True))
        x = self.pooling(coarsest)
        pyramid = [x]  # coarse to fine
        for level in reversed(range(len(fine))):  # each adds the sum so far, which `smooth` does not touch
            lateral = self.lateral[level](fine[level])
            x = lateral + _resized(x, lateral)
            pyramid.append(self.smooth[level](x))
        return self.fuse(torch.cat([_resized(each, x) for each in reversed(pyramid)], dim=1))


class PyramidPooling(nn.Module):
    """Means over regions of four sizes, each through a convolution, beside the map itself (Zhao et al. 2017, PSPNet).

    The mean over the whole map has no BatchNorm: in training it would need more than one image in a batch.
    """

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.regions = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, channels, 1), nn.ReLU()) if n == 1 else _convolution(width, channels, 1)
            for n in POOLS
        )
        self.bottleneck = _convolution(width + len(POOLS) * channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) -> (B, channels, h, w)."""
        pooled = [convolve(averaged(x, n)) for n, convolve in zip(POOLS, self.regions, strict=True)]
        return self.bottleneck(torch.cat((x, *(_resized(each, x) for each in pooled)), dim=1))


def averaged(x: Tensor, n: int) -> Tensor:
    """Means over n x n regions, as F.adaptive_avg_pool2d, which cannot be exported for images of any size.

    (B, C, h, w) -> (B, C, n, n). Region i of a side of s values is [floor(i s / n), ceil((i + 1) s / n)).
    """
    rows, columns = (_averages(n, side, x) for side in x.shape[2:])
    return rows @ x @ columns.mT


def _averages(n: int, side: int, like: Tensor) -> Tensor:
    """(n, side): the weights of the means."""
    region, place = torch.arange(n, device=like.device)[:, None], torch.arange(side, device=like.device)
    inside = (place >= region * side // n) & (place < ((region + 1) * side + n - 1) // n)
    return inside.to(like.dtype) / inside.sum(1, keepdim=True)


def _resizing(width: int, patch_size: int, stride: int) -> nn.Module:
    """Layers from a map of one value per patch to one per `stride` pixels; both are powers of 2."""
    if stride >= patch_size:
        pool = stride // patch_size
        return nn.MaxPool2d(pool, ceil_mode=True) if pool > 1 else nn.Identity()  # ceil: a lone row is not lost
    layers: list[nn.Module] = []
    while patch_size > stride:
        patch_size //= 2
        last = patch_size == stride
        layers.append(nn.ConvTranspose2d(width, width, kernel_size=2, stride=2, bias=last))
        layers += [] if last else [nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers)


def _convolution(before: int, channels: int, side: int) -> nn.Sequential:
    convolution = nn.Conv2d(before, channels, kernel_size=side, padding=side // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU())


def _resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)
