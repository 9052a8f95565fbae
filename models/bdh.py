"""The recurrent step of the Baby Dragon Hatchling (BDH, arXiv 2509.26507), common to all BDH models.

Letters in shapes: B sequences or images, T tokens, D = n_embd, H = n_head, N neurons per head.

A design choice is a field of `CoreConfig` and its line in one of the methods of `BDHCore`: `queries_and_keys`,
`scaled_query`, `activity`, `plain_update`, `update`, `level_update`, `carried`, `mixed` or `states`, or in
`RotaryAttention`. The fast path is taken only for the fields and values in `kernels.FAST_PATH_SERVES`; with any other
field away from its default, the model takes the plain path by itself.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import stochastic_depth

from models import kernels
from models.rotary import RotaryAttention, Tables, rope

LN_EPS = 1e-5
WEIGHT_STD = 0.02  # of weights with init="normal"; of embeddings, positions, tokens and a language model's head always
ACTIVATIONS = {"relu": F.relu, "relu2": lambda v: F.relu(v).square(), "gelu": F.gelu}


@dataclass(frozen=True, kw_only=True)
class CoreConfig:
    """Size and design choices of the BDH step, common to all BDH models."""

    axes: ClassVar[int] = 2  # of the grid of tokens, for rotary = axial

    n_layer: int = 6
    """number of levels: how many times the step is applied"""
    n_embd: int = 192
    """embedding width D of a token"""
    n_head: int = 6
    """attention heads; each has its own neurons"""
    mlp_internal_dim_multiplier: int = 32
    """total number of neurons, over all heads, as a multiple of n_embd"""
    dropout: float = 0.1
    """dropout probability of the gated neurons"""
    drop_path: float = 0.0
    """stochastic depth: probability of skipping the last level's update for an image; lower levels in proportion"""
    residual: Literal["post", "pre", "true_pre", "scaled_pre", "none"] = "post"
    """how the step f updates the residual stream x:
    post: x = LN(x + f(x));
    pre: x = LN(x), then x = x + f(x);
    true_pre: x = x + f(LN(x));
    scaled_pre: x = x + f(LN(x) / sqrt(level)), with a learned LN per level;
    none: x = x + f(x)"""
    attn_norm: bool = True
    """apply LayerNorm to the attention output"""
    update_norm: bool = True
    """apply LayerNorm to the update before it is added to x"""
    attention: Literal["raw", "softmax"] = "raw"
    """attention weights: q k^T without scale (raw), or softmax(q k^T / sqrt(N))"""
    qk: Literal["tied", "separate"] = "tied"
    """use the queries as keys (tied), or compute keys with a second encoder"""
    gate: Literal["multiplicative", "sigmoid", "none"] = "multiplicative"
    """what multiplies the attention-driven neurons: the token-driven neurons, sigmoid(x E), or nothing"""
    activation: Literal["relu", "relu2", "gelu"] = "relu"
    """activation function of the neurons; relu2 is the square of relu"""
    init: Literal["normal", "xavier", "xavier_per_head"] = "normal"
    """initial weights:
    normal: N(0, 0.02);
    xavier: uniform; encoders and decoder with fan-in and fan-out of the stacked weight tensors;
    xavier_per_head: encoders and decoder uniform, with fan-in and fan-out of one head"""
    rotary: Literal["raster", "axial", "none"] = "raster"
    """rotary positions: by token index (raster), by row and column of the patch (axial), or none"""
    shared: bool = True
    """use the same weights at every level instead of separate weights per level"""
    level_gain: bool = False
    """scale and shift each level's input by a learned gain and bias per channel, so that levels can differ"""
    update_gain: float | None = None
    """initial value of a learned gain of the update, per level and channel (LayerScale); default: no gain"""
    depth_mix: bool = False
    """start each level from a learned weighted sum of all earlier states; initially it is the last state"""
    attend_self: bool = True
    """let each token attend to itself; without, the diagonal of the raw scores is zero"""
    qk_norm: bool = False
    """scale each query to length sqrt(N) before the scores"""

    def __post_init__(self):
        for name in ("n_layer", "n_embd", "n_head", "mlp_internal_dim_multiplier"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"drop_path = {self.drop_path} must be at least 0 and below 1")
        if not 0.0 <= self.dropout <= 0.99:
            raise ValueError(f"dropout = {self.dropout} must be between 0 and 0.99")
        if not self.attend_self and self.attention == "softmax":
            raise ValueError("attend_self = False is for raw attention: leave it out, or set attention = raw")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd} is not a multiple of n_head = {self.n_head}: change one of them")
        if self.n_neurons % 2:
            raise ValueError(
                f"{self.n_neurons} neurons per head (mlp_internal_dim_multiplier * n_embd / n_head) is odd, "
                "but rotary positions rotate neurons in pairs: choose sizes that make it even"
            )
        if self.rotary == "axial" and self.n_neurons % 4:
            raise ValueError(
                f"rotary = axial rotates half of the neuron pairs by row and half by column, but {self.n_neurons} "
                "neurons per head are an odd number of pairs: choose sizes that make the neurons a multiple of 4"
            )

    @property
    def n_neurons(self) -> int:
        """N, neurons per head."""
        return self.mlp_internal_dim_multiplier * self.n_embd // self.n_head

    @property
    def rotary_parts(self) -> int:
        """Parts of a head's neurons that rotate by axes of their own; 1 if all rotate by the index, or none."""
        return self.axes if self.rotary == "axial" else 1

    def drop_probability(self, level: int) -> float:
        """Probability with which stochastic depth drops a level's update; it grows linearly up to drop_path."""
        return self.drop_path * (level + 1) / self.n_layer


def layer_norm(x: Tensor, eps: float = LN_EPS) -> Tensor:
    """LN over the last axis, without affine parameters."""
    if x.dtype == torch.float16:  # in float32: on a CPU, one over the deviation overflows for small x
        return F.layer_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], eps=eps)


class StepWeights(NamedTuple):
    """Weights of one level."""

    encoder: Tensor
    """(H, D, N)"""
    encoder_v: Tensor
    """(H, D, N)"""
    decoder: Tensor
    """(H N, D)"""
    encoder_k: Tensor | None = None
    """(H, D, N), with qk = separate only"""


class Activity(NamedTuple):
    """Neuron activity in one step; (B, H, T, N) each."""

    x_sparse: Tensor
    """driven by the token itself"""
    y_sparse: Tensor
    """driven by the attention output"""
    gated: Tensor
    """y_sparse after the gate; the decoder's input, before dropout"""


class BDHCore(nn.Module):
    """The recurrent step and its weights. Models inherit from it and add input embedding and output head."""

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
        self.attn = RotaryAttention(
            N, config.attention == "softmax", causal, config.rotary, config.attend_self, config.axes
        )
        self.activation = ACTIVATIONS[config.activation]
        # identity modules: the recorder's hook points at the input and the output of each level
        self.level_input, self.level_output = nn.Identity(), nn.Identity()
        if config.residual == "scaled_pre":
            self.level_norms = nn.ModuleList(nn.LayerNorm(D, eps=LN_EPS) for _ in range(config.n_layer + 1))
        if config.level_gain:
            self.level_gain = _vectors(config.n_layer, torch.ones(D))
            self.level_bias = _vectors(config.n_layer, torch.zeros(D))
        if config.update_gain is not None:
            self.update_gain = _vectors(config.n_layer, torch.full((D,), config.update_gain))
        if config.depth_mix:  # a weight for each earlier state, for the levels after the first
            lasts = (torch.tensor([0.0] * level + [1.0]) for level in range(1, config.n_layer))
            self.level_mix = nn.ParameterList(map(nn.Parameter, lasts))
        self.use_fast_path = True
        self.recompute = False  # activation checkpointing: less memory, more compute
        plain_step = ("plain_update", "activity", "queries_and_keys", "encode", "encode_attended", "decode")
        overridden = any(getattr(type(self), name) is not getattr(BDHCore, name) for name in plain_step)
        self._fast_path_serves = kernels.serves(config) and not overridden
        self.reset_core()

    def reset_core(self) -> None:
        """Draws initial encoders and decoder as `init` says."""
        H, D, N = self.encoder.shape[-3:]
        bounds = {  # uniform bounds; "xavier" is Xavier's rule applied to the stacked tensors (H, D, N) and (H N, D)
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
        """Weights of each level; if shared, the same ones n_layer times."""
        weights = [self.encoder, self.encoder_v, self.decoder]
        if self.config.qk == "separate":
            weights.append(self.encoder_k)
        if self.config.shared:
            return [StepWeights(*weights)] * self.config.n_layer
        return [StepWeights(*each) for each in zip(*(weight.unbind() for weight in weights), strict=True)]

    def levels(self, x: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        """Applies all levels. x: (B, T, D) -> (B, T, D). grid: (rows, columns) of the patches, for axial positions."""
        return self.states(x, grid)[-1]

    def states(self, x: Tensor, grid: tuple[int, ...] | None = None) -> list[Tensor]:
        """Residual stream after each level: n_layer tensors (B, T, D); the last one has passed `finished`."""
        residual = self.config.residual
        tables = self.attn.tables(x.shape[1], grid)
        weights = self.step_weights()
        fast = self.has_fast_path(x.device, x.shape[1]) and not torch.compiler.is_compiling()  # it fuses the plain path
        products = self._in_compute_precision(weights) if fast else [None] * len(weights)
        states = []
        if residual == "post":
            x = layer_norm(x)
        start = x
        for level in range(self.config.n_layer):
            step = (level, weights[level], tables, products[level])
            x = self.mixed(self.carried([start, *states]), level, grid)
            if residual == "post":
                x = layer_norm(x + self.level_update(x, *step))
            elif residual == "pre":
                x = layer_norm(x)
                x = x + self.level_update(x, *step)
            elif residual == "true_pre":
                x = x + self.level_update(layer_norm(x), *step)
            elif residual == "scaled_pre":
                x = x + self.level_update(self.scaled_norm(x, level), *step)
            else:
                x = x + self.level_update(x, *step)
            x = self.level_output(x)
            states.append(x)
        states[-1] = self.finished(x)
        return states

    def carried(self, states: list[Tensor]) -> Tensor:
        """What the next level starts from; depth_mix as in DenseFormer (Pagliardini et al. 2024, arXiv 2402.02622).

        states: (B, T, D) each, the embedded tokens and the state after each level so far.
        """
        if not self.config.depth_mix or len(states) == 1:
            return states[-1]
        weights = self.level_mix[len(states) - 2]
        return sum(weight * state for weight, state in zip(weights, states, strict=True))

    def mixed(self, x: Tensor, level: int, grid: tuple[int, ...] | None) -> Tensor:
        """The residual stream before a level's norm; models on images may mix neighbouring tokens here."""
        return x

    def level_update(self, x: Tensor, level: int, *step: Any) -> Tensor:
        """What a level adds to the residual stream: f(x) with the level's own gains, and with stochastic depth.

        Stochastic depth (Huang et al. 2016, arXiv 1603.09382) drops a sample's update, and scales the kept ones.
        """
        if self.config.level_gain:
            x = torch.addcmul(self.level_bias[level], x, self.level_gain[level])
        update = self.update(x, *step)
        if self.config.update_gain is not None:
            update = update * self.update_gain[level]
        probability = self.config.drop_probability(level)
        return stochastic_depth(update, probability, "row", self.training and probability > 0)

    def finished(self, x: Tensor) -> Tensor:
        """Applies the final norm (scaled_pre only). x: (B, T, D), the residual stream after any level."""
        return self.scaled_norm(x, self.config.n_layer) if self.config.residual == "scaled_pre" else x

    def scaled_norm(self, x: Tensor, level: int) -> Tensor:
        """S_l(x) of scaled_pre, l = level + 1: LN with the level's affine parameters, divided by sqrt(l)."""
        return self.level_norms[level](x) / math.sqrt(level + 1)

    def update(
        self, x: Tensor, weights: StepWeights, tables: Tables | None, products: StepWeights | None = None
    ) -> Tensor:
        """f(x), which one level adds to the residual stream. x: (B, T, D) -> (B, T, D).

        products: the weights in the precision of the matrix products, for the fast path; None takes the plain path.
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
        """The step from x E to the decoder product, as in the equations. x: (B, T, D) -> (B, T, D)."""
        gated = F.dropout(self.activity(x, weights, tables).gated, self.config.dropout, self.training)
        return self.decode(gated, weights.decoder)

    def activity(self, x: Tensor, weights: StepWeights, tables: Tables | None) -> Activity:
        """Neuron activity in a step. x: (B, T, D), the step's input."""
        before = self.encode(x, weights.encoder)  # (B, H, T, N)
        x_sparse = self.activation(before)
        q, k = self.queries_and_keys(x, x_sparse, weights, tables)
        if not self.config.attn_norm:
            a = self.attn(q, k, x)
        elif self.config.attention == "raw" and x_sparse.dtype == torch.float16:
            scale = kernels.half_scale(x.shape[1])
            a = layer_norm(self.attn(q * scale, k * scale, x), LN_EPS * scale**4)
        else:
            a = layer_norm(self.attn(q, k, x))
        y_sparse = self.activation(self.encode_attended(a, weights.encoder_v))
        if self.config.gate == "multiplicative":
            return Activity(x_sparse, y_sparse, x_sparse * y_sparse)
        if self.config.gate == "sigmoid":
            return Activity(x_sparse, y_sparse, before.sigmoid() * y_sparse)
        return Activity(x_sparse, y_sparse, y_sparse)

    def queries_and_keys(
        self, x: Tensor, x_sparse: Tensor, weights: StepWeights, tables: Tables | None
    ) -> tuple[Tensor, Tensor]:
        """q and k, (B, H, T, N) each, with rotary positions. x: (B, T, D), x_sparse: (B, H, T, N)."""

        def rotated(v: Tensor) -> Tensor:
            return v if tables is None else rope(v, tables.cos, tables.sin)

        q = rotated(self.scaled_query(x_sparse))
        if weights.encoder_k is None:
            return q, q
        return q, rotated(self.scaled_query(self.activation(self.encode(x, weights.encoder_k))))

    def scaled_query(self, x_sparse: Tensor) -> Tensor:
        """x_sparse, scaled to a root mean square of 1 per head and token if qk_norm. (B, H, T, N)."""
        return F.rms_norm(x_sparse, x_sparse.shape[-1:], eps=LN_EPS) if self.config.qk_norm else x_sparse

    # The three products with weights; `models.export_form` computes them as plain ones.

    def encode(self, x: Tensor, encoder: Tensor) -> Tensor:
        """x E for all heads as one (B T, D) x (D, H N) product. x: (B, T, D), encoder: (H, D, N) -> (B, H, T, N)."""
        return torch.einsum("btd,hdn->bhtn", x, encoder)

    def encode_attended(self, a: Tensor, encoder_v: Tensor) -> Tensor:
        """a E_v, each head its own. a: (B, H, T, D), encoder_v: (H, D, N) -> (B, H, T, N)."""
        return torch.einsum("bhtd,hdn->bhtn", a, encoder_v)

    def decode(self, gated: Tensor, decoder: Tensor) -> Tensor:
        """Heads concatenated, times E_d. gated: (B, H, T, N), decoder: (H N, D) -> (B, T, D)."""
        return torch.einsum("bhtn,hnd->btd", gated, decoder.view(self.config.n_head, -1, self.config.n_embd))

    def attention_weights(
        self, x: Tensor, level: int, grid: tuple[int, ...] | None = None, queries: slice = slice(None)
    ) -> Tensor:
        """Attention weights of a level, (B, H, T, T): rows are queries, columns keys. x: (B, T, D), the level's input.

        queries: a contiguous slice of tokens; only their rows are computed, (B, H, Q, T).
        """
        weights = self.step_weights()[level]
        x_sparse = self.activation(self.encode(x, weights.encoder))
        q, k = self.queries_and_keys(x, x_sparse, weights, self.attn.tables(x.shape[1], grid))
        first, _, _ = queries.indices(x.shape[1])
        return self.attn.weights(q[:, :, queries], k, first)

    def level_activity(self, x: Tensor, level: int, grid: tuple[int, ...] | None = None) -> Activity:
        """Neuron activity at a level. x: (B, T, D), the level's input."""
        return self.activity(x, self.step_weights()[level], self.attn.tables(x.shape[1], grid))

    def has_fast_path(self, device: torch.device, n_tokens: int = 0) -> bool:
        """Whether the model takes `kernels.fast_update` on that device with that many tokens (0: few).

        No for a causal model, and for a config or a plain step that `fast_update` does not cover, see `kernels.serves`.
        Softmax over many tokens is left to PyTorch where it has a kernel that holds no T x T matrix: on CUDA, and on a
        CPU if N = D (keys and values equally wide).
        """
        config = self.config
        serves = self._fast_path_serves and type(self.attn) is RotaryAttention and not self.attn.causal
        if config.attention == "softmax" and (device.type == "cuda" or config.n_neurons == config.n_embd):
            serves = serves and kernels.scores_are_cheaper(n_tokens, config.n_neurons, config.n_embd)
        return self.use_fast_path and serves and device.type in ("cpu", "cuda")

    def _in_compute_precision(self, weights: list[StepWeights]) -> list[StepWeights]:
        """Detached weights in autocast's precision; shared weights are cast once for all levels."""
        device = self.encoder.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.encoder.dtype

        def cast(step: StepWeights) -> StepWeights:
            return StepWeights(*(weight.detach().to(dtype) for weight in step[:3]))

        return [cast(weights[0])] * len(weights) if self.config.shared else [cast(step) for step in weights]


def _vectors(n_levels: int, initial: Tensor) -> nn.ParameterList:
    """A learned (D,) vector for each level."""
    return nn.ParameterList(nn.Parameter(initial.clone()) for _ in range(n_levels))
