"""RandAugment (Cubuk et al. 2020, arXiv 1909.13719) on whole batches, with its own draw for every image.

Operations and ranges are those of torchvision.transforms.RandAugment, except that geometric operations read pixels
bilinearly, shears keep the image's centre, and what comes into view is grey. torchvision draws once per batch, so it
would give all images the same operation.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
LEVELS = 30  # magnitudes 0 to 30
SHEAR, TRANSLATE, ROTATE, ENHANCE = 0.3, 150 / 331, 30.0, 0.9  # at the largest magnitude; rotation in degrees


class RandAugment:
    """`number` operations for each image, drawn from all, at one magnitude with a random sign."""

    stream = "randaugment"
    draws_on_cpu = True  # images are grouped by operation, which must not wait for the device

    def __init__(self, number: int, magnitude: int):
        self.number, self.strength = number, magnitude / LEVELS

    def draw(self, n: int, height: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        operations = torch.randint(len(OPERATIONS), (n, self.number), generator=generator)
        signs = torch.randint(2, (n, self.number), generator=generator) * 2 - 1
        return operations, signs

    def apply(self, images: Tensor, labels: Tensor, operations: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
        pixels = ((images + 1) * 127.5).round_()  # 0 to 255
        for operation, sign in zip(operations.unbind(1), signs.unbind(1), strict=True):
            pixels = self._apply_one(pixels, operation, sign)
        return pixels / 127.5 - 1, labels

    def _apply_one(self, pixels: Tensor, operations: Tensor, signs: Tensor) -> Tensor:
        """pixels: (B, C, H, W); operations, signs: (B,), on the CPU."""
        changed = pixels.clone()
        for number, name in enumerate(OPERATIONS):
            here = (operations == number).nonzero()[:, 0]
            if len(here) == 0 or name == "identity":
                continue
            index = here.to(pixels.device, non_blocking=True)
            sign = signs[here].to(pixels.device, pixels.dtype, non_blocking=True)
            changed[index] = OPERATIONS[name](pixels[index], self.strength, sign)
        return changed


def _geometric(name: str) -> Callable[[Tensor, float, Tensor], Tensor]:
    def apply(pixels: Tensor, strength: float, sign: Tensor) -> Tensor:
        return warp(pixels, inverse_matrices(name, strength * sign, *pixels.shape[-2:]))

    return apply


def inverse_matrices(name: str, strength: Tensor, height: int, width: int) -> Tensor:
    """(B, 2, 3) from output to input, in pixels from the image's centre. strength: (B,) in [-1, 1]."""
    one, zero = torch.ones_like(strength), torch.zeros_like(strength)
    if name == "rotate":
        angle = torch.deg2rad(ROTATE * strength)
        rows = (angle.cos(), angle.sin(), zero), (-angle.sin(), angle.cos(), zero)
    else:
        shear, shift = SHEAR * strength, TRANSLATE * strength
        rows = {
            "shear_x": ((one, -shear, zero), (zero, one, zero)),
            "shear_y": ((one, zero, zero), (-shear, one, zero)),
            "translate_x": ((one, zero, -(shift * width).trunc()), (zero, one, zero)),
            "translate_y": ((one, zero, zero), (zero, one, -(shift * height).trunc())),
        }[name]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def warp(pixels: Tensor, matrices: Tensor) -> Tensor:
    """Reads each image through its matrix (`inverse_matrices`), bilinearly; grey outside."""
    height, width = pixels.shape[-2:]
    y = torch.arange(height, device=pixels.device, dtype=pixels.dtype) - (height - 1) / 2
    x = torch.arange(width, device=pixels.device, dtype=pixels.dtype) - (width - 1) / 2
    x, y = torch.meshgrid(x, y, indexing="xy")
    places = torch.stack((x, y, torch.ones_like(x)), dim=-1)  # (H, W, 3)
    x, y = torch.einsum("hwk,bjk->bhwj", places, matrices).unbind(-1)  # in pixels
    grid = torch.stack((x * (2 / width), y * (2 / height)), dim=-1)
    read = F.grid_sample(pixels - 127.5, grid, align_corners=False).add_(127.5)
    return read.clamp_(0, 255)  # rounding leaves a little less than 0, an index that equalize would not find


def _blend(other: Tensor, pixels: Tensor, factor: Tensor) -> Tensor:
    factor = factor[:, None, None, None]
    return (factor * pixels + (1 - factor) * other).clamp(0, 255).floor_()


def _grey(pixels: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 1, H, W), ITU-R 601 luma, as torchvision."""
    if pixels.shape[1] == 1:
        return pixels
    red, green, blue = pixels.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue)[:, None].floor_()


def _factor(strength: float, sign: Tensor) -> Tensor:
    return 1 + ENHANCE * strength * sign


def brightness(pixels: Tensor, strength: float, sign: Tensor) -> Tensor:
    return _blend(torch.zeros_like(pixels), pixels, _factor(strength, sign))


def saturation(pixels: Tensor, strength: float, sign: Tensor) -> Tensor:
    return _blend(_grey(pixels), pixels, _factor(strength, sign))


def contrast(pixels: Tensor, strength: float, sign: Tensor) -> Tensor:
    mean = _grey(pixels).mean((1, 2, 3), keepdim=True)
    return _blend(mean, pixels, _factor(strength, sign))


def sharpness(pixels: Tensor, strength: float, sign: Tensor) -> Tensor:
    """Blends with a 3 x 3 smoothing (centre 5, neighbours 1, over 13); the border stays."""
    if min(pixels.shape[-2:]) <= 2:
        return pixels
    kernel = torch.ones(3, 3, device=pixels.device, dtype=pixels.dtype)
    kernel[1:2, 1:2] = 5  # kernel[1, 1] would copy a number from the host to a GPU, and wait for it
    channels = pixels.shape[1]
    smooth = pixels.clone()
    weight = (kernel / 13).expand(channels, 1, 3, 3)
    smooth[..., 1:-1, 1:-1] = F.conv2d(pixels, weight, groups=channels).round_()
    return _blend(smooth, pixels, _factor(strength, sign))


def posterize(pixels: Tensor, strength: float, sign: Tensor) -> Tensor:
    step = 2.0 ** round(4 * strength)  # 8 to 4 bits are kept
    return pixels.div(step).floor_().mul_(step)


def solarize(pixels: Tensor, strength: float, sign: Tensor) -> Tensor:
    return torch.where(pixels >= 255 * (1 - strength), 255 - pixels, pixels)


def autocontrast(pixels: Tensor, strength: float, sign: Tensor) -> Tensor:
    """Stretches each channel to 0 to 255; a constant channel stays."""
    low, high = pixels.amin((-2, -1), keepdim=True), pixels.amax((-2, -1), keepdim=True)
    scale = torch.where(high > low, 255 / (high - low).clamp(min=1e-6), torch.ones_like(high))
    return ((pixels - torch.where(high > low, low, torch.zeros_like(low))) * scale).clamp_(0, 255).floor_()


def equalize(pixels: Tensor, strength: float, sign: Tensor) -> Tensor:
    """Histogram equalisation of each channel, as PIL and torchvision define it."""
    values = pixels.flatten(2).long()  # (B, C, H W)
    histogram = torch.zeros(*values.shape[:2], 256, device=pixels.device, dtype=torch.long)
    histogram.scatter_add_(2, values, torch.ones_like(values))
    last = histogram.gather(2, values.amax(2, keepdim=True))  # pixels of the brightest value
    step = (values.shape[2] - last).div(255, rounding_mode="floor")  # (B, C, 1)
    before = histogram.cumsum(2) - histogram
    table = ((before + step.div(2, rounding_mode="floor")).div(step.clamp(min=1), rounding_mode="floor")).clamp_(0, 255)
    mapped = table.gather(2, values)
    return torch.where(step > 0, mapped, values).to(pixels.dtype).view_as(pixels)


OPERATIONS: dict[str, Callable[[Tensor, float, Tensor], Tensor]] = {
    "identity": lambda pixels, strength, sign: pixels,
    **{name: _geometric(name) for name in GEOMETRIC},
    "brightness": brightness,
    "saturation": saturation,
    "contrast": contrast,
    "sharpness": sharpness,
    "posterize": posterize,
    "solarize": solarize,
    "autocontrast": autocontrast,
    "equalize": equalize,
}
