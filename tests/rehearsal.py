"""Training and validation with PyTorch's meta device in place of CUDA, where every tensor has a shape but no values.

Reading a value raises there, as it would make the host wait for a GPU. What meta tensors would let pass, the guard
refuses: tensors on two devices, and, after the first step, copies to the device that the host waits for.
"""

import contextlib

import pytest
import torch
from torch.amp import GradScaler
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from training import loop, muon, session
from models.bdh import BDHCore
from training.device import AUTOCAST
from training.runs import Run

META, CUDA = torch.device("meta"), torch.device("cuda")
COPIES = (torch.ops.aten._to_copy, torch.ops.aten.copy_)
FROM_NUMBERS = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)


class Guard(TorchDispatchMode):
    """Raises for an operation on tensors of two devices; once `strict`, for a copy to the device that is waited for."""

    strict = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket not in COPIES:
            if len({each.device.type for each in _tensors(args) if each.ndim}) > 1:
                raise RuntimeError(f"{function} got tensors on two devices")
        elif self.strict and _waits(result, args, kwargs or {}):
            raise RuntimeError(f"{function} to the device makes the host wait in every step")
        return result


class NoNumbers(TorchFunctionMode):
    """Raises, once the guard is strict, for a tensor of Python numbers on the device: a copy that is waited for."""

    def __init__(self, guard):
        super().__init__()
        self.guard = guard

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if self.guard.strict and function in FROM_NUMBERS and result.device == META:
            raise RuntimeError(f"{function.__name__} on the device makes the host wait in every step")
        return result


def _tensors(args):
    """The tensors among the arguments and in their lists."""
    for each in args:
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, list | tuple):
            yield from (item for item in each if isinstance(item, torch.Tensor))


def _waits(result, args, kwargs):
    """Whether a copy goes from the host to the device, and the host waits for its end."""
    is_copy_into = len(args) > 1 and isinstance(args[1], torch.Tensor)  # copy_(target, source, non_blocking)
    source = args[1] if is_copy_into else args[0]
    non_blocking = kwargs.get("non_blocking", is_copy_into and len(args) > 2 and args[2])
    return source.device.type == "cpu" and result.device == META and not non_blocking


def _fused_adamw(parameters, gradients, averages, squares, maxima, steps, **settings):
    """Stands in for the fused kernel of CUDA, which meta tensors do not have."""
    for each in zip(parameters, gradients, averages, squares, strict=True):
        each[0].sub_(each[1]).sub_(each[2]).sub_(each[3])
    assert settings["fused"] or all(each.device == META for each in steps)


@contextlib.contextmanager
def rehearsing(precision):
    """Inside, the meta device is treated as CUDA; gives the guard, and the counts of the reads that are allowed.

    There is no autocast for meta tensors; with bf16 and fp16 the fast path alone computes as under autocast. In fp16
    the scaler reads nothing with the fused AdamW of CUDA, but does with the other one, which is taken here.
    """
    reads = {"progress": 0, "end": 0}
    real_fast_path, guard = BDHCore.has_fast_path, Guard()

    def read_progress(*args):
        reads["progress"] += 1

    def read_end(task, sums, seen):
        reads["end"] += 1
        return {"loss": 0.0, task.metric.key: 0.0}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_read_progress", read_progress)
        patch.setattr(loop, "ratios_of", read_end)
        patch.setattr(session, "set_precision", lambda precision, device: contextlib.nullcontext())
        patch.setattr(torch, "autocast", lambda *args, **settings: contextlib.nullcontext())
        patch.setattr(torch, "is_autocast_enabled", lambda *device: precision in AUTOCAST and bool(device))
        patch.setattr(torch, "get_autocast_dtype", lambda device: AUTOCAST.get(precision, torch.bfloat16))
        patch.setattr(GradScaler, "_maybe_opt_step", lambda scaler, optimizer, state: optimizer.step())
        patch.setattr(muon, "adamw", _fused_adamw)
        patch.setattr(BDHCore, "has_fast_path", lambda self, device, n=0: real_fast_path(self, CUDA, n))
        yield guard, reads


def make_session(experiment, device):
    """The session of a new run on the device, without a folder."""
    task = experiment.train.make_task()
    data = task.load(task.open(experiment), None, experiment, device)
    model = session.build_model(experiment).to(device)
    return session.make_session(experiment, Run(experiment.folder), "rehearsal", device, task, data, model)


def rehearse(experiment):
    """An epoch of training and its validation on the meta device; raises for what a GPU would have to wait for."""
    with rehearsing(experiment.train.precision) as (guard, reads):
        made = make_session(experiment, META)
        real_loss = made.task.loss

        def loss(*args):
            guard.strict = True  # what an epoch copies to the device at its start has been copied
            return real_loss(*args)

        made.task.loss = loss
        with guard, NoNumbers(guard):
            loop.train_epoch(made)
            guard.strict = False
            loop.evaluate(made, "val")
    every = experiment.options.log_every
    assert reads == {"progress": made.step // every + 1, "end": 2}
    return made
