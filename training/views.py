"""The sizes of images beside the model's own: evaluation at several scales and mirrored, training at several sizes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.vision_bdh import height_and_width
from training.config import TrainConfig, UserError

Predict = Callable[[Tensor], Tensor]  # images (B, C, height, width) in [-1, 1] -> logits
Size = tuple[int, int]  # height and width in pixels


@dataclass(frozen=True)
class Views:
    """The forms of an image that a model answers in validation and test; the mean of the answers counts."""

    flip: bool = False
    """also the mirror image of each"""
    sizes: tuple[Size, ...] = ()
    """none: the image as it is"""

    def classify(self, predict: Predict, images: Tensor) -> Tensor:
        """Mean of the logits of all forms. images: (B, C, height, width) -> (B, classes)."""
        answers = [predict(form) for form, _ in self._forms(images)]
        return answers[0] if len(answers) == 1 else sum(answers) / len(answers)

    def segment(self, predict: Predict, images: Tensor) -> Tensor:
        """Logits whose softmax is the mean of the class probabilities of all forms, each at the images' size.

        Of one form alone, the model's logits. images: (B, C, height, width) -> (B, classes, height, width).
        """
        if not self.flip and not self.sizes:
            return predict(images)
        total, n = 0.0, 0
        for form, mirrored in self._forms(images):
            logits = predict(form).float()
            logits = resized(logits.flip(-1) if mirrored else logits, images.shape[2:])
            total, n = total + logits.softmax(1), n + 1
        return (total / n).clamp(min=torch.finfo(torch.float32).tiny).log()  # 0 has no logarithm

    def _forms(self, images: Tensor) -> Iterator[tuple[Tensor, bool]]:
        """Each form, and whether it is a mirror image."""
        for size in self.sizes or (images.shape[2:],):
            form = resized(images, size, antialias=True)
            yield form, False
            if self.flip:
                yield form.flip(-1), True


def resized(images: Tensor, size: Sequence[int], antialias: bool = False) -> Tensor:
    """(B, C, height, width) scaled to the size (bilinear); unchanged if they have it."""
    if tuple(images.shape[2:]) == tuple(size):
        return images
    return F.interpolate(images, size=tuple(size), mode="bilinear", align_corners=False, antialias=antialias)


def views_of(model: Any, scales: Sequence[float], flip: bool) -> Views:
    """The views of a model config at these scales of its img_size, in whole multiples of its `size_unit`.

    Raises UserError for a model of one size, and for scales that come to the same size.
    """
    if tuple(scales) == (1.0,):
        return Views(flip)
    unit = _unit(model, "eval_scales")
    by_size: dict[Size, float] = {}
    for scale in scales:
        size = tuple(max(1, round(scale * side / unit)) * unit for side in height_and_width(model.img_size))
        if (other := by_size.setdefault(size, scale)) != scale:
            raise UserError(
                f"--eval-scales {other:g} and {scale:g} are both {size[0]} x {size[1]} pixels, in multiples of {unit}: "
                "leave one of them out"
            )
    return Views(flip, tuple(by_size))


def views_used(train: TrainConfig) -> dict[str, Any]:
    """What summary.json says of the views: nothing if the results are those of the images as they are.

    Of masks also, whether they were counted at their original size.
    """
    used: dict[str, Any] = {name: True for name in ("eval_flip", "eval_full_size") if getattr(train, name, False)}
    scales = getattr(train, "eval_scales", (1.0,))
    return used | ({} if scales == (1.0,) else {"eval_scales": list(scales)})


def views_text(summary: dict[str, Any], task: str) -> str:
    """The views that the results in summary.json are those of; empty for the images as they are."""
    flip, scales = summary.get("eval_flip"), summary.get("eval_scales")
    of_masks = "masks at their original size" if summary.get("eval_full_size") else ""
    if not flip and not scales:
        return of_masks
    answers = "class probabilities" if task == "segmentation" else "logits"
    at_scales = f" at scales {', '.join(f'{scale:g}' for scale in scales)}" if scales else ""
    mean = f"mean {answers} of each image{' and its mirror image' if flip else ''}{at_scales}"
    return ", ".join(filter(None, (mean, of_masks)))


def check_train_sizes(model: Any, sizes: Sequence[int]) -> None:
    """Raises UserError unless the model of this config takes square images of all these sizes."""
    if not sizes:
        return
    unit = _unit(model, "train_sizes")
    if bad := [size for size in sizes if size % unit]:
        raise UserError(f"--train-sizes {bad[0]} is not a multiple of {unit}, which the model needs: change it")


def _unit(model: Any, field: str) -> int:
    """What the sides of the model's images must be multiples of. Raises UserError for a model of one size."""
    unit = getattr(model, "size_unit", None)
    if unit is None:
        size = " x ".join(map(str, height_and_width(model.img_size)))
        flag = "--" + field.replace("_", "-")
        raise UserError(f"{type(model).__name__} takes images of {size} pixels only: leave out {flag}")
    return unit
