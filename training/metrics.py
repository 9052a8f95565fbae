"""Metrics: counts are summed on the device, batch by batch; ratios are taken once, at the end."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """How a metric is called and read; runs store it under its key, as a fraction where it is shown in percent."""

    key: str
    label: str
    percent: bool
    higher_is_better: bool

    @property
    def scale(self) -> int:
        """From what is stored to what is shown."""
        return 100 if self.percent else 1

    @property
    def title(self) -> str:
        return f"{self.label} (%)" if self.percent else self.label

    def number(self, value: float, sign: str = "") -> str:
        """A stored value in the title's unit. sign: "+" shows it for positive values, too."""
        return f"{self.scale * value:{sign}.{2 if self.percent else 4}f}"

    def show(self, value: float | None) -> str:
        return "none" if value is None else self.number(value) + "%" * self.percent


METRICS = {
    metric.key: metric
    for metric in (
        Metric("loss", "loss", percent=False, higher_is_better=False),
        Metric("accuracy", "accuracy", percent=True, higher_is_better=True),
        Metric("miou", "mIoU", percent=True, higher_is_better=True),
        Metric("miou_batch", "mIoU by batches", percent=True, higher_is_better=True),
        Metric("pixel_accuracy", "pixel accuracy", percent=True, higher_is_better=True),
        Metric("psnr", "PSNR in dB", percent=False, higher_is_better=True),
        Metric("bits_per_byte", "bits per byte", percent=False, higher_is_better=False),
    )
}


def metric_of(key: str) -> Metric:
    """The metric that is stored under that key: of METRICS, or the IoU of one class, iou_<class>. Raises KeyError."""
    if key.startswith("iou_"):
        return Metric(key, f"IoU {key.removeprefix('iou_')}", percent=True, higher_is_better=True)
    return METRICS[key]


class Sums:
    """Named counts, summed on the device without waiting for it."""

    def __init__(self):
        self._sums: dict[str, Tensor] = {}

    def add(self, counts: dict[str, Tensor]) -> None:
        for name, count in counts.items():
            count = count.detach().float() if count.dtype == torch.bfloat16 else count.detach()
            self._sums[name] = self._sums[name] + count if name in self._sums else count

    def read(self) -> dict[str, Any]:
        """The sums as numbers, or nested lists of them; waits for the device."""
        return {name: value.tolist() for name, value in self._sums.items()}


def classification_ratios(sums: dict[str, float]) -> dict[str, float]:
    """Mean loss in nats and accuracy between 0 and 1, from the sums that `tasks.Classification` counts."""
    return {"loss": sums["loss"] / sums["images"], "accuracy": sums["correct"] / sums["images"]}


def reconstruction_ratios(sums: dict[str, float]) -> dict[str, float]:
    """Mean absolute error and peak signal-to-noise ratio of masked pixels, which lie in [-1, 1]."""
    error = sums["squared_error"] / sums["images"]
    return {"loss": sums["loss"] / sums["images"], "psnr": 10 * math.log10(2**2 / max(error, 1e-12))}


def text_ratios(sums: dict[str, float]) -> dict[str, float]:
    """Mean loss in nats and the same in bits a byte, from the sums that `tasks.LanguageModelling` counts."""
    loss = sums["loss"] / sums["images"]
    return {"loss": loss, "bits_per_byte": loss / math.log(2)}


def confusion_matrices(predicted: Tensor, truth: Tensor, n_classes: int) -> Tensor:
    """Pixels of each image by true class (row) and predicted class (column). (B, h, w) each -> (B, n, n) int64.

    predicted: 0 to n - 1. truth: 0 to n; n is void, whose pixels count nowhere.
    """
    cells = (truth * n_classes + predicted).flatten(1)  # void's are those from n * n on
    counts = torch.zeros(len(truth), n_classes * (n_classes + 1), dtype=torch.int64, device=truth.device)
    counts.scatter_add_(1, cells, torch.ones_like(cells))  # unlike bincount, it never waits for the device
    return counts[:, : n_classes**2].unflatten(1, (n_classes, n_classes))


def batch_miou(confusion: Tensor) -> Tensor:
    """Mean IoU over the classes that a batch's masks hold; the published numbers are means of it. (n, n) -> ()."""
    hits = confusion.diagonal()
    present = confusion.sum(1) > 0
    iou = hits / (confusion.sum(0) + confusion.sum(1) - hits).clamp(min=1)
    return (iou * present).sum() / present.sum().clamp(min=1)


def segmentation_ratios(sums: dict[str, Any], class_names: Sequence[str]) -> dict[str, float | None]:
    """Mean loss, mean of `batch_miou`, and `confusion_ratios`, from what `tasks.Segmentation` counts."""
    ratios = confusion_ratios(sums["confusion"], class_names)
    return {
        "loss": sums["loss"] / sums["images"],
        "miou": ratios.pop("miou"),
        "pixel_accuracy": ratios.pop("pixel_accuracy"),
        "miou_batch": sums["miou_batch"] / sums["batches"],
        **ratios,
    }


def confusion_ratios(confusion: Any, class_names: Sequence[str]) -> dict[str, float | None]:
    """mIoU, pixel accuracy and iou_<class>. confusion: (n, n) pixels by true class (row) and predicted class.

    The IoU of a class that is neither there nor predicted is None, and not part of the mean.
    """
    confusion = np.array(confusion)
    hits = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - hits
    iou = [float(hit / all_) if all_ else None for hit, all_ in zip(hits, union, strict=True)]
    return {
        "miou": float(np.mean([each for each in iou if each is not None] or [0.0])),
        "pixel_accuracy": float(hits.sum() / max(1, confusion.sum())),
        **{f"iou_{name}": each for name, each in zip(class_names, iou, strict=True)},
    }
