"""Vision-BDH: residuals and norms against the reference, named variants, parameter counts, initial weights, configs."""

import math

import pytest
import torch

from models.locality import ConvStem
from models.vision_bdh import (
    VisionBDHConfig,
    double_ln_config,
    post_ln_config,
    pre_ln_config,
    v1_config,
    v2_as_run_config,
    v2_config,
    v2_softmax_config,
    v3_config,
)
from tests.reference import (
    SMALL,
    assert_close,
    assert_equals_reference,
    assert_normal,
    choices_of,
    count,
    norm,
    randomised,
    reference_embedding,
    reference_levels,
    reference_outputs,
    reference_update,
    small_images,
)

# residual, attn_norm, update_norm, attention, init
VARIANTS = {
    v1_config: ("post", True, True, "raw", "normal"),
    v2_config: ("pre", True, True, "raw", "xavier"),
    v2_softmax_config: ("pre", True, True, "softmax", "xavier"),
    v2_as_run_config: ("post", True, True, "raw", "xavier"),
    v3_config: ("scaled_pre", False, False, "raw", "xavier"),
    pre_ln_config: ("true_pre", True, False, "raw", "xavier"),
    post_ln_config: ("post", False, False, "raw", "xavier"),
    double_ln_config: ("post", False, True, "raw", "xavier"),
}
RESIDUALS = ["post", "pre", "true_pre", "scaled_pre", "none"]

# ---------------------------------------------------------------------------- the function


@pytest.mark.parametrize("path", ["fast", "plain", "softmax"])
@pytest.mark.parametrize("update_norm", [True, False])
@pytest.mark.parametrize("attn_norm", [True, False])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_residuals_and_norms_equal_the_reference(residual, attn_norm, update_norm, path):
    choices = dict(residual=residual, attn_norm=attn_norm, update_norm=update_norm)
    model = randomised(VisionBDHConfig(**SMALL, **choices, attention="softmax" if path == "softmax" else "raw").build())
    model.use_fast_path = path == "fast"
    assert_equals_reference(model, small_images())


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_built_variant_in_float32_equals_the_reference(variant, fast):
    # as built: fresh float32 weights and frequencies, 64 tokens. Small first updates (variance below LN's eps) make
    # these models smooth, and float32 rounding of 6e-8 an operation stays far below 2e-5.
    model = variant(mlp_internal_dim_multiplier=2, n_layer=3, n_embd=24, n_head=3).build().eval()
    model.use_fast_path = fast
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    images = torch.randn(2, 3, 32, 32)
    _, _, expected = reference_outputs(weights, images.double(), **choices_of(model.config))
    assert_close(model(images).double(), expected, 2e-5)


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
def test_hooks_see_the_input_of_every_level(fast):
    model, seen, images = randomised(v1_config(**SMALL).build()), [], small_images()
    model.use_fast_path = fast
    model.level_input.register_forward_hook(lambda module, args, out: seen.append(out))
    model(images)
    weights = dict(model.named_parameters())
    assert len(seen) == SMALL["n_layer"]
    for level, x in enumerate(seen):
        assert_close(x, reference_levels(weights, reference_embedding(weights, images), n_layer=level), 1e-9)


@pytest.mark.parametrize("batch", [1, 5])
def test_shapes_and_independent_images(batch):
    model, images = randomised(v2_config(**SMALL).build()), small_images(batch)
    assert model.tokens(images).shape == (batch, 9, 12)
    assert model.features(images).shape == (batch, 12)
    assert model(images).shape == (batch, 5)
    assert_close(model(images), torch.cat([model(image[None]) for image in images]), 1e-12)


# ---------------------------------------------------------------------------- how the variants are related


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
def test_normalised_last_state_of_v2_is_that_of_v1(fast):
    # v1 normalises at the end of a step what v2 normalises at the start of the next, and the test adds v2's last LN.
    # Each LN is applied once in both, nowhere LN(LN(x)), so eps does not enter and only rounding is left.
    v1, v2 = randomised(v1_config(**SMALL).build()), randomised(v2_config(**SMALL).build())
    v2.load_state_dict(v1.state_dict())
    v1.use_fast_path = v2.use_fast_path = fast
    images = small_images()
    state = v2.tokens(images)
    assert_close(norm(state), v1.tokens(images), 1e-12)
    assert (state - v1.tokens(images)).norm() > 0.1 * state.norm()  # only LN makes them alike
    # pooling comes before the head's LN, and the mean of normalised tokens is not the normalised mean
    assert (v2.features(images) - v1.features(images)).norm() > 1e-6


def test_v2_as_run_equals_the_published_steps():
    # The published code took LN at the start and at the end of each step. The end of one and the start of the next make
    # LN(LN(s)) = LN(s) (1 + eps / 2 (1 / var(s) - 1)) to first order; s = x + y with x and y normalised has a variance
    # between 0.5 and 4 but for rare tokens, so a step differs by about 5e-6 or less, and steps magnify that some
    # ten times. A missing or a wrong LN would differ by more than 0.01.
    model, images = randomised(v2_as_run_config(**SMALL).build()), small_images()
    weights = dict(model.named_parameters())
    x = reference_embedding(weights, images)
    for _ in range(SMALL["n_layer"]):
        x = norm(x)
        x = norm(x + reference_update(weights, x))
    logits = norm(x.mean(1)) @ weights["head.weight"].T + weights["head.bias"]
    assert_close(model(images), logits, 1e-3)


# ---------------------------------------------------------------------------- the order of patches


@pytest.mark.parametrize("pos_embed", [True, False])
@pytest.mark.parametrize("rotary", ["raster", "axial", "none"])
@pytest.mark.parametrize("attention", ["raw", "softmax"])
def test_model_sees_the_order_of_patches(attention, rotary, pos_embed):
    config = VisionBDHConfig(**SMALL, attention=attention, rotary=rotary, pos_embed=pos_embed)
    model, images = randomised(config.build()), small_images()
    swapped = images.clone()
    swapped[:, :, 0:2, 2:4], swapped[:, :, 4:6, 4:6] = images[:, :, 4:6, 4:6], images[:, :, 0:2, 2:4]
    difference = (model(images) - model(swapped)).norm() / model(images).norm()
    # without any positions the model is a function of the set of patches, which shows that the rest can fail
    assert difference > 1e-6 if pos_embed or rotary != "none" else difference < 1e-10


# ---------------------------------------------------------------------------- parameters and their start


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        *((variant(), 3_565_258 if variant is v3_config else 3_562_570) for variant in VARIANTS),
        (v1_config(num_classes=100), 3_579_940),
        (v1_config(mlp_internal_dim_multiplier=4), 465_994),
        (v1_config(mlp_internal_dim_multiplier=16), 1_793_098),
        (v1_config(mlp_internal_dim_multiplier=128), 14_179_402),
        (v2_config(qk="separate"), 3_562_570 + 192 * 6144),
        (v2_config(shared=False), 3_562_570 + 5 * 3 * 192 * 6144),
        (v2_config(pool="cls"), 3_562_570 + 192),
        (v2_config(pos_embed=False), 3_562_570 - 64 * 192),
        *((v2_config(**each), 3_562_570) for each in (dict(gate="none"), dict(rotary="axial"), dict(n_layer=16))),
    ],
)
def test_parameter_count(config, expected):
    with torch.device("meta"):  # shapes only
        assert count(config.build()) == expected


def test_state_dict_names_and_shapes():
    v1, v3 = (config(**SMALL).build().state_dict() for config in (v1_config, v3_config))
    assert {name: tuple(tensor.shape) for name, tensor in v1.items()} == {
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
    added = {name: tensor for name, tensor in v3.items() if name not in v1}  # one affine LN a level and one at the end
    assert sorted(tensor.mean().item() for tensor in added.values()) == [0.0] * 4 + [1.0] * 4
    assert {tuple(tensor.shape) for tensor in added.values()} == {(12,)}


def start(init):
    """Initial weights with H = 3, D = 120, N = 80: sizes at which no two of the bounds below are similar."""
    torch.manual_seed(0)
    fields = dict(init=init, init_projections="xavier" if init == "xavier" else "normal")
    return VisionBDHConfig(n_embd=120, n_head=3, mlp_internal_dim_multiplier=2, **fields).build()


H, D, N = 3, 120, 80
XAVIER = {  # bounds: of the tensors as shaped, as in the published code
    "encoder": math.sqrt(6 / (D * N + H * N)),
    "encoder_v": math.sqrt(6 / (D * N + H * N)),
    "decoder": math.sqrt(6 / (H * N + D)),
    "patch_embed.weight": math.sqrt(6 / (3 * 16 + 16 * D)),
    "head.weight": math.sqrt(6 / (D + 10)),
}
PER_HEAD = dict.fromkeys(["encoder", "encoder_v", "decoder"], math.sqrt(6 / (D + N)))


@pytest.mark.parametrize(
    "init, name, bound",
    [(init, *item) for init, bounds in (("xavier", XAVIER), ("xavier_per_head", PER_HEAD)) for item in bounds.items()],
)
def test_uniform_start(init, name, bound):
    weight = start(init).get_parameter(name)
    n = weight.numel()
    # sample deviation of a uniform distribution (kurtosis 1.8): relative error sqrt((1.8 - 1) / (4 n))
    assert abs(weight.std().item() / (bound / math.sqrt(3)) - 1) < 5 * math.sqrt(0.2 / n)
    assert abs(weight.mean().item()) < 5 * bound / math.sqrt(3 * n)
    assert 0.99 * bound < weight.abs().max() <= bound * (1 + 1e-6)
    fan_in, fan_out = torch.nn.init._calculate_fan_in_and_fan_out(weight)  # Xavier's own rule on the tensor as shaped
    assert init != "xavier" or math.sqrt(6 / (fan_in + fan_out)) == pytest.approx(bound)


@pytest.mark.parametrize("init, drawn_otherwise", [("normal", {}), ("xavier", XAVIER), ("xavier_per_head", PER_HEAD)])
def test_normal_start(init, drawn_otherwise):
    model = start(init)
    for name in {"pos_embed", *XAVIER} - set(drawn_otherwise):
        assert_normal(model.get_parameter(name))


@pytest.mark.parametrize("variant", VARIANTS)
def test_biases_start_at_zero_and_weights_differ(variant):
    model, other = variant(**SMALL).build(), variant(**SMALL).build()
    biases = {name: p for name, p in model.named_parameters() if name.endswith("bias")}
    assert {"patch_embed.bias", "head.bias"} <= set(biases)
    assert all((bias == 0).all() for bias in biases.values())
    for name in ("encoder", "encoder_v", "decoder", "pos_embed"):
        assert not torch.equal(model.get_parameter(name), other.get_parameter(name)), name
    assert not torch.equal(model.encoder, model.encoder_v)


def test_convolutions_of_the_stem_start_by_he():
    stem = ConvStem(3, 64, 8)
    for convolution in (stem.first, *stem.hidden):
        fan_in = convolution.weight[0].numel()
        assert convolution.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.15)
        assert not convolution.bias.any()


def test_blocks_of_a_hybrid_start_as_a_vits():
    blocks = v2_config(n_layer=1, n_embd=64, n_head=2, blocks_before=1).build().blocks_before
    linears = [module for module in blocks.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 4
    for linear in linears:
        assert_normal(linear.weight)
        assert not linear.bias.any()


def test_separate_keys_and_levels_start_like_the_others():
    """Xavier's bound is that of one (H, D, N) tensor, however many there are."""
    shared, other = v2_config().build(), v2_config(qk="separate", shared=False, n_layer=2).build()
    for name in ("encoder", "encoder_v", "decoder"):
        bound = getattr(shared, name).abs().max().item()
        assert getattr(other, name).abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert other.encoder_k.std().item() == pytest.approx(shared.encoder.std().item(), rel=0.01)


# ---------------------------------------------------------------------------- configurations


@pytest.mark.parametrize(("variant", "values"), VARIANTS.items())
def test_named_variants(variant, values):
    named = dict(zip(("residual", "attn_norm", "update_norm", "attention", "init"), values, strict=True))
    named["init_projections"] = "xavier" if named["init"] == "xavier" else "normal"
    config = variant()
    assert config == VisionBDHConfig(**named)
    assert (config.n_layer, config.n_embd, config.n_head, config.mlp_internal_dim_multiplier) == (6, 192, 6, 32)
    assert (config.img_size, config.patch_size, config.in_channels, config.num_classes) == (32, 4, 3, 10)
    assert (config.dropout, config.n_neurons, config.grid) == (0.1, 1024, (8, 8))
    # overrides, also of the fields that define a variant
    fields = SMALL | dict(dropout=0.3, residual="none", attn_norm=False, update_norm=True, init="xavier_per_head")
    model = variant(**fields).build()
    assert model.config == VisionBDHConfig(**(named | fields))
    assert model(torch.randn(4, 2, 6, 6)).shape == (4, 5)
    with pytest.raises(TypeError, match="n_layers"):
        variant(n_layers=4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(n_embd=100, n_head=6), "n_embd = 100 is not a multiple of n_head = 6"),
        (dict(img_size=30, patch_size=4), "img_size = 30 is not a multiple of patch_size = 4"),
        (dict(n_layer=0), "n_layer = 0"),
        (dict(n_head=0), "n_head = 0"),
        (dict(n_embd=-6), "n_embd = -6"),
        (dict(mlp_internal_dim_multiplier=0), "mlp_internal_dim_multiplier = 0"),
        (dict(patch_size=0), "patch_size = 0"),
        (dict(num_classes=0), "num_classes = 0"),
        (dict(dropout=1.0), "dropout = 1.0"),
        (dict(dropout=-0.1), "dropout = -0.1"),
        (dict(n_embd=9, n_head=3, mlp_internal_dim_multiplier=5), "mlp_internal_dim_multiplier.*n_embd.*n_head.*even"),
        (dict(n_embd=9, n_head=3, mlp_internal_dim_multiplier=2, rotary="axial"), "multiple of 4"),
    ],
)
def test_impossible_values_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        VisionBDHConfig(**fields)
