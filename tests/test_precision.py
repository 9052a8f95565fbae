"""bf16 and fp16: attention of a ViT on a CPU, empty shares of a batch, models whose weights are 16 bits themselves.

Of fp16 besides: raw attention beyond its range, and the scaling of the loss.
"""

import math
import signal
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from training import UserError, fit, loop, processes
from models import kernels
from models.baselines import FEW_TOKENS, ViTConfig
from models.language import BDHConfig
from models.rotary import RotaryAttention
from models.vision_bdh import v1_config, v2_config, v2_softmax_config, v4_config
from tests.children import before, kill, launch_in_child, nth, run_together
from tests.reference import relative_error, results_in
from tests.test_resume import assert_same
from tests.trials import read_rows, resumed, with_options
from training.command_line import flags_of
from training.device import set_precision
from training.stored import load_checkpoint

CPU = torch.device("cpu")
FLASH = "_scaled_dot_product_flash_attention_for_cpu"
SIZES = dict(patch_size=8, n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4)


class Operations(TorchDispatchMode):
    """Names of the operations inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def logits(model, images, precision):
    with set_precision(precision, CPU), Operations() as seen:
        result = model(images)
        result.float().sum().backward()
    return result.detach().float(), seen.names


def test_few_tokens_of_a_vit_attend_by_plain_products_in_bf16_only():
    sizes = dict(n_layer=2, n_embd=48, n_head=2, mlp_dim=64)
    model, images = ViTConfig(**sizes).build(), torch.randn(3, 3, 32, 32)
    torch.nn.init.normal_(model.heads.head.weight)
    expected, names = logits(model, images, "float32")
    assert FLASH in names
    result, names = logits(model, images, "bf16")
    assert FLASH not in names
    assert (result - expected).norm() < 0.05 * expected.norm()
    many = ViTConfig(**sizes, img_size=4 * 25).build()
    assert many.seq_length == 626 > FEW_TOKENS
    assert FLASH in logits(many, torch.randn(1, 3, 100, 100), "bf16")[1]


@pytest.mark.parametrize("make", [v1_config, v2_config, v2_softmax_config, v4_config])
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_a_process_may_get_an_empty_share_of_a_batch(make, precision):
    model = make(**SIZES).build()
    with set_precision(precision, CPU):
        result = model(torch.randn(0, 3, 32, 32))
    assert result.shape == (0, 10)
    result.float().sum().backward()
    assert model.encoder.grad.eq(0).all()


@pytest.mark.parametrize("make", [v1_config, v2_config, v4_config])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_with_16_bit_weights_keeps_the_precision_of_its_positions(make, fast, dtype):
    model, images = make(**SIZES, dropout=0.0).build(), torch.randn(3, 3, 32, 32)
    torch.nn.init.normal_(model.head.weight)
    expected = model(images)
    model.to(dtype).use_fast_path = fast
    (attention,) = (module for module in model.modules() if isinstance(module, RotaryAttention))
    assert model.encoder.dtype == dtype and attention.freqs.dtype == torch.float32
    assert attention.freqs.equal(make(**SIZES).build().attn.freqs)
    result = model(images.to(dtype))
    assert result.dtype == dtype and (result.float() - expected).norm() < 0.1 * expected.norm()
    assert model.double().attn.freqs.dtype == torch.float64


# ---------------------------------------------------------------------------- fp16: raw attention

WIDE = dict(n_layer=1, n_embd=16, n_head=2, mlp_internal_dim_multiplier=8, dropout=0.0)  # N = 64
LARGEST = torch.finfo(torch.float16).max


def outputs_and_gradients(model, inputs, precision, fast):
    """Of the model on these inputs, with a fixed cotangent."""
    logits, gradients = results_in(set_precision(precision, CPU), model, inputs, torch.ones(1).expand(4, 10), fast)
    return logits, gradients


@pytest.mark.parametrize("gain", [15, 0.01])  # beyond fp16's range, and so small that LN's eps counts
@pytest.mark.parametrize(("rows", "order"), [(5, "scores"), (8, "state")])
def test_raw_attention_in_fp16_stays_near_float32(rows, order, gain, monkeypatch):
    """The fast path and the plain one, forward and backward, against the plain one in float32."""
    torch.manual_seed(0)
    model = v1_config(**WIDE, update_norm=False, patch_size=2, img_size=2 * rows).build()
    assert kernels.scores_are_cheaper(rows**2, 64, 16) == (order == "scores")
    with torch.no_grad():
        nn.init.normal_(model.head.weight)
        for weight in (model.encoder, model.encoder_v, model.decoder):
            weight.normal_(std=weight.shape[-2] ** -0.5)
        model.encoder.mul_(gain)
    largest, real = [], RotaryAttention.forward
    monkeypatch.setattr(RotaryAttention, "forward", lambda *args: largest.append(real(*args)) or largest[-1])
    images = torch.randn(4, 3, 2 * rows, 2 * rows)
    expected, expected_gradients = outputs_and_gradients(model, images, "float32", fast=False)
    assert largest[0].abs().max() > LARGEST if gain > 1 else largest[0].var() < 1e-3
    for fast in (False, True):
        actual, gradients = outputs_and_gradients(model, images, "fp16", fast)
        assert relative_error(actual, expected) < 0.01
        for name, gradient in gradients.items():  # rounding flips a few ReLUs
            assert gradient.dtype == torch.float32 and relative_error(gradient, expected_gradients[name]) < 0.05, name


def test_a_language_model_beyond_the_range_of_fp16_stays_near_float32():
    torch.manual_seed(0)
    model, bytes_ = BDHConfig(**WIDE).build(), torch.randint(256, (2, 40))
    with torch.no_grad():
        model.encoder.normal_(std=10 * 16**-0.5)
    expected, loss = model(bytes_, bytes_)
    with set_precision("fp16", CPU):
        actual, half_loss = model(bytes_, bytes_)
    assert actual.dtype == torch.float16 and relative_error(actual, expected) < 0.02
    half_loss.backward()  # the first byte attends to nothing: one over its deviation is beyond fp16's range, too
    assert loss.isfinite() and all(each.grad.isfinite().all() for each in model.parameters())


def test_the_scale_of_queries_in_fp16():
    assert [kernels.half_scale(tokens) for tokens in (1, 4, 64, 65, 2304)] == [1, 1 / 2, 1 / 8, 1 / 16, 1 / 64]


# ---------------------------------------------------------------------------- fp16: the scale of the loss

START = 2.0**16


def overflow(session, *at):
    """An infinite gradient in these steps, counted from 0."""
    if session.step in at:
        session.model.head.weight.grad[0, 0] = math.inf


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_a_step_whose_gradient_overflows_is_skipped_and_halves_the_scale(optimizer, experiment, monkeypatch):
    seen, real = [], loop.optimizer_step

    def step(session):
        state = [each.clone() for each in session.model.parameters()]
        state += [value.clone() for each in session.optimizer.state.values() for value in each.values()]
        with Operations() as operations:
            rate = real(session)
        after = [*session.model.parameters()]
        after += [value for each in session.optimizer.state.values() for value in each.values()]
        same = len(after) == len(state) and all(torch.equal(*pair) for pair in zip(state, after, strict=True))
        seen.append((same, session.scaler.get_scale(), rate))
        assert optimizer != "adamw" or "_local_scalar_dense" not in operations.names  # reads no value
        return rate

    before_clip = loop._clip
    monkeypatch.setattr(loop, "_clip", lambda session: overflow(session, 0, 3, 4) or before_clip(session))
    monkeypatch.setattr(loop, "optimizer_step", step)
    trial = experiment(epochs=1, precision="fp16", optimizer=optimizer, grad_accum=1)
    fit(trial)
    assert len(seen) == 6
    assert [scale for _, scale, _ in seen] == [START / 2, START / 2, START / 2, START / 4, START / 8, START / 8]
    assert [same for same, *_ in seen][1:] == [False, False, True, True, False]
    assert len({rate for *_, rate in seen}) == 6  # the schedule goes on


def test_endless_overflow_and_a_loss_that_is_not_finite_end_the_run(experiment, monkeypatch):
    with pytest.raises(loop.TrainingError, match=r"the loss or its gradient at step 2 is not finite"):
        fit(experiment("loss", learning_rate=1e30, precision="fp16"))
    real = loop._clip
    monkeypatch.setattr(loop, "_clip", lambda session: overflow(session, *range(100)) or real(session))
    trial = experiment("gradient", epochs=5, precision="fp16")
    with pytest.raises(loop.TrainingError, match=r"gradient in fp16, even with the loss scaled by .* is not finite"):
        fit(trial)
    assert load_checkpoint(trial.folder / "last.pt")["epoch"] == 2  # 17 skipped steps, 6 an epoch


def test_clipping_sees_the_gradient_without_the_scale(experiment, monkeypatch):
    real, norms = loop._clip, {}

    def clip(session):
        norm = real(session)
        clipped = nn.utils.get_total_norm([each.grad for each in session.model.parameters()])
        norms.setdefault(session.experiment.train.precision, []).append((norm.item(), clipped.item()))
        return norm

    monkeypatch.setattr(loop, "_clip", clip)
    for precision in ("float32", "fp16"):
        fit(experiment(precision, epochs=1, precision=precision, grad_accum=2, max_grad_norm=0.5, learning_rate=1e-3))
    assert len(norms["fp16"]) == 3 and max(norm for norm, _ in norms["float32"]) > 0.5
    torch.testing.assert_close(torch.tensor(norms["fp16"]), torch.tensor(norms["float32"]), rtol=0.02, atol=0)


EACH_STEP = dict(checkpoint_minutes=1e-9, log_every=1)


def overflow_and_kill(step=None):
    """Gradients overflow in steps 1 and 7; SIGKILL before a step, counted from 1."""
    before(loop, "_clip", lambda session: overflow(session, 1, 7))
    if step:
        before(loop, "optimizer_step", nth(step, lambda session: kill()))


def test_a_run_killed_inside_an_epoch_resumes_bit_for_bit(experiment, monkeypatch, capsys):
    make = partial(experiment, epochs=3, precision="fp16", ema=0.9, model=dict(dropout=0.2), options=EACH_STEP)
    whole, killed = make("whole"), make("killed")
    monkeypatch.setattr(loop, "_clip", loop._clip)  # as it was, afterwards
    overflow_and_kill()
    fit(with_options(whole, checkpoint_minutes=None))
    code, _ = launch_in_child(killed, partial(overflow_and_kill, 10), *flags_of(EACH_STEP))
    assert code == -signal.SIGKILL
    stopped = load_checkpoint(killed.folder / "last.pt")
    assert stopped["inside"]["steps"] == 3 and stopped["scaler"]["scale"] == START / 4
    fit(with_options(resumed(killed), checkpoint_minutes=None))
    assert "resuming in epoch 2 of 3" in capsys.readouterr().out
    assert_same(*(load_checkpoint(each.folder / "last.pt") for each in (killed, whole)), "last.pt")
    assert read_rows(killed.folder, measured=False) == read_rows(whole.folder, measured=False)


def overflow_in_the_second(trial):
    """Trains, the third step's gradient overflows in the second process alone; scales by step, and the last weights."""
    sessions, real, calls = [], loop.share_of_loss, iter(range(100))

    def share_of_loss(*args):
        return real(*args) * (1e38 if processes.rank() == 1 and next(calls) == 2 else 1)

    loop.share_of_loss = share_of_loss
    before(loop, "optimizer_step", lambda session: sessions.append((session, session.scaler.get_scale())))
    fit(trial)
    return [scale for _, scale in sessions], [each.tolist() for each in sessions[-1][0].model.parameters()]


def test_processes_skip_together(experiment):
    ended = run_together(2, overflow_in_the_second, experiment(epochs=1, precision="fp16"))
    assert [code for code, *_ in ended] == [0, 0], ended
    (scales, weights), (other_scales, other_weights) = (result for *_, result in ended)
    assert scales == other_scales and scales[3] == scales[2] / 2 and weights == other_weights


def test_a_device_without_loss_scaling_is_refused():
    with pytest.raises(UserError, match="--precision fp16 is for CUDA: use bf16 or float32 on mps"):
        set_precision("fp16", torch.device("mps"))
