"""The Baby Dragon Hatchling (BDH, arXiv 2509.26507): its recurrent step, and the language model it was made for.

Letters in shapes: B sequences or images, T tokens, D = n_embd, H = n_head, N neurons a head, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models import kernels
from models.rotary import RotaryAttention, Tables, rope

LN_EPS = 1e-5
WEIGHT_STD = 0.02  # of every weight under init="normal", and of embeddings, patch projection and head always
ACTIVATIONS = {"relu": F.relu, "relu2": lambda v: F.relu(v).square(), "gelu": F.gelu}


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
    qk: Literal["tied", "separate"] = "tied"
    """keys are the queries, or come from an encoder of their own (the gate keeps the queries' neurons)"""
    gate: Literal["multiplicative", "sigmoid", "none"] = "multiplicative"
    """what multiplies y_sparse: x_sparse, sigmoid(x E), or nothing"""
    activation: Literal["relu", "relu2", "gelu"] = "relu"
    """of the neurons, in both places"""
    init: Literal["normal", "xavier", "xavier_per_head"] = "normal"
    """distribution of the encoders and the decoder at the start"""
    rotary: Literal["raster", "axial", "none"] = "raster"
    """what turns the neurons: the token's index, its row and its column, or nothing"""
    shared: bool = True
    """one set of weights for all levels, or one a level"""

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
        if self.rotary == "axial" and self.n_neurons % 4:
            raise ValueError(
                f"rotary = axial turns one half of the pairs by the row, the other by the column, but {self.n_neurons} "
                "neurons a head make an odd number of pairs: choose sizes that make neurons a multiple of 4"
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

    def __post_init__(self):
        super().__post_init__()
        if self.rotary == "axial":
            raise ValueError("rotary = axial needs rows and columns, and text has none: use raster or none")

    def build(self) -> "BDH":
        return BDH(self)


def layer_norm(x: Tensor) -> Tensor:
    """LN over the last axis, without affine parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=LN_EPS)


class StepWeights(NamedTuple):
    """The weights of one step."""

    encoder: Tensor
    """(H, D, N)"""
    encoder_v: Tensor
    """(H, D, N)"""
    decoder: Tensor
    """(H N, D)"""
    encoder_k: Tensor | None = None
    """(H, D, N), where keys have an encoder of their own"""


class Activity(NamedTuple):
    """Of the neurons in one step; (B, H, T, N) each."""

    x_sparse: Tensor
    """what the token itself excites"""
    y_sparse: Tensor
    """what attention excites"""
    gated: Tensor
    """both together, by the gate: what the decoder reads, before dropout"""


class BDHCore(nn.Module):
    """The recurrent step with its weights; models inherit it and add what goes in and what comes out."""

    def __init__(self, config: CoreConfig, causal: bool):
        super().__init__()
        H, D, N = config.n_head, config.n_embd, config.n_neurons
        sets = () if config.shared else (config.n_layer,)
        self.config = config
        self.encoder = nn.Parameter(torch.empty(*sets, H, D, N))
        self.encoder_v = nn.Parameter(torch.empty(*sets, H, D, N))
        self.decoder = nn.Parameter(torch.empty(*sets, H * N, D))
        if config.qk == "separate":
            self.encoder_k = nn.Parameter(torch.empty(*sets, H, D, N))
        self.attn = RotaryAttention(N, config.attention == "softmax", causal, config.rotary)
        self.activation = ACTIVATIONS[config.activation]
        # what enters each level and what leaves it pass here: hooks for looking inside attach to them
        self.level_input, self.level_output = nn.Identity(), nn.Identity()
        if config.residual == "scaled_pre":
            self.level_norms = nn.ModuleList(nn.LayerNorm(D, eps=LN_EPS) for _ in range(config.n_layer + 1))
        self.use_fast_path = True
        self.recompute = False  # keep little of a level for the backward pass, and compute it again there
        self.reset_core()

    def reset_core(self) -> None:
        """Draws encoders and decoder by `init`."""
        H, D, N = self.encoder.shape[-3:]
        bounds = {  # of the uniform distribution; "xavier" is what Xavier's rule makes of the tensors as shaped above
            "xavier": (math.sqrt(6 / (D * N + H * N)), math.sqrt(6 / (H * N + D))),
            "xavier_per_head": (math.sqrt(6 / (D + N)),) * 2,
        }
        for name in StepWeights._fields:
            weight = getattr(self, name, None)
            if weight is None:
                continue
            if self.config.init == "normal":
                nn.init.normal_(weight, std=WEIGHT_STD)
            else:
                bound = bounds[self.config.init][name == "decoder"]
                nn.init.uniform_(weight, -bound, bound)

    def step_weights(self) -> list[StepWeights]:
        """The weights of every level: the same ones n_layer times, where they are shared."""
        weights = [self.encoder, self.encoder_v, self.decoder]
        if self.config.qk == "separate":
            weights.append(self.encoder_k)
        if self.config.shared:
            return [StepWeights(*weights)] * self.config.n_layer
        return [StepWeights(*each) for each in zip(*(weight.unbind() for weight in weights), strict=True)]

    def levels(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """All steps. x: (B, T, D) -> (B, T, D). grid: (rows, columns) of the patches, for axial positions."""
        return self.states(x, grid)[-1]

    def states(self, x: Tensor, grid: tuple[int, int] | None = None) -> list[Tensor]:
        """The residual stream after each level, n_layer times (B, T, D); scaled_pre normalises the last."""
        residual = self.config.residual
        tables = self.attn.tables(x.shape[1], grid)
        weights = self.step_weights()
        fast = self.has_fast_path(x.device, x.shape[1]) and not torch.compiler.is_compiling()  # it fuses the plain path
        products = self._in_compute_precision(weights) if fast else [None] * len(weights)
        states = []
        if residual == "post":
            x = layer_norm(x)
        for level in range(self.config.n_layer):
            step = (weights[level], tables, products[level])
            if residual == "post":
                x = layer_norm(x + self.update(x, *step))
            elif residual == "pre":
                x = layer_norm(x)
                x = x + self.update(x, *step)
            elif residual == "true_pre":
                x = x + self.update(layer_norm(x), *step)
            elif residual == "scaled_pre":
                x = x + self.update(self.scaled_norm(x, level), *step)
            else:
                x = x + self.update(x, *step)
            x = self.level_output(x)
            states.append(x)
        states[-1] = self.finished(x)
        return states

    def finished(self, x: Tensor) -> Tensor:
        """The stream of any level as the last one gives it on: scaled_pre normalises it once more. (B, T, D)."""
        return self.scaled_norm(x, self.config.n_layer) if self.config.residual == "scaled_pre" else x

    def scaled_norm(self, x: Tensor, level: int) -> Tensor:
        """S_l of DESIGN's scaled_pre with l = level + 1: affine LN times 1 / sqrt(l)."""
        return self.level_norms[level](x) / math.sqrt(level + 1)

    def update(
        self, x: Tensor, weights: StepWeights, tables: Tables | None, products: StepWeights | None = None
    ) -> Tensor:
        """f(x), what one step adds to the residual stream. x: (B, T, D) -> (B, T, D).

        products: the weights in the precision of the products, for the fast path; None takes the plain one.
        """
        x = self.level_input(x)
        if products is None and self.recompute and torch.is_grad_enabled():
            y = checkpoint(self.plain_update, x, weights, tables, use_reentrant=False)
        elif products is None:
            y = self.plain_update(x, weights, tables)
        else:
            y = kernels.fast_update(
                x,
                weights[:3],
                products[:3],
                tables.phases,
                attn_eps=LN_EPS if self.config.attn_norm else None,
                dropout=self.config.dropout if self.training else 0.0,
                softmax=self.config.attention == "softmax",
                recompute=self.recompute,
            )
        return layer_norm(y) if self.config.update_norm else y

    def plain_update(self, x: Tensor, weights: StepWeights, tables: Tables | None) -> Tensor:
        """The step from x E to the decoder product, as its equations read. x: (B, T, D) -> (B, T, D)."""
        gated = F.dropout(self.activity(x, weights, tables).gated, self.config.dropout, self.training)
        decoder = weights.decoder.view(self.config.n_head, -1, self.config.n_embd)  # (H, N, D)
        return torch.einsum("bhtn,hnd->btd", gated, decoder)

    def activity(self, x: Tensor, weights: StepWeights, tables: Tables | None) -> Activity:
        """What the neurons of a step do. x: (B, T, D), its input."""
        before = _all_heads(x, weights.encoder)  # (B, H, T, N)
        x_sparse = self.activation(before)
        a = self.attn(*self.queries_and_keys(x, x_sparse, weights, tables), x)
        if self.config.attn_norm:
            a = layer_norm(a)
        y_sparse = self.activation(torch.einsum("bhtd,hdn->bhtn", a, weights.encoder_v))
        if self.config.gate == "multiplicative":
            return Activity(x_sparse, y_sparse, x_sparse * y_sparse)
        if self.config.gate == "sigmoid":
            return Activity(x_sparse, y_sparse, before.sigmoid() * y_sparse)
        return Activity(x_sparse, y_sparse, y_sparse)

    def queries_and_keys(
        self, x: Tensor, x_sparse: Tensor, weights: StepWeights, tables: Tables | None
    ) -> tuple[Tensor, Tensor]:
        """q and k, both (B, H, T, N), turned by position. x: (B, T, D), x_sparse: (B, H, T, N)."""

        def turned(v: Tensor) -> Tensor:
            return v if tables is None else rope(v, tables.cos, tables.sin)

        q = turned(x_sparse)
        if weights.encoder_k is None:
            return q, q
        return q, turned(self.activation(_all_heads(x, weights.encoder_k)))

    def attention_weights(
        self, x: Tensor, level: int, grid: tuple[int, int] | None = None, queries: slice = slice(None)
    ) -> Tensor:
        """(B, H, T, T), with which factor each query (row) receives each key at a level. x: (B, T, D), its input.

        queries: of these tokens only, one after the other: (B, H, Q, T).
        """
        weights = self.step_weights()[level]
        x_sparse = self.activation(_all_heads(x, weights.encoder))
        q, k = self.queries_and_keys(x, x_sparse, weights, self.attn.tables(x.shape[1], grid))
        first, _, _ = queries.indices(x.shape[1])
        return self.attn.weights(q[:, :, queries], k, first)

    def level_activity(self, x: Tensor, level: int, grid: tuple[int, int] | None = None) -> Activity:
        """What the neurons do at a level. x: (B, T, D), its input."""
        return self.activity(x, self.step_weights()[level], self.attn.tables(x.shape[1], grid))

    def has_fast_path(self, device: torch.device, n_tokens: int = 0) -> bool:
        """Whether `kernels.fast_update` serves this setting there, with so many tokens; 0 for few.

        Softmax over many tokens is left to the library where it has a kernel that holds no T x T matrix: on CUDA, and
        on a CPU where keys and values are equally wide, N = D.
        """
        config = self.config
        design = (config.qk, config.gate, config.activation)
        serves = design == ("tied", "multiplicative", "relu") and config.rotary != "none" and not self.attn.causal
        if config.attention == "softmax" and (device.type == "cuda" or config.n_neurons == config.n_embd):
            serves = serves and kernels.scores_are_cheaper(n_tokens, config.n_neurons, config.n_embd)
        return self.use_fast_path and serves and device.type in ("cpu", "cuda")

    def _in_compute_precision(self, weights: list[StepWeights]) -> list[StepWeights]:
        """The weights in autocast's precision, without gradient; shared ones are cast once for all levels."""
        device = self.encoder.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.encoder.dtype

        def cast(step: StepWeights) -> StepWeights:
            return StepWeights(*(weight.detach().to(dtype) for weight in step[:3]))

        return [cast(weights[0])] * len(weights) if self.config.shared else [cast(step) for step in weights]


def _all_heads(x: Tensor, encoder: Tensor) -> Tensor:
    """x E of all heads as one (B T, D) x (D, H N) product. x: (B, T, D), encoder: (H, D, N) -> (B, H, T, N)."""
    return torch.einsum("btd,hdn->bhtn", x, encoder)


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
