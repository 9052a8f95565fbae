"""The fast step of models/kernels.py against its plain twin, alone and in whole models, on fresh random inputs."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import kernels
from models.bdh import LN_EPS, BDHConfig, BDHCore, CoreConfig, layer_norm
from models.rotary import rope
from models.vision_bdh import VisionBDHConfig, v1_config, v2_config, v2_softmax_config, v3_config

SMALL = dict(n_layer=2, n_embd=6, n_head=3, mlp_internal_dim_multiplier=5, img_size=6, patch_size=2)  # T = 9, N = 10
# images, tokens, width, heads, neurons over width; and the order of the attention product that such sizes take
SIZES = [
    (5, 4, 6, 3, 5, "scores"),
    (1, 9, 12, 3, 4, "scores"),
    (3, 7, 10, 5, 7, "scores"),
    (4, 1, 6, 2, 4, "scores"),
    (5, 9, 6, 3, 5, "state"),
    (1, 33, 6, 3, 5, "state"),
    (2, 25, 8, 1, 3, "state"),
]


pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------------------- helpers


def make_core(width, heads, multiplier, dtype=torch.float64, **fields):
    """The bare step without a mask, its weights of a size that lets every term count."""
    sizes = dict(n_embd=width, n_head=heads, mlp_internal_dim_multiplier=multiplier)
    core = BDHCore(CoreConfig(**(sizes | dict(dropout=0.0) | fields)), causal=False).to(dtype)
    with torch.no_grad():
        core.encoder.normal_(std=width**-0.5)
        core.encoder_v.normal_(std=width**-0.5)
        core.decoder.normal_(std=len(core.decoder) ** -0.5)
    return core


def draw(images, tokens, width, heads, multiplier, dtype=torch.float64, margin=1e-5, **fields):
    """A core and an input x for it: (B, T, D), with no ReLU that matters within `margin` of its kink.

    At the kink the gradient jumps, and rounding alone may put two correct implementations on different sides of it.
    """
    while True:
        core = make_core(width, heads, multiplier, dtype, **fields)
        x = torch.randn(images, tokens, width, dtype=dtype, requires_grad=True)
        with torch.no_grad():
            into_gate = torch.einsum("btd,hdn->bhtn", x, core.encoder)
            tables = core.attn.tables(x.shape[1])
            q = rope(into_gate.relu(), tables.cos, tables.sin)
            a = core.attn(q, q, x)
            a = layer_norm(a) if core.config.attn_norm else a
            into_y = torch.einsum("bhtd,hdn->bhtn", a, core.encoder_v)[into_gate > 0]  # a shut gate hides the other
        if into_gate.abs().min() > margin and (into_y.numel() == 0 or into_y.abs().min() > margin):
            return core, x


def fast_update(core, x, *, masters=None, images_per_slice=None, dropout=0.0):
    """kernels.fast_update with the core's weights, all images at once unless told otherwise."""
    masters = masters or (core.encoder, core.encoder_v, core.decoder)
    bytes_per_image = core.config.n_head * x.shape[1] * core.config.n_neurons * core.encoder.element_size()
    # not a whole number of images: what is left over must not matter
    slices = {} if images_per_slice is None else dict(slice_bytes=images_per_slice * bytes_per_image + 3)
    return kernels.fast_update(
        x,
        masters,
        tuple(master.detach() for master in masters),
        core.attn.tables(x.shape[1]).phases,
        attn_eps=LN_EPS if core.config.attn_norm else None,
        dropout=dropout,
        softmax=core.config.attention == "softmax",
        **slices,
    )


def plain_update(core, x):
    """The plain twin."""
    return core.plain_update(x, core.step_weights()[0], core.attn.tables(x.shape[1]))


def gradients(y, core, x, cotangent):
    """Of x, encoder, encoder_v, decoder."""
    return torch.autograd.grad(y, (x, core.encoder, core.encoder_v, core.decoder), cotangent)


def relative_error(actual, expected):
    """Norm of the difference over the norm of what is expected, both taken in float64."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_same(core, x, y, tolerance):
    """y and its gradients are those of the plain path."""
    expected = plain_update(core, x)
    assert y.dtype == expected.dtype
    assert relative_error(y, expected) <= tolerance
    cotangent = torch.randn_like(expected)
    names = "x", "encoder", "encoder_v", "decoder"
    both = gradients(y, core, x, cotangent), gradients(expected, core, x, cotangent)
    for name, actual_grad, expected_grad in zip(names, *both, strict=True):
        assert actual_grad.dtype == expected_grad.dtype
        assert expected_grad.norm() > 0, name
        assert relative_error(actual_grad, expected_grad) <= tolerance, name


def spread_weights(model):
    """The model with every matrix scaled by its fan-in, so that every term of the step counts; others stay."""
    with torch.no_grad():
        for name in ("encoder", "encoder_v", "decoder", "pos_embed", "patch_embed.weight", "head.weight"):
            weight = model.get_parameter(name)
            weight.normal_(std=1.0 if weight.ndim == 4 or name == "pos_embed" else weight.shape[-2] ** -0.5)
    return model


def refuse(*args, **kwargs):
    """Stands in for a function that must not be called."""
    raise AssertionError("the fast path was taken")


# ---------------------------------------------------------------------------- fast_update


@pytest.mark.parametrize("attention", ["raw", "softmax"])
@pytest.mark.parametrize("images_per_slice", [None, 1, 2])
@pytest.mark.parametrize("attn_norm", [True, False])
@pytest.mark.parametrize(("images", "tokens", "width", "heads", "multiplier", "order"), SIZES)
def test_update_equals_plain_in_float64(
    images, tokens, width, heads, multiplier, order, attn_norm, images_per_slice, attention
):
    core = make_core(width, heads, multiplier, attn_norm=attn_norm, attention=attention)
    assert kernels.scores_are_cheaper(tokens, core.config.n_neurons, width) == (order == "scores")
    x = torch.randn(images, tokens, width, dtype=torch.float64, requires_grad=True)
    # LN of a nearly constant row magnifies rounding, 1e-16, at most 1 / sqrt(1e-5) = 316 times
    assert_same(core, x, fast_update(core, x, images_per_slice=images_per_slice), 1e-11)


@pytest.mark.parametrize("attention", ["raw", "softmax"])
@pytest.mark.parametrize("images_per_slice", [None, 2])
@pytest.mark.parametrize("attn_norm", [True, False])
@pytest.mark.parametrize(("images", "tokens", "width", "heads", "multiplier", "order"), SIZES)
def test_update_equals_plain_in_float32(
    images, tokens, width, heads, multiplier, order, attn_norm, images_per_slice, attention
):
    core, x = draw(images, tokens, width, heads, multiplier, torch.float32, attn_norm=attn_norm, attention=attention)
    # a few roundings of 6e-8, magnified by LN where a row of the attention output is nearly constant
    assert_same(core, x, fast_update(core, x, images_per_slice=images_per_slice), 5e-5)


@pytest.mark.parametrize("attention", ["raw", "softmax"])
@pytest.mark.parametrize("tokens", [3, 6])
@pytest.mark.parametrize("attn_norm", [True, False])
@pytest.mark.parametrize("images_per_slice", [None, 1])
def test_gradients_are_those_of_the_forward_pass_with_dropout(tokens, attn_norm, images_per_slice, attention):
    # the margin is a hundred times gradcheck's step of 1e-6, so that no step crosses a kink
    core, x = draw(2, tokens, 4, 2, 3, margin=1e-4, attn_norm=attn_norm, attention=attention)
    assert kernels.scores_are_cheaper(tokens, core.config.n_neurons, 4) == (tokens == 3)
    seed = torch.randint(2**31, ()).item()

    def update(x, *masters):
        torch.manual_seed(seed)  # the same mask at each call
        return fast_update(core, x, masters=masters, images_per_slice=images_per_slice, dropout=0.3)

    assert torch.autograd.gradcheck(update, (x, core.encoder, core.encoder_v, core.decoder))


@pytest.mark.parametrize("images_per_slice", [None, 1])
def test_dropout_keeps_the_mean(images_per_slice):
    torch.manual_seed(0)
    core, copies = make_core(6, 3, 5), 1000
    x = torch.randn(1, 4, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = plain_update(core.eval(), x)[0]
        samples = fast_update(core, x.expand(copies, -1, -1), images_per_slice=images_per_slice, dropout=0.25)
    # gradcheck cannot see a factor missing from both passes; this can
    assert (samples.std(0) > 0).any()
    assert ((samples.mean(0) - expected).abs() <= 5 * samples.std(0) / math.sqrt(copies) + 1e-12).all()


def test_dropout_is_as_wide_as_the_plain_path():
    # the same distribution, not only the same mean: deviations of 2000 draws agree within their sampling error
    torch.manual_seed(0)
    core, copies = make_core(6, 3, 5, dropout=0.25).train(), 2000
    x = torch.randn(1, 4, 6, dtype=torch.float64).expand(copies, -1, -1)
    with torch.no_grad():
        fast, plain = fast_update(core, x, dropout=0.25), plain_update(core, x)
    deviations = fast.std(0), plain.std(0)
    # few neurons make y's distribution lumpy, its kurtosis up to some 10: relative error sqrt(9 / 4 / 2000) = 0.034
    assert torch.allclose(*deviations, rtol=5 * 0.034 * math.sqrt(2), atol=1e-12)
    assert torch.allclose(fast.mean(0), plain.mean(0), atol=5 * max(d.max().item() for d in deviations) / 31)


@pytest.mark.parametrize(
    ("images", "images_per_slice", "expected"),
    [(5, 2, [2, 2, 1]), (4, 2, [2, 2]), (1, 3, [1]), (3, 0, [1, 1, 1]), (5, None, [5])],
)
def test_batch_passes_in_slices(monkeypatch, images, images_per_slice, expected):
    core, seen, drop = make_core(6, 3, 5), [], kernels.drop_
    monkeypatch.setattr(kernels, "drop_", lambda v, p: (seen.append(v.numel()), drop(v, p))[1])
    fast_update(core, torch.randn(images, 9, 6, dtype=torch.float64), images_per_slice=images_per_slice)
    assert seen == [n * 3 * 9 * 10 for n in expected]


@pytest.mark.parametrize(("images", "tokens", "width", "heads", "multiplier", "order"), SIZES)
def test_update_multiplies_no_more_than_the_equations(images, tokens, width, heads, multiplier, order):
    core = make_core(width, heads, multiplier)
    N, D, T = core.config.n_neurons, width, tokens
    attention = {"scores": T * (N + D), "state": 2 * N * D}[order]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fast_update(core, torch.randn(images, T, D, dtype=torch.float64))
    assert counter.get_total_flops() == 2 * images * T * heads * (3 * D * N + attention)


def test_backward_leaves_what_it_needs_intact():
    core, x = draw(3, 9, 6, 3, 5)
    y = fast_update(core, x, images_per_slice=2, dropout=0.4)
    cotangent = torch.randn_like(y)
    arguments = y, (x, core.encoder, core.encoder_v, core.decoder), cotangent
    first = torch.autograd.grad(*arguments, retain_graph=True)
    for once, again in zip(first, torch.autograd.grad(*arguments), strict=True):
        assert torch.equal(once, again)


def test_inputs_are_not_written_to():
    core, x = draw(3, 9, 6, 3, 5)
    kept = [t.detach().clone() for t in (x, core.encoder, core.encoder_v, core.decoder, core.attn.tables(9).phases)]
    cotangent = torch.randn_like(x)
    kept_cotangent = cotangent.clone()
    fast_update(core, x, images_per_slice=2, dropout=0.4).backward(cotangent)
    for now, before in zip(
        (x, core.encoder, core.encoder_v, core.decoder, core.attn.tables(9).phases), kept, strict=True
    ):
        assert torch.equal(now, before)
    assert torch.equal(cotangent, kept_cotangent)


@pytest.mark.parametrize("tokens", [4, 9])
def test_strided_input_and_expanded_cotangent(tokens):
    core = make_core(6, 3, 5)
    x = torch.randn(5, 6, tokens, dtype=torch.float64).mT.requires_grad_()  # as patch embedding hands it on
    assert not x.is_contiguous()
    actual = torch.autograd.grad(fast_update(core, x, images_per_slice=2).sum(), (x, core.encoder))
    expected = torch.autograd.grad(plain_update(core, x).sum(), (x, core.encoder))
    for fast, plain in zip(actual, expected, strict=True):
        assert relative_error(fast, plain) < 1e-11


def test_frozen_weights_get_no_gradient_and_others_the_right_one():
    core, x = make_core(6, 3, 5), torch.randn(2, 9, 6, dtype=torch.float64)
    core.encoder.requires_grad_(False)
    expected = torch.autograd.grad(plain_update(core, x).sum(), (core.encoder_v, core.decoder))
    fast_update(core, x).sum().backward()
    assert core.encoder.grad is None
    assert relative_error(core.encoder_v.grad, expected[0]) < 1e-11
    assert relative_error(core.decoder.grad, expected[1]) < 1e-11


def test_gradients_go_to_the_masters():
    core, x = make_core(6, 3, 5), torch.randn(2, 9, 6, dtype=torch.float64)
    masters = core.encoder, core.encoder_v, core.decoder
    weights = tuple((2 * master).detach().requires_grad_() for master in masters)
    y = kernels.fast_update(x, masters, weights, core.attn.tables(9).phases, attn_eps=LN_EPS, dropout=0.0)
    y.sum().backward()
    assert all(master.grad is not None for master in masters)
    assert all(weight.grad is None for weight in weights)
    with torch.no_grad():  # and the products were taken with the weights
        for master in masters:
            master.mul_(2)
        assert relative_error(y, plain_update(core, x)) < 1e-11


# ---------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("residual", ["post", "pre", "true_pre", "scaled_pre", "none"])
@pytest.mark.parametrize("norms", [(True, True), (True, False), (False, True), (False, False)])
def test_model_with_and_without_fast_path(residual, norms):
    fields = SMALL | dict(residual=residual, attn_norm=norms[0], update_norm=norms[1], dropout=0.0)
    model = spread_weights(VisionBDHConfig(**fields).build().double())
    images = torch.randn(3, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(3, 10, dtype=torch.float64)
    results = []
    for model.use_fast_path in (True, False):
        logits = model(images)
        results.append((logits, *torch.autograd.grad(logits, (images, *model.parameters()), cotangent)))
    for fast, plain in zip(*results, strict=True):
        assert relative_error(fast, plain) < 1e-9


def forward_and_backward(model):
    """One pass of a small model both ways."""
    if isinstance(model.config, BDHConfig):
        model(torch.randint(model.config.vocab_size, (2, 5)))[0].sum().backward()
    else:
        model(torch.randn(2, 3, model.config.img_size, model.config.img_size)).sum().backward()


@pytest.mark.parametrize(
    "build",
    [
        # N = D, and 16 tokens are many at this width
        lambda: v1_config(**(SMALL | dict(img_size=8, mlp_internal_dim_multiplier=3, attention="softmax"))).build(),
        lambda: BDHConfig(n_embd=6, n_head=3, mlp_internal_dim_multiplier=5).build(),
        lambda: BDHConfig(n_embd=6, n_head=3, mlp_internal_dim_multiplier=5, attention="softmax").build(),
    ],
)
def test_causal_models_and_softmax_over_many_tokens_never_take_the_fast_path(monkeypatch, build):
    monkeypatch.setattr(kernels, "fast_update", refuse)
    model = build()
    assert model.use_fast_path
    forward_and_backward(model)


@pytest.mark.parametrize("build", [v1_config, v2_config, v2_softmax_config, v3_config])
def test_models_take_the_fast_path_unless_told_not_to(monkeypatch, build):
    monkeypatch.setattr(kernels, "fast_update", refuse)
    model = build(**(SMALL | dict(img_size=4)))
    with pytest.raises(AssertionError, match="fast path"):
        forward_and_backward(model)
    model.use_fast_path = False
    forward_and_backward(model)


def test_model_drops_by_its_config_and_only_in_training(monkeypatch):
    seen, drop = [], kernels.drop_
    monkeypatch.setattr(kernels, "drop_", lambda v, p: (seen.append(p), drop(v, p))[1])
    model = v1_config(**SMALL, dropout=0.35).build()
    forward_and_backward(model)
    model.eval()
    forward_and_backward(model)
    assert seen == [0.35, 0.35, 0.0, 0.0]


@pytest.mark.parametrize("fast", [True, False])
def test_inference_then_training(fast):
    model, images = spread_weights(v1_config(**SMALL).build()).double().eval(), torch.randn(2, 3, 6, 6).double()
    model.use_fast_path = fast
    with torch.inference_mode():
        logits = model(images)
    assert not logits.requires_grad
    model(images).sum().backward()  # the rotary table was made in inference mode and has to serve here too
    assert torch.equal(model(images), logits)


def results_in(model, images, cotangent, *, fast, autocast):
    """Logits and the gradients of all parameters by name, on the chosen path, under bfloat16 autocast or not."""
    model.use_fast_path = fast
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(images)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(logits, parameters, cotangent.to(logits.dtype))
    return logits, dict(zip(names, grads, strict=True))


@pytest.mark.parametrize(("grid", "attention"), [(4, "raw"), (7, "raw"), (4, "softmax")])
def test_bfloat16_autocast_is_near_float32(monkeypatch, grid, attention):
    # A rounding to bfloat16 errs by up to 2^-9, 0.0011 in the mean square. About ten lie between x and y (x, E,
    # x_sparse, q, scores, a, E_v, y_sparse, the gated product, E_d), and the queries count three times: sqrt(16) *
    # 0.0011 = 0.0045 a level, LN and head included 0.006 for two; 0.03 is allowed.
    # For gradients, besides, rounding puts 0.1 to 0.5 % of the ReLUs on the other side of their kink, an error of
    # sqrt(0.005) = 0.07 with a long tail. In the first level rounding flips the same ones on both paths, so the plain
    # path under the same autocast is the measure: the fast one may be half as far again from float32, and 0.02. From
    # the second level on other ReLUs flip, and there is no bound that always holds.
    fields = dict(n_embd=16, n_head=2, mlp_internal_dim_multiplier=4, img_size=2 * grid, patch_size=2, dropout=0.0)
    images, cotangent = torch.randn(16, 3, 2 * grid, 2 * grid), torch.randn(16, 10)
    seen, fast = [], kernels.fast_update
    monkeypatch.setattr(kernels, "fast_update", lambda *a, **k: (seen.append(a[2][0].dtype), fast(*a, **k))[1])
    for n_layer in (1, 2):
        model = spread_weights(v1_config(**fields, n_layer=n_layer, attention=attention).build())
        assert kernels.scores_are_cheaper(grid**2, model.config.n_neurons, 16) == (grid == 4)
        expected, expected_grads = results_in(model, images, cotangent, fast=False, autocast=False)
        _, plain_grads = results_in(model, images, cotangent, fast=False, autocast=True)
        seen.clear()
        actual, actual_grads = results_in(model, images, cotangent, fast=True, autocast=True)
        assert seen == [torch.bfloat16] * n_layer
        assert 0 < relative_error(actual, expected) < 0.03
        for name, grad in actual_grads.items():
            assert grad.dtype == torch.float32, name
            if n_layer == 1:
                allowed = 1.5 * relative_error(plain_grads[name], expected_grads[name]) + 0.02
                assert relative_error(grad, expected_grads[name]) < allowed, name


@pytest.mark.parametrize("tokens", [4, 9])
@pytest.mark.parametrize("images_per_slice", [1, 5])
def test_bfloat16_weight_gradients_are_summed_in_float32(tokens, images_per_slice):
    # 320 equal images, one to a slice or five: a sum kept in bfloat16 stops growing at 256 units of its last place
    core, x = draw(1, tokens, 6, 3, 5, torch.float32)
    masters = core.encoder, core.encoder_v, core.decoder
    weights = tuple(master.detach().bfloat16() for master in masters)
    cotangent = torch.randn_like(x)

    def weight_gradients(copies, per_slice):
        slice_bytes = per_slice * 3 * tokens * 10 * 2
        repeated = x.detach().expand(copies, -1, -1)
        y = kernels.fast_update(
            repeated,
            masters,
            weights,
            core.attn.tables(tokens).phases,
            attn_eps=LN_EPS,
            dropout=0.0,
            slice_bytes=slice_bytes,
        )
        assert y.dtype == torch.float32
        return torch.autograd.grad(y, masters, cotangent.expand(copies, -1, -1))

    for one, many in zip(weight_gradients(1, 1), weight_gradients(320, images_per_slice), strict=True):
        assert many.dtype == torch.float32
        # a slice's own product is rounded to bfloat16, by at most 2^-8 of each entry
        assert relative_error(many / 320, one) < 2**-7
