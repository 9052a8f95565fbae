"""Fast paths of the BDH step. The plain twin of everything here is `BDHCore.plain_update` in bdh.py.

`fast_update` computes what the plain twin computes, for the settings that matter most (Q = K, no mask, scores raw or
through the softmax), with a hand-written backward pass. What it gains:

* Heads lead every tensor, (H, B T, N), so that x E is one batched product over the heads that reads x in place: no
  weight is copied per image, and the attention products find each head contiguous.
* Q = K, so dq = (dS + dS^T) q is one product; raw scores are symmetric, so S serves both directions.
* Backward keeps two (H, B T, N) tensors a level: x_sparse, and y_sparse with the dropped entries set to zero. The mask,
  the rotated queries and the gated product follow from them. With `recompute` it keeps none, only x and the scores,
  and makes both again: two of the step's products more, and a fraction of the memory.
* On a CPU the batch passes through in slices, whose element-wise passes then find most of their operands in cache.
* Weight gradients of all slices and levels are summed in the precision of the master weights.
"""

import contextlib
import math

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Size of one (H, images T, N) tensor of a slice: small enough for a last-level cache, large enough for products at full
# speed. Step times are flat from 6 to 50 MB on 2 cores with 32 MB of cache; below 3 MB they rise.
CPU_SLICE_BYTES = 12 * 2**20


def rotate(v: Tensor, phases: Tensor, out: Tensor | None = None) -> Tensor:
    """Rotary positions as one complex product; the twin of `rotary.rope`.

    v: (..., T, N) with pairs at (even, odd) neighbours; phases: (T, N / 2), exp(i angle), complex64 or complex128, the
    precision in which the rotation is computed. The conjugate of phases rotates back. Returns v's shape and dtype,
    written to out if given (out may be v).
    """
    wide = v.to(phases.real.dtype)
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    if out is None:
        out = torch.empty_like(v)
    if wide is v:
        torch.mul(pairs, phases, out=torch.view_as_complex(out.unflatten(-1, (-1, 2))))
        return out
    return out.copy_(torch.view_as_real(pairs.mul_(phases)).flatten(-2))


def drop_(v: Tensor, p: float) -> float:
    """Zeroes each entry of v in place with probability p; returns the factor 1 / (1 - p) that makes up for it.

    On a CPU the random numbers are drawn 8 bits an entry, many times faster than `bernoulli_`. A byte alone would round
    p to a multiple of 1 / 256, so how many of its values drop is itself drawn, for each position of the last axis,
    between the two neighbours of 256 p, with mean 256 p: each entry is dropped with probability p.

    v: (..., N), contiguous; p: at most 255 / 256.
    """
    if p == 0.0:
        return 1.0
    if v.device.type != "cpu":
        v.mul_(torch.empty_like(v).bernoulli_(1 - p))
        return 1 / (1 - p)
    seed = int(torch.randint(2**63 - 1, ()))  # PyTorch's generator decides; NumPy's SFC64 draws twice as fast
    words = np.random.Generator(np.random.SFC64(seed)).integers(2**64, size=(v.numel() + 7) // 8, dtype=np.uint64)
    keep = torch.from_numpy(words.view(np.int8))[: v.numel()].view_as(v)  # uniform on -128 to 127
    dropped = torch.rand(v.shape[-1], dtype=torch.float64).add_(256 * p).floor_()
    torch.ge(keep, dropped.sub_(128).to(torch.int8), out=keep)  # 1 keeps, 0 drops
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[v.element_size()]
    v.view(bits).bitwise_and_(keep.neg_().to(bits))  # -1 is all ones
    return 1 / (1 - p)


def scores_are_cheaper(n_tokens: int, n_neurons: int, n_embd: int) -> bool:
    """Whether (q q^T) x takes fewer operations than q (q^T x): T (N + D) against 2 N D a token."""
    return n_tokens * (n_neurons + n_embd) <= 2 * n_neurons * n_embd


def raw_attention(q: Tensor, k: Tensor, x: Tensor) -> Tensor:
    """(q k^T) x in the cheaper of its two orders. q, k: (..., T, N), x: (..., T, D) -> (..., T, D)."""
    if scores_are_cheaper(q.shape[-2], q.shape[-1], x.shape[-1]):
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
    """y of one BDH step before its LN: everything from x E to the decoder product.

    x: (B, T, D). masters: encoder (H, D, N), encoder_v (H, D, N), decoder (H N, D), which receive the gradients;
    weights: the same three in the precision of the products. phases: (T, N / 2), see `rotate`. attn_eps: eps of the LN
    around the attention output, None for no LN. dropout: probability, 0 outside training. softmax: attend by
    softmax(q q^T / sqrt(N)), which is held as (H, images, T, T) for the backward pass, in place of q q^T. recompute:
    keep little for the backward pass; the gradients are the same to the bit. slice_bytes: size of one (H, images T, N)
    tensor at a time, on a CPU. Returns (B, T, D) in x's dtype.
    """
    settings = (attn_eps, dropout, softmax, recompute, slice_bytes)
    return _FastUpdate.apply(x, *masters, tuple(w.detach() for w in weights), phases, *settings)


class _FastUpdate(torch.autograd.Function):
    """Letters: H heads, g images of a slice, T tokens, D width, N neurons a head; R = g T rows."""

    @staticmethod
    def forward(
        ctx, x, encoder, encoder_v, decoder, weights, phases, attn_eps, dropout, softmax, recompute, slice_bytes
    ):
        n_head, _, n_neurons = encoder.shape
        bytes_per_image = n_head * x.shape[1] * n_neurons * weights[0].element_size()
        per_slice = max(1, slice_bytes // bytes_per_image) if x.device.type == "cpu" else len(x)
        weights = (*weights[:2], weights[2].view(n_head, n_neurons, -1))
        ctx.settings = (weights, phases, attn_eps, dropout, softmax)
        ctx.random_states = []
        ys, saved = [], []
        for x_slice in x.to(weights[0].dtype).split(per_slice):
            if recompute:
                ctx.random_states.append(_random_state(x.device))
            y, ctx.scale, kept = _forward_slice(x_slice, *ctx.settings)
            ys.append(y)
            saved += [x_slice, kept[-1]] if recompute else [x_slice, *kept]
        ctx.save_for_backward(*saved)
        ctx.n_saved = len(saved) // len(ys)
        return torch.cat(ys).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        weights, phases, *_, softmax = ctx.settings
        saved, n = ctx.saved_tensors, ctx.n_saved
        totals = tuple(torch.zeros_like(w, dtype=dy.dtype) for w in weights)
        dy = (dy * ctx.scale).to(weights[0].dtype)
        slices = [saved[k : k + n] for k in range(0, len(saved), n)]
        (g, T, _), (n_head, _, n_neurons) = slices[0][0].shape, weights[0].shape
        scratch = [dy.new_empty(n_head, g * T, n_neurons) for _ in range(2)]  # for each slice, so it stays in cache
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


def _random_state(device: torch.device) -> list[Tensor]:
    """What the next draws of dropout follow from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


@contextlib.contextmanager
def _random_as(states: list[Tensor], device: torch.device):
    """Draws inside are those that followed from these states; afterwards the generators go on where they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(states[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(states[1], device)
        yield


def _forward_slice(x, weights, phases, attn_eps, dropout, softmax):
    """y (g, T, D), the dropout factor, and what backward needs, of a slice x: (g, T, D)."""
    spare, scale, kept = _excite(x, weights, phases, attn_eps, dropout, softmax)
    x_sparse, y_sparse, *_ = kept
    gated = torch.mul(x_sparse, y_sparse, out=spare)
    y = torch.bmm(gated, weights[2]).sum(0, dtype=phases.real.dtype).mul_(scale)
    return y.view(x.shape), scale, kept


def _excite(x, weights, phases, attn_eps, dropout, softmax, inner=None):
    """From a slice x, (g, T, D), to its neurons, dropout included.

    inner: q q^T, its softmax or q^T x, where it is known. Returns a tensor (H, R, N) that has served, the dropout
    factor, and what backward needs: x_sparse, y_sparse, a, rstd, inner.
    """
    encoder, encoder_v, _ = weights  # (H, D, N) each
    (g, T, D), H = x.shape, len(encoder)
    x_sparse = torch.bmm(x.reshape(1, g * T, D).expand(H, -1, -1), encoder).relu_()  # (H, R, N)
    by_scores, q = softmax or scores_are_cheaper(T, x_sparse.shape[-1], D), None
    if inner is None or not by_scores:
        q = rotate(x_sparse.view(H, g, T, -1), phases)
    if by_scores:
        if inner is None:
            inner = q @ q.mT  # (H, g, T, T)
            inner = inner.div_(math.sqrt(q.shape[-1])).softmax(-1) if softmax else inner
        a = inner @ x  # (H, g, T, D)
    else:
        inner = q.mT @ x if inner is None else inner  # (H, g, N, D)
        a = q @ inner
    rstd = None
    if attn_eps is not None:
        a, _, rstd = torch.native_layer_norm(a, (D,), None, None, attn_eps)
    y_sparse = torch.bmm(a.view(H, g * T, D), encoder_v).relu_()  # (H, R, N)
    scale = drop_(y_sparse, dropout)
    return None if q is None else q.view_as(x_sparse), scale, (x_sparse, y_sparse, a, rstd, inner)


def _backward_slice(dy, kept, weights, phases, softmax, totals, scratch):
    """dx (g, T, D) of a slice; adds to the weights' totals. dy: (g, T, D), with the dropout factor already in it."""
    x, x_sparse, y_sparse, a, rstd, inner = kept
    encoder, encoder_v, decoder = weights
    d_encoder, d_encoder_v, d_decoder = totals
    (g, T, D), H = x.shape, len(encoder)
    x_rows = x.reshape(1, g * T, D).expand(H, -1, -1)
    dy_rows = dy.reshape(1, g * T, D).expand(H, -1, -1)
    one, two = (buffer.view(-1)[: x_sparse.numel()].view_as(x_sparse) for buffer in scratch)
    # gate and decoder
    gated = torch.mul(x_sparse, y_sparse, out=one)  # (H, R, N)
    _add_product(d_decoder, gated.mT, dy_rows)
    d_gated = torch.bmm(dy_rows, decoder.mT, out=one)
    dy_sparse = _relu_backward_(torch.mul(d_gated, x_sparse, out=two), y_sparse)
    # encoder_v and the LN around the attention output
    _add_product(d_encoder_v, a.view(H, g * T, D).mT, dy_sparse)
    da = torch.bmm(dy_sparse, encoder_v.mT).view(H, g, T, D)
    if rstd is not None:
        da = _norm_backward(da, a, rstd)
    # attention: a = (q q^T) x, softmax(q q^T / sqrt(N)) x or q (q^T x)
    q = rotate(x_sparse.view(H, g, T, -1), phases, out=two.view(H, g, T, -1))
    if softmax or scores_are_cheaper(T, q.shape[-1], D):
        d_scores = da @ x.mT
        if softmax:
            d_scores = torch.ops.aten._softmax_backward_data(d_scores, inner, -1, inner.dtype).div_(
                math.sqrt(q.shape[-1])
            )
        dq = (d_scores + d_scores.mT) @ q
        dx = ((inner.mT if softmax else inner) @ da).sum(0, dtype=phases.real.dtype)  # raw scores are symmetric
    else:
        d_inner = q.mT @ da  # (H, g, N, D)
        dq = da @ inner.mT + x @ d_inner.mT
        dx = (q @ d_inner).sum(0, dtype=phases.real.dtype)
    dx_sparse = rotate(dq, phases.conj(), out=dq).view_as(x_sparse).addcmul_(d_gated, y_sparse)
    dx_sparse = _relu_backward_(dx_sparse, x_sparse)
    # encoder
    _add_product(d_encoder, x_rows.mT, dx_sparse)
    return dx + torch.bmm(dx_sparse, encoder.mT).sum(0, dtype=dx.dtype).view_as(dx)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, batched over heads; total may be wider than the factors."""
    if total.dtype == left.dtype:
        total.baddbmm_(left, right)
    else:
        total += torch.bmm(left, right)


def _relu_backward_(grad: Tensor, output: Tensor) -> Tensor:
    """Zeroes grad in place where the ReLU's output is zero."""
    return torch.ops.aten.threshold_backward.grad_input(grad, output, 0, grad_input=grad)


def _norm_backward(da: Tensor, a: Tensor, rstd: Tensor) -> Tensor:
    """Gradient of LN's input from that of its output a: rstd (da - mean(da) - a mean(da a)), over the last axis."""
    wide, a = da.to(rstd.dtype), a.to(rstd.dtype)
    centred = wide - wide.mean(-1, keepdim=True) - a * (wide * a).mean(-1, keepdim=True)
    return centred.mul_(rstd).to(da.dtype)
