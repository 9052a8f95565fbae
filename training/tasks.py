"""What differs between tasks: the loss, what is counted, and the metric that picks the best epoch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from training.metrics import classification_ratios


class Classification:
    """Cross-entropy and accuracy."""

    metric = "accuracy"  # higher is better; val_accuracy picks the best epoch

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy in nats. logits: (B, classes), labels: (B,)."""
        return F.cross_entropy(logits.float(), labels)

    def counts(self, loss: Tensor, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What is summed over batches, as tensors on the device."""
        images = torch.full_like(labels[0], len(labels))
        return {"loss": loss * len(labels), "correct": (logits.argmax(1) == labels).sum(), "images": images}

    def ratios(self, sums: dict[str, float]) -> dict[str, float]:
        return classification_ratios(sums)
