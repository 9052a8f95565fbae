"""What a run needs at hand, set up once: data, task, model, optimizer, schedule, and how far training is."""

import contextlib
import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from training import batchnorm, processes, seeds
from models.bdh import BDHCore
from models.kernels import set_random_state
from training.config import UserError
from training.device import effective_precision, make_scaler, set_precision, warn_of_precision
from training.experiment import Experiment
from training.graphs import StepGraphs
from training.optimiser import WeightAverage, make_schedule, set_step
from training.progress import Progress
from training.runs import Run
from training.tasks import Batches, Task


@dataclass
class Session:
    """A run in training."""

    experiment: Experiment
    run: Run
    run_id: str
    device: torch.device
    data: Batches
    task: Task
    model: nn.Module  # holds the weights
    forward: nn.Module  # the same, compiled if asked
    trained: nn.Module  # the same, averaging gradients over processes if there are several
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    autocast: contextlib.AbstractContextManager
    scaler: GradScaler  # of the loss, in fp16
    graphs: StepGraphs | None = None  # of the training step, on a GPU
    average: WeightAverage | None = None  # of the weights, if train.ema: what is validated and tested
    epoch: int = 0  # epochs done
    step: int = 0  # optimizer steps done
    best: dict[str, Any] | None = None  # epoch and metrics of the best validation so far
    history: list[dict[str, Any]] | None = field(default_factory=list)  # rows of metrics.csv
    progress: Progress | None = None  # inside an epoch
    saved: float = field(default_factory=time.monotonic)  # when the last checkpoint was written

    @property
    def evaluated(self) -> nn.Module:
        """What is validated, tested and kept as the best: the model, or the average of its weights."""
        return self.model if self.average is None else self.average.module

    def begin_epoch(self) -> Progress:
        """Progress of the epoch to train: none yet, or as the checkpoint has it, where dropout continues as it was."""
        torch.manual_seed(seeds.derive("model", self.experiment.train.seed, self.epoch, processes.rank()))
        if self.progress is None:
            self.progress = Progress.start(self.device)
        elif self.progress.random is not None:
            set_random_state(self.progress.random, self.device)
        return self.progress

    def not_synced(self, last: bool) -> contextlib.AbstractContextManager:
        """Inside, gradients stay with their process, unless these are the last batch's of a step."""
        return contextlib.nullcontext() if last or self.trained is self.forward else self.trained.no_sync()

    def save(self) -> None:
        self.run.save_checkpoint(self.state())
        self.saved = time.monotonic()

    def save_if_due(self) -> None:
        """Inside an epoch, after --checkpoint-minutes."""
        minutes = self.experiment.options.checkpoint_minutes
        if minutes and processes.from_main(lambda: time.monotonic() - self.saved >= 60 * minutes):
            self.save()

    def state(self) -> dict[str, Any]:
        """Content of last.pt. Random draws depend on seed and epoch, learning rates on the step."""
        training = {"step": self.step, "best": self.best, "optimizer": self.optimizer.state_dict()}
        average = {} if self.average is None else {"average": self.average.state_dict()}
        scaler = {"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {}
        inside = {} if self.progress is None else {"inside": self.progress.state(self.device)}
        rest = {"history": self.history, "processes": processes.count()}
        return self.weights(self.model) | training | average | scaler | inside | rest

    def weights(self, model: nn.Module | None = None) -> dict[str, Any]:
        """Content of best.pt and epoch_<n>.pt. model: default, what is evaluated."""
        weights, fields = (model or self.evaluated).state_dict(), self.experiment.configuration.fields()
        return {"epoch": self.epoch, "model": weights, "config": fields, "run_id": self.run_id}

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
        self.history = state.get("history")  # None in checkpoints of older versions
        set_step(self.schedule, self.step)
        if inside := state.get("inside"):
            self.progress = Progress.load(inside, self.device)


def build_model(experiment: Experiment) -> nn.Module:
    """The model with weights drawn from the run's seed."""
    torch.manual_seed(seeds.derive("weights", experiment.train.seed))
    model = experiment.model.build()
    if experiment.options.recompute:
        _recompute(model)
    if experiment.train.sync_batchnorm:
        batchnorm.check_batchnorm(model)
    return model


def make_session(
    experiment: Experiment, run: Run, run_id: str, device: torch.device, task: Task, data: Batches, model: nn.Module
) -> Session:
    """model: on the device."""
    train = experiment.train
    if train.sync_batchnorm:
        model = batchnorm.sync_batchnorm(model, device)
    optimizer = train.make_optimizer(model)
    # the last step of an epoch may see fewer samples
    total_steps = train.epochs * math.ceil(data.size("train") / (train.batch_size * train.grad_accum))
    forward = _compile(model, device) if train.compile else model
    trained = forward if processes.count() == 1 else _distribute(forward, device)
    schedule = make_schedule(optimizer, total_steps, train)
    autocast, scaler = set_precision(train.precision, device), make_scaler(train.precision, device)
    average = WeightAverage(model, train.ema) if train.ema else None
    graphs = StepGraphs(optimizer, device) if device.type == "cuda" and _can_capture(experiment, task) else None
    parts = (device, data, task, model, forward, trained, optimizer, schedule, autocast, scaler, graphs, average)
    return Session(experiment, run, run_id, *parts)


def _can_capture(experiment: Experiment, task: Task) -> bool:
    """Whether a training step may become a CUDA graph: one batch, one process, nothing that depends on a value."""
    train, options = experiment.train, experiment.options
    is_one = train.grad_accum == 1 and processes.count() == 1
    reads_values = train.precision == "fp16" or task.reads_values
    return options.cuda_graph and is_one and not reads_values and not options.recompute


def announce(session: Session) -> None:
    train, data = session.experiment.train, session.data
    parameters = count_parameters(session.model)
    sizes = f"{data.size('train'):,} {session.task.samples} to train, {data.size('val'):,} to validate"
    several = f"{processes.count()} processes on " if processes.count() > 1 else ""
    print(
        f"{session.experiment.name}, seed {train.seed}: {parameters:,} parameters; {sizes}, {data.size('test'):,} to "
        f"test; {several}{session.device}, {effective_precision(train.precision, session.device)}\n"
        f"{session.experiment.folder}"
    )
    warn_of_precision(train.precision, session.device)


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _recompute(model: nn.Module) -> None:
    """Turns on activation checkpointing of the model's BDH. Raises UserError if it has none."""
    cores = _cores(model)
    if not cores:
        raise UserError("--recompute works for BDH models only: leave it out")
    for core in cores:
        core.recompute = True


def _cores(model: nn.Module) -> list[BDHCore]:
    return [module for module in model.modules() if isinstance(module, BDHCore)]


def _compile(model: nn.Module, device: torch.device) -> nn.Module:
    """The model through torch.compile, except on a CPU where it has a hand-written step, which is faster there."""
    if device.type == "cpu" and any(core.has_fast_path(device) for core in _cores(model)):
        print("--compile is ignored on a CPU: the model's own fast path is faster (benchmarks/step_time.py --compile)")
        return model
    return torch.compile(model)


def _distribute(forward: nn.Module, device: torch.device) -> nn.Module:
    """Averages gradients over the processes. Weights, and before every forward pass buffers, are the main process's."""
    if device.type == "cuda":
        return DistributedDataParallel(forward, device_ids=[device.index], gradient_as_bucket_view=True)
    trained = DistributedDataParallel(forward, gradient_as_bucket_view=True)
    _arrange_gradients(trained)
    return trained


def _arrange_gradients(trained: DistributedDataParallel) -> None:
    """Has PyTorch arrange the gradients in messages now, always alike.

    It does so after a process's first step. From three processes on, the rounding of a sum depends on its place in a
    message, so that the first step after a resume would round otherwise than without a stop.
    """
    forward, trained.module = trained.module, _SumOfWeights(trained.module)
    trained().backward()
    trained.module = forward
    trained.zero_grad()


class _SumOfWeights(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self) -> Tensor:
        return sum(each.sum() for each in self.model.parameters() if each.requires_grad)
