"""Attention of the BDH step: neurons turned by position, compared with each other.

Letters in shapes: B sequences or images, T tokens, H heads, N neurons a head, D width of a token.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import kernels


def rope_frequencies(n_neurons: int, theta: float = 2.0**16) -> Tensor:
    """(N,) float32, turns per position: theta ** (-2 floor(j / 2) / N) / (2 pi); neighbours share one."""
    pair = torch.arange(n_neurons, dtype=torch.float32) // 2
    return theta ** (-2 * pair / n_neurons) / (2 * math.pi)


def rope(v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (e, o) of even and odd neighbours to (e cos - o sin, o cos + e sin).

    v: (..., T, N); cos, sin: (T, N), equal within a pair, in the precision to compute in. Returns v's shape and dtype.
    """
    turned = torch.stack((-v[..., 1::2], v[..., 0::2]), dim=-1).flatten(-2)
    return (v * cos + turned * sin).to(v.dtype)


class Tables(NamedTuple):
    """What turns the neurons of T tokens; T rows, one for each."""

    cos: Tensor
    """(T, N), of the angles"""
    sin: Tensor
    """(T, N)"""
    phases: Tensor | None
    """(T, N / 2), exp(i angle) of the pairs, for the fast path; None for a compiler, which does without"""


class RotaryAttention(nn.Module):
    """Attention of x by the neurons' activity, turned by position: no projections, so no parameters."""

    def __init__(self, n_neurons: int, softmax: bool, causal: bool, rotary: str = "raster"):
        super().__init__()
        if rotary == "axial":  # rows and columns each have the whole range of frequencies, on their half of the pairs
            freqs = rope_frequencies(n_neurons // 2).repeat(2)
        else:
            freqs = rope_frequencies(n_neurons)
        self.register_buffer("freqs", freqs.view(1, 1, 1, -1))
        self.softmax = softmax
        self.causal = causal
        self.rotary = rotary
        self._tables: dict[tuple, Tables] = {}

    def angles(self, n_tokens: int, grid: tuple[int, int] | None = None) -> Tensor:
        """(T, N) in radians: the fraction of position times frequency, times 2 pi. grid: see `tables`."""
        freqs = self.freqs.view(-1)
        index = torch.arange(n_tokens, device=freqs.device, dtype=freqs.dtype)
        if self.rotary != "axial":
            turns = index[:, None] * freqs
        else:
            rows, columns = grid
            extra = n_tokens - rows * columns
            place = (index - extra).clamp(min=0)
            row, column = place.div(columns, rounding_mode="floor"), place % columns
            if extra:  # the class token stands at (0, 0), outside the grid of patches
                row, column = ((each + 1) * (index >= extra) for each in (row, column))
            by_row, by_column = freqs.chunk(2)
            turns = torch.cat((row[:, None] * by_row, column[:, None] * by_column), dim=1)
        return turns.frac() * (2 * math.pi)

    def tables(self, n_tokens: int, grid: tuple[int, int] | None = None) -> Tables | None:
        """Kept for the next call; one shape at a time, since shapes rarely change. None where nothing is turned.

        grid: (rows, columns) of the patches, which are the last rows * columns of the tokens; only axial needs it.
        """
        if self.rotary == "none":
            return None
        if torch.compiler.is_compiling():  # the compiler makes the tables part of its program
            angles = self.angles(n_tokens, grid)
            return Tables(angles.cos(), angles.sin(), None)
        key = (n_tokens, grid, self.freqs.device, self.freqs.dtype)
        if key not in self._tables:
            with torch.inference_mode(False):  # else a table made in inference mode could not serve training later
                angles = self.angles(n_tokens, grid)
                cos, sin = angles.cos(), angles.sin()
            self._tables = {key: Tables(cos, sin, torch.complex(cos[:, 0::2], sin[:, 0::2]))}
        return self._tables[key]

    def weights(self, q: Tensor, k: Tensor, first: int = 0) -> Tensor:
        """(B, H, Q, T), the factors with which tokens enter the output: scores, masked, through the softmax if any.

        q: (B, H, Q, N), of the tokens from the one numbered first on; k: (B, H, T, N). The causal model attends to keys
        strictly before the query: with raw scores the first token receives zero.
        """
        scores = q @ k.mT
        if self.softmax:
            scores = scores / math.sqrt(q.shape[-1])
            if self.causal:
                later = torch.ones_like(scores, dtype=torch.bool).triu(first)
                return scores.masked_fill(later, -math.inf).softmax(-1).nan_to_num()
            return scores.softmax(-1)
        return scores.tril(first - 1) if self.causal else scores

    def forward(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        """q, k: (B, H, T, N), x: (B, T, D) -> (B, H, T, D)."""
        values = x.unsqueeze(1)
        if self.causal:
            return self.weights(q, k) @ values
        if self.softmax:  # scaled by 1 / sqrt(N); holds T x T scores on a CPU unless N = D
            return F.scaled_dot_product_attention(q, k, values.expand(-1, q.shape[1], -1, -1))
        return kernels.raw_attention(q, k, values)
