"""(q k^T) x and q (k^T x): the same, and the code takes the cheaper."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from models import kernels
from models.bdh import layer_norm
from models.rotary import RotaryAttention
from models.vision_bdh import v2_config

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = [
    (3, 8, 5),
    (5, 10, 4),
    (33, 10, 6),
    (64, 6, 3),
    (13, 4, 11),
]  # T, N, D: the scores are cheaper in the first two


class LargestPlane(TorchDispatchMode):
    """Notes the most entries that the last two axes of any tensor made inside have."""

    planes = ()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple) else (result,)
        self.planes += tuple(tuple(each.shape[-2:]) for each in made if isinstance(each, torch.Tensor))
        return result


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("tokens", "neurons", "width"), SIZES)
def test_both_orders_agree_in_float64(tokens, neurons, width, normed):
    q, k = (torch.randn(2, 3, tokens, neurons, dtype=torch.float64).relu().requires_grad_() for _ in range(2))
    x = torch.randn(2, 1, tokens, width, dtype=torch.float64, requires_grad=True)
    after = layer_norm if normed else lambda a: a
    scores = torch.einsum("bhtn,bhsn->bhts", q, k)
    plain = after(torch.einsum("bhts,bxsd->bhtd", scores, x))
    reordered = after(kernels.raw_attention(q, k, x))
    torch.testing.assert_close(reordered, plain, rtol=1e-9, atol=1e-9)
    cotangent = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, (q, k, x), cotangent)
    for actual, wanted in zip(torch.autograd.grad(reordered, (q, k, x), cotangent), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("tokens", "neurons", "width"), SIZES)
def test_the_order_is_picked_by_cost(tokens, neurons, width):
    q, x = torch.randn(1, 2, tokens, neurons), torch.randn(1, 1, tokens, width)
    with LargestPlane() as seen:
        kernels.raw_attention(q, q, x)
    cheaper = tokens * (neurons + width) <= 2 * neurons * width
    assert kernels.scores_are_cheaper(tokens, neurons, width) == cheaper
    assert ((tokens, tokens) in seen.planes) == cheaper
    assert ((neurons, width) in seen.planes) == (not cheaper)


@pytest.mark.parametrize("values", ["of each head", "of all heads"])
@pytest.mark.parametrize(("tokens", "neurons", "width"), SIZES)
def test_the_order_costs_what_it_should(tokens, neurons, width, values):
    q = torch.randn(2, 3, tokens, neurons)
    x = torch.randn(2, 3 if values == "of each head" else 1, tokens, width)
    with FlopCounterMode(display=False) as counter:
        kernels.raw_attention(q, q, x)
    assert counter.get_total_flops() == 2 * 6 * tokens * min(tokens * (neurons + width), 2 * neurons * width)


def test_both_orders_occur_above_and_at_the_sizes_of_the_models():
    assert [kernels.scores_are_cheaper(*sizes) for sizes in SIZES] == [True, True, False, False, False]
    assert kernels.scores_are_cheaper(64, 1024, 192)  # CIFAR
    assert kernels.scores_are_cheaper(323, 1024, 192)  # 2 N D / (N + D) is 323.4
    assert not kernels.scores_are_cheaper(324, 1024, 192)
    assert not kernels.scores_are_cheaper(2304, 1024, 256)  # BDH-UNet at 384 x 384


@pytest.mark.parametrize("fast", [True, False])
def test_a_step_on_many_tokens_never_holds_a_matrix_of_token_pairs(fast):
    model = v2_config(img_size=52, patch_size=4, n_layer=2, n_embd=6, n_head=2, mlp_internal_dim_multiplier=4).build()
    model.use_fast_path = fast
    with LargestPlane() as seen:
        model(torch.randn(2, 3, 52, 52)).sum().backward()
    tokens = model.config.grid[0] * model.config.grid[1]
    assert (tokens, model.config.n_embd) in seen.planes  # the modes see what the model makes
    assert (tokens, tokens) not in seen.planes


@pytest.mark.parametrize(("tokens", "neurons", "width"), SIZES)
def test_softmax_attention_is_the_librarys_and_equals_the_plain_one(tokens, neurons, width, monkeypatch):
    attention = RotaryAttention(neurons, softmax=True, causal=False, rotary="none").double()
    q, k = (torch.randn(2, 3, tokens, neurons, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x = torch.randn(2, tokens, width, dtype=torch.float64, requires_grad=True)
    calls = []
    library = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args: calls.append(1) or library(*args))
    a = attention(q, k, x)
    assert calls == [1]
    plain = (q @ k.mT / neurons**0.5).softmax(-1) @ x.unsqueeze(1)
    torch.testing.assert_close(a, plain, rtol=1e-9, atol=1e-9)
    cotangent = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, (q, k, x), cotangent)
    for actual, wanted in zip(torch.autograd.grad(a, (q, k, x), cotangent), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-7, atol=1e-7)
