"""How far the training of an epoch is: what is summed, what is shown, and what a checkpoint inside the epoch holds."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from training import processes
from models.kernels import random_state
from training.metrics import Items, Sums
from training.tasks import Task

NEVER = 2**62  # as a step: later than any


@dataclass
class Progress:
    """The training part of one epoch."""

    first_bad: Tensor  # first step whose loss or gradient is not finite
    sums: Sums = field(default_factory=Sums)  # of this process's shares
    steps: int = 0  # optimizer steps done in this epoch
    seen: int = 0  # samples done, of all processes
    rate: float = float("nan")  # learning rate of the last step
    started: float = field(default_factory=time.perf_counter)  # earlier by what the epoch took before a resume
    random: list[Tensor] | None = None  # this process's generators, of a checkpoint

    @classmethod
    def start(cls, device: torch.device) -> "Progress":
        return cls(torch.full((), NEVER, device=device))

    def state(self, device: torch.device) -> dict[str, Any]:
        """For a checkpoint; all processes call it."""
        mine = {"random": random_state(device), **self.sums.state()}
        return {
            "steps": self.steps,
            "seen": self.seen,
            "rate": self.rate,
            "seconds": time.perf_counter() - self.started,
            "of_processes": processes.gather(mine),
        }

    @classmethod
    def load(cls, state: dict[str, Any], device: torch.device) -> "Progress":
        """From a checkpoint, also of another number of processes: the main one then takes the sums of all."""
        progress, stored = cls.start(device), state["of_processes"]
        progress.steps, progress.seen, progress.rate = state["steps"], state["seen"], state["rate"]
        progress.started = time.perf_counter() - state["seconds"]
        if processes.rank() < len(stored):
            progress.random = stored[processes.rank()]["random"]
        if len(stored) == processes.count():
            progress.sums = Sums.load([stored[processes.rank()]], device)
        else:
            progress.sums = Sums.load(stored, device)
            if not processes.is_main():
                progress.sums.clear()
        return progress

    def note(self, step: int, finite: Tensor) -> None:
        """finite: whether loss and gradient of that step were."""
        self.first_bad = torch.where(finite, self.first_bad, self.first_bad.clamp(max=step))

    def bad_step(self) -> int | None:
        """The first step that was not finite in any process; waits for the device."""
        step = int(processes.smallest(self.first_bad))
        return None if step == NEVER else step


def share_of_loss(task: Task, loss: Tensor, n: int, batch: int, in_step: int) -> Tensor:
    """The loss as this process differentiates it: averaged over processes, the gradients are those of one process.

    n: samples of this process's share of a batch of `batch` samples; in_step: of all batches of the optimizer step.
    """
    whole = task.whole_batch  # such a loss is that of all shares, equal in every process
    return loss * ((batch if whole else processes.count() * n) / in_step)


def loss_of(task: Task, outputs: Any, targets: Tensor) -> Tensor:
    """The task's loss; 0 for an empty share, whose mean is NaN. Its gradient is then 0."""
    loss = task.loss(outputs, targets)
    if len(targets) or task.whole_batch:
        return loss
    return loss.masked_fill(torch.ones_like(loss, dtype=torch.bool), 0.0)


def counts_of(task: Task, outputs: Any, targets: Tensor, loss: Tensor) -> dict[str, Tensor | Items]:
    """What is summed of a share: the loss over its samples and the task's counts; zeros if it is empty."""
    counts = {"loss": loss * len(targets), **task.counts(outputs, targets)}
    if len(targets):
        return counts
    return {
        name: Items(count.rows[:0]) if isinstance(count, Items) else torch.zeros_like(count)
        for name, count in counts.items()
    }


def ratios_of(task: Task, sums: Sums, seen: int) -> dict[str, Any]:
    """Mean loss per sample and the task's ratios, over all processes; waits for the device."""
    read = sums.read() | {"samples": seen}
    return {"loss": read["loss"] / seen, **task.ratios(read)}
