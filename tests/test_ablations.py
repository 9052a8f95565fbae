"""The design choices beyond residual, norms and attention: each does what DESIGN's table says, and nothing else."""

import dataclasses
import itertools
import typing

import pytest
import torch
from reference import SMALL, STEP_FIELDS, assert_close, assert_equals_reference, count, randomised, small_images

from interpretability.common.recorder import record
from models.bdh import BDHConfig, CoreConfig
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

pytestmark = pytest.mark.usefixtures("one_thread")

CHOICES = {
    "qk": ["tied", "separate"],
    "gate": ["multiplicative", "sigmoid", "none"],
    "activation": ["relu", "relu2", "gelu"],
    "rotary": ["raster", "axial", "none"],
    "pos_embed": [True, False],
    "shared": [True, False],
    "pool": ["mean", "cls"],
}
ALONE = [{name: value} for name, values in CHOICES.items() for value in values[1:]]
TOGETHER = [
    dict(qk="separate", gate="sigmoid", activation="gelu", attention="softmax"),
    dict(qk="separate", gate="none", activation="relu2", update_norm=False, residual="true_pre"),
    dict(rotary="axial", pool="cls", shared=False),
    dict(rotary="axial", pool="cls", attention="softmax", pos_embed=False),
    dict(qk="separate", shared=False, residual="scaled_pre", attn_norm=False),
    dict(rotary="none", pos_embed=False, pool="cls", gate="sigmoid", init="xavier"),
]


def short(choices):
    return ",".join(f"{key}={value}" for key, value in choices.items()) if isinstance(choices, dict) else None


# ---------------------------------------------------------------------------- the function


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("choices", [{}, *ALONE, *TOGETHER], ids=short)
def test_a_choice_equals_the_reference(choices, fast):
    model = randomised(VisionBDHConfig(**(SMALL | choices)).build())
    model.use_fast_path = fast
    assert_equals_reference(model, small_images())


@pytest.mark.parametrize("choices", ALONE, ids=short)
def test_a_choice_changes_the_function(choices):
    """So that the test above cannot pass for a flag that nothing reads, in the model and in the reference."""
    default, other = (randomised(VisionBDHConfig(**(SMALL | each)).build()) for each in ({}, choices))
    shared = default.state_dict()
    own = other.state_dict()
    for name, tensor in own.items():
        if name in shared and name != "attn.freqs":
            tensor.copy_(shared[name].expand_as(tensor))
    images = small_images()
    difference = (default(images) - other(images)).norm() / default(images).norm()
    if choices == {"shared": False}:
        assert difference < 1e-12  # with the same weights at every level it is the same function
        with torch.no_grad():
            other.encoder[1].normal_()
        difference = (default(images) - other(images)).norm() / default(images).norm()
    assert difference > 1e-4


@pytest.mark.parametrize(
    ("choices", "fast"),
    [
        ({}, True),
        (dict(attention="softmax"), True),
        (dict(gate="sigmoid"), False),
        (dict(qk="separate"), False),
        (dict(activation="gelu"), False),
        (dict(rotary="none"), False),
    ],
    ids=str,
)
def test_which_settings_take_the_fast_path(choices, fast):
    model = VisionBDHConfig(**(SMALL | choices)).build()
    assert model.has_fast_path(torch.device("cpu")) == fast


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("multiplier", [1, 2, 4])
def test_softmax_over_many_tokens_is_left_to_the_library_where_it_has_a_kernel(device, multiplier):
    """One that holds no T x T matrix; on a CPU it asks for values as wide as keys. Raw scores have another order."""
    config = VisionBDHConfig(**SMALL | dict(attention="softmax", mlp_internal_dim_multiplier=multiplier))
    N, D = config.n_neurons, config.n_embd
    most = 2 * N * D // (N + D)  # T (N + D) <= 2 N D
    device = torch.device(device)
    assert config.build().has_fast_path(device, most)
    assert config.build().has_fast_path(device, most + 1) == (device.type == "cpu" and N != D)
    assert dataclasses.replace(config, attention="raw").build().has_fast_path(device, most + 1)


@pytest.mark.parametrize(("neurons", "kernel"), [(32, "MATH"), (8, "FLASH_ATTENTION")])
def test_the_library_has_a_kernel_on_a_cpu_where_keys_and_values_are_equally_wide(neurons, kernel):
    """What `BDHCore.has_fast_path` goes by: the library's choice for a model that trains."""
    q = torch.randn(1, 2, 64, neurons, requires_grad=True)
    values = torch.randn(1, 1, 64, 8, requires_grad=True).expand(-1, 2, -1, -1)
    assert torch.nn.attention.SDPBackend(torch._fused_sdp_choice(q, q, values)).name == kernel


@pytest.mark.parametrize("rotary", ["axial", "raster"])
def test_scores_depend_on_relative_position_only(rotary):
    """Axial: on rows and columns apart; raster on the index alone, so that the end of a row neighbours the next."""
    attn = randomised(VisionBDHConfig(**SMALL, rotary=rotary).build()).attn
    rows, columns = 4, 5
    places = list(itertools.product(range(rows), range(columns)))
    v, w = torch.randn(2, 16, dtype=torch.float64)
    angles = attn.angles(rows * columns, (rows, columns))
    pairs = torch.polar(torch.ones_like(angles[:, 0::2]), angles[:, 0::2])

    def turned(u):
        return torch.view_as_complex(u.view(8, 2)) * pairs  # (T, N / 2)

    scores = (turned(v) @ turned(w).conj().T).real
    by_offset = {}
    for (i, (r1, c1)), (j, (r2, c2)) in itertools.product(enumerate(places), repeat=2):
        offset = (r2 - r1, c2 - c1) if rotary == "axial" else j - i
        by_offset.setdefault(offset, []).append(scores[i, j].item())
    assert all(max(values) - min(values) < 1e-10 for values in by_offset.values())
    distinct = {round(values[0], 6) for values in by_offset.values()}
    assert len(distinct) == len(by_offset)


def test_axial_halves_follow_row_and_column():
    attn = randomised(VisionBDHConfig(**SMALL, rotary="axial").build()).attn
    angles = attn.angles(12, (3, 4)).view(3, 4, 16)
    row, column = angles[..., :8], angles[..., 8:]
    assert torch.equal(row, row[:, :1].expand_as(row)) and torch.equal(column, column[:1].expand_as(column))
    assert torch.equal(row[:, 0], column[0, :3])  # the same frequencies on both halves
    with_class_token = attn.angles(13, (3, 4))
    assert (with_class_token[0] == 0).all() and (with_class_token[1] != 0).any()


def test_axial_tables_follow_the_grid():
    """A kept table must not serve another shape with as many tokens."""
    attn = randomised(VisionBDHConfig(**SMALL, rotary="axial").build()).attn
    for grid in ((3, 4), (4, 3), (2, 6), (3, 4)):
        assert torch.equal(attn.tables(12, grid).cos, attn.angles(12, grid).cos())


def test_without_any_position_the_model_sees_a_set_of_patches():
    choices = dict(rotary="none", pos_embed=False)
    model, images = randomised(VisionBDHConfig(**SMALL, **choices).build()), small_images()
    swapped = images.clone()
    swapped[:, :, 0:2, 2:4], swapped[:, :, 4:6, 4:6] = images[:, :, 4:6, 4:6], images[:, :, 0:2, 2:4]
    assert_close(model(images), model(swapped), 1e-10)


def test_levels_of_their_own_learn_apart():
    model = VisionBDHConfig(**SMALL, shared=False).build()
    model(torch.randn(4, 2, 6, 6)).square().sum().backward()
    for weight in (model.encoder, model.encoder_v, model.decoder):
        assert weight.shape[0] == 3 and (weight.grad.flatten(1).norm(dim=1) > 0).all()
        assert not torch.equal(weight[0], weight[1])


def test_dropout_drops_in_every_gate():
    for gate in CHOICES["gate"]:
        model, images = randomised(VisionBDHConfig(**SMALL, gate=gate, dropout=0.5).build()), small_images()
        assert torch.equal(model(images), model(images))
        model.train()
        assert not torch.equal(model(images), model(images))


# ---------------------------------------------------------------------------- looking inside


@pytest.mark.parametrize("choices", [*ALONE, *TOGETHER], ids=short)
def test_the_recorder_sees_what_the_model_does(choices):
    """Attention from the record, times what entered the level, is what the model's own attention returns."""
    model, images = randomised(VisionBDHConfig(**(SMALL | choices)).build()), small_images()
    model.use_fast_path = False
    outputs = []
    handle = model.attn.register_forward_hook(lambda module, args, output: outputs.append(output))
    plain = model(images)
    with torch.no_grad(), record(model) as trace:
        assert torch.equal(model(images), plain)
    handle.remove()
    cls = choices.get("pool") == "cls"
    for level in range(3):
        scores = trace.scores(level)
        assert_close(scores @ trace.inputs[level][:, None], outputs[level], 1e-9)
        assert trace.scores(level, patches_only=True).shape[-1] == 9 and scores.shape[-1] == 9 + cls


# ---------------------------------------------------------------------------- the space


def test_every_choice_is_tested():
    """A new field, or a new value of one, has to be added here."""
    hints = typing.get_type_hints(VisionBDHConfig)
    known = {name: list(typing.get_args(kind)) for name, kind in hints.items() if typing.get_args(kind)}
    known |= {name: [True, False] for name, kind in hints.items() if kind is bool}
    tested_elsewhere = {"residual", "attn_norm", "update_norm", "attention", "init"}
    assert {name: values for name, values in known.items() if name not in tested_elsewhere} == CHOICES
    assert set(STEP_FIELDS) | {"init", "pos_embed", "pool"} == set(CHOICES) | tested_elsewhere
    assert {field.name for field in dataclasses.fields(CoreConfig)} < set(hints)


@pytest.mark.parametrize(
    ("config", "residual", "attn_norm", "update_norm", "attention", "init"),
    [
        (v1_config, "post", True, True, "raw", "normal"),
        (v2_config, "pre", True, True, "raw", "xavier"),
        (v2_softmax_config, "pre", True, True, "softmax", "xavier"),
        (v2_as_run_config, "post", True, True, "raw", "xavier"),
        (v3_config, "scaled_pre", False, False, "raw", "xavier"),
        (pre_ln_config, "true_pre", True, False, "raw", "xavier"),
        (post_ln_config, "post", False, False, "raw", "xavier"),
        (double_ln_config, "post", False, True, "raw", "xavier"),
    ],
)
def test_named_variants_are_points_of_the_space(config, residual, attn_norm, update_norm, attention, init):
    fields = dict(residual=residual, attn_norm=attn_norm, update_norm=update_norm, attention=attention, init=init)
    assert config() == VisionBDHConfig(**fields)
    assert config(attention="softmax", n_layer=2) == VisionBDHConfig(**(fields | dict(attention="softmax", n_layer=2)))


@pytest.mark.parametrize("build", [pre_ln_config, post_ln_config, double_ln_config])
@pytest.mark.parametrize("attention", ["raw", "softmax"])
def test_the_published_ablation_builds(build, attention):
    model = build(**SMALL, attention=attention)
    assert torch.isfinite(model(torch.randn(2, 2, 6, 6))).all()
    assert model.config.attention == attention


@pytest.mark.parametrize(
    ("multiplier", "expected"), [(4, 465_994), (16, 1_793_098), (32, 3_562_570), (128, 14_179_402)]
)
def test_parameters_by_multiplier(multiplier, expected):
    with torch.device("meta"):
        assert count(v2_config(mlp_internal_dim_multiplier=multiplier).build()) == expected


@pytest.mark.parametrize(
    ("choices", "extra"),
    [
        (dict(qk="separate"), 192 * 6144),
        (dict(shared=False), 5 * 3 * 192 * 6144),
        (dict(pool="cls"), 192),
        (dict(pos_embed=False), -64 * 192),
        (dict(gate="none"), 0),
        (dict(gate="sigmoid"), 0),
        (dict(activation="gelu"), 0),
        (dict(rotary="axial"), 0),
        (dict(n_layer=16), 0),
    ],
    ids=short,
)
def test_parameters_by_choice(choices, extra):
    with torch.device("meta"):
        assert count(v2_config(**choices).build()) == 3_562_570 + extra


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("n_layer", [1, 16])
def test_sizes_of_the_space_train(patch, n_layer):
    sizes = dict(n_embd=8, n_head=2, mlp_internal_dim_multiplier=4)
    model = v1_config(**sizes, patch_size=patch, n_layer=n_layer).build()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_weights_of_separate_keys_and_levels_start_as_the_others():
    """Xavier's bound is that of one (H, D, N) tensor, however many there are."""
    shared, other = v2_config().build(), v2_config(qk="separate", shared=False, n_layer=2).build()
    for name in ("encoder", "encoder_v", "decoder"):
        bound = getattr(shared, name).abs().max().item()
        assert getattr(other, name).abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert other.encoder_k.std().item() == pytest.approx(shared.encoder.std().item(), rel=0.01)


@pytest.mark.parametrize(
    ("config", "fields", "words"),
    [
        (VisionBDHConfig, dict(SMALL, rotary="axial", mlp_internal_dim_multiplier=2, n_embd=9), "multiple of 4"),
        (BDHConfig, dict(rotary="axial"), "text has none"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(config, fields, words):
    with pytest.raises(ValueError, match=words):
        config(**fields)


@pytest.mark.parametrize("choices", [*ALONE[:5], dict(shared=False), dict(rotary="none")], ids=short)
def test_the_language_model_knows_the_choices_too(choices):
    if choices == {"rotary": "axial"}:
        pytest.skip("refused, see above")
    sizes = dict(n_layer=2, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=7)
    model = BDHConfig(**sizes, **choices).build().double().eval()
    idx = torch.randint(7, (2, 6))
    other = idx.clone()
    other[:, 4] = (idx[:, 4] + 1) % 7
    before, after = model(idx)[0], model(other)[0]
    assert torch.equal(before[:, :4], after[:, :4]) and not torch.equal(before[:, 4:], after[:, 4:])
