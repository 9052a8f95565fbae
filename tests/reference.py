"""Vision-BDH written a second time, plainly, from DESIGN's table alone: what the models here are held to.

A head at a time, every choice spelled out; nothing is shared with the code under test. Letters as there: B images, T
tokens, D width, H heads, N neurons a head.
"""

import itertools
import math

import torch


def norm(x):
    """LN over the last axis, no affine parameters, eps 1e-5."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def keep(x):
    """No LN."""
    return x


def formula_frequencies(n_neurons):
    """Turns per position of each neuron, 2^16 ** (-2 floor(j / 2) / N) / (2 pi)."""
    return torch.tensor(
        [65536.0 ** (-2 * (j // 2) / n_neurons) / (2 * math.pi) for j in range(n_neurons)], dtype=torch.float64
    )


def turn_by(v, positions):
    """Turns the pairs of v by a position each token has. v: (B, T, N), positions: (T,)."""
    angle = 2 * math.pi * positions.to(v.dtype)[:, None] * formula_frequencies(v.shape[2])[0::2]
    even, odd = v[..., 0::2], v[..., 1::2]
    rotated = (even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin())
    return torch.stack(rotated, dim=-1).reshape(v.shape)


def turn(v, rotary="raster", class_token=False):
    """Rotary positions. v: (B, T, N); axial: of a square grid, the first half by the row, the second by the column."""
    n_tokens, half = v.shape[1], v.shape[2] // 2
    if rotary == "none":
        return v
    if rotary == "raster":
        return turn_by(v, torch.arange(n_tokens))
    side = math.isqrt(n_tokens)
    places = list(itertools.product(range(side), range(side)))
    if class_token:  # at a corner outside the grid
        places = [(0, 0)] + [(row + 1, column + 1) for row, column in places]
    rows, columns = torch.tensor(places).T
    return torch.cat((turn_by(v[..., :half], rows), turn_by(v[..., half:], columns)), dim=-1)


def activate(v, activation):
    if activation == "gelu":
        return v * (1 + torch.erf(v / math.sqrt(2))) / 2
    return v.clamp(min=0) ** {"relu": 1, "relu2": 2}[activation]


def reference_update(
    weights,
    x,
    *,
    attn_norm,
    update_norm,
    attention,
    qk="tied",
    gate="multiplicative",
    activation="relu",
    rotary="raster",
    class_token=False,
):
    """f of DESIGN's table: everything from x E to y, a head at a time. x: (B, T, D)."""
    gated = []
    for head, (encoder, encoder_v) in enumerate(zip(weights["encoder"], weights["encoder_v"], strict=True)):
        before = x @ encoder
        x_sparse = activate(before, activation)
        k_sparse = activate(x @ weights["encoder_k"][head], activation) if qk == "separate" else x_sparse
        q, k = turn(x_sparse, rotary, class_token), turn(k_sparse, rotary, class_token)
        scores = torch.einsum("btn,bun->btu", q, k)
        if attention == "softmax":
            scores = scores / math.sqrt(q.shape[-1])
            powers = (scores - scores.amax(-1, keepdim=True)).exp()
            scores = powers / powers.sum(-1, keepdim=True)
        a = (norm if attn_norm else keep)(scores @ x)
        y_sparse = activate(a @ encoder_v, activation)
        factor = {"multiplicative": x_sparse, "sigmoid": 1 / (1 + (-before).exp()), "none": 1}[gate]
        gated.append(factor * y_sparse)
    return (norm if update_norm else keep)(torch.cat(gated, dim=-1) @ weights["decoder"])


def reference_embedding(weights, images):
    """Patches, row by row, as tokens with what is learned of their positions: (B, C, height, width) -> (B, T, D).

    Positions and a class token are there if the weights have them.
    """
    kernel, bias = weights["patch_embed.weight"], weights["patch_embed.bias"]
    p = kernel.shape[-1]
    tokens = []
    for row, column in itertools.product(range(0, images.shape[2], p), range(0, images.shape[3], p)):
        patch = images[:, :, row : row + p, column : column + p].flatten(1)
        tokens.append(patch @ kernel.flatten(1).T + bias)
    x = torch.stack(tokens, dim=1)
    if "pos_embed" in weights:
        x = x + weights["pos_embed"]
    if "cls_token" in weights:
        x = torch.cat((weights["cls_token"].repeat(len(x), 1, 1), x), dim=1)
    return x


def weights_of_level(weights, level, shared):
    """The step's weights at a level, counted from 1."""
    names = [name for name in ("encoder", "encoder_v", "decoder", "encoder_k") if name in weights]
    return {name: weights[name] if shared else weights[name][level - 1] for name in names}


def reference_tokens(weights, images, *, n_layer, residual, shared=True, **step):
    """The last state, by DESIGN's table of residuals."""

    def f(x, level):
        class_token = "cls_token" in weights
        return reference_update(weights_of_level(weights, level, shared), x, class_token=class_token, **step)

    def scaled(x, level):  # S_l, l from 1
        affine = weights[f"level_norms.{level - 1}.weight"], weights[f"level_norms.{level - 1}.bias"]
        return (norm(x) * affine[0] + affine[1]) / math.sqrt(level)

    x = reference_embedding(weights, images)
    if residual == "post":
        x = norm(x)
    for level in range(1, n_layer + 1):
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
    return scaled(x, n_layer + 1) if residual == "scaled_pre" else x


def reference_outputs(weights, images, *, residual, **choices):
    """(tokens, features, logits) of the whole model."""
    tokens = reference_tokens(weights, images, residual=residual, **choices)
    pooled = tokens[:, 0] if "cls_token" in weights else tokens.sum(1) / tokens.shape[1]
    features = pooled if residual == "scaled_pre" else norm(pooled)
    return tokens, features, features @ weights["head.weight"].T + weights["head.bias"]


# ---------------------------------------------------------------------------- what tests of it share

# 9 tokens of width 12, 3 heads of N = 16 neurons, 5 classes, 2 channels: no two sizes alike
SMALL = dict(
    n_layer=3,
    n_embd=12,
    n_head=3,
    mlp_internal_dim_multiplier=4,
    img_size=6,
    patch_size=2,
    in_channels=2,
    num_classes=5,
)


def randomised(model):
    """The model in float64 and evaluation mode, every parameter random, of a size that lets every term count."""
    model = model.double().eval()
    D, width = model.config.n_embd, model.decoder.shape[-2]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = {"encoder": D, "encoder_v": D, "encoder_k": D, "decoder": width}.get(name, 1)
            parameter.normal_(std=fan_in**-0.5)
            if name.startswith("level_norms") and name.endswith("weight"):
                parameter.add_(1)
        # the buffer is drawn up in float32; the exact values allow tolerances of float64
        N = model.config.n_neurons
        exact = formula_frequencies(N // 2).repeat(2) if model.config.rotary == "axial" else formula_frequencies(N)
        model.attn.freqs.copy_(exact.view(1, 1, 1, -1))
    return model


def small_images(batch=2):
    """(B, 2, 6, 6) float64."""
    return torch.randn(batch, 2, 6, 6, dtype=torch.float64)


def assert_close(actual, expected, tolerance):
    """Equal up to tolerance relative to the whole tensor's norm."""
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    assert (actual - expected).norm() <= tolerance * expected.norm(), (actual - expected).norm() / expected.norm()


def count(model):
    """Trainable numbers."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


STEP_FIELDS = ["residual", "attn_norm", "update_norm", "attention", "qk", "gate", "activation", "rotary", "shared"]


def assert_equals_reference(model, images):
    """Tokens, features, logits and all gradients of a `randomised` model are those of the functions above.

    Without LN a raw step multiplies x by a fourth-degree product, so three steps magnify relative rounding some 4^3
    times; LN of a nearly constant row by up to 1 / sqrt(1e-5). Both leave 1e-9 of float64's 1e-16 easily.
    """
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    step = {name: getattr(model.config, name) for name in STEP_FIELDS}
    tokens, features, logits = reference_outputs(weights, images, n_layer=model.config.n_layer, **step)
    assert_close(model.tokens(images), tokens, 1e-9)
    assert_close(model.features(images), features, 1e-9)
    actual = model(images)
    assert_close(actual, logits, 1e-9)
    cotangent = torch.randn_like(logits)
    expected_grads = torch.autograd.grad(logits, list(weights.values()), cotangent)
    actual.backward(cotangent)
    for (name, parameter), expected in zip(model.named_parameters(), expected_grads, strict=True):
        assert expected.norm() > 0, name
        assert_close(parameter.grad, expected, 1e-7)
