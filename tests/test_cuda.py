"""What could differ on a GPU: kernels against their plain twins, precision, waiting, memory, whole runs, resume.

    python -m pytest tests/test_cuda.py --device cuda

Without the flag, all that a CPU can do of it runs there, so that the tests themselves stay sound.
"""

import json
import math
import re

import pytest
import torch
from test_cuda_rehearsal import RECIPES, V2, tiny  # noqa: F401 (a fixture)

from training import ClassificationConfig, fit, loop
from benchmarks.measure import kept_memory_mb, step_memory_mb
from models import kernels
from models.bdh_unet import bdh_unet_config
from models.rotary import RotaryAttention, rope
from models.vision_bdh import v1_config, v2_config, v3_config
from tests.reference import randomised, relative_error, results_in
from tests.rehearsal import make_session
from tests.trials import interrupt, read_metrics, resumed, weights
from training.command_line import experiment_of
from training.config import UserError
from training.device import describe_hardware, fits_in_memory, pick_device, set_precision, synchronize
from training.graphs import WARM_UP, StepGraphs
from training.runs import load_model

FIELDS = dict(n_layer=1, n_embd=32, n_head=2, mlp_internal_dim_multiplier=4, patch_size=2, dropout=0.0)  # N = 64
SCORES, STATE = 6, 8  # rows of patches: 36 tokens take the order by scores, 64 that by state


@pytest.fixture
def float32_again(device):
    """Leaves the precision of products as it was."""
    yield
    set_precision("float32", device)


# ---------------------------------------------------------------------------- kernels against their twins


# float32: a few roundings of 6e-8, magnified by LN. tf32 and fp16 round each factor to 11 bits, bf16 to 8: about ten
# roundings lie between x and y (see test_kernels), and those that flip a ReLU change gradients more; there the plain
# path in the same precision is the measure.
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("float32", 1e-4), ("tf32", 0.01), ("fp16", 0.015), ("bf16", 0.03)]
)
@pytest.mark.parametrize("rows", [SCORES, STATE])
@pytest.mark.parametrize(
    "fields", [{}, dict(attn_norm=False), dict(attention="softmax"), dict(rotary="axial")], ids=str
)
def test_the_fast_step_is_near_the_plain_one(precision, tolerance, rows, fields, device, float32_again):
    torch.manual_seed(0)
    config = v1_config(**FIELDS | fields, img_size=2 * rows)
    by_scores = kernels.scores_are_cheaper(rows**2, config.n_neurons, config.n_embd)
    assert by_scores == (rows == SCORES)
    if not by_scores and config.attention == "softmax" and device.type == "cuda":
        pytest.skip("softmax over many tokens is left to PyTorch's kernel on a GPU")
    model = randomised(config.build()).float().to(device)
    images, cotangent = torch.randn(16, 3, 2 * rows, 2 * rows), torch.randn(16, 10)
    images, cotangent = images.to(device), cotangent.to(device)
    expected, expected_grads = results_in(set_precision("float32", device), model, images, cotangent, fast=False)
    _, plain_grads = results_in(set_precision(precision, device), model, images, cotangent, fast=False)
    actual, grads = results_in(set_precision(precision, device), model, images, cotangent, fast=True)
    assert relative_error(actual, expected) < tolerance
    for name, grad in grads.items():
        assert grad.dtype == torch.float32, name
        allowed = 1.5 * relative_error(plain_grads[name], expected_grads[name]) + tolerance
        assert relative_error(grad, expected_grads[name]) < allowed, name


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16", "fp16"])
def test_the_precision_of_products_is_the_one_asked_for(precision, gpu, float32_again):
    """1 + 2^-9 has ten bits: float32, tf32 and fp16 keep it, bf16 does not; 1 + 2^-13 only float32 keeps."""
    if precision == "tf32" and torch.cuda.get_device_capability(gpu) < (8, 0):
        pytest.skip("no TF32 on this GPU")
    autocast = set_precision(precision, gpu)
    ones = torch.eye(512, device=gpu)
    with autocast:
        kept = [bool(((ones * (1 + 2.0**-bits)) @ ones)[0, 0] != 1) for bits in (9, 13)]
    bits = {"float32": [True, True], "tf32": [True, False], "fp16": [True, False], "bf16": [False, False]}
    assert kept == bits[precision]


def test_rotation_equals_its_twin(device):
    v = torch.randn(2, 3, 5, 8, device=device)
    tables = RotaryAttention(8, softmax=False, causal=False).to(device).tables(5)
    torch.testing.assert_close(kernels.rotate(v, tables.phases), rope(v, tables.cos, tables.sin))
    torch.testing.assert_close(kernels.rotate(kernels.rotate(v, tables.phases), tables.phases.conj()), v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_its_share_and_follows_the_seed(dtype, device):
    n, p = 400_000, 0.3
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(torch.ones(n // 100, 100, dtype=dtype, device=device))
        assert kernels.drop_(drawn[-1], p) == pytest.approx(1 / (1 - p))
    share = (drawn[0] == 0).float().mean().item()
    assert abs(share - p) < 6 * math.sqrt(p * (1 - p) / n)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("config", [v1_config, v3_config, bdh_unet_config])
@pytest.mark.parametrize("fast", [True, False])
def test_recomputing_changes_no_result_and_saves_memory(config, fast, device):
    """The same dropout again, and the draws that follow are undisturbed."""
    torch.manual_seed(0)
    fields = dict(n_layer=3, n_embd=16, n_head=2, mlp_internal_dim_multiplier=8, dropout=0.3, img_size=64)
    model = config(**fields).build().to(device)
    core = model.encoder if config is bdh_unet_config else model
    core.use_fast_path, images, results, memory = fast, torch.randn(8, 3, 64, 64, device=device), [], []
    for core.recompute in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        loss = model(images).square().mean()
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((loss.detach(), gradients, torch.rand(5, device=device)))
        memory.append(kept_memory_mb(lambda: core(images), device))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert memory[1] < 0.7 * memory[0]


# ---------------------------------------------------------------------------- training


def test_memory_is_measured(device):
    a = torch.ones(1000, 1000, device=device)
    assert step_memory_mb(lambda: a + 1, device) == pytest.approx(4, rel=0.1)
    assert fits_in_memory(10**6, device) and not fits_in_memory(10**15, device)


@pytest.mark.parametrize(("script", "flags"), [(V2, ""), *RECIPES])
def test_an_epoch_waits_for_nothing_but_the_progress(script, flags, device, tiny, monkeypatch):  # noqa: F811
    """As in the rehearsal, on the device itself: CUDA raises where the host would wait for it."""
    session = make_session(tiny(script, flags), device)
    real_loss, real_progress = session.task.loss, loop._read_progress

    def may_wait(allowed):
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default" if allowed else "error")

    def loss(*args):
        may_wait(False)  # what an epoch copies to the device at its start has been copied
        return real_loss(*args)

    def read_progress(*args):
        may_wait(True)
        real_progress(*args)
        may_wait(False)

    def ratios(task, sums, seen):
        may_wait(True)
        return real_ratios(task, sums, seen)

    real_ratios = loop.ratios_of
    monkeypatch.setattr(session.task, "loss", loss)
    monkeypatch.setattr(loop, "_read_progress", read_progress)
    monkeypatch.setattr(loop, "ratios_of", ratios)
    try:
        trained, _ = loop.train_epoch(session)
        may_wait(True)
        validated = loop.evaluate(session, "val")
    finally:
        may_wait(True)
    assert math.isfinite(trained["loss"]) and math.isfinite(validated["loss"])


GRAPHED = [(V2, ""), *RECIPES]
MANY = "--train-limit 120 --batch-size 8"  # 12 steps an epoch


@pytest.mark.parametrize(("script", "flags"), GRAPHED)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_graph_trains_as_kernels_one_by_one(script, flags, precision, gpu, tiny, float32_again):  # noqa: F811
    results = []
    flags = re.sub("--grad-accum .|--recompute", "", f"{flags} --precision {precision}")
    flags += f" {MANY}" * isinstance(experiment_of(script).train, ClassificationConfig)
    for graph in ("--cuda-graph", "--no-cuda-graph"):
        session = make_session(tiny(script, f"{flags} {graph}"), gpu)
        losses = []
        for _ in range(3):
            losses.append(loop.train_epoch(session)[0]["loss"])
            session.epoch += 1
        weights = torch.cat([each.detach().flatten() for each in session.model.parameters()])
        results.append((session, torch.tensor(losses), weights))
    (graphed, losses, weights), (plain, expected_losses, expected) = results
    assert plain.graphs is None and graphed.step == plain.step
    assert sum(graphed.graphs.seen.values()) == graphed.step
    assert graphed.graphs.replays or "unet" in script
    torch.testing.assert_close(losses, expected_losses, rtol=1e-2, atol=1e-3)
    assert relative_error(weights, expected) < 0.02


@pytest.mark.parametrize(
    "precision, optimizer", [("float32", "adamw"), ("bf16", "adamw"), ("fp16", "adamw"), ("float32", "muon")]
)
def test_a_stopped_run_resumes_to_the_same_end(precision, optimizer, experiment, device, float32_again):
    fields = dict(epochs=3, ema=0.9, mixup=0.5, randaugment=1, optimizer=optimizer, precision=precision)
    fields |= dict(options={"device": device.type})
    whole, stopped = experiment("whole", **fields), experiment("stopped", **fields)
    fit(whole)
    interrupt(stopped, epoch=2)
    fit(resumed(stopped))
    for one, other in zip(read_metrics(whole.folder), read_metrics(stopped.folder), strict=True):
        assert one["val_loss"] == pytest.approx(other["val_loss"], rel=1e-3)
        assert math.isfinite(one["peak_memory_mb"]) and one["peak_memory_mb"] > 0
    for name, value in weights(whole.folder).items():
        torch.testing.assert_close(value, weights(stopped.folder)[name], rtol=1e-3, atol=1e-4)
    hardware = json.loads((whole.folder / "config.json").read_text())["hardware"]
    assert hardware == json.loads(json.dumps(describe_hardware(device))) and hardware["device"] == device.type
    model, _ = load_model(whole.folder)  # on the CPU, wherever it was trained
    assert torch.isfinite(model(torch.zeros(1, 3, 32, 32))).all()


def test_a_gpu_is_what_auto_takes(gpu):
    assert pick_device("auto").type == "cuda"


def test_a_run_starts_where_the_cpu_left_it(gpu, experiment):
    trial = experiment("moves", epochs=2)
    interrupt(trial, epoch=2)
    moved = experiment("moves", epochs=2, options={"device": "cuda", "resume": True})
    assert fit(moved)["epochs"] == 2


def test_a_compiled_run(gpu, experiment):
    trial = experiment("compiled", epochs=1, compile=True, precision="bf16", options={"device": "cuda"})
    assert fit(trial)["epochs"] == 1
    assert not [name for name in weights(trial.folder) if "_orig_mod" in name]


def test_full_memory_is_one_message(device, call_script, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "train_epoch", lambda session: torch.empty(2**50, device=session.device))
    flags = "--n-layer 1 --n-embd 8 --n-head 2 --mlp-internal-dim-multiplier 4 --patch-size 8 --epochs 1"
    where = ["--device", device.type, "--data-dir", data_dir, "--runs-dir", tmp_path / "runs"]
    assert call_script(V2, *flags.split(), *where) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: out of memory") and "--batch-size" in message


def test_a_step_at_full_size(gpu):
    model = v2_config().build().to(gpu)
    assert model.has_fast_path(gpu, 64)
    loss = model(torch.randn(8, 3, 32, 32, device=gpu)).square().mean()
    loss.backward()
    synchronize(gpu)
    assert all(torch.isfinite(each.grad).all() for each in model.parameters())


@pytest.mark.parametrize(
    ("what", "reason"), [("reads a value", "captur"), ("draws on the CPU", "draws random numbers on the CPU")]
)
def test_a_step_that_no_graph_can_hold_is_refused(what, reason, gpu):
    layer = torch.nn.Linear(4, 1).to(gpu)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    graphs, values = StepGraphs(optimizer, gpu), []

    def step(inputs, targets):
        loss = (layer(inputs) - targets).square().mean()
        loss.backward()
        values.append(loss.item() if what == "reads a value" else torch.rand(1).item())
        optimizer.step()
        return loss.detach().isfinite(), {"loss": loss}

    batch = torch.randn(8, 4, device=gpu), torch.randn(8, 1, device=gpu)
    for _ in range(WARM_UP):
        graphs.run(step, *batch)
    with pytest.raises(UserError, match=f"cannot become a CUDA graph.*{reason}.*--no-cuda-graph"):
        graphs.run(step, *batch)
    assert len(values) >= WARM_UP and torch.isfinite(layer(batch[0])).all()
    assert torch.rand(4, device=gpu).unique().numel() > 1  # the generator is not left in the capture
