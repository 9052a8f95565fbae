"""models/kernels.py on fresh random inputs: the order of raw attention, and the fast step against the plain one."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from models import kernels
from models.bdh import LN_EPS, BDHCore, CoreConfig, layer_norm
from models.rotary import RotaryAttention, rope
from models.vision_bdh import v1_config, v2_config
from tests.reference import randomised, relative_error, results_in

SMALL = dict(n_layer=2, n_embd=6, n_head=3, mlp_internal_dim_multiplier=5, img_size=6, patch_size=2)  # T = 9, N = 10
# images, tokens, width, heads, multiplier; and the order of the attention product chosen at such sizes
SIZES = [
    (5, 4, 6, 3, 5, "scores"),
    (1, 9, 12, 3, 4, "scores"),
    (3, 7, 10, 5, 7, "scores"),
    (4, 1, 6, 2, 4, "scores"),
    (5, 9, 6, 3, 5, "state"),
    (1, 33, 6, 3, 5, "state"),
    (2, 25, 8, 1, 3, "state"),
]
NAMES = "encoder", "encoder_v", "decoder"
ORDERS = [(3, 8, 5), (5, 10, 4), (33, 10, 6), (64, 6, 3), (13, 4, 11)]  # T, N, D: scores cheaper in the first two

# ---------------------------------------------------------------------------- helpers


def make_core(width, heads, multiplier, dtype=torch.float64, **fields):
    """The bare step without a mask, its weights scaled so that every term counts."""
    sizes = dict(n_embd=width, n_head=heads, mlp_internal_dim_multiplier=multiplier)
    core = BDHCore(CoreConfig(**(sizes | dict(dropout=0.0) | fields)), causal=False).to(dtype)
    with torch.no_grad():
        for name in NAMES:
            weight = core.get_parameter(name)
            weight.normal_(std=weight.shape[-2] ** -0.5)
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
            into_y = torch.einsum("bhtd,hdn->bhtn", a, core.encoder_v)[into_gate > 0]  # a closed gate hides the other
        if into_gate.abs().min() > margin and (into_y.numel() == 0 or into_y.abs().min() > margin):
            return core, x


def fast_update(core, x, *, masters=None, weights=None, images_per_slice=None, dropout=0.0):
    """kernels.fast_update with the core's weights, all images at once unless told otherwise."""
    masters = masters or tuple(core.get_parameter(name) for name in NAMES)
    weights = weights or tuple(master.detach() for master in masters)
    bytes_per_image = core.config.n_head * x.shape[1] * core.config.n_neurons * weights[0].element_size()
    # not a whole number of images: the remainder must not matter
    slices = {} if images_per_slice is None else dict(slice_bytes=images_per_slice * bytes_per_image + 3)
    return kernels.fast_update(
        x,
        masters,
        weights,
        core.attn.tables(x.shape[1]).phases,
        attn_eps=LN_EPS if core.config.attn_norm else None,
        dropout=dropout,
        softmax=core.config.attention == "softmax",
        **slices,
    )


def plain_update(core, x):
    return core.plain_update(x, core.step_weights()[0], core.attn.tables(x.shape[1]))


# ---------------------------------------------------------------------------- (q k^T) x or q (k^T x)


class Planes(TorchDispatchMode):
    """Records the last two axes of every tensor made inside."""

    planes = ()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple) else (result,)
        self.planes += tuple(tuple(each.shape[-2:]) for each in made if isinstance(each, torch.Tensor))
        return result


@pytest.mark.parametrize("attention", ["raw", "normed", "softmax"])
@pytest.mark.parametrize(("tokens", "neurons", "width"), ORDERS)
def test_attention_equals_the_plain_product_in_float64(tokens, neurons, width, attention, monkeypatch):
    q, k = (torch.randn(2, 3, tokens, neurons, dtype=torch.float64).relu().requires_grad_() for _ in range(2))
    x = torch.randn(2, tokens, width, dtype=torch.float64, requires_grad=True)
    calls, library = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args: calls.append(1) or library(*args))
    softmax, after = attention == "softmax", layer_norm if attention == "normed" else lambda a: a
    module = RotaryAttention(neurons, softmax=softmax, causal=False, rotary="none").double()
    actual = after(module(q, k, x))
    assert calls == [1] * softmax
    scores = torch.einsum("bhtn,bhsn->bhts", q, k)
    scores = (scores / neurons**0.5).softmax(-1) if softmax else scores
    plain = after(torch.einsum("bhts,bsd->bhtd", scores, x))
    torch.testing.assert_close(actual, plain, rtol=1e-9, atol=1e-9)
    cotangent = torch.randn_like(plain)
    gradients = (torch.autograd.grad(each, (q, k, x), cotangent) for each in (actual, plain))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("values", ["of each head", "of all heads"])
@pytest.mark.parametrize(("tokens", "neurons", "width"), ORDERS)
def test_the_cheaper_order_is_taken(tokens, neurons, width, values):
    q = torch.randn(2, 3, tokens, neurons)
    x = torch.randn(2, 3 if values == "of each head" else 1, tokens, width)
    with FlopCounterMode(display=False) as counter:
        kernels.raw_attention(q, q, x)
    assert counter.get_total_flops() == 2 * 6 * tokens * min(tokens * (neurons + width), 2 * neurons * width)


def test_both_orders_occur_above_and_at_the_sizes_of_models():
    assert [kernels.scores_are_cheaper(*sizes) for sizes in ORDERS] == [True, True, False, False, False]
    assert kernels.scores_are_cheaper(64, 1024, 192)  # CIFAR
    assert kernels.scores_are_cheaper(323, 1024, 192)  # 2 N D / (N + D) is 323.4
    assert not kernels.scores_are_cheaper(324, 1024, 192)
    assert not kernels.scores_are_cheaper(2304, 1024, 256)  # BDH-UNet at 384 x 384


@pytest.mark.parametrize("fast", [True, False])
def test_a_step_on_many_tokens_never_holds_a_matrix_of_token_pairs(fast):
    model = v2_config(img_size=52, patch_size=4, n_layer=2, n_embd=6, n_head=2, mlp_internal_dim_multiplier=4).build()
    model.use_fast_path = fast
    with Planes() as seen:
        model(torch.randn(2, 3, 52, 52)).sum().backward()
    tokens = model.config.grid[0] * model.config.grid[1]
    assert (tokens, model.config.n_embd) in seen.planes  # the mode sees what the model makes
    assert (tokens, tokens) not in seen.planes


# ---------------------------------------------------------------------------- fast_update


@pytest.mark.parametrize("attention", ["raw", "softmax"])
# in float64, LN of a nearly constant row magnifies rounding, 1e-16, at most 1 / sqrt(1e-5) = 316 times;
# in float32, a few roundings of 6e-8 are magnified likewise
@pytest.mark.parametrize(
    ("dtype", "images_per_slice", "tolerance"),
    [*((torch.float64, n, 1e-11) for n in (None, 1, 2)), *((torch.float32, n, 5e-5) for n in (None, 2))],
)
@pytest.mark.parametrize("attn_norm", [True, False])
@pytest.mark.parametrize(("images", "tokens", "width", "heads", "multiplier", "order"), SIZES)
def test_update_and_gradients_equal_the_plain_ones(
    images, tokens, width, heads, multiplier, order, attn_norm, dtype, images_per_slice, tolerance, attention
):
    core, x = draw(images, tokens, width, heads, multiplier, dtype, attn_norm=attn_norm, attention=attention)
    assert kernels.scores_are_cheaper(tokens, core.config.n_neurons, width) == (order == "scores")
    actual, expected = fast_update(core, x, images_per_slice=images_per_slice), plain_update(core, x)
    assert actual.dtype == expected.dtype and relative_error(actual, expected) <= tolerance
    inputs, cotangent = (x, *(core.get_parameter(name) for name in NAMES)), torch.randn_like(expected)
    gradients = (torch.autograd.grad(each, inputs, cotangent) for each in (actual, expected))
    for name, one, other in zip(("x", *NAMES), *gradients, strict=True):
        assert one.dtype == other.dtype and other.norm() > 0, name
        assert relative_error(one, other) <= tolerance, name


@pytest.mark.parametrize("attention", ["raw", "softmax"])
@pytest.mark.parametrize("tokens", [3, 6])
@pytest.mark.parametrize(("images_per_slice", "attn_norm"), [(None, True), (1, False)])
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
def test_dropout_has_the_mean_and_deviation_of_the_plain_path(images_per_slice):
    # gradcheck cannot see a factor missing from both passes; this can
    torch.manual_seed(0)
    core, copies = make_core(6, 3, 5, dropout=0.25).train(), 2000
    x = torch.randn(1, 4, 6, dtype=torch.float64).expand(copies, -1, -1)
    with torch.no_grad():
        fast = fast_update(core, x, images_per_slice=images_per_slice, dropout=0.25)
        plain, expected = plain_update(core, x), plain_update(core.eval(), x[:1])[0]
    deviations = fast.std(0), plain.std(0)
    # few neurons make y's distribution lumpy, its kurtosis up to some 10: relative error sqrt(9 / 4 / 2000) = 0.034
    assert torch.allclose(*deviations, rtol=5 * 0.034 * math.sqrt(2), atol=1e-12)
    assert (fast.std(0) > 0).any()
    assert ((fast.mean(0) - expected).abs() <= 5 * fast.std(0) / math.sqrt(copies) + 1e-12).all()


@pytest.mark.parametrize(
    ("images", "images_per_slice", "expected"),
    [(5, 2, [2, 2, 1]), (4, 2, [2, 2]), (1, 3, [1]), (3, 0, [1, 1, 1]), (5, None, [5])],
)
def test_batch_is_processed_in_slices(monkeypatch, images, images_per_slice, expected):
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


def test_backward_can_be_repeated_and_writes_to_no_input():
    core, x = draw(3, 9, 6, 3, 5)
    cotangent = torch.randn_like(x)
    inputs = (x, *(core.get_parameter(name) for name in NAMES), core.attn.tables(9).phases, cotangent)
    kept = [each.detach().clone() for each in inputs]
    y = fast_update(core, x, images_per_slice=2, dropout=0.4)
    first, again = (torch.autograd.grad(y, inputs[:4], cotangent, retain_graph=True) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert all(torch.equal(*pair) for pair in zip(inputs, kept, strict=True))


@pytest.mark.parametrize("tokens", [4, 9])
def test_strided_input_and_expanded_cotangent(tokens):
    core = make_core(6, 3, 5)
    x = torch.randn(5, 6, tokens, dtype=torch.float64).mT.requires_grad_()  # as patch embedding returns it
    assert not x.is_contiguous()
    actual = torch.autograd.grad(fast_update(core, x, images_per_slice=2).sum(), (x, core.encoder))
    expected = torch.autograd.grad(plain_update(core, x).sum(), (x, core.encoder))
    for fast, plain in zip(actual, expected, strict=True):
        assert relative_error(fast, plain) < 1e-11


def test_gradients_go_to_the_masters_that_are_not_frozen():
    core, x = make_core(6, 3, 5), torch.randn(2, 9, 6, dtype=torch.float64)
    core.encoder.requires_grad_(False)
    masters = tuple(core.get_parameter(name) for name in NAMES)
    weights = tuple((2 * master).detach().requires_grad_() for master in masters)
    y = fast_update(core, x, masters=masters, weights=weights)
    y.sum().backward()
    assert [master.grad is None for master in masters] == [True, False, False]
    assert all(weight.grad is None for weight in weights)
    with torch.no_grad():  # the products were computed with the weights, twice the masters
        for master in masters:
            master.mul_(2)
    expected = plain_update(core, x)
    assert relative_error(y, expected) < 1e-11
    for master, gradient in zip(masters[1:], torch.autograd.grad(expected.sum(), masters[1:]), strict=True):
        assert relative_error(master.grad, gradient) < 1e-11


# ---------------------------------------------------------------------------- whole models


def test_model_drops_by_its_config_and_only_in_training(monkeypatch):
    seen, drop = [], kernels.drop_
    monkeypatch.setattr(kernels, "drop_", lambda v, p: (seen.append(p), drop(v, p))[1])
    model = v1_config(**SMALL, dropout=0.35).build()
    images = torch.randn(2, 3, 6, 6)
    model(images).sum().backward()
    model.eval()(images).sum().backward()
    assert seen == [0.35, 0.35, 0.0, 0.0]


@pytest.mark.parametrize("fast", [True, False])
def test_inference_then_training(fast):
    model, images = randomised(v1_config(**SMALL).build()), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    model.use_fast_path = fast
    with torch.inference_mode():
        logits = model(images)
    assert not logits.requires_grad
    model(images).sum().backward()  # the rotary table was made in inference mode and is used here too
    assert torch.equal(model(images), logits)


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
    bf16, seen, fast = torch.autocast("cpu", torch.bfloat16), [], kernels.fast_update
    monkeypatch.setattr(kernels, "fast_update", lambda *a, **k: (seen.append(a[2][0].dtype), fast(*a, **k))[1])
    for n_layer in (1, 2):
        model = randomised(v1_config(**fields, n_layer=n_layer, attention=attention).build()).float()
        assert kernels.scores_are_cheaper(grid**2, model.config.n_neurons, 16) == (grid == 4)
        expected, expected_grads = results_in(contextlib.nullcontext(), model, images, cotangent, fast=False)
        _, plain_grads = results_in(bf16, model, images, cotangent, fast=False)
        seen.clear()
        actual, actual_grads = results_in(bf16, model, images, cotangent, fast=True)
        assert seen == [torch.bfloat16] * n_layer
        assert 0 < relative_error(actual, expected) < 0.03
        for name, grad in actual_grads.items():
            assert grad.dtype == torch.float32, name
            if n_layer == 1:
                allowed = 1.5 * relative_error(plain_grads[name], expected_grads[name]) + 0.02
                assert relative_error(grad, expected_grads[name]) < allowed, name


@pytest.mark.parametrize("tokens", [4, 9])
@pytest.mark.parametrize("images_per_slice", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_weight_gradients_are_summed_in_float32(dtype, tokens, images_per_slice):
    # 320 equal images, one or five per slice: a sum kept in bfloat16 stops growing at 256 units of its last place
    core, x = draw(1, tokens, 6, 3, 5, torch.float32)
    masters, x = (core.encoder, core.encoder_v, core.decoder), x.to(dtype)
    cotangent = torch.randn_like(x)

    def weight_gradients(copies, per_slice):
        weights = tuple(master.detach().bfloat16() for master in masters)
        y = fast_update(core, x.detach().expand(copies, -1, -1), weights=weights, images_per_slice=per_slice)
        assert y.dtype == dtype
        return torch.autograd.grad(y, masters, cotangent.expand(copies, -1, -1))

    for one, many in zip(weight_gradients(1, 1), weight_gradients(320, images_per_slice), strict=True):
        assert many.dtype == torch.float32
        # a slice's own product is rounded to bfloat16, by at most 2^-8 of each entry
        assert relative_error(many / 320, one) < 2**-7
