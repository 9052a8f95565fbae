"""Fast path of the BDH step. Its plain reference is `BDHCore.plain_update` in bdh.py.

`fast_update` computes what `plain_update` computes, for the settings in FAST_PATH_SERVES, with a hand-written backward
pass. Why it is faster:

* The head axis comes first in every tensor, (H, B T, N). x E is then one batched product that reads x in place: no
  weight is copied per image, and the attention products find each head contiguous in memory.
* Q = K, so dq = (dS + dS^T) q is one product. Raw scores are symmetric, so S serves both directions.
* Only two (H, B T, N) tensors per level are saved for the backward pass: x_sparse, and y_sparse with dropped entries
  set to zero. The dropout mask, the rotated queries and the gated product are derived from them. `recompute` saves
  neither, only x and the scores (or q^T x, where that is cheaper), and computes both again: two more products, a
  fraction of the memory.
* On a CPU the batch is processed in slices, so that element-wise passes find most of their operands in cache, and no
  factor of a product is copied for each head.
* Weight gradients of all slices and levels are accumulated in the precision of the master weights.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Size of one (H, images T, N) tensor of a slice: fits into a last-level cache, and is large enough for products at full
# speed. On 2 cores with 32 MB of cache, step times are flat from 6 to 50 MB and rise below 3 MB.
CPU_SLICE_BYTES = 12 * 2**20
# Size of the buffer in which slices of a lower precision are rotated in float32: fits into the cache of two cores.
CPU_BUFFER_BYTES = 2 * 2**20

ANY = object()
# The config fields that the fast path honours, with the values it serves. Any other field that may affect the step must
# have its default (see `serves`), so a field added to the plain step alone never meets a fast path that ignores it.
FAST_PATH_SERVES: dict[str, Any] = {
    "n_layer": ANY,  # the fast path replaces the update of one level; the loop over levels is outside
    "n_embd": ANY,  # sizes are read from the tensors
    "n_head": ANY,
    "mlp_internal_dim_multiplier": ANY,
    "dropout": ANY,  # passed as dropout
    "residual": ANY,  # outside the update
    "attn_norm": (True, False),  # passed as attn_eps
    "update_norm": ANY,  # applied after the update
    "attention": ("raw", "softmax"),  # passed as softmax
    "qk": ("tied",),  # q = k is built in
    "gate": ("multiplicative",),  # built in
    "activation": ("relu",),  # built in
    "init": ANY,  # initial weights only
    "rotary": ("raster", "axial"),  # passed as phases; there is no path without rotation
    "shared": ANY,  # each level is given its weights
    "drop_path": ANY,  # outside the update
    "level_gain": ANY,  # outside the update
    "update_gain": ANY,  # outside the update
    "depth_mix": ANY,  # outside the update
}


def serves(config: Any) -> bool:
    """Whether the fast path computes the step of this config (a CoreConfig or a subclass).

    True if every field in FAST_PATH_SERVES has a value listed there, and every other field is either named in the
    `outside_step` of a config class or has its default. That default is the one of the class that introduces the field,
    at which the step must be the one without the field.
    """
    classes = type(config).__mro__
    outside = {name for cls in classes for name in vars(cls).get("outside_step", ())}
    defaults: dict[str, Any] = {}
    for cls in reversed(classes):
        for field in fields(cls) if "__dataclass_fields__" in vars(cls) else ():
            default = field.default if field.default_factory is MISSING else field.default_factory()
            defaults.setdefault(field.name, default)
    for name, default in defaults.items():
        served = ANY if name in outside else FAST_PATH_SERVES.get(name, (default,))
        if served is not ANY and getattr(config, name) not in served:
            return False
    return True


def rotate(v: Tensor, phases: Tensor, out: Tensor | None = None) -> Tensor:
    """Rotary positions as one complex product; equals `rotary.rope`.

    v: (..., T, N), pairs are (even, odd) neighbours. phases: (T, N / 2), exp(i angle), complex64 or complex128, which
    sets the precision of the rotation; their conjugate rotates back. Returns v's shape and dtype, written to out if
    given (out may be v).
    """
    if out is None:
        out = torch.empty_like(v)
    if v.dtype == phases.real.dtype:
        torch.mul(_pairs(v), phases, out=_pairs(out))
    elif v.device.type != "cpu":
        out.copy_(torch.view_as_real(_pairs(v.to(phases.real.dtype)).mul_(phases)).flatten(-2))
    elif phases.dim() > 2:
        for each in zip(v, phases, out, strict=True):
            _rotate_in_parts(*each)
    else:
        _rotate_in_parts(v, phases, out)
    return out


def _rotate_in_parts(v: Tensor, phases: Tensor, out: Tensor) -> None:
    """`rotate` in a precision above v's, through a buffer that stays in cache. v, out: (..., T, N)."""
    v, out = v.reshape(-1, *v.shape[-2:]), out.view(-1, *out.shape[-2:])
    per_part = max(1, CPU_BUFFER_BYTES // (v.shape[-2] * v.shape[-1] * phases.real.element_size()))
    buffer = torch.empty_like(v[:per_part], dtype=phases.real.dtype)
    for part, part_out in zip(v.split(per_part), out.split(per_part), strict=True):
        wide = buffer[: len(part)].copy_(part)
        _pairs(wide).mul_(phases)
        part_out.copy_(wide)


def _pairs(v: Tensor) -> Tensor:
    """Each pair of neighbours as one complex number; shares memory. (..., N) -> (..., N / 2)."""
    return torch.view_as_complex(v.unflatten(-1, (-1, 2)))


def drop_(v: Tensor, p: float) -> float:
    """Dropout: zeroes each entry of v in place with probability p; returns the factor 1 / (1 - p), not yet applied.

    On a CPU, 8 random bits are drawn per entry, many times faster than `bernoulli_`. One integer threshold would
    round p to a multiple of 1 / 256, so the threshold of each position of the last axis is itself drawn from the two
    integers next to 256 p, with mean 256 p: each entry is dropped with probability p.

    v: (..., N), contiguous; p: at most 255 / 256.
    """
    if p == 0.0:
        return 1.0
    if v.device.type != "cpu":
        v.mul_(torch.empty_like(v).bernoulli_(1 - p))
        return 1 / (1 - p)
    seed = int(torch.randint(2**63 - 1, ()))  # seeded by PyTorch; NumPy's SFC64 is twice as fast
    words = np.random.Generator(np.random.SFC64(seed)).integers(2**64, size=(v.numel() + 7) // 8, dtype=np.uint64)
    keep = torch.from_numpy(words.view(np.int8))[: v.numel()].view_as(v)  # uniform on -128 to 127
    dropped = torch.rand(v.shape[-1], dtype=torch.float64).add_(256 * p).floor_()
    torch.ge(keep, dropped.sub_(128).to(torch.int8), out=keep)  # 1 keeps, 0 drops
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[v.element_size()]
    v.view(bits).bitwise_and_(keep.neg_().to(bits))  # -1 is all ones
    return 1 / (1 - p)


def scores_are_cheaper(n_tokens: int, n_neurons: int, n_embd: int) -> bool:
    """Whether (q q^T) x takes fewer operations than q (q^T x): T (N + D) against 2 N D per token."""
    return n_tokens * (n_neurons + n_embd) <= 2 * n_neurons * n_embd


def half_scale(n_tokens: int) -> float:
    """The factor of queries and keys in float16, a power of two near 1 / sqrt(T).

    The raw attention output is a sum over T tokens and passes 65,504, float16's largest number, at published sizes. So
    scaled, it is about a mean over tokens. The LN after it cancels the factor exactly, its eps taken times factor^4.
    """
    return 2.0 ** -math.ceil(math.log2(n_tokens) / 2)


def raw_attention(q: Tensor, k: Tensor, x: Tensor) -> Tensor:
    """(q k^T) x in the cheaper of its two orders. q, k: (..., T, N), x: (..., T, D) -> (..., T, D).

    With a number of tokens left open in torch.export, in the order whose cost is linear in them.
    """
    if isinstance(q.shape[-2], int) and scores_are_cheaper(q.shape[-2], q.shape[-1], x.shape[-1]):
        return (q @ k.mT) @ x
    return q @ (k.mT @ x)


def fast_update(
    x: Tensor,
    masters: tuple[Tensor, Tensor, Tensor],
    weights: tuple[Tensor, Tensor, Tensor],
    phases: Tensor,
    *,
    attn_eps: float | None,
    dropout: float,
    softmax: bool = False,
    recompute: bool = False,
    slice_bytes: int = CPU_SLICE_BYTES,
) -> Tensor:
    """y of one BDH step before its LN: everything from x E to the decoder product. Returns (B, T, D) in x's dtype.

    x: (B, T, D).
    masters: encoder (H, D, N), encoder_v (H, D, N), decoder (H N, D); they receive the gradients.
    weights: the same three in the precision of the matrix products.
    phases: (T, N / 2) or (H, 1, T, N / 2), see `rotate`.
    attn_eps: eps of the LN around the attention output, None for no LN.
    dropout: probability; 0 outside training.
    softmax: attend by softmax(q q^T / sqrt(N)), kept as (H, images, T, T) for the backward pass, instead of q q^T.
    recompute: activation checkpointing; the gradients are bit-identical.
    slice_bytes: on a CPU, the size of one (H, images T, N) tensor; the batch is processed in slices of that size.
    """
    if weights[0].dtype == torch.float16 and attn_eps is not None and not softmax:
        scale = half_scale(x.shape[1])
        phases, attn_eps = phases * scale, attn_eps * scale**4
    settings = (attn_eps, dropout, softmax, recompute, slice_bytes)
    return _FastUpdate.apply(x, *masters, tuple(w.detach() for w in weights), phases, *settings)


def _in_given_precision(function: Callable) -> Callable:
    """function(ctx, tensor, ...) without autocast, which on CUDA would return norms, softmax and sums in float32."""

    @functools.wraps(function)
    def run(ctx, tensor, *rest):
        with torch.autocast(tensor.device.type, enabled=False):
            return function(ctx, tensor, *rest)

    return run


class _FastUpdate(torch.autograd.Function):
    """Letters in shapes: H heads, g images in a slice, T tokens, D width, N neurons per head; R = g T rows."""

    @staticmethod
    @_in_given_precision
    def forward(
        ctx, x, encoder, encoder_v, decoder, weights, phases, attn_eps, dropout, softmax, recompute, slice_bytes
    ):
        n_head, _, n_neurons = encoder.shape
        bytes_per_image = n_head * x.shape[1] * n_neurons * weights[0].element_size()
        per_slice = max(1, slice_bytes // bytes_per_image) if x.device.type == "cpu" else len(x)
        weights = (*weights[:2], weights[2].view(n_head, n_neurons, -1))
        ctx.settings = (weights, phases, attn_eps, dropout, softmax)
        ctx.master_dtype = encoder.dtype
        ctx.random_states = []
        ys, saved = [], []
        for x_slice in x.to(weights[0].dtype).split(per_slice):
            if recompute:
                ctx.random_states.append(random_state(x.device))
            y, ctx.scale, kept = _forward_slice(x_slice, *ctx.settings)
            ys.append(y)
            saved += [x_slice, kept[-1]] if recompute else [x_slice, *kept]
        ctx.save_for_backward(*saved)
        ctx.n_saved = len(saved) // len(ys)
        return torch.cat(ys).to(x.dtype)

    @staticmethod
    @once_differentiable
    @_in_given_precision
    def backward(ctx, dy):
        weights, phases, *_, softmax = ctx.settings
        saved, n = ctx.saved_tensors, ctx.n_saved
        totals = tuple(torch.zeros_like(w, dtype=ctx.master_dtype) for w in weights)
        dy = (dy * ctx.scale).to(weights[0].dtype)
        slices = [saved[k : k + n] for k in range(0, len(saved), n)]
        (g, T, _), (n_head, _, n_neurons) = slices[0][0].shape, weights[0].shape
        scratch = [dy.new_empty(n_head, g * T, n_neurons) for _ in range(2)]  # reused by slices, so it stays in cache
        dxs, first = [], 0
        for place, kept in enumerate(slices):
            x_slice = kept[0]
            if ctx.random_states:
                with _random_as(ctx.random_states[place], x_slice.device):
                    *_, made = _excite(x_slice, *ctx.settings, inner=kept[1])
                kept = (x_slice, *made)
            dy_slice = dy[first : first + len(x_slice)]
            dxs.append(_backward_slice(dy_slice, kept, weights, phases, softmax, totals, scratch))
            first += len(dy_slice)
        d_encoder, d_encoder_v, d_decoder = totals
        return torch.cat(dxs).to(dy.dtype), d_encoder, d_encoder_v, d_decoder.flatten(0, 1), *[None] * 7


def random_state(device: torch.device) -> list[Tensor]:
    """States of the generators that dropout draws from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_random_state(states: list[Tensor], device: torch.device) -> None:
    """Sets the generators to what `random_state` returned, maybe on another device: then the CPU's alone."""
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


@contextlib.contextmanager
def _random_as(states: list[Tensor], device: torch.device):
    """Inside, the generators have these states; afterwards they continue from where they were before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        set_random_state(states, device)
        yield


def _forward_slice(x, weights, phases, attn_eps, dropout, softmax):
    """x: (g, T, D), a slice. Returns y (g, T, D), the dropout factor, and the tensors that backward needs."""
    spare, scale, kept = _excite(x, weights, phases, attn_eps, dropout, softmax)
    x_sparse, y_sparse, *_ = kept
    gated = torch.mul(x_sparse, y_sparse, out=spare)
    y = torch.bmm(gated, weights[2]).sum(0).mul_(scale)
    return y.view(x.shape), scale, kept


def _excite(x, weights, phases, attn_eps, dropout, softmax, inner=None):
    """The neurons' activity for a slice x: (g, T, D), dropout included.

    inner: q q^T, its softmax or q^T x, if already known. Returns a buffer (H, R, N) free for reuse, the dropout factor,
    and the tensors that backward needs: x_sparse, y_sparse, a, rstd, inner.
    """
    encoder, encoder_v, _ = weights  # (H, D, N) each
    (g, T, D), H = x.shape, len(encoder)
    x_sparse = _product(x.reshape(g * T, D), encoder).relu_()  # (H, R, N)
    by_scores, q = softmax or scores_are_cheaper(T, x_sparse.shape[-1], D), None
    if inner is None or not by_scores:
        q = rotate(x_sparse.unflatten(1, (g, T)), phases)
    if by_scores:
        if inner is None:
            inner = q @ q.mT  # (H, g, T, T)
            inner = inner.div_(math.sqrt(q.shape[-1])).softmax(-1) if softmax else inner
        a = _product(inner, x)  # (H, g, T, D)
    else:
        inner = q.mT @ x if inner is None else inner  # (H, g, N, D)
        a = q @ inner
    rstd = None
    if attn_eps is not None:
        a, rstd = _norm(a, attn_eps)
    y_sparse = torch.bmm(a.view(H, g * T, D), encoder_v).relu_()  # (H, R, N)
    scale = drop_(y_sparse, dropout)
    return None if q is None else q.view_as(x_sparse), scale, (x_sparse, y_sparse, a, rstd, inner)


def _backward_slice(dy, kept, weights, phases, softmax, totals, scratch):
    """Returns dx (g, T, D) of a slice; adds the weight gradients to totals. dy: (g, T, D), dropout factor applied."""
    x, x_sparse, y_sparse, a, rstd, inner = kept
    encoder, encoder_v, decoder = weights
    d_encoder, d_encoder_v, d_decoder = totals
    (g, T, D), H = x.shape, len(encoder)
    x_rows, dy_rows = x.reshape(g * T, D), dy.reshape(g * T, D)
    one, two = (buffer.view(-1)[: x_sparse.numel()].view_as(x_sparse) for buffer in scratch)
    # gate and decoder
    gated = torch.mul(x_sparse, y_sparse, out=one)  # (H, R, N)
    _add_product(d_decoder, gated.mT, dy_rows)
    d_gated = _product(dy_rows, decoder.mT, out=one)
    dy_sparse = _relu_backward_(torch.mul(d_gated, x_sparse, out=two), y_sparse)
    # encoder_v and the LN around the attention output
    _add_product(d_encoder_v, a.view(H, g * T, D).mT, dy_sparse)
    da = torch.bmm(dy_sparse, encoder_v.mT).view(H, g, T, D)
    if rstd is not None:
        da = _norm_backward(da, a, rstd)
    # attention: a = (q q^T) x, softmax(q q^T / sqrt(N)) x or q (q^T x)
    q = rotate(x_sparse.unflatten(1, (g, T)), phases, out=two.unflatten(1, (g, T)))
    if softmax or scores_are_cheaper(T, q.shape[-1], D):
        d_scores = _product(da, x.mT)
        if softmax:
            d_scores = torch.ops.aten._softmax_backward_data(d_scores, inner, -1, inner.dtype).div_(
                math.sqrt(q.shape[-1])
            )
        dq = (d_scores + d_scores.mT) @ q
        dx = ((inner.mT if softmax else inner) @ da).sum(0)  # raw scores are symmetric
    else:
        d_inner = q.mT @ da  # (H, g, N, D)
        dq = da @ inner.mT + x @ d_inner.mT
        dx = (q @ d_inner).sum(0)
    dx_sparse = rotate(dq, phases.conj(), out=dq).view_as(x_sparse).addcmul_(d_gated, y_sparse)
    dx_sparse = _relu_backward_(dx_sparse, x_sparse)
    # encoder
    _add_product(d_encoder, x_rows.mT, dx_sparse)
    return dx + torch.bmm(dx_sparse, encoder.mT).sum(0).view_as(dx)


def _product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left @ right, batched over heads, the first axis. A factor without that axis serves all heads.

    On a CPU such a product runs head by head, because a batched one copies the factor for each head.
    """
    n_dim, n_head = max((factor.dim(), len(factor)) for factor in (left, right))
    alone = [factor.dim() < n_dim for factor in (left, right)]
    if left.device.type != "cpu" or not any(alone):
        factors = (factor.expand(n_head, *factor.shape[1 - n_dim :]) for factor in (left, right))
        return torch.matmul(*factors, out=out)
    if out is None:
        out = left.new_empty(n_head, *left.shape[1 - n_dim : -1], right.shape[-1])
    for head, one in enumerate(out):
        torch.matmul(left if alone[0] else left[head], right if alone[1] else right[head], out=one)
    return out


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, see `_product`; total may have a higher precision than the factors."""
    if total.dtype == left.dtype and left.dim() == right.dim():
        total.baddbmm_(left, right)
    else:
        total += _product(left, right)


def _relu_backward_(grad: Tensor, output: Tensor) -> Tensor:
    """Zeroes grad in place where the ReLU's output is zero."""
    return torch.ops.aten.threshold_backward.grad_input(grad, output, 0, grad_input=grad)


def _norm(a: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """LN over the last axis, and one over the deviation; that in float32 where a is float16, which it may overflow."""
    wide = a.float() if a.dtype == torch.float16 and a.device.type == "cpu" else a
    normed, _, rstd = torch.native_layer_norm(wide, a.shape[-1:], None, None, eps)
    return normed.to(a.dtype), rstd


def _norm_backward(da: Tensor, a: Tensor, rstd: Tensor) -> Tensor:
    """Gradient of LN's input from da, that of its output a: rstd (da - mean(da) - a mean(da a)), over the last axis."""
    if rstd.dtype == torch.bfloat16:  # on a CPU under autocast; PyTorch's backward sums in float32, in one pass
        unscaled = (torch.zeros_like(rstd), torch.ones_like(rstd), None, None, [True, False, False])
        return torch.ops.aten.native_layer_norm_backward(da, a, a.shape[-1:], *unscaled)[0].mul_(rstd)
    wide, a = da.to(rstd.dtype), a.to(rstd.dtype)
    centred = wide - wide.mean(-1, keepdim=True) - a * (wide * a).mean(-1, keepdim=True)
    return centred.mul_(rstd).to(da.dtype)
