"""Metrics: counts are summed on the device batch by batch; ratios are computed from the sums."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from training import processes


@dataclass(frozen=True)
class Metric:
    """Name and display of a metric; runs store it under its key, percentages as fractions."""

    key: str
    label: str
    percent: bool
    higher_is_better: bool

    @property
    def scale(self) -> int:
        """Factor from the stored to the shown value."""
        return 100 if self.percent else 1

    @property
    def title(self) -> str:
        return f"{self.label} (%)" if self.percent else self.label

    def number(self, value: float, sign: str = "") -> str:
        """A stored value in the title's unit. sign: "+" also marks positive values."""
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
        Metric("map", "mAP", percent=True, higher_is_better=True),
        Metric("ap50", "AP50", percent=True, higher_is_better=True),
        Metric("psnr", "PSNR in dB", percent=False, higher_is_better=True),
        Metric("bits_per_byte", "bits per byte", percent=False, higher_is_better=False),
    )
}


def metric_of(key: str) -> Metric:
    """The metric stored under key: an entry of METRICS, or the IoU of one class, iou_<class>. Raises KeyError."""
    if key.startswith("iou_"):
        return Metric(key, f"IoU {key.removeprefix('iou_')}", percent=True, higher_is_better=True)
    return METRICS[key]


class Items(NamedTuple):
    """Counts to be gathered, not added: one row per sample, for metrics such as average precision."""

    rows: Tensor
    """(B, ...)"""


class Sums:
    """Named counts over batches, added or gathered on the device without waiting for it."""

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._items: dict[str, list[Tensor]] = {}

    def add(self, counts: dict[str, Tensor | Items]) -> None:
        for name, count in counts.items():
            if isinstance(count, Items):
                self._items.setdefault(name, []).append(count.rows.detach())
                continue
            count = count.detach().float() if count.dtype in (torch.bfloat16, torch.float16) else count.detach()
            self._sums[name] = self._sums[name] + count if name in self._sums else count

    def read_one(self, name: str) -> float:
        """One sum, of all processes, as a number; waits for the device."""
        return processes.total(self._sums[name]).item()

    def read(self) -> dict[str, Any]:
        """Sums as numbers or nested lists, gathered items as one CPU tensor each; waits for the device.

        Over all processes, which all call it; items in the order in which one process would have them.
        """
        sums = {name: processes.total(value).tolist() for name, value in self._sums.items()}
        return sums | {name: torch.cat(rows).cpu() for name, rows in self._all_items().items()}

    def _all_items(self) -> dict[str, list[Tensor]]:
        if processes.count() == 1 or not self._items:
            return self._items
        mine = {name: [rows.cpu() for rows in of] for name, of in self._items.items()}
        return _in_order(processes.gather(mine))

    def state(self) -> dict[str, Any]:
        """This process's, on the CPU, for a checkpoint."""
        items = {name: [rows.cpu() for rows in of] for name, of in self._items.items()}
        return {"sums": {name: value.cpu() for name, value in self._sums.items()}, "items": items}

    @classmethod
    def load(cls, states: list[dict[str, Any]], device: torch.device) -> "Sums":
        """From `state`s of one process, or of several together, by rank."""
        sums = cls()
        sums._items = {
            name: [rows.to(device) for rows in of] for name, of in _in_order([s["items"] for s in states]).items()
        }
        for state in states:
            sums.add({name: value.to(device) for name, value in state["sums"].items()})
        return sums

    def clear(self) -> None:
        """Sets all sums to 0 and leaves no items, of as many batches."""
        self._sums = {name: torch.zeros_like(value) for name, value in self._sums.items()}
        self._items = {name: [rows[:0] for rows in of] for name, of in self._items.items()}


def _in_order(of_processes: list[dict[str, list[Tensor]]]) -> dict[str, list[Tensor]]:
    """Rows of each batch, of the processes in turn: shares of a batch follow each other."""
    names = of_processes[0]
    return {
        name: [rows for of in zip(*(each[name] for each in of_processes), strict=True) for rows in of] for name in names
    }


def confusion_matrices(predicted: Tensor, truth: Tensor, n_classes: int) -> Tensor:
    """Pixels of each image by true class (row) and predicted class (column). (B, h, w) each -> (B, n, n) int64.

    predicted: 0 to n - 1. truth: 0 to n; n is void and not counted.
    """
    cells = (truth * n_classes + predicted).flatten(1)  # void: from n * n on
    counts = torch.zeros(len(truth), n_classes * (n_classes + 1), dtype=torch.int64, device=truth.device)
    counts.scatter_add_(1, cells, torch.ones_like(cells))  # unlike bincount, it never waits for the device
    return counts[:, : n_classes**2].unflatten(1, (n_classes, n_classes))


def batch_miou(confusion: Tensor) -> Tensor:
    """Mean IoU over the classes present in a batch's masks; published numbers are means of it. (n, n) -> ()."""
    hits = confusion.diagonal()
    present = confusion.sum(1) > 0
    iou = hits / (confusion.sum(0) + confusion.sum(1) - hits).clamp(min=1)
    return (iou * present).sum() / present.sum().clamp(min=1)


def confusion_ratios(confusion: Any, class_names: Sequence[str]) -> dict[str, float | None]:
    """mIoU, pixel accuracy and iou_<class>. confusion: (n, n) pixels by true class (row) and predicted class.

    The IoU of a class that is neither present nor predicted is None and left out of the mean.
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
