"""Metrics: counts are summed on the device, batch by batch; ratios are taken once, at the end."""

import math
from dataclasses import dataclass

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

    def show(self, value: float) -> str:
        return self.number(value) + "%" * self.percent


METRICS = {
    metric.key: metric
    for metric in (
        Metric("loss", "loss", percent=False, higher_is_better=False),
        Metric("accuracy", "accuracy", percent=True, higher_is_better=True),
        Metric("miou", "mIoU", percent=True, higher_is_better=True),
        Metric("bits_per_byte", "bits per byte", percent=False, higher_is_better=False),
    )
}


class Sums:
    """Named counts, summed on the device without waiting for it."""

    def __init__(self):
        self._sums: dict[str, Tensor] = {}

    def add(self, counts: dict[str, Tensor]) -> None:
        for name, count in counts.items():
            count = count.detach().float() if count.dtype == torch.bfloat16 else count.detach()
            self._sums[name] = self._sums[name] + count if name in self._sums else count

    def read(self) -> dict[str, float]:
        """The sums as numbers; waits for the device."""
        return {name: value.item() for name, value in self._sums.items()}


def classification_ratios(sums: dict[str, float]) -> dict[str, float]:
    """Mean loss in nats and accuracy between 0 and 1, from the sums that `tasks.Classification` counts."""
    return {"loss": sums["loss"] / sums["images"], "accuracy": sums["correct"] / sums["images"]}


def text_ratios(sums: dict[str, float]) -> dict[str, float]:
    """Mean loss in nats and the same in bits a byte, from the sums that `tasks.LanguageModelling` counts."""
    loss = sums["loss"] / sums["images"]
    return {"loss": loss, "bits_per_byte": loss / math.log(2)}
