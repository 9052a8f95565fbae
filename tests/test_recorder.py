"""The recorder: it changes nothing, keeps what was asked for, and gives what the model computed."""

import math

import pytest
import torch
from torch import nn

from interpretability.common.adapters import adapter_of
from interpretability.common.recorder import record
from models.baselines import DeiTTinyConfig, ViTConfig
from models.bdh import layer_norm
from models.bdh_unet import bdh_unet_config
from models.language import BDH, BDHConfig
from models.vision_bdh import v1_config, v2_config, v2_softmax_config, v3_config
from tests.inspecting import BDH as BDH_SIZES
from tests.inspecting import VIT as VIT_SIZES
from tests.inspecting import with_large_weights
from tests.reference import activate, assert_close, norm, randomised, reference_embedding, reference_levels, rotate

TEXT_SIZES = {key: size for key, size in BDH_SIZES.items() if key not in ("img_size", "patch_size")}
CLASSIFIERS = {
    "v1": v1_config(**BDH_SIZES),
    "v2": v2_config(**BDH_SIZES),
    "v2_softmax": v2_softmax_config(**BDH_SIZES),
    "v3": v3_config(**BDH_SIZES),
    "class_token": v2_config(pool="cls", rotary="axial", **BDH_SIZES),
    "own_weights": v2_config(shared=False, qk="separate", gate="sigmoid", **BDH_SIZES),
    "vit": ViTConfig(mlp_dim=32, **VIT_SIZES),
}
CONFIGS = CLASSIFIERS | {"bdh_unet": bdh_unet_config(**BDH_SIZES), "text": BDHConfig(**TEXT_SIZES)}


def build(name):
    return with_large_weights(CONFIGS[name].build())


@pytest.fixture(params=CONFIGS)
def model(request):
    return build(request.param)


@pytest.fixture
def images():
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def inputs_of(model, images):
    """The images, or bytes for the language model."""
    return images.flatten(1)[:, :16].mul(40).long().clamp(0, 255) if isinstance(model, BDH) else images


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
        outputs = model(inputs)
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
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


def test_hooks_go_after_an_exception(model, images):
    with pytest.raises(ZeroDivisionError), record(model):
        assert count_hooks(model) > 0
        _ = model(inputs_of(model, images)), 1 / 0
    assert count_hooks(model) == 0


# ---------------------------------------------------------------------------- it keeps what was asked for


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


def test_what_a_model_does_not_have():
    for level in (-1, 3):
        with pytest.raises(ValueError, match="between 0 and 2"), record(build("v2"), levels=[level]):
            pass
    with pytest.raises(ValueError, match="ViT has no x_sparse, only x, state, scores, logits"):
        record(build("vit"), "x_sparse").__enter__()
    for name in ("text", "bdh_unet"):
        with pytest.raises(ValueError, match="has no logits"):
            record(build(name), "logits").__enter__()
    with pytest.raises(TypeError, match="Linear is not supported"), record(nn.Linear(2, 2)):
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


@pytest.mark.parametrize("name", ["v1", "v2", "v2_softmax", "v3", "class_token"])
def test_inputs_and_scores_are_the_reference_s(name, images):
    """Of every level and head, in float64."""
    model = randomised(CLASSIFIERS[name].build())
    config, images = model.config, images.double()
    choices = {key: getattr(config, key) for key in ("residual", "attn_norm", "update_norm", "attention", "rotary")}
    with torch.no_grad(), record(model) as trace:
        model(images)
        weights = dict(model.named_parameters())
        for level in range(3):
            x = reference_levels(weights, reference_embedding(weights, images), n_layer=level, **choices)
            x = norm(x) if config.residual == "pre" else x
            assert_close(trace.x(level), x, 1e-9)
            for head, encoder in enumerate(weights["encoder"]):
                q = rotate(activate(x @ encoder, "relu"), config.rotary, config.pool == "cls")
                scores = q @ q.mT
                if config.attention == "softmax":
                    scores = (scores / math.sqrt(q.shape[-1])).softmax(-1)
                assert_close(trace.scores(level)[:, head], scores, 1e-9)


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
        together = trace.activity(level)
        assert all(torch.equal(getattr(together, each), getattr(trace, each)(level)) for each in together._fields)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_what_the_model_says_at_each_level(name, images):
    """At the last level its output; test_probe.py has the others."""
    model = build(name)
    with torch.no_grad(), record(model, "logits") as trace:
        expected = model(images)
    torch.testing.assert_close(trace.logits(2), expected)
    assert (trace.logits(0) - expected).abs().max() > 0.01


def test_recorded_under_autocast_computed_without(images):
    model = build("v2")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), record(model) as trace:
        model(images)
        assert all(getattr(trace, name)(1).dtype == torch.float32 for name in ("scores", "gated", "logits"))


@pytest.mark.parametrize("attention", ["raw", "softmax"])
def test_language_model_scores_are_masked(attention):
    model = with_large_weights(BDHConfig(**(TEXT_SIZES | dict(attention=attention))).build())
    with torch.no_grad(), record(model, "scores", "x") as trace:
        model(torch.randint(0, 256, (2, 9)))
    scores = trace.scores(1)
    assert scores.shape == (2, 2, 9, 9) and scores.abs().max() > 0
    assert torch.equal(scores, scores.tril(-1))
    for first in range(9):
        torch.testing.assert_close(trace.scores(1, slice(first, first + 1)), scores[:, :, first : first + 1])


def torchvision_attention(model, level):
    """The module, its values by head (B, H, T, D / H) as a function of its input, and its output projection."""
    attention = model.encoder.layers[level].self_attention

    def values(x):
        v = nn.functional.linear(x, attention.in_proj_weight[32:], attention.in_proj_bias[32:])
        return v.unflatten(-1, (2, 8)).transpose(1, 2)

    return attention, values, attention.out_proj


def timm_attention(model, level):
    attention = model.blocks[level].attn
    return attention, lambda x: attention.qkv(x).unflatten(-1, (3, 3, -1))[:, :, 2].transpose(1, 2), attention.proj


@pytest.mark.parametrize(
    "config, parts",
    [(CONFIGS["vit"], torchvision_attention), (DeiTTinyConfig(img_size=8, setting="fitted"), timm_attention)],
    ids=["torchvision", "timm"],
)
def test_vit_weights_multiply_out_to_its_attention(config, parts, images):
    """Rows sum to 1; with the values and the output projection they give what its attention gave."""
    torch.manual_seed(0)
    model = config.build().eval()
    for level in (0, 2):
        attention, values, projection = parts(model, level)
        seen = []
        handle = attention.register_forward_hook(lambda module, args, output, seen=seen: seen.append((args[0], output)))
        with torch.no_grad(), record(model) as trace:
            expected = model(images)
        handle.remove()
        assert count_hooks(model) == 0 and torch.equal(model(images), expected)
        ((x, output),) = seen
        scores = trace.scores(level)
        torch.testing.assert_close(scores.sum(-1), torch.ones(scores.shape[:3]))
        heads = (scores @ values(x)).transpose(1, 2).flatten(2)
        output = output[0] if isinstance(output, tuple) else output
        torch.testing.assert_close(projection(heads), output, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trace.logits(trace.levels[-1]), expected)
