"""fit(): the only training loop."""

import contextlib
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from models.bdh import BDHCore
from training import seeds
from training.config import Experiment, UserError
from training.device import (
    describe_hardware,
    effective_precision,
    peak_memory_mb,
    pick_device,
    set_precision,
    synchronize,
    tune_cpu_allocator,
)
from training.metrics import METRICS, Sums
from training.runs import Run
from training.start import start_weights
from training.tasks import Batches, Task, make_task
from training.trackers import open_trackers, require_packages


class TrainingError(UserError):
    """Training cannot go on; what was saved stays."""


def rate_factor(step: int, total_steps: int, warmup_steps: int) -> float:
    """Learning rate of a step, counted from 0, as a share of the peak: step / warm-up, then half a cosine down to 0.

    The warm-up is capped at a tenth of all steps, so that short runs learn.
    """
    warmup = min(warmup_steps, total_steps // 10)
    if step < warmup:
        return step / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup))) / 2


@dataclass
class Session:
    """What a run needs at hand: set up once, then trained."""

    experiment: Experiment
    device: torch.device
    data: Batches
    task: Task
    model: nn.Module  # holds the weights
    forward: nn.Module  # the same, compiled where asked
    optimizer: torch.optim.Optimizer
    autocast: contextlib.AbstractContextManager
    epoch: int = 0  # epochs done
    step: int = 0  # optimiser steps done
    best: dict[str, Any] | None = None  # epoch and metrics of the best validation so far

    @property
    def total_steps(self) -> int:
        train = self.experiment.train
        # the last step of an epoch may see fewer samples
        return train.epochs * math.ceil(self.data.size("train") / (train.batch_size * train.grad_accum))

    def state(self) -> dict[str, Any]:
        """What last.pt holds. Random draws follow from the seed and the epoch, the schedule from the step."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "config": self.experiment.fields(),
        }

    def weights(self) -> dict[str, Any]:
        """What the files beside last.pt and previous.pt hold."""
        return {"epoch": self.epoch, "model": self.model.state_dict(), "config": self.experiment.fields()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]


def fit(experiment: Experiment) -> dict[str, Any]:
    """Trains, validates after every epoch, tests the best epoch once at the end; returns the summary.

    Writes the run's folder (see training.runs). Raises UserError for what the user can mend, TrainingError where the
    loss stops being finite.
    """
    run = Run(experiment.folder)
    resuming = run.prepare(experiment)
    if resuming and (summary := run.read_summary()):
        print(f"{run.folder} is complete: nothing to resume")
        return summary
    session = _set_up(experiment, run, resuming)
    trackers = open_trackers(experiment, session.epoch + 1)
    try:
        while session.epoch < experiment.train.epochs:
            row = _epoch(session, run)
            for tracker in trackers:
                tracker.log(row)
        return _finish(session, run)
    finally:
        for tracker in trackers:
            tracker.close()


def _set_up(experiment: Experiment, run: Run, resuming: bool) -> Session:
    """Everything that can fail for the user's reasons happens here, before the folder is touched."""
    train, options = experiment.train, experiment.options
    require_packages(options)
    device = pick_device(options.device)
    if device.type == "cpu" and tune_cpu_allocator():
        print("CPU: freed memory is kept for the next step (glibc mallopt; benchmarks/step_time.py shows its worth)")
    task = make_task(train)
    if resuming:
        data = task.load(experiment, run.read_split(), device, check=run.check_data)
    else:
        data = task.load(experiment, None, device, check=lambda description: None)

    torch.manual_seed(seeds.derive("weights", train.seed))
    try:
        model = experiment.model.build()
    except ImportError as error:  # of a library that only this model needs
        raise UserError(str(error)) from None
    if options.recompute:
        _recompute(model)
    origin = None if resuming else start_weights(model, experiment)
    model = model.to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=train.learning_rate,
        weight_decay=train.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )
    session = Session(
        experiment,
        device,
        data,
        task,
        model,
        _compile(model, device) if train.compile else model,
        optimizer,
        set_precision(train.precision, device),
    )
    parameters = sum(p.numel() for p in model.parameters())
    if resuming:
        session.load_state(run.load_checkpoint(print))
        run.cut_metrics(session.epoch)
        print(f"resuming after epoch {session.epoch} of {train.epochs}")
    else:
        run.start(experiment, data, describe_hardware(device), parameters, origin)
        run.save_checkpoint(session.state())  # so that a run stopped in its first epoch can be resumed too
        _keep_weights(session, run)
    print(
        f"{experiment.name}, seed {train.seed}: {parameters:,} parameters; "
        f"{data.size('train'):,} {task.samples} to train, "
        f"{data.size('val'):,} to validate, {data.size('test'):,} to test; "
        f"{device}, {effective_precision(train.precision, device)}\n{run.folder}"
    )
    return session


def _recompute(model: nn.Module) -> None:
    """Makes the BDH in the model trade time for memory. Raises UserError where there is none."""
    cores = [module for module in model.modules() if isinstance(module, BDHCore)]
    if not cores:
        raise UserError("--recompute is for BDH models, whose levels can be computed again: leave it out")
    for core in cores:
        core.recompute = True


def _compile(model: nn.Module, device: torch.device) -> nn.Module:
    """The model through torch.compile; on a CPU as it is where it has a step written by hand, which is faster there."""
    if device.type == "cpu" and getattr(model, "has_fast_path", lambda device: False)(device):
        print("--compile: not on a CPU, where this model's own step is faster (benchmarks/step_time.py --compile)")
        return model
    return torch.compile(model)


def _epoch(session: Session, run: Run) -> dict[str, Any]:
    """One epoch: training, validation, a row of metrics.csv, checkpoints. Returns the row."""
    train, task, device = session.experiment.train, session.task, session.device
    started = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    training = train_epoch(session)
    synchronize(device)
    trained = time.perf_counter()
    validation = evaluate(session, "val")
    if not math.isfinite(validation["loss"]):
        raise TrainingError(_not_finite(session, f"the validation loss after epoch {session.epoch + 1}"))
    ended = time.perf_counter()
    session.epoch += 1
    row = {
        "epoch": session.epoch,
        "train_loss": training["loss"],
        "val_loss": validation["loss"],
        f"val_{task.metric.key}": validation[task.metric.key],
        "learning_rate": session.optimizer.param_groups[0]["lr"],
        "epoch_time_sec": round(ended - started, 3),
        "images_per_sec": round(session.data.size("train") / (trained - started), 1),
        "peak_memory_mb": round(peak_memory_mb(device), 1),
        f"train_{task.metric.key}": training[task.metric.key],
        **{f"val_{key}": value for key, value in validation.items() if key not in ("loss", task.metric.key)},
    }
    run.append_metrics(row)
    if session.best is None or _score(row, task) > _score(session.best, task):
        session.best = {key: value for key, value in row.items() if key == "epoch" or key.startswith("val_")}
        run.save_best(session.weights() | session.best)
    _keep_weights(session, run)
    run.save_checkpoint(session.state())
    left = (train.epochs - session.epoch) * (ended - started)
    tqdm.write(
        f"epoch {session.epoch:3d}/{train.epochs}  "
        f"train loss {training['loss']:.4f}  val loss {validation['loss']:.4f}  "
        f"val {task.metric.label} {task.metric.show(validation[task.metric.key])}  "
        f"{row['images_per_sec']:,.0f} {task.unit}/s  "
        f"left {tqdm.format_interval(left)}"
    )
    return row


def _keep_weights(session: Session, run: Run) -> None:
    """Those of this epoch, where --keep-every asks for them."""
    every = session.experiment.options.keep_every
    if every is not None and session.epoch % every == 0:
        run.keep_weights(session.weights())


def _score(row: dict[str, Any], task: Task) -> tuple[float, float]:
    """What the best epoch has most of: the metric, and among equals the lower validation loss."""
    sign = 1 if task.metric.higher_is_better else -1
    return sign * row[f"val_{task.metric.key}"], -row["val_loss"]


def train_epoch(session: Session) -> dict[str, float]:
    """All training samples once; returns mean loss and metric. Waits for the device only where progress is read."""
    train, task = session.experiment.train, session.task
    torch.manual_seed(seeds.derive("model", train.seed, session.epoch))  # dropout
    session.forward.train()
    n_samples, group = session.data.size("train"), train.batch_size * train.grad_accum
    sums = Sums()
    first_bad = torch.full((), -1, device=session.device)  # step whose loss or gradient was the first to be not finite
    bar = tqdm(
        total=n_samples, unit=task.unit, desc=f"epoch {session.epoch + 1}/{train.epochs}", leave=False, disable=None
    )
    batches = session.data.train_batches(session.epoch)
    with bar:
        for first in range(0, n_samples, group):
            in_group = min(group, n_samples - first)
            finite = torch.ones((), dtype=torch.bool, device=session.device)
            for _ in range(math.ceil(in_group / train.batch_size)):
                inputs, targets = next(batches)
                with session.autocast:
                    outputs = session.forward(inputs)
                    loss = task.loss(outputs, targets)
                (loss * (len(targets) / in_group)).backward()
                finite &= loss.detach().isfinite()
                sums.add(task.counts(loss, outputs, targets))
            finite &= optimizer_step(session).isfinite()
            first_bad = torch.where((first_bad < 0) & ~finite, session.step, first_bad)
            session.step += 1
            if session.step % session.experiment.options.log_every == 0:
                _read_progress(session, bar, sums, first_bad)
        _read_progress(session, bar, sums, first_bad)
    return task.ratios(sums.read())


def optimizer_step(session: Session) -> Tensor:
    """Clips, steps at the schedule's rate, clears the gradients; returns the gradient's norm on the device."""
    train = session.experiment.train
    rate = train.learning_rate * rate_factor(session.step, session.total_steps, train.warmup_steps)
    for group in session.optimizer.param_groups:
        group["lr"] = rate
    norm = nn.utils.clip_grad_norm_(session.model.parameters(), train.max_grad_norm)
    session.optimizer.step()
    session.optimizer.zero_grad()
    return norm


def _read_progress(session: Session, bar: tqdm, sums: Sums, first_bad: Tensor) -> None:
    """Shows where training stands; the one place in an epoch that waits for the device."""
    if (step := int(first_bad)) >= 0:
        raise TrainingError(_not_finite(session, f"the loss or its gradient at step {step}"))
    read = sums.read()
    ratios = session.task.ratios(read)
    bar.set_postfix({METRICS[key].label: METRICS[key].show(ratios[key]) for key in ("loss", session.task.metric.key)})
    bar.update(int(read["images"]) - bar.n)


def _not_finite(session: Session, what: str) -> str:
    folder = session.experiment.folder
    return (
        f"{what} is not finite: training stopped. The checkpoint of epoch {session.epoch} in {folder} is good; "
        "start again with a lower --learning-rate or --precision float32"
    )


@torch.no_grad()
def evaluate(session: Session, part: str) -> dict[str, float]:
    """Mean loss and metric on "val" or "test"."""
    session.forward.eval()
    sums = Sums()
    for inputs, targets in session.data.eval_batches(part):
        with session.autocast:
            outputs = session.forward(inputs)
            loss = session.task.loss(outputs, targets)
        sums.add(session.task.counts(loss, outputs, targets))
    return session.task.ratios(sums.read())


def _finish(session: Session, run: Run) -> dict[str, Any]:
    """The test part, if there is one, once, with the weights of the best validation epoch; writes summary.json."""
    best = run.load_best()
    session.model.load_state_dict(best["model"])
    test = evaluate(session, "test") if session.data.size("test") else None  # then validation is the result
    summary = {
        "test": test,
        "best": {key: value for key, value in best.items() if key not in ("model", "config")},
        "epochs": session.epoch,
        "parameters": sum(p.numel() for p in session.model.parameters()),
        "images": {part: session.data.size(part) for part in ("train", "val", "test")},
    }
    run.write_summary(summary)
    return summary
