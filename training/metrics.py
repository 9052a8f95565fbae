"""Metrics: counts are summed on the device, batch by batch; ratios are taken once, at the end."""

import torch
from torch import Tensor


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
