"""Design choices of the step: each does what its equation says, and the fast path never ignores one."""

import dataclasses
import itertools
import typing
from pathlib import Path

import pytest
import torch

from interpretability.common.depth import run_with_levels, why_not_deeper
from interpretability.common.recorder import record
from models import CONFIG_CLASSES, kernels
from models.bdh import BDHCore, CoreConfig
from models.language import BDHConfig
from models.vision_bdh import VisionBDH, VisionBDHConfig, v1_config, v2_config, v2_softmax_config, v3_config
from tests.reference import SMALL, assert_close, assert_equals_reference, randomised, small_images

CPU = torch.device("cpu")
# Every field of every BDH config with other valid values; add new fields here. Choices have all their other values,
OTHER_VALUES = {
    "residual": ["pre", "true_pre", "scaled_pre", "none"],
    "attn_norm": [False],
    "update_norm": [False],
    "attention": ["softmax"],
    "qk": ["separate"],
    "gate": ["sigmoid", "none"],
    "activation": ["relu2", "gelu"],
    "init": ["xavier", "xavier_per_head"],
    "init_projections": ["xavier"],
    "rotary": ["axial", "none"],
    "shared": [False],
    "pos_embed": [False],
    "pool": ["cls", "seq"],
    "skips": [True],
    "bridges": ["attention"],
    "decoder": ["upernet"],
    "level_gain": [True],
    "update_gain": [0.3],
    "depth_mix": [True],
    "attend_self": [False],
    "qk_norm": [True],
    "stem": ["conv"],
    "mixing": ["conv", "conv_per_level"],
}
# sizes and the rest have one.
SIZES = dict(
    n_layer=2, n_embd=24, n_head=2, mlp_internal_dim_multiplier=6, dropout=0.4, drop_path=0.3, vocab_size=7, img_size=8
)
SIZES |= dict(patch_size=2, in_channels=12, num_classes=3, skip_levels=(1,), encoder=Path("best.pt"), mask_ratio=0.3)
SIZES |= dict(n_frames=4, tubelet=2, blocks_before=2, blocks_after=1)
SIZES |= dict(upernet_levels=(3, 1, 2, 3), upernet_channels=5)
SIZES |= dict(n_queries=5, decoder_layers=2, decoder_heads=3, decoder_mlp_dim=8)
OTHER_VALUES |= {name: [value] for name, value in SIZES.items()}
BASE = dict(n_layer=3, n_embd=12, n_head=3, mlp_internal_dim_multiplier=4, dropout=0.2, img_size=12, patch_size=4)
BASE["skip_levels"] = (2,)
UPERNET = dict(decoder="upernet", img_size=36)
NEEDS = {  # other fields without which a field is refused
    "bridges": dict(skips=True),
    "n_frames": dict(in_channels=12),
    "in_channels": dict(n_frames=4),
    **dict.fromkeys(("decoder", "upernet_levels", "upernet_channels"), UPERNET),
}
SQUARE = SMALL | dict(attention="softmax", n_embd=6, mlp_internal_dim_multiplier=3)
BDH_CLASSES = [cls for cls in CONFIG_CLASSES.values() if issubclass(cls, CoreConfig)]
# the choices that tests/test_vision_bdh.py does not combine with each other
CHOICES = ["qk", "gate", "activation", "rotary", "pos_embed", "shared", "pool"]
CHOICES += ["level_gain", "update_gain", "depth_mix", "attend_self", "qk_norm", "stem", "mixing"]
CHOICES += ["blocks_before", "blocks_after"]
ALONE = [{name: value} for name in CHOICES for value in OTHER_VALUES[name]]
TOGETHER = [
    dict(qk="separate", gate="sigmoid", activation="gelu", attention="softmax"),
    dict(qk="separate", gate="none", activation="relu2", update_norm=False, residual="true_pre"),
    dict(rotary="axial", pool="cls", shared=False),
    dict(rotary="axial", pool="cls", attention="softmax", pos_embed=False),
    dict(qk="separate", shared=False, residual="scaled_pre", attn_norm=False),
    dict(rotary="none", pos_embed=False, pool="cls", gate="sigmoid", init="xavier"),
    dict(stem="conv", mixing="conv_per_level", level_gain=True, update_gain=0.3, pool="seq", residual="true_pre"),
    dict(mixing="conv", pool="cls", rotary="axial", level_gain=True, residual="scaled_pre", shared=False),
    dict(depth_mix=True, residual="post", pool="cls", mixing="conv", shared=False),
    dict(depth_mix=True, residual="true_pre", blocks_before=1, level_gain=True),
    dict(qk="separate", qk_norm=True, attend_self=False, update_gain=0.3, residual="post"),
    dict(blocks_before=1, blocks_after=2, pool="cls", residual="scaled_pre", shared=False),
    dict(blocks_before=1, blocks_after=1, residual="true_pre", attention="softmax", mixing="conv", pool="seq"),
]


def short(value):
    if isinstance(value, dict):
        return ",".join(f"{key}={each}" for key, each in value.items())
    return value.__name__ if isinstance(value, type) else str(value)


# ---------------------------------------------------------------------------- the function


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("choices", [{}, *ALONE, *TOGETHER], ids=short)
def test_a_choice_equals_the_reference(choices, fast):
    model = randomised(VisionBDHConfig(**(SMALL | choices)).build())
    model.use_fast_path = fast
    assert_equals_reference(model, small_images())


@pytest.mark.parametrize("choices", ALONE, ids=short)
def test_a_choice_changes_the_function(choices):
    """So that the test above cannot pass for a flag that neither the model nor the reference reads."""
    default, other = (randomised(VisionBDHConfig(**(SMALL | each)).build()) for each in ({}, choices))
    shared, images = default.state_dict(), small_images()
    for name, tensor in other.state_dict().items():
        if name in shared and name != "attn.freqs":
            tensor.copy_(shared[name].expand_as(tensor))
    if choices == {"shared": False}:
        assert_close(other(images), default(images), 1e-12)  # equal weights at every level: the same function
        with torch.no_grad():
            other.encoder[1].normal_()
    assert (default(images) - other(images)).norm() > 1e-4 * default(images).norm()


@pytest.mark.parametrize(
    "config",
    [
        *(VisionBDHConfig(**SMALL, gate=gate, dropout=0.5) for gate in ("multiplicative", "sigmoid", "none")),
        *(config(**SMALL, dropout=0.5) for config in (v2_softmax_config, v3_config)),
        BDHConfig(n_embd=12, n_head=3, mlp_internal_dim_multiplier=4, dropout=0.5),
    ],
)
def test_dropout_in_training_only(config):
    model = randomised(config.build())
    inputs = torch.randint(256, (2, 5)) if isinstance(config, BDHConfig) else small_images()
    for training in (False, True):
        model.train(training)
        first, second = (model(inputs) for _ in range(2))
        first, second = (each[0] if isinstance(each, tuple) else each for each in (first, second))
        assert torch.equal(first, second) != training


# ---------------------------------------------------------------------------- the fast path serves what it knows


def outputs_and_gradients(model, core, inputs, fast):
    """All outputs and the gradients of all parameters, and whether the fast path was taken."""
    core.use_fast_path = fast
    with pytest.MonkeyPatch.context() as patch:
        calls, update = [], kernels.fast_update
        patch.setattr(kernels, "fast_update", lambda *args, **kwargs: calls.append(1) or update(*args, **kwargs))
        outputs = model(inputs)
    outputs = outputs[0] if isinstance(outputs, tuple) else outputs
    cotangent = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view_as(outputs)
    gradients = torch.autograd.grad(outputs, list(model.parameters()), cotangent, allow_unused=True)
    return bool(calls), [outputs, *(each for each in gradients if each is not None)]


CHANGES = [(cls, "n_layer", BASE["n_layer"]) for cls in BDH_CLASSES]  # nothing changed
CHANGES += [
    (cls, field.name, value)
    for cls in BDH_CLASSES
    for field in dataclasses.fields(cls)
    for value in OTHER_VALUES.get(field.name, ["?"])
    if cls is not BDHConfig or (value != "axial" and field.name != "attend_self")  # refused, see tests/test_text.py
]


@pytest.mark.parametrize(("cls", "name", "value"), CHANGES, ids=short)
def test_every_field_is_served_or_refused_by_the_fast_path(cls, name, value):
    """In evaluation mode; tests/test_kernels.py has dropout."""
    assert value != "?", f"add {name} with other valid values to OTHER_VALUES or SIZES"
    own = {field.name for field in dataclasses.fields(cls)}
    fields = {key: each for key, each in (BASE | NEEDS.get(name, {}) | {name: value}).items() if key in own}
    config = cls(**fields)
    model = config.build().double().eval()
    core = next(module for module in model.modules() if isinstance(module, BDHCore))
    randomised(core)
    text = cls is BDHConfig
    size = (2, 3) if text else (2, config.in_channels, config.img_size, config.img_size)
    inputs = torch.randint(5, size) if text else torch.randn(size, dtype=torch.float64)
    (taken, actual), (_, expected) = (outputs_and_gradients(model, core, inputs, fast) for fast in (True, False))
    assert taken == (kernels.serves(config) and not text)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, 1e-7)


def test_every_field_and_choice_has_other_values():
    """Also after a field was removed, or a choice has gained a value."""
    hints = {name: kind for cls in BDH_CLASSES for name, kind in typing.get_type_hints(cls).items()}
    fields = {field.name: field.default for cls in BDH_CLASSES for field in dataclasses.fields(cls)}
    assert set(OTHER_VALUES) == set(fields), "OTHER_VALUES must have the fields of the configs"
    for name, default in fields.items():
        choices = [True, False] if hints[name] is bool else typing.get_args(hints[name])
        if hints[name] is bool or typing.get_origin(hints[name]) is typing.Literal:
            assert {*OTHER_VALUES[name], default} == set(choices), name
    outside = {name for cls in CoreConfig.__subclasses__() + BDH_CLASSES for name in cls.outside_step}
    assert set(kernels.FAST_PATH_SERVES) <= {field.name for field in dataclasses.fields(CoreConfig)}
    assert outside <= set(fields) - set(kernels.FAST_PATH_SERVES)


@pytest.mark.parametrize(
    ("config", "taken"),
    [
        *((config(**SMALL), True) for config in (v1_config, v2_config, v2_softmax_config, v3_config)),
        *((VisionBDHConfig(**SMALL | choice), True) for choice in (dict(rotary="axial"), dict(shared=False))),
        *((VisionBDHConfig(**SMALL | choice), False) for choice in (dict(gate="none"), dict(qk="separate"))),
        *((VisionBDHConfig(**SMALL | choice), False) for choice in (dict(activation="gelu"), dict(rotary="none"))),
        # softmax with N = D = 6: 4 tokens are few, 36 are many and left to the library
        *((VisionBDHConfig(**SQUARE | dict(patch_size=side)), side == 3) for side in (3, 1)),
        (BDHConfig(**{key: BASE[key] for key in ("n_embd", "n_head", "mlp_internal_dim_multiplier")}), False),
    ],
)
def test_which_configs_take_the_fast_path(config, taken):
    model = randomised(config.build())
    inputs = torch.randint(256, (2, 5)) if isinstance(config, BDHConfig) else small_images()
    assert model.use_fast_path
    assert outputs_and_gradients(model, model, inputs, fast=True)[0] == taken
    assert not outputs_and_gradients(model, model, inputs, fast=False)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeakyConfig(VisionBDHConfig):
    """A field that somebody adds, with its line in the plain step."""

    leak: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeryLeakyConfig(LeakyConfig):
    """Its default is not the one that leaves the step as it was."""

    leak: float = 0.5


def test_a_new_field_takes_the_plain_path_unless_at_its_default(monkeypatch):
    plain = BDHCore.activity

    def leaky(self, x, weights, tables):
        activity = plain(self, x, weights, tables)
        return activity._replace(gated=activity.gated + self.config.leak * activity.y_sparse)

    monkeypatch.setattr(BDHCore, "activity", leaky)
    images, logits = small_images(), []
    for config in (LeakyConfig(**SMALL), LeakyConfig(**SMALL, leak=0.3), VeryLeakyConfig(**SMALL)):
        torch.manual_seed(0)
        model = randomised(config.build())
        (taken, actual), (_, expected) = (outputs_and_gradients(model, model, images, fast) for fast in (True, False))
        assert taken == (config.leak == 0.0)
        for one, other in zip(actual, expected, strict=True):
            assert_close(one, other, 1e-7)
        logits.append(actual[0])
    assert all((one - other).norm() > 1e-3 * one.norm() for one, other in itertools.combinations(logits, 2))


def test_a_model_with_a_step_of_its_own_takes_the_plain_path():
    class Halved(VisionBDH):
        def activity(self, *args):
            return super().activity(*args)._replace(gated=0.5 * super().activity(*args).gated)

    class OtherAttention(type(VisionBDHConfig(**SMALL).build().attn)):
        pass

    assert not Halved(VisionBDHConfig(**SMALL)).has_fast_path(CPU)
    model = VisionBDHConfig(**SMALL).build()
    assert model.has_fast_path(CPU)
    model.attn = OtherAttention(16, softmax=False, causal=False)
    assert not model.has_fast_path(CPU)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("multiplier", [1, 2, 4])
def test_softmax_over_many_tokens_is_left_to_the_library_where_it_has_a_kernel(device, multiplier):
    """One that holds no T x T matrix; on a CPU it needs values as wide as keys. Raw scores have another order."""
    config = VisionBDHConfig(**SMALL | dict(attention="softmax", mlp_internal_dim_multiplier=multiplier))
    N, D = config.n_neurons, config.n_embd
    most = 2 * N * D // (N + D)  # T (N + D) <= 2 N D
    device = torch.device(device)
    assert config.build().has_fast_path(device, most)
    assert config.build().has_fast_path(device, most + 1) == (device.type == "cpu" and N != D)
    assert dataclasses.replace(config, attention="raw").build().has_fast_path(device, most + 1)


@pytest.mark.parametrize(("neurons", "kernel"), [(32, "MATH"), (8, "FLASH_ATTENTION")])
def test_the_library_has_a_kernel_on_a_cpu_where_keys_and_values_are_equally_wide(neurons, kernel):
    """What `BDHCore.has_fast_path` relies on: the library's choice for a model that trains."""
    q = torch.randn(1, 2, 64, neurons, requires_grad=True)
    values = torch.randn(1, 1, 64, 8, requires_grad=True).expand(-1, 2, -1, -1)
    assert torch.nn.attention.SDPBackend(torch._fused_sdp_choice(q, q, values)).name == kernel


# ---------------------------------------------------------------------------- positions


@pytest.mark.parametrize("rotary", ["axial", "raster"])
def test_scores_depend_on_relative_position_only(rotary):
    """Axial: on rows and columns separately; raster: on the index alone, so the end of a row neighbours the next."""
    attn = randomised(VisionBDHConfig(**SMALL, rotary=rotary).build()).attn
    rows, columns = 4, 5
    places = list(itertools.product(range(rows), range(columns)))
    v, w = torch.randn(2, 16, dtype=torch.float64)
    angles = attn.angles(rows * columns, (rows, columns))
    pairs = torch.polar(torch.ones_like(angles[:, 0::2]), angles[:, 0::2])
    v, w = (torch.view_as_complex(each.view(8, 2)) * pairs for each in (v, w))  # (T, N / 2)
    scores = (v @ w.conj().T).real
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
    for grid in ((3, 4), (4, 3), (2, 6), (3, 4)):  # cached tables must not serve another grid of as many tokens
        assert torch.equal(attn.tables(12, grid).cos, attn.angles(12, grid).cos())


# ---------------------------------------------------------------------------- looking inside


@pytest.mark.parametrize("choices", [{}, dict(attention="softmax"), *ALONE, *TOGETHER], ids=short)
def test_the_recorder_sees_what_the_model_does(choices):
    """The recorded attention, times the level's input, is what the model's own attention returns."""
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


@pytest.mark.parametrize("choices", [{}, dict(residual="scaled_pre"), *ALONE], ids=short)
def test_a_model_runs_deeper_if_its_weights_fit_a_deeper_model(choices):
    model, images = randomised(VisionBDHConfig(**(SMALL | choices)).build()), small_images()
    deeper = VisionBDHConfig(**(SMALL | choices | dict(n_layer=5))).build().double().eval()
    try:
        deeper.load_state_dict(model.state_dict())
    except RuntimeError:  # weights of each level
        assert why_not_deeper(model)
        with pytest.raises(ValueError, match="n_layer = 5 is above 3: "), run_with_levels(model, 5):
            pass
    else:
        assert why_not_deeper(model) is None
        with run_with_levels(model, 5):
            assert_close(model(images), deeper(images), 1e-9)


def test_text_has_no_axial_positions():
    with pytest.raises(ValueError, match="rows and columns, which text does not have"):
        BDHConfig(rotary="axial")
