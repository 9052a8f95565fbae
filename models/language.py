"""The original BDH (arXiv 2509.26507): a language model on bytes.

Letters in shapes: B sequences, T tokens, D = n_embd, V vocabulary size.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.bdh import WEIGHT_STD, BDHCore, CoreConfig


@dataclass(frozen=True, kw_only=True)
class BDHConfig(CoreConfig):
    """BDH language model; the defaults are its authors'."""

    outside_step: ClassVar[tuple[str, ...]] = ("vocab_size",)

    n_embd: int = 256
    """embedding width D of a token"""
    n_head: int = 4
    """attention heads; each has its own neurons"""
    mlp_internal_dim_multiplier: int = 128
    """total number of neurons, over all heads, as a multiple of n_embd"""
    vocab_size: int = 256
    """vocabulary size; 256 for bytes"""

    def __post_init__(self):
        super().__post_init__()
        if self.rotary == "axial":
            raise ValueError("rotary = axial needs rows and columns, which text does not have: use raster or none")

    def check_new(self) -> None:
        """Raises ValueError for a setting without effect; stored runs may have it."""
        if not self.attend_self:
            raise ValueError("attend_self = False changes nothing here, since no byte attends to itself: leave it out")

    def build(self) -> "BDH":
        return BDH(self)


class BDH(BDHCore):
    """Language model. Parameters have the authors' names and shapes, so checkpoints of their implementation load."""

    def __init__(self, config: BDHConfig):
        super().__init__(config, causal=True)
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.lm_head = nn.Parameter(torch.empty(config.n_embd, config.vocab_size))
        nn.init.normal_(self.embed.weight, std=WEIGHT_STD)
        nn.init.normal_(self.lm_head, std=WEIGHT_STD)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """idx, targets: (B, T) token ids -> logits (B, T, V), mean cross-entropy in nats (None without targets)."""
        logits = self.levels(self.embed(idx)) @ self.lm_head
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
        """Samples a continuation. idx: (B, T) -> (B, T + max_new_tokens).

        temperature: divides the logits; 0 is greedy. top_k: sample from the k most probable tokens only.
        Raises ValueError for a negative temperature or a top_k below 1.
        """
        if temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"temperature = {temperature} must not be negative, top_k = {top_k} must be at least 1")
        for _ in range(max_new_tokens):
            logits = self(idx)[0][:, -1].float()
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)
            else:
                logits = logits / temperature
                if top_k is not None:
                    least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits = logits.masked_fill(logits < least, -math.inf)
                token = torch.multinomial(logits.softmax(-1), 1)
            idx = torch.cat((idx, token), dim=1)
        return idx
