"""The BDH language model: its function, causality, checkpoints, generation and rotary positions."""

import math

import pytest
import torch

from models import rotary
from models.language import BDHConfig
from tests.reference import (
    SIZES,
    assert_close,
    assert_equals_reference,
    assert_normal,
    formula_frequencies,
    randomised,
    reference_logits,
)

SMALL = SIZES | dict(vocab_size=11)  # N = 16 neurons per head
CHOICES = [
    {},
    dict(attention="softmax"),
    dict(qk="separate"),
    dict(gate="sigmoid"),
    dict(gate="none", residual="pre"),
    dict(activation="relu2"),
    dict(activation="gelu", attention="softmax"),
    dict(shared=False),
    dict(rotary="none"),
]


def small_model(**overrides):
    """A tiny float64 model in evaluation mode with random weights."""
    return randomised(BDHConfig(**(SMALL | overrides)).build())


def random_tokens(batch=2, length=7):
    """(B, T) token ids below SMALL's vocabulary size."""
    return torch.randint(SMALL["vocab_size"], (batch, length))


# ---------------------------------------------------------------------------- the function


@pytest.mark.parametrize(
    ("choices", "length"), [*((each, 7) for each in CHOICES), *((each, n) for each in CHOICES[:2] for n in (1, 2))]
)
def test_logits_and_gradients_equal_the_reference(choices, length):
    # with one token nothing is attended to, so y = 0 and only embedding and head matter
    assert_equals_reference(small_model(**choices), random_tokens(length=length), every_weight_counts=length > 1)


def test_published_size_in_float32_equals_the_reference():
    # weights and frequencies as built, so float32 throughout: rounding 6e-8 an operation, over six levels
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
    assert loss.item() == pytest.approx(total / targets.numel(), rel=1e-5)  # the loss is computed in float32
    assert loss.ndim == 0
    assert model(idx)[1] is None


# ---------------------------------------------------------------------------- parameters and checkpoints


def test_defaults_are_the_authors():
    config = BDHConfig()
    assert (config.n_layer, config.n_embd, config.n_head, config.mlp_internal_dim_multiplier) == (6, 256, 4, 128)
    assert (config.dropout, config.vocab_size, config.n_neurons) == (0.1, 256, 8192)
    assert (config.residual, config.attn_norm, config.update_norm) == ("post", True, True)
    assert (config.attention, config.init) == ("raw", "normal")


def test_a_checkpoint_of_the_authors_loads_and_gives_their_logits():
    checkpoint = {  # as their implementation writes it: D = 12, H = 3, N = 16, V = 11
        "decoder": torch.randn(3 * 16, 12),
        "encoder": torch.randn(3, 12, 16),
        "encoder_v": torch.randn(3, 12, 16),
        "lm_head": torch.randn(12, 11),
        "embed.weight": torch.randn(11, 12),
        "attn.freqs": formula_frequencies(16).float().view(1, 1, 1, 16),
    }
    model = BDHConfig(**SMALL).build().eval()
    assert "attn.freqs" not in dict(model.named_parameters())  # not trained
    model.load_state_dict(checkpoint, strict=True)
    idx = random_tokens()
    weights = {name: tensor.double() for name, tensor in checkpoint.items()}
    # freqs are float32 on both sides, so the model is run in float64: a ReLU within rounding of zero then cannot matter
    assert_close(model.double()(idx)[0], reference_logits(weights, idx, n_layer=3), 1e-4)


def test_weights_start_normal():
    torch.manual_seed(0)
    model = BDHConfig(n_embd=64, mlp_internal_dim_multiplier=4).build()
    for name in ("embed.weight", "encoder", "encoder_v", "decoder", "lm_head"):
        assert_normal(model.get_parameter(name))


# ---------------------------------------------------------------------------- causality


@pytest.mark.parametrize("choices", CHOICES)
@pytest.mark.parametrize("changed", [0, 3, 6])
def test_a_token_affects_only_itself_and_later_ones(choices, changed):
    model, idx = small_model(**choices), random_tokens()
    other = idx.clone()
    other[:, changed] = (other[:, changed] + 1) % SMALL["vocab_size"]
    before, after = model(idx)[0], model(other)[0]
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert ((before - after)[:, changed:].abs().amax(-1) > 1e-9).all()


@pytest.mark.parametrize("attention", ["raw", "softmax"])
def test_attention_sees_earlier_keys_only(attention):
    attn = small_model(attention=attention).attn
    q, x = torch.rand(2, 3, 7, 16, dtype=torch.float64), torch.randn(2, 7, 12, dtype=torch.float64)
    weights = attn.weights(q, q)
    earlier = torch.ones(7, 7, dtype=torch.bool).tril(-1).expand(2, 3, -1, -1)
    assert torch.equal(weights != 0, earlier)
    assert attention == "raw" or torch.allclose(weights[:, :, 1:].sum(-1), torch.ones((), dtype=torch.float64))
    assert_close(attn(q, q, x), weights @ x[:, None], 1e-12)


# ---------------------------------------------------------------------------- generation


@pytest.mark.parametrize("new", [0, 5])
@pytest.mark.parametrize("sampling", [dict(), dict(temperature=0), dict(top_k=3), dict(top_k=1000)])
def test_generate_appends_to_the_prompt_without_a_graph(new, sampling):
    model, prompt, graphs = small_model(), random_tokens(batch=3, length=4), []
    model.level_input.register_forward_hook(lambda module, args, out: graphs.append(out.requires_grad))
    kept = prompt.clone()
    out = model.generate(prompt, new, **sampling)
    assert out.shape == (3, 4 + new) and out.dtype == prompt.dtype
    assert torch.equal(out[:, :4], kept) and torch.equal(prompt, kept)
    assert ((out >= 0) & (out < SMALL["vocab_size"])).all()
    assert graphs == [False] * 3 * new


@pytest.mark.parametrize("sampling", [dict(temperature=0), dict(temperature=0, top_k=4), dict(top_k=1)])
def test_greedy_generation_is_argmax(sampling):
    model, prompt = small_model(), random_tokens(batch=4, length=3)
    out = model.generate(prompt, 8, **sampling)
    for end in range(3, 11):
        assert torch.equal(out[:, end], model(out[:, :end])[0][:, -1].argmax(-1))


def test_seeded_sampling_repeats():
    model, prompt = small_model(), random_tokens(batch=4, length=3)
    torch.manual_seed(5)
    first = model.generate(prompt, 12, temperature=3.0)
    assert not torch.equal(model.generate(prompt, 12, temperature=3.0), first)  # 48 tokens alike by chance: no
    torch.manual_seed(5)
    assert torch.equal(model.generate(prompt, 12, temperature=3.0), first)


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
    p = (model(prompt[:1])[0][0, -1] / temperature).softmax(-1)
    deviation = (p * (1 - p) / draws).sqrt()
    assert ((counts / draws - p).abs() < 5 * deviation + 1 / draws).all()


@pytest.mark.parametrize("bad", [dict(temperature=-0.1), dict(top_k=0), dict(temperature=0, top_k=-3)])
def test_bad_sampling_is_refused(bad):
    with pytest.raises(ValueError, match=r"temperature.*top_k"):
        small_model().generate(random_tokens(), 1, **bad)


# ---------------------------------------------------------------------------- rotary positions


@pytest.mark.parametrize("n_neurons", [2, 16, 1024])
def test_frequencies_follow_the_formula(n_neurons):
    frequencies = rotary.rope_frequencies(n_neurons)
    assert frequencies.dtype == torch.float32
    assert torch.allclose(frequencies.double(), formula_frequencies(n_neurons), rtol=2e-6, atol=0)
    assert torch.equal(frequencies[0::2], frequencies[1::2])
    assert frequencies[0].item() == pytest.approx(1 / (2 * math.pi))  # the fastest pair turns one radian per token
    assert n_neurons == 2 or (frequencies[2::2] < frequencies[:-2:2]).all()


def test_tables_hold_the_fraction_of_turns():
    attn = small_model().attn
    for n_tokens in (5, 50, 5):  # tables are cached: another length must not get them
        turns = torch.arange(n_tokens, dtype=torch.float64)[:, None] * formula_frequencies(16)
        angles, tables = attn.angles(n_tokens), attn.tables(n_tokens)
        assert torch.allclose(angles, (turns - turns.floor()) * 2 * math.pi, atol=1e-12, rtol=0)
        assert (angles < 2 * math.pi).all()
        assert torch.equal(tables.cos, angles.cos()) and torch.equal(tables.sin, angles.sin())
        expected = torch.stack((angles.cos(), angles.sin()), -1)[:, 0::2]
        assert torch.allclose(torch.view_as_real(tables.phases), expected, atol=1e-12)
