"""Augmentations that make soft targets: label smoothing, mixup, cutmix."""

import torch
import torch.nn.functional as F
from torch import Tensor


class Mix:
    """Mixup (Zhang et al. 2018, arXiv 1710.09412), cutmix (Yun et al. 2019, arXiv 1905.04899), or either per batch.

    Each image is mixed with its partner at the mirrored place of its batch, with a share lambda ~ Beta(alpha, alpha) of
    its own. Mixup: lambda image + (1 - lambda) partner. Cutmix: a box of the partner with an area of 1 - lambda, whose
    centre is uniform and which is cut at the border; lambda is then what is left of the image.
    """

    stream = "mixing"
    mixes = True  # with the image at the mirrored place of the batch

    def __init__(self, mixup: float, cutmix: float, num_classes: int, batch_size: int):
        self.mixup, self.cutmix, self.num_classes, self.batch_size = mixup, cutmix, num_classes, batch_size

    def draw(self, n: int, height: int, width: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Shares (n,), boxes (n, 4) of top, bottom, left, right, and whether the image's batch is cut (n,)."""
        n_batches = -(-n // self.batch_size)
        of_batch = torch.rand(n_batches, generator=generator) < 0.5
        cut = of_batch.repeat_interleave(self.batch_size)[:n]
        if not (self.mixup and self.cutmix):
            cut = torch.full((n,), self.cutmix > 0)
        alpha = torch.where(cut, self.cutmix, self.mixup)
        share = _draw_beta(alpha, generator)
        side = (1 - share).sqrt()
        centre = torch.rand(2, n, generator=generator)
        top, bottom = _edges(centre[0], side, height)
        left, right = _edges(centre[1], side, width)
        area = (bottom - top) * (right - left) / (height * width)
        share = torch.where(cut, 1 - area, share)
        return share, torch.stack((top, bottom, left, right), dim=1), cut

    def apply(self, images: Tensor, labels: Tensor, share: Tensor, boxes: Tensor, cut: Tensor) -> tuple[Tensor, Tensor]:
        partner, soft = images.flip(0), as_probabilities(labels, self.num_classes)
        weight = share.to(images.dtype)[:, None, None, None]
        rows = torch.arange(images.shape[-2], device=images.device)[None, :, None]
        columns = torch.arange(images.shape[-1], device=images.device)[None, None, :]
        top, bottom, left, right = (edge[:, None, None] for edge in boxes.unbind(1))
        inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)  # (B, H, W)
        pasted = torch.where(inside[:, None], partner, images)
        blended = weight * images + (1 - weight) * partner
        mixed = torch.where(cut[:, None, None, None], pasted, blended)
        share = share.to(soft.dtype)[:, None]
        return mixed, share * soft + (1 - share) * soft.flip(0)


class SmoothLabels:
    """Label smoothing (Szegedy et al. 2016, arXiv 1512.00567): (1 - s) target + s / classes."""

    stream = "mixing"

    def __init__(self, smoothing: float, num_classes: int):
        self.smoothing, self.num_classes = smoothing, num_classes

    def draw(self, n: int, height: int, width: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        return ()

    def apply(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        soft = as_probabilities(labels, self.num_classes)
        return images, (1 - self.smoothing) * soft + self.smoothing / self.num_classes


def as_probabilities(labels: Tensor, num_classes: int) -> Tensor:
    """Labels (B,) as float32 (B, classes); probabilities as they are."""
    return F.one_hot(labels, num_classes).float() if labels.ndim == 1 else labels


def _draw_beta(alpha: Tensor, generator: torch.Generator) -> Tensor:
    """Beta(alpha, alpha), by two gamma draws x / (x + y). alpha: (n,) above 0."""
    x, y = (torch._standard_gamma(alpha.double(), generator=generator) for _ in range(2))
    return (x / (x + y).clamp(min=1e-300)).float()


def _edges(centre: Tensor, side: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """First pixel of a box along one side of the image, and the one after its last; cut at the border."""
    half, middle = side * size / 2, centre * size
    return (middle - half).round().clamp(0, size).long(), (middle + half).round().clamp(0, size).long()
