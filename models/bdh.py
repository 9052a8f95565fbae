"""The Baby Dragon Hatchling (BDH, arXiv 2509.26507): its recurrent step, and the language model it was made for.

Letters in shapes: B sequences or images, T tokens, D = n_embd, H = n_head, N neurons a head, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import kernels

LN_EPS = 1e-5
WEIGHT_STD = 0.02  # of every weight under init="normal", and of embeddings, patch projection and head always


@dataclass(frozen=True, kw_only=True)
class CoreConfig:
    """What every BDH shares: the size of the step and its design choices."""

    n_layer: int = 6
    """how often the one step is repeated"""
    n_embd: int = 192
    """width D of a token"""
    n_head: int = 6
    """heads H; each has its own neurons"""
    mlp_internal_dim_multiplier: int = 32
    """neurons over all heads, as a multiple of n_embd"""
    dropout: float = 0.1
    """share of the gated neurons set to zero in training"""
    residual: Literal["post", "pre", "true_pre", "scaled_pre", "none"] = "post"
    """where the residual stream x is normalised"""
    attn_norm: bool = True
    """LN around the attention output"""
    update_norm: bool = True
    """LN around the update that is added to x"""
    attention: Literal["raw", "softmax"] = "raw"
    """what the scores q k^T go through"""
    init: Literal["normal", "xavier", "xavier_per_head"] = "normal"
    """distribution of the encoders and the decoder at the start"""

    def __post_init__(self):
        for name in ("n_layer", "n_embd", "n_head", "mlp_internal_dim_multiplier"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if not 0.0 <= self.dropout <= 0.99:
            raise ValueError(f"dropout = {self.dropout} must be between 0 and 0.99")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd} is not a multiple of n_head = {self.n_head}: change one of them")
        if self.n_neurons % 2:
            raise ValueError(
                f"{self.n_neurons} neurons a head (mlp_internal_dim_multiplier * n_embd / n_head) is odd, "
                "and rotary positions turn neurons in pairs: choose sizes that make it even"
            )

    @property
    def n_neurons(self) -> int:
        """N, neurons a head."""
        return self.mlp_internal_dim_multiplier * self.n_embd // self.n_head


@dataclass(frozen=True, kw_only=True)
class BDHConfig(CoreConfig):
    """The language model, with the defaults of its authors."""

    n_embd: int = 256
    """width D of a token"""
    n_head: int = 4
    """heads H; each has its own neurons"""
    mlp_internal_dim_multiplier: int = 128
    """neurons over all heads, as a multiple of n_embd"""
    vocab_size: int = 256
    """tokens the model knows: bytes"""

    def build(self) -> "BDH":
        return BDH(self)


def layer_norm(x: Tensor) -> Tensor:
    """LN over the last axis, without affine parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=LN_EPS)


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


class RotaryAttention(nn.Module):
    """Attention of x with Q = K = rope(x_sparse): no projections, so no parameters."""

    def __init__(self, n_neurons: int, softmax: bool, causal: bool):
        super().__init__()
        self.register_buffer("freqs", rope_frequencies(n_neurons).view(1, 1, 1, -1))
        self.softmax = softmax
        self.causal = causal
        self._tables: dict[tuple, tuple[Tensor, Tensor, Tensor]] = {}

    def angles(self, n_tokens: int) -> Tensor:
        """(T, N) in radians: the fraction of position times frequency, times 2 pi."""
        freqs = self.freqs.view(-1)
        turns = torch.arange(n_tokens, device=freqs.device, dtype=freqs.dtype)[:, None] * freqs
        return turns.frac() * (2 * math.pi)

    def tables(self, n_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """cos and sin (T, N) of the angles, for `rope`, and exp(i angle) (T, N / 2) of the pairs, for the fast path.

        Kept for the next call; one length at a time, since lengths rarely change.
        """
        key = (n_tokens, self.freqs.device, self.freqs.dtype)
        if key not in self._tables:
            with torch.inference_mode(False):  # else a table made in inference mode could not serve training later
                angles = self.angles(n_tokens)
                cos, sin = angles.cos(), angles.sin()
            self._tables = {key: (cos, sin, torch.complex(cos[:, 0::2], sin[:, 0::2]))}
        return self._tables[key]

    def queries(self, x_sparse: Tensor) -> Tensor:
        """q = k, x_sparse turned by position. x_sparse: (B, H, T, N), returned in that shape."""
        if torch.compiler.is_compiling():  # the compiler makes the tables part of its program
            angles = self.angles(x_sparse.shape[-2])
            return rope(x_sparse, angles.cos(), angles.sin())
        cos, sin, _ = self.tables(x_sparse.shape[-2])
        return rope(x_sparse, cos, sin)

    def scores(self, x_sparse: Tensor) -> Tensor:
        """(B, H, T, T), q k^T as it enters the product with x (or the softmax). x_sparse: (B, H, T, N)."""
        q = self.queries(x_sparse)
        return q @ q.mT

    def weights(self, x_sparse: Tensor) -> Tensor:
        """(B, H, T, T), the factors with which tokens enter the output: scores, masked, through the softmax if any.

        The causal model attends to keys strictly before the query: with raw scores the first token receives zero.
        """
        scores = self.scores(x_sparse)
        if self.softmax:
            scores = scores / math.sqrt(x_sparse.shape[-1])
            if self.causal:
                later = torch.ones_like(scores, dtype=torch.bool).triu()
                return scores.masked_fill(later, -math.inf).softmax(-1).nan_to_num()
            return scores.softmax(-1)
        return scores.tril(-1) if self.causal else scores

    def forward(self, x_sparse: Tensor, x: Tensor) -> Tensor:
        """x_sparse: (B, H, T, N), x: (B, T, D) -> (B, H, T, D)."""
        values = x.unsqueeze(1)
        if self.causal or self.softmax:
            return self.weights(x_sparse) @ values
        return kernels.raw_attention(self.queries(x_sparse), values)


class BDHCore(nn.Module):
    """The recurrent step with its three weights; models inherit it and add what goes in and what comes out."""

    def __init__(self, config: CoreConfig, causal: bool):
        super().__init__()
        H, D, N = config.n_head, config.n_embd, config.n_neurons
        self.config = config
        self.encoder = nn.Parameter(torch.empty(H, D, N))
        self.encoder_v = nn.Parameter(torch.empty(H, D, N))
        self.decoder = nn.Parameter(torch.empty(H * N, D))
        self.attn = RotaryAttention(N, softmax=config.attention == "softmax", causal=causal)
        self.level_input = nn.Identity()  # what enters each level passes here: hooks for looking inside attach to it
        if config.residual == "scaled_pre":
            self.level_norms = nn.ModuleList(nn.LayerNorm(D, eps=LN_EPS) for _ in range(config.n_layer + 1))
        self.use_fast_path = True
        self.reset_core()

    def reset_core(self) -> None:
        """Draws encoder, encoder_v and decoder by `init`."""
        H, D, N = self.encoder.shape
        bounds = {  # of the uniform distribution; "xavier" is what Xavier's rule makes of the tensors as shaped above
            "xavier": (math.sqrt(6 / (D * N + H * N)), math.sqrt(6 / (H * N + D))),
            "xavier_per_head": (math.sqrt(6 / (D + N)),) * 2,
        }
        if self.config.init == "normal":
            for weight in (self.encoder, self.encoder_v, self.decoder):
                nn.init.normal_(weight, std=WEIGHT_STD)
        else:
            encoder_bound, decoder_bound = bounds[self.config.init]
            nn.init.uniform_(self.encoder, -encoder_bound, encoder_bound)
            nn.init.uniform_(self.encoder_v, -encoder_bound, encoder_bound)
            nn.init.uniform_(self.decoder, -decoder_bound, decoder_bound)

    def levels(self, x: Tensor) -> Tensor:
        """All steps. x: (B, T, D) -> (B, T, D)."""
        residual = self.config.residual
        weights = self._compute_weights() if self._fast(x) else None
        if residual == "post":
            x = layer_norm(x)
        for level in range(self.config.n_layer):
            if residual == "post":
                x = layer_norm(x + self.update(x, weights))
            elif residual == "pre":
                x = layer_norm(x)
                x = x + self.update(x, weights)
            elif residual == "true_pre":
                x = x + self.update(layer_norm(x), weights)
            elif residual == "scaled_pre":
                x = x + self.update(self.scaled_norm(x, level), weights)
            else:
                x = x + self.update(x, weights)
        return self.scaled_norm(x, self.config.n_layer) if residual == "scaled_pre" else x

    def scaled_norm(self, x: Tensor, level: int) -> Tensor:
        """S_l of DESIGN's scaled_pre with l = level + 1: affine LN times 1 / sqrt(l)."""
        return self.level_norms[level](x) / math.sqrt(level + 1)

    def update(self, x: Tensor, weights: tuple[Tensor, ...] | None = None) -> Tensor:
        """f(x), what one step adds to the residual stream. x: (B, T, D) -> (B, T, D).

        weights: the three weights in the precision of the products, for the fast path; None takes the plain one.
        """
        x = self.level_input(x)
        if weights is None:
            y = self.plain_update(x)
        else:
            y = kernels.raw_update(
                x,
                (self.encoder, self.encoder_v, self.decoder),
                weights,
                self.attn.tables(x.shape[1])[-1],
                attn_eps=LN_EPS if self.config.attn_norm else None,
                dropout=self.config.dropout if self.training else 0.0,
            )
        return layer_norm(y) if self.config.update_norm else y

    def plain_update(self, x: Tensor) -> Tensor:
        """The step from x E to the decoder product, as its equations read. x: (B, T, D) -> (B, T, D)."""
        x_sparse = self.x_sparse(x)
        a = self.attn(x_sparse, x)
        if self.config.attn_norm:
            a = layer_norm(a)
        y_sparse = F.relu(torch.einsum("bhtd,hdn->bhtn", a, self.encoder_v))
        gated = F.dropout(x_sparse * y_sparse, self.config.dropout, self.training)
        decoder = self.decoder.view(self.config.n_head, -1, self.config.n_embd)  # (H, N, D)
        return torch.einsum("bhtn,hnd->btd", gated, decoder)

    def x_sparse(self, x: Tensor) -> Tensor:
        """relu(x E). x: (B, T, D) -> (B, H, T, N), one (B T, D) x (D, H N) product for all heads."""
        return F.relu(torch.einsum("btd,hdn->bhtn", x, self.encoder))

    def _fast(self, x: Tensor) -> bool:
        """Whether `kernels.raw_update` serves this setting. A compiler fuses the plain path itself."""
        plain_only = self.attn.causal or self.attn.softmax or torch.compiler.is_compiling()
        return self.use_fast_path and not plain_only and x.device.type in ("cpu", "cuda")

    def _compute_weights(self) -> tuple[Tensor, ...]:
        """encoder, encoder_v, decoder in autocast's precision, cast once for all levels."""
        weights = (self.encoder, self.encoder_v, self.decoder)
        device = self.encoder.device.type
        if torch.is_autocast_enabled(device):
            return tuple(weight.detach().to(torch.get_autocast_dtype(device)) for weight in weights)
        return tuple(weight.detach() for weight in weights)


class BDH(BDHCore):
    """The language model. Parameter names and shapes are the authors', so checkpoints of their implementation load."""

    def __init__(self, config: BDHConfig):
        super().__init__(config, causal=True)
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.lm_head = nn.Parameter(torch.empty(config.n_embd, config.vocab_size))
        nn.init.normal_(self.embed.weight, std=WEIGHT_STD)
        nn.init.normal_(self.lm_head, std=WEIGHT_STD)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """idx, targets: (B, T) token numbers -> logits (B, T, V), mean cross-entropy in nats or None."""
        logits = self.levels(self.embed(idx)) @ self.lm_head
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
        """Samples a continuation. idx: (B, T) -> (B, T + max_new_tokens).

        temperature divides the logits; 0 takes the most probable token. top_k samples among the k most probable only.
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
