"""The BDH language model against an implementation written here from DESIGN's equations alone."""

import math

import pytest
import torch
import torch.nn.functional as F

from models import rotary
from models.bdh import BDHConfig

SMALL = dict(n_layer=3, n_embd=12, n_head=3, mlp_internal_dim_multiplier=4, vocab_size=11)  # N = 16 neurons a head


pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------------------- the reference


def formula_frequencies(n_neurons):
    """Turns per position of each neuron, 2^16 ** (-2 floor(j / 2) / N) / (2 pi), in Python's double precision."""
    return torch.tensor(
        [65536.0 ** (-2 * (j // 2) / n_neurons) / (2 * math.pi) for j in range(n_neurons)], dtype=torch.float64
    )


def norm(x):
    """LN over the last axis, no affine parameters, eps 1e-5."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def turn(v, frequencies):
    """Rotary positions. v: (B, T, N)."""
    angle = 2 * math.pi * torch.arange(v.shape[1], dtype=v.dtype)[:, None] * frequencies[0::2]
    even, odd = v[..., 0::2], v[..., 1::2]
    rotated = (even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin())
    return torch.stack(rotated, dim=-1).reshape(v.shape)


def reference_logits(weights, idx, *, n_layer, softmax=False):
    """The language model, a head at a time. weights: its state dict; idx: (B, T) -> (B, T, V)."""
    n_head, _, n_neurons = weights["encoder"].shape
    frequencies = formula_frequencies(n_neurons)
    position = torch.arange(idx.shape[1])
    before = position[None, :] < position[:, None]  # keys (columns) strictly before the query (row)
    x = norm(weights["embed.weight"][idx])
    for _ in range(n_layer):
        gated = []
        for head in range(n_head):
            x_sparse = (x @ weights["encoder"][head]).clamp(min=0)
            q = turn(x_sparse, frequencies)
            scores = torch.einsum("btn,bun->btu", q, q)
            if softmax:
                powers = (scores / math.sqrt(n_neurons)).exp() * before
                scores = powers / powers.sum(-1, keepdim=True).clamp(min=1e-300)  # the first token has no keys: zero
            a = norm((scores * before) @ x)
            gated.append(x_sparse * (a @ weights["encoder_v"][head]).clamp(min=0))
        x = norm(x + norm(torch.cat(gated, dim=-1) @ weights["decoder"]))
    return x @ weights["lm_head"]


# ---------------------------------------------------------------------------- helpers


def small_model(**overrides):
    """A tiny float64 model in evaluation mode, its weights of a size that lets every term of the step count."""
    model = BDHConfig(**(SMALL | overrides)).build().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        # the buffer is drawn up in float32; the exact values allow tolerances of float64
        model.attn.freqs.copy_(formula_frequencies(model.config.n_neurons).view(1, 1, 1, -1))
    return model


def random_tokens(batch=2, length=7):
    """(B, T) token numbers below SMALL's vocabulary."""
    return torch.randint(SMALL["vocab_size"], (batch, length))


def original_checkpoint():
    """A state dict as the authors' implementation writes it: D = 12, H = 3, N = 16, V = 11."""
    return {
        "decoder": torch.randn(3 * 16, 12),
        "encoder": torch.randn(3, 12, 16),
        "encoder_v": torch.randn(3, 12, 16),
        "lm_head": torch.randn(12, 11),
        "embed.weight": torch.randn(11, 12),
        "attn.freqs": formula_frequencies(16).float().view(1, 1, 1, 16),
    }


def assert_close(actual, expected, tolerance):
    """Equal up to tolerance relative to the whole tensor's norm."""
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    assert (actual - expected).norm() <= tolerance * expected.norm(), (actual - expected).norm() / expected.norm()


# ---------------------------------------------------------------------------- the function


@pytest.mark.parametrize("attention", ["raw", "softmax"])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_logits_and_gradients_equal_reference(attention, length):
    model = small_model(attention=attention)
    idx = random_tokens(length=length)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = reference_logits(weights, idx, n_layer=3, softmax=attention == "softmax")
    actual, _ = model(idx)
    assert_close(actual, expected, 1e-10)
    cotangent = torch.randn_like(expected)
    # with one token nothing is attended to, so y = 0 and only embedding and head matter
    expected_grads = torch.autograd.grad(expected, list(weights.values()), cotangent)
    actual.backward(cotangent)
    for (name, parameter), expected_grad in zip(model.named_parameters(), expected_grads, strict=True):
        assert length == 1 or expected_grad.norm() > 0, name
        assert_close(parameter.grad, expected_grad, 1e-8)


def test_published_size_in_float32_equals_reference():
    # weights and frequencies as built, so float32 all through: rounding 6e-8 an operation, over six levels
    model = BDHConfig(mlp_internal_dim_multiplier=4).build().eval()
    idx = torch.randint(256, (1, 20))
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    assert_close(model(idx)[0].double(), reference_logits(weights, idx, n_layer=6), 1e-5)


def test_loss_is_mean_cross_entropy():
    model, idx, targets = small_model(), random_tokens(), random_tokens()
    logits, loss = model(idx, targets)
    total = 0.0
    for row, row_targets in zip(logits.tolist(), targets.tolist(), strict=True):
        for values, target in zip(row, row_targets, strict=True):
            total += math.log(sum(math.exp(value) for value in values)) - values[target]
    assert loss.item() == pytest.approx(total / targets.numel(), rel=1e-5)  # the loss is taken in float32
    assert loss.ndim == 0


def test_no_targets_no_loss():
    assert small_model()(random_tokens())[1] is None


def test_dropout_in_training_only():
    model, idx = small_model(dropout=0.5), random_tokens()
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


# ---------------------------------------------------------------------------- parameters and checkpoints


def test_defaults_are_the_authors():
    config = BDHConfig()
    assert (config.n_layer, config.n_embd, config.n_head, config.mlp_internal_dim_multiplier) == (6, 256, 4, 128)
    assert (config.dropout, config.vocab_size, config.n_neurons) == (0.1, 256, 8192)
    assert (config.residual, config.attn_norm, config.update_norm) == ("post", True, True)
    assert (config.attention, config.init) == ("raw", "normal")


def test_state_dict_names_and_shapes():
    shapes = {name: tuple(tensor.shape) for name, tensor in BDHConfig(**SMALL).build().state_dict().items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in original_checkpoint().items()}


def test_original_checkpoint_loads_and_gives_its_logits():
    checkpoint = original_checkpoint()
    model = BDHConfig(**SMALL).build().eval()
    model.load_state_dict(checkpoint, strict=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, checkpoint[name]), name
    idx = random_tokens()
    weights = {name: tensor.double() for name, tensor in checkpoint.items()}
    # freqs are float32 on both sides, so the model is run in float64: a ReLU within rounding of zero then cannot matter
    assert_close(model.double()(idx)[0], reference_logits(weights, idx, n_layer=3), 1e-4)


def test_frequencies_are_not_trained():
    assert "attn.freqs" not in dict(BDHConfig(**SMALL).build().named_parameters())


@pytest.mark.parametrize("name", ["embed.weight", "encoder", "encoder_v", "decoder", "lm_head"])
def test_weights_start_normal(name):
    torch.manual_seed(0)
    weight = BDHConfig(n_embd=64, mlp_internal_dim_multiplier=4).build().get_parameter(name)
    n = weight.numel()
    assert abs(weight.std().item() / 0.02 - 1) < 5 / math.sqrt(2 * n)  # sampling error of a normal's deviation
    assert abs(weight.mean().item()) < 5 * 0.02 / math.sqrt(n)
    assert weight.abs().max() > 3 * 0.02  # a uniform distribution of this deviation ends at 1.73


# ---------------------------------------------------------------------------- causality


@pytest.mark.parametrize("attention", ["raw", "softmax"])
@pytest.mark.parametrize("changed", [0, 3, 6])
def test_a_token_reaches_only_itself_and_later_ones(attention, changed):
    model, idx = small_model(attention=attention), random_tokens()
    other = idx.clone()
    other[:, changed] = (other[:, changed] + 1) % SMALL["vocab_size"]
    before, after = model(idx)[0], model(other)[0]
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert ((before - after)[:, changed:].abs().amax(-1) > 1e-9).all()


@pytest.mark.parametrize("attention", ["raw", "softmax"])
def test_first_token_gets_zero_attention(attention):
    model = small_model(attention=attention)
    q, x = torch.rand(2, 3, 7, 16, dtype=torch.float64), torch.randn(2, 7, 12, dtype=torch.float64)
    a = model.attn(q, q, x)
    assert (a[:, :, 0] == 0).all()
    assert (a[:, :, 1:].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("attention", ["raw", "softmax"])
def test_attention_weights_are_zero_except_for_earlier_keys(attention):
    model = small_model(attention=attention)
    q = torch.rand(2, 3, 7, 16, dtype=torch.float64)
    weights = model.attn.weights(q, q)
    assert weights.shape == (2, 3, 7, 7)
    for query in range(7):
        assert (weights[:, :, query, query:] == 0).all()
        assert (weights[:, :, query, :query] != 0).all()
    if attention == "softmax":
        assert torch.allclose(weights[:, :, 1:].sum(-1), torch.ones((), dtype=torch.float64))


# ---------------------------------------------------------------------------- generation


@pytest.mark.parametrize("new", [0, 1, 5])
@pytest.mark.parametrize("sampling", [dict(), dict(temperature=0), dict(top_k=3), dict(top_k=1000)])
def test_generate_appends_to_the_prompt(new, sampling):
    prompt = random_tokens(batch=3, length=4)
    kept = prompt.clone()
    out = small_model().generate(prompt, new, **sampling)
    assert out.shape == (3, 4 + new)
    assert out.dtype == prompt.dtype
    assert torch.equal(out[:, :4], kept)
    assert torch.equal(prompt, kept)
    assert ((out >= 0) & (out < SMALL["vocab_size"])).all()


@pytest.mark.parametrize("sampling", [dict(temperature=0), dict(temperature=0, top_k=4), dict(top_k=1)])
def test_greedy_generation_is_argmax(sampling):
    model, prompt = small_model(), random_tokens(batch=4, length=3)
    out = model.generate(prompt, 8, **sampling)
    for end in range(3, 11):
        assert torch.equal(out[:, end], model(out[:, :end])[0][:, -1].argmax(-1))


def test_seeded_sampling_repeats():
    model, prompt = small_model(), random_tokens(batch=4, length=3)
    torch.manual_seed(5)
    first = model.generate(prompt, 12)
    assert not torch.equal(model.generate(prompt, 12), first)  # 48 tokens by chance alike: no
    torch.manual_seed(5)
    assert torch.equal(model.generate(prompt, 12), first)


@pytest.mark.parametrize("top_k", [2, 5])
def test_top_k_excludes_all_others(top_k):
    model = small_model()
    # so hot that every token is about equally probable: without top_k, 600 draws would certainly leave the best k
    out = model.generate(random_tokens(batch=100, length=2), 6, temperature=1e6, top_k=top_k)
    seen = set()
    for end in range(2, 8):
        ranks = model(out[:, :end])[0][:, -1].argsort(-1, descending=True).argsort(-1)
        seen |= set(ranks.gather(1, out[:, end : end + 1]).flatten().tolist())
    assert seen == set(range(top_k))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_sampling_follows_the_softmax_at_that_temperature(temperature):
    torch.manual_seed(0)
    model, draws = small_model(), 4_000
    prompt = random_tokens(batch=1, length=2).expand(draws, -1)
    counts = model.generate(prompt, 1, temperature=temperature)[:, -1].bincount(minlength=SMALL["vocab_size"])
    logits = model(prompt[:1])[0][0, -1]
    p = (logits / temperature).exp() / (logits / temperature).exp().sum()
    deviation = (p * (1 - p) / draws).sqrt()
    assert ((counts / draws - p).abs() < 5 * deviation + 1 / draws).all()


@pytest.mark.parametrize("bad", [dict(temperature=-0.1), dict(top_k=0), dict(top_k=-3), dict(temperature=0, top_k=0)])
def test_bad_sampling_is_refused(bad):
    with pytest.raises(ValueError, match=r"temperature.*top_k"):
        small_model().generate(random_tokens(), 1, **bad)


def test_generation_builds_no_graph():
    model = small_model()
    graphs = []
    model.level_input.register_forward_hook(lambda module, args, out: graphs.append(out.requires_grad))
    model.generate(random_tokens(), 2)
    assert len(graphs) == 2 * 3
    assert not any(graphs)


# ---------------------------------------------------------------------------- rotary positions


@pytest.mark.parametrize("n_neurons", [2, 16, 1024])
def test_frequencies_follow_the_formula(n_neurons):
    frequencies = rotary.rope_frequencies(n_neurons)
    assert frequencies.dtype == torch.float32
    assert torch.allclose(frequencies.double(), formula_frequencies(n_neurons), rtol=2e-6, atol=0)
    assert torch.equal(frequencies[0::2], frequencies[1::2])
    assert frequencies[0].item() == pytest.approx(1 / (2 * math.pi))  # the fastest pair turns one radian a token
    assert n_neurons == 2 or (frequencies[2::2] < frequencies[:-2:2]).all()


def test_angles_are_the_fraction_of_turns():
    attn = small_model().attn
    turns = torch.arange(50, dtype=torch.float64)[:, None] * formula_frequencies(16)
    angles = attn.angles(50)
    assert angles.shape == (50, 16)
    assert torch.allclose(angles, (turns - turns.floor()) * 2 * math.pi, atol=1e-12, rtol=0)
    assert (angles < 2 * math.pi).all()


def test_phases_are_unit_numbers_at_the_angles():
    attn = small_model().attn
    for n_tokens in (5, 9, 5):  # a table is kept: another length must not get it
        phases, angles = attn.tables(n_tokens).phases, attn.angles(n_tokens)[:, 0::2]
        assert phases.shape == (n_tokens, 8)
        assert torch.allclose(torch.view_as_real(phases), torch.stack((angles.cos(), angles.sin()), -1), atol=1e-12)


def test_rope_turns_each_pair_by_its_angle():
    angle = torch.tensor([0.0, 0.4, 2.0], dtype=torch.float64)
    v = torch.tensor([[3.0, 0.0]] * 3 + [[0.0, 2.0]] * 3, dtype=torch.float64).view(2, 3, 2)
    even_only = torch.stack((3 * angle.cos(), 3 * angle.sin()), dim=-1)
    odd_only = torch.stack((-2 * angle.sin(), 2 * angle.cos()), dim=-1)
    turned = rotary.rope(v, *(each[:, None].expand(3, 2) for each in (angle.cos(), angle.sin())))
    assert torch.allclose(turned, torch.stack((even_only, odd_only)), atol=1e-14, rtol=0)


def test_rope_keeps_pair_norms_and_the_first_token():
    attn = small_model().attn
    v = torch.randn(2, 3, 40, 16, dtype=torch.float64)
    turned = rotary.rope(v, *attn.tables(40)[:2])
    assert torch.allclose(turned.unflatten(-1, (-1, 2)).norm(dim=-1), v.unflatten(-1, (-1, 2)).norm(dim=-1))
    assert torch.equal(turned[:, :, 0], v[:, :, 0])
    assert not torch.allclose(turned[:, :, 1:], v[:, :, 1:])


def test_scores_depend_on_relative_position_only():
    attn = small_model().attn
    q, k = torch.randn(2, 16, dtype=torch.float64)
    tables = attn.tables(40)[:2]
    scores = rotary.rope(q.expand(40, -1), *tables) @ rotary.rope(k.expand(40, -1), *tables).T
    for shift in (1, 7, 25):  # both positions moved on by as much
        assert torch.allclose(scores[shift:, shift:], scores[:-shift, :-shift], atol=1e-10, rtol=0)
    assert scores[0].std() > 1e-3  # at one query, other offsets have other scores


def test_scores_with_frequencies_as_built_are_relative_in_float32():
    # float32 rounds position times frequency; at position 63 of the fastest pair that is 63 * 6e-8 radians
    attn = BDHConfig(**SMALL).build().attn
    q, k = F.normalize(torch.randn(2, 16), dim=-1)
    tables = attn.tables(64)[:2]
    assert tables[0].dtype == torch.float32
    scores = rotary.rope(q.expand(64, -1), *tables) @ rotary.rope(k.expand(64, -1), *tables).T
    assert torch.allclose(scores[1:, 1:], scores[:-1, :-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rope_keeps_shape_and_dtype(dtype):
    v = torch.randn(2, 3, 5, 16).to(dtype)
    turned = rotary.rope(v, *small_model().attn.tables(5)[:2])
    assert turned.dtype == dtype
    assert turned.shape == v.shape
