"""Attention of the BDH step: queries and keys are neuron activities with rotary positions, values are the tokens.

Letters in shapes: B sequences or images, T tokens, H heads, N neurons per head, D width of a token.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import kernels


def rope_frequencies(n_neurons: int) -> Tensor:
    """(N,) float32, turns per position: (2 ** 16) ** (-2 floor(j / 2) / N) / (2 pi), equal within a pair (RoPE)."""
    pair = torch.arange(n_neurons, dtype=torch.float32) // 2
    return (2.0**16) ** (-2 * pair / n_neurons) / (2 * math.pi)


def rope(v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair (e, o) of even and odd neighbours to (e cos - o sin, o cos + e sin).

    v: (..., T, N); cos, sin: (T, N), equal within a pair; their dtype sets the precision. Returns v's shape and dtype.
    """
    quarter_turn = torch.stack((-v[..., 1::2], v[..., 0::2]), dim=-1).flatten(-2)
    return (v * cos + quarter_turn * sin).to(v.dtype)


def axial_sizes(n_neurons: int, axes: int) -> list[int]:
    """Neurons that rotate by each axis of the grid: even numbers, as equal as possible; the first axis has the rest."""
    each = n_neurons // (2 * axes) * 2
    return [n_neurons - each * (axes - 1), *[each] * (axes - 1)]


class Tables(NamedTuple):
    """Cached rotations for T positions."""

    cos: Tensor
    """(T, N), cosines of the angles; (H, T, N) where each head has its own frequencies"""
    sin: Tensor
    """like cos, sines of the angles"""
    phases: Tensor | None
    """(T, N / 2) or (H, 1, T, N / 2), exp(i angle) of each pair, for the fast path; None under torch.compile"""


class RotaryAttention(nn.Module):
    """Attention with neuron activities as queries and keys and tokens as values; it has no parameters.

    softmax: softmax(q k^T / sqrt(N)) instead of q k^T. causal: only keys strictly before the query.
    rotary: selects the angles, see `CoreConfig`; the caller rotates q and k with `tables`. attend_self: raw scores of a
    token with itself count. axes: of the grid of tokens, 2 in images and 3 in clips.

    The buffer `freqs` is (1, 1, 1, N), the same for all heads. Loading weights of a pruned model makes it (1, H, 1, N).
    """

    def __init__(
        self,
        n_neurons: int,
        softmax: bool,
        causal: bool,
        rotary: str = "raster",
        attend_self: bool = True,
        axes: int = 2,
    ):
        super().__init__()
        if rotary == "axial":  # rows and columns have half of the pairs each, with the full range of frequencies
            freqs = torch.cat([rope_frequencies(size) for size in axial_sizes(n_neurons, axes)])
        else:
            freqs = rope_frequencies(n_neurons)
        self.register_buffer("freqs", freqs.view(1, 1, 1, -1))
        self.softmax = softmax
        self.causal = causal
        self.rotary = rotary
        self.attend_self = attend_self
        self.axes = axes
        self._tables: dict[tuple, Tables] = {}

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        freqs = state_dict.get(f"{prefix}freqs")
        if freqs is not None and freqs.dim() == 4 and freqs.shape[::2] == (1, 1):
            self.freqs = self.freqs[:, :1].expand(1, freqs.shape[1], 1, -1).clone()
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._tables = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryAttention":
        """Moves and converts the module. Frequencies keep at least float32: positions times them need it."""
        before = self.freqs
        super()._apply(fn, recurse)
        if self.freqs.dtype.itemsize < 4:
            self.freqs = before.to(self.freqs.device)
        return self

    def angles(self, n_tokens: int, grid: tuple[int, ...] | None = None) -> Tensor:
        """Rotation angles (T, N), or (H, T, N), in radians: 2 pi frac(position * frequency). grid: see `tables`."""
        freqs = self.freqs[0, 0] if self.freqs.shape[1] == 1 else self.freqs[0]  # (1, N) or (H, 1, N)
        index = torch.arange(n_tokens, device=freqs.device, dtype=freqs.dtype)
        if self.rotary != "axial":
            turns = index[:, None] * freqs
        else:
            extra = n_tokens - math.prod(grid)
            place, places = (index - extra).clamp(min=0), []
            for extent in grid[:0:-1]:  # the last axis runs fastest
                places.insert(0, place % extent)
                place = place.div(extent, rounding_mode="floor")
            places.insert(0, place)
            if extra:  # the class token is at (0, 0), patches start at (1, 1)
                places = [(each + 1) * (index >= extra) for each in places]
            by_axis = freqs.split(axial_sizes(freqs.shape[-1], self.axes), dim=-1)
            turns = torch.cat([each[:, None] * by for each, by in zip(places, by_axis, strict=True)], dim=-1)
        return turns.frac() * (2 * math.pi)

    def tables(self, n_tokens: int, grid: tuple[int, ...] | None = None) -> Tables | None:
        """Rotation tables, cached for the last shape; None for rotary = none.

        grid: (rows, columns) of the patches, which are the last rows * columns tokens, or (frames, rows, columns);
        needed for axial only.
        """
        if self.rotary == "none":
            return None
        if torch.compiler.is_compiling():  # the tables become part of the compiled graph
            angles = self.angles(n_tokens, grid)
            return Tables(angles.cos(), angles.sin(), None)
        if self._is_captured():  # a CUDA graph needs tables that last as long as it does
            return self._make_tables(n_tokens, grid)
        key = (n_tokens, grid, self.freqs.device, self.freqs.dtype)
        if key not in self._tables:
            with torch.inference_mode(False):  # a cached inference tensor could not be used in training
                self._tables = {key: self._make_tables(n_tokens, grid)}
        return self._tables[key]

    def _is_captured(self) -> bool:
        return self.freqs.is_cuda and torch.cuda.is_current_stream_capturing()

    def _make_tables(self, n_tokens: int, grid: tuple[int, ...] | None) -> Tables:
        angles = self.angles(n_tokens, grid)
        cos, sin = angles.cos(), angles.sin()
        phases = torch.complex(cos[..., 0::2], sin[..., 0::2])
        return Tables(cos, sin, phases if phases.dim() == 2 else phases[:, None])

    def weights(self, q: Tensor, k: Tensor, first: int = 0) -> Tensor:
        """Attention weights (B, H, Q, T): masked scores, after the softmax if there is one.

        q: (B, H, Q, N), queries of the tokens first, first + 1, ...; k: (B, H, T, N). Causal attention sees only keys
        strictly before the query, so the first token's weights are all zero.
        """
        scores = q @ k.mT
        if self.softmax:
            scores = scores / math.sqrt(q.shape[-1])
            if self.causal:
                later = torch.ones_like(scores, dtype=torch.bool).triu(first)
                return scores.masked_fill(later, -math.inf).softmax(-1).nan_to_num()
            return scores.softmax(-1)
        if self.causal:
            return scores.tril(first - 1)
        return scores if self.attend_self else scores - scores.tril(first).triu(first)

    def forward(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        """q, k: (B, H, T, N), x: (B, T, D) -> (B, H, T, D)."""
        values = x.unsqueeze(1)
        if self.causal:
            return self.weights(q, k) @ values
        if self.softmax:  # scales by 1 / sqrt(N); a CPU stores T x T scores unless N = D
            return F.scaled_dot_product_attention(q, k, values.expand(-1, q.shape[1], -1, -1))
        a = kernels.raw_attention(q, k, values)
        return a if self.attend_self else a - (q * k).sum(-1, keepdim=True) * values
