"""The recorder on every family of models: it changes nothing, and what it gives is what the model computed."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from interpretability.common.adapters import adapter_of
from interpretability.common.recorder import record
from models.baselines import DeiTTinyConfig, ViTConfig
from models.bdh import BDH, BDHConfig, layer_norm
from models.bdh_unet import bdh_unet_config
from models.vision_bdh import v1_config, v2_config, v2_softmax_config, v3_config

BDH_SIZES = dict(img_size=8, patch_size=2, n_layer=3, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4)  # 16 tokens
VIT_SIZES = dict(img_size=8, patch_size=2, n_layer=3, n_embd=16, n_head=2, mlp_dim=32)
CLASSIFIERS = {
    "v1": lambda: v1_config(**BDH_SIZES).build(),
    "v2": lambda: v2_config(**BDH_SIZES).build(),
    "v2_softmax": lambda: v2_softmax_config(**BDH_SIZES).build(),
    "v3": lambda: v3_config(**BDH_SIZES).build(),
    "class_token": lambda: v2_config(pool="cls", rotary="axial", **BDH_SIZES).build(),
    "own_weights": lambda: v2_config(shared=False, qk="separate", gate="sigmoid", **BDH_SIZES).build(),
    "vit": lambda: ViTConfig(**VIT_SIZES).build(),
}
BUILDERS = CLASSIFIERS | {
    "bdh_unet": lambda: bdh_unet_config(**BDH_SIZES).build(),
    "text": lambda: BDH(
        BDHConfig(**{key: BDH_SIZES[key] for key in BDH_SIZES if key not in ("img_size", "patch_size")})
    ),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def build(name):
    """A small model with weights large enough for all parts to matter, in evaluation mode."""
    torch.manual_seed(3)
    model = BUILDERS[name]().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(params=BUILDERS)
def model(request):
    return build(request.param)


@pytest.fixture
def images():
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def inputs_of(model, images):
    """The images, or bytes for the language model."""
    return images.flatten(1)[:, :16].mul(40).long().clamp(0, 255) if isinstance(model, BDH) else images


def outputs_of(model, inputs):
    outputs = model(inputs)
    return outputs[0] if isinstance(outputs, tuple) else outputs


def count_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# ---------------------------------------------------------------------------- it changes nothing


@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients_keep_their_bits(model, images, training):
    """Dropout included; and the hooks are gone afterwards."""
    model.train(training)
    inputs = inputs_of(model, images)

    def step():
        torch.manual_seed(0)
        model.zero_grad()
        outputs = outputs_of(model, inputs)
        outputs.square().sum().backward()
        return outputs, [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    outputs, gradients = step()
    with record(model) as trace:
        recorded_outputs, recorded_gradients = step()
        assert count_hooks(model) > 0
    assert torch.equal(outputs, recorded_outputs)
    assert all(torch.equal(*pair) for pair in zip(gradients, recorded_gradients, strict=True))
    assert count_hooks(model) == 0
    for kept in (trace.inputs, trace.outputs):
        assert sorted(kept) == [0, 1, 2] and not any(x.requires_grad for x in kept.values())
    for name in trace.names:  # looking changes nothing either
        assert getattr(trace, name)(1).isfinite().all() and not getattr(trace, name)(1).requires_grad
    assert all(torch.equal(*pair) for pair in zip(step()[1], gradients, strict=True))


def test_timm_transformer(images):
    torch.manual_seed(0)
    model = DeiTTinyConfig(img_size=8, setting="fitted").build().eval()
    expected = model(images)
    attention = model.blocks[5].attn
    seen = []
    handle = attention.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    with torch.no_grad(), record(model) as trace:
        assert torch.equal(model(images), expected)
    handle.remove()
    ((x, output),) = seen
    scores = trace.scores(5)
    torch.testing.assert_close(scores.sum(-1), torch.ones(3, 3, 5))
    v = attention.qkv(x).unflatten(-1, (3, 3, -1))[:, :, 2].transpose(1, 2)  # (B, H, T, D / H)
    torch.testing.assert_close(attention.proj((scores @ v).transpose(1, 2).flatten(2)), output)
    torch.testing.assert_close(trace.logits(11), expected)
    assert count_hooks(model) == 0 and trace.scores(0, patches_only=True).shape == (3, 3, 4, 4)


def test_hooks_go_after_an_exception(model, images):
    with pytest.raises(ZeroDivisionError), record(model):
        assert count_hooks(model) > 0
        _ = model(inputs_of(model, images)), 1 / 0
    assert count_hooks(model) == 0


def test_only_what_is_asked_for_is_kept(model, images):
    inputs = inputs_of(model, images)
    with torch.no_grad(), record(model) as everything, record(model, "scores", levels=[2, 0]) as trace:
        model(inputs)
    assert sorted(trace.inputs) == [0, 2] and not trace.outputs
    assert all(torch.equal(trace.scores(level), everything.scores(level)) for level in (0, 2))
    assert not torch.equal(trace.inputs[0], trace.inputs[2])
    with pytest.raises(LookupError, match="level 1 was not recorded"):
        trace.scores(1)
    with pytest.raises(LookupError, match=r"x was not recorded, only scores: name it in record"):
        trace.x(0)
    with torch.no_grad(), record(model, "state") as trace:
        model(inputs)
    assert sorted(trace.outputs) == [0, 1, 2] and not trace.inputs


def test_what_a_model_does_not_have(images):
    for level in (-1, 3):
        with pytest.raises(ValueError, match="between 0 and 2"), record(build("v2"), levels=[level]):
            pass
    with pytest.raises(ValueError, match="VisionTransformer has no x_sparse, only x, state, scores, logits"):
        record(build("vit"), "x_sparse").__enter__()
    for name in ("text", "bdh_unet"):
        with pytest.raises(ValueError, match="has no logits"):
            record(build(name), "logits").__enter__()
    with pytest.raises(TypeError, match="Linear cannot be looked into"), record(nn.Linear(2, 2)):
        pass


def test_the_last_pass_counts(model, images):
    """Also after a pass that broke off between levels."""
    inputs = inputs_of(model, images)
    core = adapter_of(model).model
    with torch.no_grad(), record(model) as expected:
        model(inputs)
    with torch.no_grad(), record(model) as trace:
        model(inputs.flip(0))
        if hasattr(core, "use_fast_path"):
            core.use_fast_path = False  # which does not call attn
        broken = core.attn if hasattr(core, "attn") else core.encoder.layers[1].mlp
        handle = broken.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(inputs.flip(0))
        handle.remove()
        if hasattr(core, "use_fast_path"):
            core.use_fast_path = True
        model(inputs)
    for level in range(3):
        assert torch.equal(trace.x(level), expected.x(level)) and torch.equal(trace.state(level), expected.state(level))


def test_scores_are_made_when_asked_for(images, monkeypatch):
    """One level at a time, so that memory never holds all of them."""
    model = build("v2")
    shapes, real = [], model.attn.weights
    monkeypatch.setattr(model.attn, "weights", lambda *args: shapes.append(args[0].shape) or real(*args))
    with torch.no_grad(), record(model) as trace:
        model(images)
    assert not shapes
    trace.scores(1)
    trace.scores(1, queries=slice(4, 5))
    assert [shape[2] for shape in shapes] == [16, 1]


# ---------------------------------------------------------------------------- it gives what the model computed


def test_some_queries_are_rows_of_all(model, images):
    with torch.no_grad(), record(model, "scores") as trace:
        model(inputs_of(model, images))
    for level in range(3):
        scores = trace.scores(level)
        torch.testing.assert_close(trace.scores(level, slice(5, 9)), scores[:, :, 5:9])
        first = adapter_of(model).class_tokens
        patches = trace.scores(level, patches_only=True)
        assert torch.equal(patches, scores[:, :, first:, first:])
        torch.testing.assert_close(trace.scores(level, slice(3, 4), patches_only=True), patches[:, :, 3:4])
    assert first == (scores.shape[-1] > 16)


@pytest.mark.parametrize("name", ["v2", "class_token", "own_weights"])
def test_scores_and_neurons_multiply_out_to_the_level(name, images):
    """The decoder on the gated neurons, which attention has excited: together, the very step from state to state."""
    model = build(name)
    with torch.no_grad(), record(model) as trace:
        model(images)
    for level in range(3):
        x, weights = trace.x(level), model.step_weights()[level]
        a = layer_norm(trace.scores(level) @ x.unsqueeze(1))
        y_sparse = torch.einsum("bhtd,hdn->bhtn", a, weights.encoder_v).relu()
        torch.testing.assert_close(trace.y_sparse(level), y_sparse, rtol=1e-4, atol=1e-4)
        before = torch.einsum("btd,hdn->bhtn", x, weights.encoder)
        torch.testing.assert_close(trace.x_sparse(level), before.relu(), rtol=1e-4, atol=1e-5)
        gate = before.sigmoid() if name == "own_weights" else before.relu()
        torch.testing.assert_close(trace.gated(level), gate * y_sparse, rtol=1e-3, atol=1e-3)
        y = sum(trace.gated(level)[:, head] @ weights.decoder.chunk(2)[head] for head in range(2))
        with torch.no_grad():  # v2: x = LN(x); x = x + LN(y)
            torch.testing.assert_close(trace.state(level), x + layer_norm(y), rtol=1e-4, atol=1e-4)
        if level:
            torch.testing.assert_close(x, layer_norm(trace.state(level - 1)))
        together = trace.activity(level)
        assert all(torch.equal(getattr(together, each), getattr(trace, each)(level)) for each in together._fields)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_what_the_model_says_at_each_level(name, images):
    """At the last level its output; a BDH with fewer levels and the same weights says the same earlier."""
    model = build(name)
    with torch.no_grad(), record(model, "logits") as trace:
        expected = model(images)
    torch.testing.assert_close(trace.logits(2), expected)
    if name in ("v1", "v2", "v2_softmax", "class_token"):
        shorter = dataclasses.replace(model.config, n_layer=2).build().eval()
        shorter.load_state_dict(model.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(trace.logits(1), shorter(images))
    assert (trace.logits(0) - expected).abs().max() > 0.01


def test_recorded_under_autocast_computed_without(images):
    model = build("v2")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), record(model) as trace:
        model(images)
        assert all(getattr(trace, name)(1).dtype == torch.float32 for name in ("scores", "gated", "logits"))


def layer_norm64(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def attention64(model, images, residual, norms, softmax):
    """Attention of every level (B, H, T, T), by the equations in numpy float64, one head and one pair at a time."""
    weights = {name: value.detach().double().numpy() for name, value in model.state_dict().items()}
    B, side, patch = len(images), 4, 2
    pixels = images.double().numpy().reshape(B, 3, side, patch, side, patch).transpose(0, 2, 4, 1, 3, 5)
    kernel = weights["patch_embed.weight"].reshape(16, -1)  # (D, 3 * patch * patch)
    x = pixels.reshape(B, side * side, -1) @ kernel.T + weights["patch_embed.bias"] + weights["pos_embed"]
    H, _, N = weights["encoder"].shape
    x = layer_norm64(x) if residual == "post" else x
    scores = []
    for level in range(3):
        x = layer_norm64(x) if residual == "pre" else x
        seen = x
        if residual == "scaled_pre":
            scale, shift = weights[f"level_norms.{level}.weight"], weights[f"level_norms.{level}.bias"]
            seen = (layer_norm64(x) * scale + shift) / math.sqrt(level + 1)
        update, heads = 0, []
        for head in range(H):
            x_sparse = np.maximum(seen @ weights["encoder"][head], 0)  # (B, T, N)
            q = np.empty_like(x_sparse)
            for pair in range(N // 2):
                angle = np.arange(side * side) * (2.0**16) ** (-2 * pair / N)
                even, odd = x_sparse[..., 2 * pair], x_sparse[..., 2 * pair + 1]
                q[..., 2 * pair] = even * np.cos(angle) - odd * np.sin(angle)
                q[..., 2 * pair + 1] = odd * np.cos(angle) + even * np.sin(angle)
            s = q @ q.transpose(0, 2, 1)
            if softmax:
                s = np.exp(s / math.sqrt(N))
                s /= s.sum(-1, keepdims=True)
            heads.append(s)
            a = layer_norm64(s @ seen) if norms else s @ seen
            y_sparse = np.maximum(a @ weights["encoder_v"][head], 0)
            update = update + (x_sparse * y_sparse) @ weights["decoder"][head * N : (head + 1) * N]
        x = x + (layer_norm64(update) if norms else update)
        x = layer_norm64(x) if residual == "post" else x
        scores.append(np.stack(heads, 1))
    return scores


@pytest.mark.parametrize(
    "name, residual, norms, softmax",
    [
        ("v1", "post", True, False),
        ("v2", "pre", True, False),
        ("v2_softmax", "pre", True, True),
        ("v3", "scaled_pre", False, False),
    ],
)
def test_bdh_scores(images, name, residual, norms, softmax):
    torch.manual_seed(7)
    model = BUILDERS[name]().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    with torch.no_grad(), record(model) as trace:
        model(images)
    expected = attention64(model, images, residual, norms, softmax)
    for level in range(3):
        scores = trace.scores(level)
        assert scores.shape == (3, 2, 16, 16)
        scale = np.abs(expected[level]).max()
        assert np.abs(scores.numpy() - expected[level]).max() < 2e-5 * scale


@pytest.mark.parametrize("attention", ["raw", "softmax"])
def test_language_model_scores_are_masked(attention):
    torch.manual_seed(0)
    model = BDH(BDHConfig(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4, attention=attention)).eval()
    with torch.no_grad(), record(model, "scores", "x") as trace:
        model(torch.randint(0, 256, (2, 9)))
    scores = trace.scores(1)
    assert scores.shape == (2, 2, 9, 9) and scores.abs().max() > 0
    assert torch.equal(scores, scores.tril(-1))
    for first in range(9):
        torch.testing.assert_close(trace.scores(1, slice(first, first + 1)), scores[:, :, first : first + 1])


def test_vit_weights_multiply_out_to_its_attention(images):
    """Rows sum to 1; with the values and the output projection they give what its attention gave."""
    model = build("vit")
    seen = []
    handles = [
        block.self_attention.register_forward_hook(lambda module, args, output: seen.append((args[0], output[0])))
        for block in model.encoder.layers
    ]
    with torch.no_grad(), record(model) as trace:
        model(images)
    for handle in handles:
        handle.remove()
    assert len(seen) == 3
    for level, (x, output) in enumerate(seen):
        attention, scores = model.encoder.layers[level].self_attention, trace.scores(level)
        assert torch.equal(trace.x(level), x)
        torch.testing.assert_close(scores.sum(-1), torch.ones(3, 2, 17))
        v = nn.functional.linear(x, attention.in_proj_weight[32:], attention.in_proj_bias[32:])
        heads = scores @ v.unflatten(-1, (2, 8)).transpose(1, 2)  # (B, H, T, D / H)
        torch.testing.assert_close(attention.out_proj(heads.transpose(1, 2).flatten(2)), output, rtol=1e-4, atol=1e-5)
