"""What explore.py's page shows of an image, computed from the recorder: when the page is written, and in the page."""

import torch
from torch import Tensor, nn

from interpretability.common.recorder import record


class LookInside(nn.Module):
    """A model that answers with its inside. L levels, H heads, T tokens, Q quantities, K neurons listed per token."""

    def __init__(self, model: nn.Module, n_neurons: int):
        """n_neurons: K, if the model has so many."""
        super().__init__()
        self.model, self.n_neurons = model, n_neurons

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(1, C, height, width) -> probabilities (L, classes) of the head after each level, and scores (L, H, T, T).

        Of a BDH also the most active neurons, over all heads: numbers and values (L, Q, T, K), and active (L, Q, T).
        """
        with record(self.model) as trace:
            self.model(images)
        probabilities = torch.cat([trace.logits(level) for level in trace.levels]).float().softmax(-1)
        scores = torch.stack([trace.scores(level)[0] for level in trace.levels]).float()
        levels = []
        for level in trace.levels if "gated" in trace.names else ():
            activity = torch.stack(trace.activity(level))[:, 0].transpose(1, 2).flatten(2)  # (Q, T, H N)
            values, numbers = activity.topk(min(self.n_neurons, activity.shape[-1]))
            levels.append((numbers.int(), values.float().clamp(min=0), (activity > 0).sum(-1).int()))
        return probabilities, scores, *(torch.stack(each) for each in zip(*levels, strict=True))
