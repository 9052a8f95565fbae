"""What of CUDA graphs needs no GPU: which steps may become one, and that rates on the device change nothing.

tests/test_cuda.py captures and replays steps on a GPU.
"""

import contextlib

import pytest
import torch

from models.rotary import RotaryAttention
from training.command_line import experiment_of
from training.graphs import StepGraphs
from training.muon import MuonWithAdamW
from training.session import _can_capture


@pytest.mark.parametrize(
    ("script", "flags", "may"),
    [
        ("train_v2_cifar10.py", "", True),
        ("train_v2_cifar10.py", "--precision bf16 --compile --ema 0.99 --mixup 0.8 --optimizer muon", True),
        ("train_bdh_unet.py", "", True),
        ("train_v2_cifar10.py", "--no-cuda-graph", False),
        ("train_v2_cifar10.py", "--grad-accum 2", False),
        ("train_v2_cifar10.py", "--precision fp16", False),
        ("train_v2_cifar10.py", "--recompute", False),
        ("train_bdh_detector.py", "", False),
    ],
)
def test_which_steps_may_become_a_graph(script, flags, may):
    experiment = experiment_of(script, flags)
    assert _can_capture(experiment, experiment.train.make_task()) == may


def parameters():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in ((2, 6, 10), (5, 4), (7,))]


def muon(rate):
    weights = parameters()
    matrices = {"params": weights[:2], "shapes": [(2, 6, 10), (5, 4)], "lr": rate}
    return weights, MuonWithAdamW([matrices, {"params": weights[2:], "shapes": None, "lr": 2 * rate}], lr=rate)


def adamw(rate):
    weights = parameters()
    groups = [{"params": weights[:2]}, {"params": weights[2:], "lr": 2 * rate}]
    return weights, torch.optim.AdamW(groups, rate, fused=True)  # as training makes it


@pytest.mark.parametrize("make", [muon, adamw])
def test_rates_on_the_device_are_those_of_the_schedule(make, monkeypatch):
    """Five steps whose rates change: the same weights as with numbers, and the groups hold numbers again."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    results = []
    for on_device in (False, True):
        weights, optimizer = make(0.03)
        graphs = StepGraphs(optimizer, torch.device("cpu"))
        seen = []
        for step in range(5):
            for place, group in enumerate(optimizer.param_groups):
                group["lr"] = rate = (place + 1) * 0.01 * (step + 1)
                graphs.rates[place].fill_(rate)
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
            kept = [dict(group) for group in optimizer.param_groups]
            with graphs._rates_on_device() if on_device else contextlib.nullcontext():
                seen += [isinstance(group["lr"], torch.Tensor) for group in optimizer.param_groups]
                optimizer.step()
            assert all(before == after for before, after in zip(kept, optimizer.param_groups, strict=True))
        assert all(each == on_device for each in seen)
        results.append(weights)
    for one, other, first in zip(*results, parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
        assert not torch.allclose(one, first, atol=0.01)


def test_a_graph_does_not_use_the_cached_rotation(monkeypatch):
    """Another size replaces the cached tables, and the memory of those in a graph must stay theirs."""
    attention = RotaryAttention(8, softmax=False, causal=False)
    cached = attention.tables(5)
    assert attention.tables(5) is cached
    monkeypatch.setattr(RotaryAttention, "_is_captured", lambda self: True)
    own = attention.tables(5)
    assert own is not cached and attention.tables(5) is not own
    for one, other in zip(own, cached, strict=True):
        torch.testing.assert_close(one, other)


def test_the_option_is_no_part_of_a_runs_name():
    assert experiment_of("train_v2_cifar10.py", "--no-cuda-graph").name == experiment_of("train_v2_cifar10.py").name
