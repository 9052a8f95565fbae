"""Vision-BDH: every design choice against an implementation written here from DESIGN's table; names, counts, starts."""

import math

import pytest
import torch
from reference import (
    SMALL,
    assert_close,
    assert_equals_reference,
    count,
    norm,
    randomised,
    reference_embedding,
    reference_outputs,
    reference_tokens,
    reference_update,
    small_images,
)

from models.vision_bdh import (
    VisionBDHConfig,
    v1_config,
    v2_as_run_config,
    v2_config,
    v2_softmax_config,
    v3_config,
)

BUILDERS = [v1_config, v2_config, v2_softmax_config, v2_as_run_config, v3_config]
RESIDUALS = ["post", "pre", "true_pre", "scaled_pre", "none"]


pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------------------- the function


@pytest.mark.parametrize("path", ["fast", "plain", "softmax"])
@pytest.mark.parametrize("update_norm", [True, False])
@pytest.mark.parametrize("attn_norm", [True, False])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_every_design_choice_equals_reference(residual, attn_norm, update_norm, path):
    choices = dict(
        residual=residual,
        attn_norm=attn_norm,
        update_norm=update_norm,
        attention="softmax" if path == "softmax" else "raw",
    )
    model = randomised(VisionBDHConfig(**SMALL, **choices).build())
    model.use_fast_path = path == "fast"
    assert_equals_reference(model, small_images())


@pytest.mark.parametrize("path", ["fast", "plain"])
@pytest.mark.parametrize("build", BUILDERS)
def test_built_variant_in_float32_equals_reference(build, path):
    # as built: fresh float32 weights and frequencies, 64 tokens. Small first updates (variance below LN's eps) make
    # these models smooth, and float32 rounding of 6e-8 an operation stays far below 2e-5.
    model = build(mlp_internal_dim_multiplier=2, n_layer=3, n_embd=24, n_head=3).eval()
    model.use_fast_path = path == "fast"
    config = model.config
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    images = torch.randn(2, 3, 32, 32)
    _, _, expected = reference_outputs(
        weights,
        images.double(),
        n_layer=3,
        residual=config.residual,
        attn_norm=config.attn_norm,
        update_norm=config.update_norm,
        attention=config.attention,
    )
    assert_close(model(images).double(), expected, 2e-5)


@pytest.mark.parametrize("attention", ["raw", "softmax"])
def test_attention_weights_are_those_of_the_output(attention):
    model = randomised(VisionBDHConfig(**SMALL, attention=attention).build())
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    x_sparse = (x[:, None] @ model.encoder).relu()  # (B, H, T, N)
    weights = model.attention_weights(x, level=1)
    q, _ = model.queries_and_keys(x, x_sparse, model.step_weights()[1], model.attn.tables(9))
    assert_close(model.attn(q, q, x), weights @ x[:, None], 1e-12)
    if attention == "softmax":
        assert torch.allclose(weights.sum(-1), torch.ones((), dtype=torch.float64))
    else:
        assert torch.allclose(weights, weights.mT)
        assert torch.allclose(weights.diagonal(dim1=-2, dim2=-1), x_sparse.square().sum(-1))  # rope keeps norms


@pytest.mark.parametrize("path", ["fast", "plain"])
def test_hooks_see_the_input_of_every_level(path):
    model = randomised(v1_config(**SMALL).build())
    model.use_fast_path = path == "fast"
    seen = []
    model.level_input.register_forward_hook(lambda module, args, out: seen.append(out))
    images = small_images()
    model(images)
    weights = dict(model.named_parameters())
    assert len(seen) == SMALL["n_layer"]
    for level, x in enumerate(seen):
        step = dict(attn_norm=True, update_norm=True, attention="raw")
        assert_close(x, reference_tokens(weights, images, n_layer=level, residual="post", **step), 1e-9)


@pytest.mark.parametrize("build", BUILDERS)
def test_dropout_in_training_only(build):
    model, images = randomised(build(**SMALL, dropout=0.5)), small_images()
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))


# ---------------------------------------------------------------------------- what the variants share


@pytest.mark.parametrize("path", ["fast", "plain"])
def test_normalised_last_state_of_v2_is_that_of_v1(path):
    # v1 normalises at the end of a step what v2 normalises at the head of the next, and the test adds v2's last LN.
    # Each LN is applied once in both, nowhere LN(LN(x)), so eps does not enter and only rounding is left.
    v1, v2 = randomised(v1_config(**SMALL).build()), randomised(v2_config(**SMALL).build())
    v2.load_state_dict(v1.state_dict())
    v1.use_fast_path = v2.use_fast_path = path == "fast"
    images = small_images()
    state = v2.tokens(images)
    assert_close(norm(state), v1.tokens(images), 1e-12)
    assert (state - v1.tokens(images)).norm() > 0.1 * state.norm()  # only LN makes them alike
    # pooling comes before the head's LN, and the mean of normalised tokens is not the normalised mean
    assert (v2.features(images) - v1.features(images)).norm() > 1e-6


def test_v2_as_run_is_v1_with_other_weights():
    v1, as_run = randomised(v1_config(**SMALL).build()), randomised(v2_as_run_config(**SMALL).build())
    as_run.load_state_dict(v1.state_dict())
    images = small_images()
    assert torch.equal(as_run(images), v1(images))


def test_v2_as_run_equals_the_published_steps():
    # The published code took LN at the head and at the end of each step. The end of one and the head of the next make
    # LN(LN(s)) = LN(s) (1 + eps / 2 (1 / var(s) - 1)) to first order; s = x + y with x and y normalised has a variance
    # between 0.5 and 4 but for rare tokens, so a step differs by about 5e-6 or less, and steps magnify that some
    # ten times. A missing or a wrong LN would differ by more than 0.01.
    model, images = randomised(v2_as_run_config(**SMALL).build()), small_images()
    weights = dict(model.named_parameters())
    x = reference_embedding(weights, images)
    for _ in range(SMALL["n_layer"]):
        x = norm(x)
        x = norm(x + reference_update(weights, x, attn_norm=True, update_norm=True, attention="raw"))
    logits = norm(x.mean(1)) @ weights["head.weight"].T + weights["head.bias"]
    assert_close(model(images), logits, 1e-3)


# ---------------------------------------------------------------------------- the order of patches


@pytest.mark.parametrize(
    ("learned", "rotary", "sees_order"), [(True, True, True), (True, False, True), (False, True, True), (False,) * 3]
)
@pytest.mark.parametrize("attention", ["raw", "softmax"])
def test_model_sees_the_order_of_patches(attention, learned, rotary, sees_order):
    model, images = randomised(v1_config(**SMALL, attention=attention).build()), small_images()
    with torch.no_grad():
        if not learned:
            model.pos_embed.zero_()
        if not rotary:
            model.attn.freqs.zero_()
    swapped = images.clone()
    swapped[:, :, 0:2, 2:4], swapped[:, :, 4:6, 4:6] = images[:, :, 4:6, 4:6], images[:, :, 0:2, 2:4]
    difference = (model(images) - model(swapped)).norm() / model(images).norm()
    # without any positions the model is a function of the set of patches, which shows that the rest can fail
    assert difference > 1e-6 if sees_order else difference < 1e-10


# ---------------------------------------------------------------------------- parameters and their start


@pytest.mark.parametrize(
    ("build", "fields", "expected"),
    [
        (v1_config, {}, 3_562_570),
        (v2_config, {}, 3_562_570),
        (v2_softmax_config, {}, 3_562_570),
        (v2_as_run_config, {}, 3_562_570),
        (v3_config, {}, 3_565_258),
        (v1_config, dict(num_classes=100), 3_579_940),
        (v1_config, dict(mlp_internal_dim_multiplier=4), 465_994),
        (v1_config, dict(mlp_internal_dim_multiplier=16), 1_793_098),
        (v1_config, dict(mlp_internal_dim_multiplier=128), 14_179_402),
    ],
)
def test_parameter_count(build, fields, expected):
    with torch.device("meta"):  # shapes only
        assert count(build(**fields)) == expected


def test_state_dict_names_and_shapes():
    shapes = {name: tuple(tensor.shape) for name, tensor in v1_config(**SMALL).build().state_dict().items()}
    assert shapes == {
        "patch_embed.weight": (12, 2, 2, 2),
        "patch_embed.bias": (12,),
        "pos_embed": (1, 9, 12),
        "encoder": (3, 12, 16),
        "encoder_v": (3, 12, 16),
        "decoder": (48, 12),
        "attn.freqs": (1, 1, 1, 16),
        "head.weight": (5, 12),
        "head.bias": (5,),
    }


def test_scaled_pre_adds_one_affine_norm_a_level_and_one_at_the_end():
    plain, scaled = v1_config(**SMALL).build().state_dict(), v3_config(**SMALL).build().state_dict()
    added = {name: tensor for name, tensor in scaled.items() if name not in plain}
    assert len(added) == 2 * 4
    assert sorted(tensor.mean().item() for tensor in added.values()) == [0.0] * 4 + [1.0] * 4
    assert {tuple(tensor.shape) for tensor in added.values()} == {(12,)}


def start(init):
    """A model as drawn, with H = 3, D = 120, N = 80: sizes at which no two of the bounds below are near each other."""
    torch.manual_seed(0)
    return VisionBDHConfig(n_embd=120, n_head=3, mlp_internal_dim_multiplier=2, init=init).build()


@pytest.mark.parametrize("name", ["encoder", "encoder_v", "decoder"])
@pytest.mark.parametrize("init", ["xavier", "xavier_per_head"])
def test_uniform_start(init, name):
    weight = start(init).get_parameter(name)
    H, D, N = 3, 120, 80
    bound = {
        ("xavier", "encoder"): math.sqrt(6 / (D * N + H * N)),
        ("xavier", "encoder_v"): math.sqrt(6 / (D * N + H * N)),
        ("xavier", "decoder"): math.sqrt(6 / (H * N + D)),
    }.get((init, name), math.sqrt(6 / (D + N)))
    n = weight.numel()
    # sample deviation of a uniform distribution (kurtosis 1.8): relative error sqrt((1.8 - 1) / (4 n))
    assert abs(weight.std().item() / (bound / math.sqrt(3)) - 1) < 5 * math.sqrt(0.2 / n)
    assert abs(weight.mean().item()) < 5 * bound / math.sqrt(3 * n)
    assert 0.99 * bound < weight.abs().max() <= bound * (1 + 1e-6)
    if init == "xavier":  # Xavier's own rule on the tensor as it is shaped
        assert xavier_bound(weight) == pytest.approx(bound)


def xavier_bound(weight):
    """The bound that PyTorch's Xavier takes for this tensor."""
    fan_in, fan_out = torch.nn.init._calculate_fan_in_and_fan_out(weight)
    return math.sqrt(6 / (fan_in + fan_out))


@pytest.mark.parametrize(
    ("init", "name"),
    [("normal", name) for name in ("encoder", "encoder_v", "decoder")]
    + [(i, n) for i in ("normal", "xavier") for n in ("pos_embed", "patch_embed.weight", "head.weight")],
)
def test_normal_start(init, name):
    weight = start(init).get_parameter(name)
    n = weight.numel()
    assert abs(weight.std().item() / 0.02 - 1) < 5 / math.sqrt(2 * n)  # sampling error of a normal's deviation
    assert abs(weight.mean().item()) < 5 * 0.02 / math.sqrt(n)
    assert weight.abs().max() > 2.5 * 0.02  # a uniform distribution of this deviation ends at 1.73


@pytest.mark.parametrize("build", BUILDERS)
def test_biases_start_at_zero(build):
    model = build(**SMALL)
    biases = {name: p for name, p in model.named_parameters() if name.endswith("bias")}
    assert {"patch_embed.bias", "head.bias"} <= set(biases)
    for name, bias in biases.items():
        assert (bias == 0).all(), name


def test_starts_differ_from_call_to_call():
    first, second = v2_config(**SMALL).build(), v2_config(**SMALL).build()
    for name in ("encoder", "encoder_v", "decoder", "pos_embed"):
        assert not torch.equal(first.get_parameter(name), second.get_parameter(name)), name
    assert not torch.equal(first.encoder, first.encoder_v)


# ---------------------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    ("config", "build", "expected"),
    [
        (v1_config, v1_config, ("post", True, True, "raw", "normal")),
        (v2_config, v2_config, ("pre", True, True, "raw", "xavier")),
        (v2_softmax_config, v2_softmax_config, ("pre", True, True, "softmax", "xavier")),
        (v2_as_run_config, v2_as_run_config, ("post", True, True, "raw", "xavier")),
        (v3_config, v3_config, ("scaled_pre", False, False, "raw", "xavier")),
    ],
)
def test_named_variants(config, build, expected):
    fields = config()
    assert (fields.residual, fields.attn_norm, fields.update_norm, fields.attention, fields.init) == expected
    assert (fields.n_layer, fields.n_embd, fields.n_head, fields.mlp_internal_dim_multiplier) == (6, 192, 6, 32)
    assert (fields.img_size, fields.patch_size, fields.in_channels, fields.num_classes) == (32, 4, 3, 10)
    assert (fields.dropout, fields.n_neurons, fields.grid) == (0.1, 1024, (8, 8))
    with torch.device("meta"):
        assert build().config == fields


@pytest.mark.parametrize("build", BUILDERS)
def test_overrides(build):
    # every field away from the value of every variant, also those that make the variant
    fields = SMALL | dict(dropout=0.3, residual="none", attn_norm=False, update_norm=True, init="xavier_per_head")
    model = build(**fields)
    assert {name: getattr(model.config, name) for name in fields} == fields
    assert model(torch.randn(4, 2, 6, 6)).shape == (4, 5)
    assert model.config.attention == build(**SMALL).config.attention  # the others stay the variant's


@pytest.mark.parametrize("build", BUILDERS)
def test_misspelt_field_is_refused(build):
    with pytest.raises(TypeError, match="n_layers"):
        build(n_layers=4)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (dict(n_embd=100, n_head=6), ["n_embd", "n_head"]),
        (dict(img_size=30, patch_size=4), ["img_size", "patch_size"]),
        (dict(n_layer=0), ["n_layer"]),
        (dict(n_head=0), ["n_head"]),
        (dict(n_embd=-6), ["n_embd"]),
        (dict(mlp_internal_dim_multiplier=0), ["mlp_internal_dim_multiplier"]),
        (dict(patch_size=0), ["patch_size"]),
        (dict(num_classes=0), ["num_classes"]),
        (dict(dropout=1.0), ["dropout"]),
        (dict(dropout=-0.1), ["dropout"]),
        (dict(n_embd=9, n_head=3, mlp_internal_dim_multiplier=5), ["mlp_internal_dim_multiplier", "n_embd", "n_head"]),
    ],
)
def test_impossible_sizes_are_refused_by_name(fields, named):
    with pytest.raises(ValueError) as refusal:
        VisionBDHConfig(**fields)
    for name in named:
        assert name in str(refusal.value)


@pytest.mark.parametrize("batch", [1, 5])
def test_shapes(batch):
    model, images = v1_config(**SMALL).build(), small_images(batch).float()
    assert model.tokens(images).shape == (batch, 9, 12)
    assert model.features(images).shape == (batch, 12)
    assert model(images).shape == (batch, 5)


def test_images_do_not_see_each_other():
    model, images = randomised(v2_config(**SMALL).build()), small_images(3)
    assert_close(model(images), torch.cat([model(image[None]) for image in images]), 1e-12)
