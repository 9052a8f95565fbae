"""Plain reference implementation of BDH and Vision-BDH, written from the equations alone, and helpers around it.

The reference computes one head at a time and shares nothing with the code under test. Letters in shapes: B images or
sequences, T tokens, D width, H heads, N neurons per head.
"""

import itertools
import math

import pytest
import torch

from models import kernels


def norm(x):
    """LN over the last axis, no affine parameters, eps 1e-5."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def formula_frequencies(n_neurons):
    """Turns per position of each neuron, 2^16 ** (-2 floor(j / 2) / N) / (2 pi), in Python's double precision."""
    return torch.tensor(
        [65536.0 ** (-2 * (j // 2) / n_neurons) / (2 * math.pi) for j in range(n_neurons)], dtype=torch.float64
    )


def rotate_to(v, positions):
    """Rotates the pairs of v by the position of each token. v: (B, T, N), positions: (T,)."""
    angle = 2 * math.pi * positions.to(v.dtype)[:, None] * formula_frequencies(v.shape[2])[0::2]
    even, odd = v[..., 0::2], v[..., 1::2]
    rotated = (even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin())
    return torch.stack(rotated, dim=-1).reshape(v.shape)


def rotate(v, rotary="raster", class_token=False):
    """Rotary positions. v: (B, T, N); axial: on a square grid, the first half by row, the second by column."""
    n_tokens, half = v.shape[1], v.shape[2] // 2
    if rotary == "none":
        return v
    if rotary == "raster":
        return rotate_to(v, torch.arange(n_tokens))
    side = math.isqrt(n_tokens)
    places = list(itertools.product(range(side), range(side)))
    if class_token:  # at (0, 0), patches start at (1, 1)
        places = [(0, 0)] + [(row + 1, column + 1) for row, column in places]
    rows, columns = torch.tensor(places).T
    return torch.cat((rotate_to(v[..., :half], rows), rotate_to(v[..., half:], columns)), dim=-1)


def activate(v, activation):
    if activation == "gelu":
        return v * (1 + torch.erf(v / math.sqrt(2))) / 2
    return v.clamp(min=0) ** {"relu": 1, "relu2": 2}[activation]


def reference_update(
    weights,
    x,
    *,
    attn_norm=True,
    update_norm=True,
    attention="raw",
    qk="tied",
    gate="multiplicative",
    activation="relu",
    rotary="raster",
    attend_self=True,
    qk_norm=False,
    class_token=False,
    causal=False,
):
    """f(x): everything from x E to y, a head at a time. x: (B, T, D). causal: keys strictly before the query."""
    position = torch.arange(x.shape[1])
    visible = position[None, :] < position[:, None] if causal else torch.ones(2 * x.shape[1:2], dtype=torch.bool)
    if not attend_self:
        visible = visible & (position[None, :] != position[:, None])
    gated = []
    for head, (encoder, encoder_v) in enumerate(zip(weights["encoder"], weights["encoder_v"], strict=True)):
        before = x @ encoder
        x_sparse = activate(before, activation)
        k_sparse = activate(x @ weights["encoder_k"][head], activation) if qk == "separate" else x_sparse
        q, k = (
            rotate(v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt() if qk_norm else v, rotary, class_token)
            for v in (x_sparse, k_sparse)
        )
        scores = torch.einsum("btn,bun->btu", q, k)
        if attention == "softmax":
            scores = scores / math.sqrt(q.shape[-1])
            powers = (scores - scores.amax(-1, keepdim=True)).exp() * visible
            scores = powers / powers.sum(-1, keepdim=True).clamp(min=1e-300)  # no visible key gives zero
        a = (scores * visible) @ x
        y_sparse = activate((norm(a) if attn_norm else a) @ encoder_v, activation)
        factor = {"multiplicative": x_sparse, "sigmoid": 1 / (1 + (-before).exp()), "none": 1}[gate]
        gated.append(factor * y_sparse)
    y = torch.cat(gated, dim=-1) @ weights["decoder"]
    return norm(y) if update_norm else y


def convolution(x, kernel, bias, stride=1):
    """3 x 3 with a border of zeros. x: (B, C, height, width), kernel: (O, C, 3, 3), or (C, 1, 3, 3) per channel."""
    rows, columns = x.shape[2:]
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    form = "bchw,c->bchw" if kernel.shape[1] == 1 else "bchw,oc->bohw"
    total = bias[:, None, None]
    for i, j in itertools.product(range(3), repeat=2):
        taps = kernel[:, 0, i, j] if kernel.shape[1] == 1 else kernel[:, :, i, j]
        total = total + torch.einsum(form, padded[:, :, i : i + rows : stride, j : j + columns : stride], taps)
    return total


def mix(weights, x, level):
    """x plus a depthwise convolution of the patches, which lie on a square grid. level from 0."""
    per_level = f"mixing.{level}.weight" in weights
    kernel, bias = (weights[f"mixing.{level if per_level else 0}.{name}"] for name in ("weight", "bias"))
    side = math.isqrt(x.shape[1])
    first = x.shape[1] - side**2  # a class token is not on the grid
    planes = x[:, first:].transpose(1, 2).reshape(len(x), -1, side, side)
    mixed = convolution(planes, kernel, bias).reshape(len(x), -1, side**2).transpose(1, 2)
    return torch.cat((x[:, :first], x[:, first:] + mixed), dim=1)


def transform(weights, name, x):
    """The Transformer blocks of that name, a head at a time; none if the weights have none. x: (B, T, D)."""

    def affine(v, part):
        return v @ weights[f"{part}.weight"].T + weights[f"{part}.bias"]

    def learned_norm(v, part):
        return norm(v) * weights[f"{part}.weight"] + weights[f"{part}.bias"]

    n_heads = weights["encoder"].shape[-3]
    for block in itertools.takewhile(
        lambda block: f"{block}.norm1.weight" in weights, map(f"{name}.{{}}".format, range(9))
    ):
        qkv = affine(learned_norm(x, f"{block}.norm1"), f"{block}.attn.qkv").chunk(3, dim=-1)
        heads = []
        for q, k, v in zip(*(each.chunk(n_heads, dim=-1) for each in qkv), strict=True):
            powers = (torch.einsum("btn,bun->btu", q, k) / math.sqrt(q.shape[-1])).exp()
            heads.append(powers / powers.sum(-1, keepdim=True) @ v)
        x = x + affine(torch.cat(heads, dim=-1), f"{block}.attn.proj")
        hidden = activate(affine(learned_norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"), "gelu")
        x = x + affine(hidden, f"{block}.mlp.fc2")
    return x


def reference_levels(weights, x, *, n_layer, residual="post", shared=True, **step):
    """The last state, by the table of residuals. x: (B, T, D), the embedded tokens."""

    def f(x, level):  # level from 1; without sharing, weights are stacked over the levels
        if "level_gain.0" in weights:
            x = x * weights[f"level_gain.{level - 1}"] + weights[f"level_bias.{level - 1}"]
        return weights.get(f"update_gain.{level - 1}", 1) * core(x, level)

    def core(x, level):
        names = [name for name in ("encoder", "encoder_v", "decoder", "encoder_k") if name in weights]
        own = {name: weights[name] if shared else weights[name][level - 1] for name in names}
        return reference_update(own, x, class_token="cls_token" in weights, **step)

    def scaled(x, level):  # S_l, l from 1
        affine = weights[f"level_norms.{level - 1}.weight"], weights[f"level_norms.{level - 1}.bias"]
        return (norm(x) * affine[0] + affine[1]) / math.sqrt(level)

    x = transform(weights, "blocks_before", x)
    if residual == "post":
        x = norm(x)
    states = [x]
    for level in range(1, n_layer + 1):
        if f"level_mix.{level - 2}" in weights:
            x = torch.einsum("i,ibtd->btd", weights[f"level_mix.{level - 2}"], torch.stack(states))
        if "mixing.0.weight" in weights:
            x = mix(weights, x, level - 1)
        if residual == "post":
            x = norm(x + f(x, level))
        elif residual == "pre":
            x = norm(x)
            x = x + f(x, level)
        elif residual == "true_pre":
            x = x + f(norm(x), level)
        elif residual == "scaled_pre":
            x = x + f(scaled(x, level), level)
        else:
            x = x + f(x, level)
        states.append(x)
    x = transform(weights, "blocks_after", x)
    return scaled(x, n_layer + 1) if residual == "scaled_pre" else x


def reference_embedding(weights, images):
    """Patches, row by row, or the convolutional stem, with class token and learned positions if the weights have them.

    images: (B, C, height, width) -> (B, T, D).
    """
    if "patch_embed.weight" in weights:
        kernel, bias = weights["patch_embed.weight"], weights["patch_embed.bias"]
        p = kernel.shape[-1]
        tokens = []
        for row, column in itertools.product(range(0, images.shape[2], p), range(0, images.shape[3], p)):
            patch = images[:, :, row : row + p, column : column + p].flatten(1)
            tokens.append(patch @ kernel.flatten(1).T + bias)
        x = torch.stack(tokens, dim=1)
    else:
        planes = images
        for name in ("first", *(f"hidden.{index}" for index in range(10))):
            if f"patch_embed.{name}.weight" in weights:
                planes = planes if name == "first" else planes.clamp(min=0)
                kernel, bias = (weights[f"patch_embed.{name}.{each}"] for each in ("weight", "bias"))
                planes = convolution(planes, kernel, bias, stride=2)
        x = planes.flatten(2).transpose(1, 2)
    if "pos_embed" in weights:
        x = x + weights["pos_embed"]
    if "cls_token" in weights:
        x = torch.cat((weights["cls_token"].repeat(len(x), 1, 1), x), dim=1)
    return x


def reference_outputs(weights, images, *, residual, **choices):
    """(tokens, features, logits) of Vision-BDH."""
    tokens = reference_levels(weights, reference_embedding(weights, images), residual=residual, **choices)
    normalise = (lambda x: x) if residual == "scaled_pre" else norm
    pooled = tokens[:, 0] if "cls_token" in weights else tokens.sum(1) / tokens.shape[1]
    if "pool_query" in weights:
        powers = (normalise(tokens) * weights["pool_query"]).sum(-1, keepdim=True).exp()  # (B, T, 1)
        pooled = (powers * tokens).sum(1) / powers.sum(1)
    features = normalise(pooled)
    return tokens, features, features @ weights["head.weight"].T + weights["head.bias"]


def reference_logits(weights, idx, **choices):
    """The language model: idx (B, T) -> (B, T, V)."""
    return reference_levels(weights, weights["embed.weight"][idx], causal=True, **choices) @ weights["lm_head"]


# ---------------------------------------------------------------------------- shared by the tests of models

# 9 tokens of width 12, 3 heads of N = 16 neurons, 5 classes, 2 channels: no two sizes are equal
SIZES = dict(n_layer=3, n_embd=12, n_head=3, mlp_internal_dim_multiplier=4)
SMALL = SIZES | dict(img_size=6, patch_size=2, in_channels=2, num_classes=5)
STEP_FIELDS = ["residual", "attn_norm", "update_norm", "attention", "qk", "gate", "activation", "rotary", "shared"]
STEP_FIELDS += ["attend_self", "qk_norm"]


def choices_of(config):
    """The arguments of `reference_levels` for a config."""
    return {name: getattr(config, name) for name in ["n_layer", *STEP_FIELDS]}


def randomised(model):
    """The model in float64 and evaluation mode, every parameter random, scaled so that every term counts."""
    model = model.double().eval()
    D, width = model.config.n_embd, model.decoder.shape[-2]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = {"encoder": D, "encoder_v": D, "encoder_k": D, "lm_head": D, "decoder": width}.get(name, 1)
            if name.startswith("blocks_") and parameter.ndim == 2:
                fan_in = parameter.shape[1]
            parameter.normal_(std=fan_in**-0.5)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
        # the buffer is computed in float32; exact values allow float64 tolerances
        N = model.config.n_neurons
        exact = formula_frequencies(N // 2).repeat(2) if model.config.rotary == "axial" else formula_frequencies(N)
        model.attn.freqs.copy_(exact.view(1, 1, 1, -1))
    return model


def small_images(batch=2):
    """(B, 2, 6, 6) float64."""
    return torch.randn(batch, 2, 6, 6, dtype=torch.float64)


def count(model):
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def assert_close(actual, expected, tolerance):
    """Equal up to tolerance relative to the whole tensor's norm."""
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    assert (actual - expected).norm() <= tolerance * expected.norm(), (actual - expected).norm() / expected.norm()


def relative_error(actual, expected):
    """Norm of the difference over the norm of what is expected, both in float64."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def results_in(autocast, model, images, cotangent, fast):
    """Logits and the gradients of all parameters by name, inside autocast, on the chosen path."""
    calls, real = [], kernels.fast_update
    model.use_fast_path = fast
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "fast_update", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
        with autocast:
            logits = model(images)
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(logits, parameters, cotangent.to(logits.dtype))
    assert bool(calls) == fast
    return logits, dict(zip(names, gradients, strict=True))


def assert_equals_reference(model, inputs, every_weight_counts=True):
    """Outputs and all gradients of a `randomised` VisionBDH or BDH are those of the functions above.

    Without LN a raw step multiplies x by a fourth-degree product, so three steps magnify relative rounding some 4^3
    times; LN of a nearly constant row by up to 1 / sqrt(1e-5). Both leave 1e-9 of float64's 1e-16 easily.
    """
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    if "embed.weight" in weights:
        actual, expected = model(inputs)[0], reference_logits(weights, inputs, **choices_of(model.config))
    else:
        tokens, features, expected = reference_outputs(weights, inputs, **choices_of(model.config))
        assert_close(model.tokens(inputs), tokens, 1e-9)
        assert_close(model.features(inputs), features, 1e-9)
        actual = model(inputs)
    assert_close(actual, expected, 1e-9)
    cotangent = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, list(weights.values()), cotangent)
    actual.backward(cotangent)
    for (name, parameter), expected_grad in zip(model.named_parameters(), expected_grads, strict=True):
        assert expected_grad.norm() > 0 or not every_weight_counts, name
        assert_close(parameter.grad, expected_grad, 1e-7)


def assert_normal(weight, std=0.02):
    """Mean and deviation are those of N(0, std) within the sampling error."""
    n = weight.numel()
    assert abs(weight.std().item() / std - 1) < 5 / math.sqrt(2 * n)
    assert abs(weight.mean().item()) < 5 * std / math.sqrt(n)
    assert weight.abs().max() > 2.5 * std  # a uniform distribution of this deviation ends at 1.73
