"""fit(): the only training loop."""

import contextlib
import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from training import contracts, seeds
from models.bdh import BDHCore
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
from training.optimiser import make_average, make_schedule, set_step
from training.provenance import describe_run
from training.runs import Run
from training.start import start_weights
from training.tasks import Batches, Task
from training.trackers import Trackers


class TrainingError(UserError):
    """Training cannot continue; saved checkpoints stay."""


@dataclass
class Session:
    """What a run needs at hand: set up once, then trained."""

    experiment: Experiment
    run_id: str
    device: torch.device
    data: Batches
    task: Task
    model: nn.Module  # holds the weights
    forward: nn.Module  # the same, compiled if asked
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    autocast: contextlib.AbstractContextManager
    average: AveragedModel | None = None  # of the weights, if train.ema: what is validated and tested
    epoch: int = 0  # epochs done
    step: int = 0  # optimizer steps done
    best: dict[str, Any] | None = None  # epoch and metrics of the best validation so far
    history: list[dict[str, Any]] | None = field(default_factory=list)  # rows of metrics.csv

    @property
    def evaluated(self) -> nn.Module:
        """What is validated, tested and kept as the best: the model, or the average of its weights."""
        return self.model if self.average is None else self.average.module

    def state(self) -> dict[str, Any]:
        """Content of last.pt. Random draws depend on seed and epoch, learning rates on the step."""
        training = {"step": self.step, "best": self.best, "optimizer": self.optimizer.state_dict()}
        average = {} if self.average is None else {"average": self.average.state_dict()}
        return self.weights(self.model) | training | average | {"history": self.history}

    def weights(self, model: nn.Module | None = None) -> dict[str, Any]:
        """Content of best.pt and epoch_<n>.pt. model: default, what is evaluated."""
        weights, fields = (model or self.evaluated).state_dict(), self.experiment.configuration.fields()
        return {"epoch": self.epoch, "model": weights, "config": fields, "run_id": self.run_id}

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
        self.history = state.get("history")  # None in checkpoints of older versions
        set_step(self.schedule, self.step)


def fit(experiment: Experiment) -> dict[str, Any]:
    """Trains, validates after every epoch, tests the best epoch once at the end; returns the summary.

    Writes the run's folder (see training.runs). Raises UserError for what the user can fix, TrainingError if the loss
    is no longer finite.
    """
    contracts.check_experiment(experiment)
    run = Run(experiment.folder)
    with run.locked():
        resuming = run.prepare(experiment)
        if resuming and (summary := run.read_summary()):
            print(f"{run.folder} is complete: nothing to resume")
            return summary
        trackers = Trackers(experiment)
        try:
            session = _resume(experiment, run, trackers) if resuming else _start(experiment, run, trackers)
            _announce(session)
            while session.epoch < experiment.train.epochs:
                trackers.log(_epoch(session, run))
            return _finish(session, run)
        finally:
            trackers.close()


def _start(experiment: Experiment, run: Run, trackers: Trackers) -> Session:
    """A new run. Everything that can fail for the user's reasons fails before the folder is touched."""
    device, task = _pick_device(experiment), experiment.train.make_task()
    source = task.open(experiment)
    contracts.check_source(experiment.train, source)
    data = task.load(source, None, experiment, device)
    model = _build(experiment)
    origin = start_weights(model, experiment)
    facts = {
        "origin": origin,
        "parameters": _count_parameters(model),
        "hardware": describe_hardware(device),
    }
    config = describe_run(experiment, source.description, **facts)
    session = _make_session(experiment, config["run_id"], device, task, data, model)
    contracts.check_batches(session.model, data, task, experiment.train.batch_size)
    trackers.connect(config["run_id"])
    run.start(experiment, config, data.split, session.state())  # a checkpoint: resumable from the first epoch
    trackers.open_files(session.epoch + 1)
    _keep_weights(session, run)
    return session


def _resume(experiment: Experiment, run: Run, trackers: Trackers) -> Session:
    """The run in the folder, as its last checkpoint has it."""
    config = run.read_config()
    device, task = _pick_device(experiment), experiment.train.make_task()
    source = task.open(experiment)
    run.check_data(source.description)
    data = task.load(source, run.read_split(), experiment, device)
    session = _make_session(experiment, config.get("run_id", ""), device, task, data, _build(experiment))
    session.load_state(run.load_checkpoint(session.model))
    trackers.connect(config.get("run_id"))
    run.restore_metrics(session.epoch, session.history)
    run.restore_split(data.split, session.run_id)
    trackers.open_files(session.epoch + 1)
    print(f"resuming after epoch {session.epoch} of {experiment.train.epochs}")
    return session


def _pick_device(experiment: Experiment) -> torch.device:
    device = pick_device(experiment.options.device)
    if device.type == "cpu" and tune_cpu_allocator():
        print("CPU: glibc keeps freed memory for the next step (mallopt; see benchmarks/step_time.py)")
    return device


def _build(experiment: Experiment) -> nn.Module:
    """The model with weights drawn from the run's seed. Raises UserError if a library is missing."""
    torch.manual_seed(seeds.derive("weights", experiment.train.seed))
    try:
        model = experiment.model.build()
    except ImportError as error:  # of a library that only this model needs
        raise UserError(str(error)) from None
    if experiment.options.recompute:
        _recompute(model)
    return model


def _make_session(
    experiment: Experiment, run_id: str, device: torch.device, task: Task, data: Batches, model: nn.Module
) -> Session:
    train = experiment.train
    model = model.to(device)
    optimizer = train.make_optimizer(model)
    # the last step of an epoch may see fewer samples
    total_steps = train.epochs * math.ceil(data.size("train") / (train.batch_size * train.grad_accum))
    forward = _compile(model, device) if train.compile else model
    schedule = make_schedule(optimizer, total_steps, train)
    autocast = set_precision(train.precision, device)
    average = make_average(model, train.ema) if train.ema else None
    return Session(experiment, run_id, device, data, task, model, forward, optimizer, schedule, autocast, average)


def _announce(session: Session) -> None:
    train, data = session.experiment.train, session.data
    parameters = _count_parameters(session.model)
    sizes = f"{data.size('train'):,} {session.task.samples} to train, {data.size('val'):,} to validate"
    print(
        f"{session.experiment.name}, seed {train.seed}: {parameters:,} parameters; {sizes}, {data.size('test'):,} to "
        f"test; {session.device}, {effective_precision(train.precision, session.device)}\n{session.experiment.folder}"
    )


def _count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _recompute(model: nn.Module) -> None:
    """Turns on activation checkpointing of the model's BDH. Raises UserError if it has none."""
    cores = [module for module in model.modules() if isinstance(module, BDHCore)]
    if not cores:
        raise UserError("--recompute works for BDH models only: leave it out")
    for core in cores:
        core.recompute = True


def _compile(model: nn.Module, device: torch.device) -> nn.Module:
    """The model through torch.compile, except on a CPU where it has a hand-written step, which is faster there."""
    if device.type == "cpu" and getattr(model, "has_fast_path", lambda device: False)(device):
        print("--compile is ignored on a CPU: the model's own fast path is faster (benchmarks/step_time.py --compile)")
        return model
    return torch.compile(model)


def _epoch(session: Session, run: Run) -> dict[str, Any]:
    """One epoch: training, validation, a row of metrics.csv, checkpoints. Returns the row."""
    task, device = session.task, session.device
    started = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    training, rate = train_epoch(session)
    synchronize(device)
    trained = time.perf_counter()
    validation = evaluate(session, "val")
    if not math.isfinite(validation["loss"]):
        raise TrainingError(_not_finite(session, f"the validation loss after epoch {session.epoch + 1}"))
    ended = time.perf_counter()
    session.epoch += 1
    metric = task.metric
    row = {
        "epoch": session.epoch,
        "train_loss": training["loss"],
        "val_loss": validation["loss"],
        f"val_{metric.key}": validation[metric.key],
        "learning_rate": rate,
        "epoch_time_sec": round(ended - started, 3),
        "images_per_sec": round(session.data.size("train") / (trained - started), 1),
        "peak_memory_mb": round(peak_memory_mb(device), 1),
        f"train_{metric.key}": training[metric.key],
        **{f"val_{key}": value for key, value in validation.items() if key not in ("loss", metric.key)},
    }
    run.append_metrics(row)
    if session.history is not None:
        session.history.append(row)
    if session.best is None or not task.selects_best or _score(row, task) > _score(session.best, task):
        session.best = {key: value for key, value in row.items() if key == "epoch" or key.startswith("val_")}
        run.save_best(session.weights() | session.best)
    _keep_weights(session, run)
    run.save_checkpoint(session.state())
    _print_epoch(session, row, ended - started)
    return row


def _print_epoch(session: Session, row: dict[str, Any], seconds: float) -> None:
    metric, epochs = session.task.metric, session.experiment.train.epochs
    tqdm.write(
        f"epoch {session.epoch:3d}/{epochs}  train loss {row['train_loss']:.4f}  val loss {row['val_loss']:.4f}  "
        f"val {metric.label} {metric.show(row[f'val_{metric.key}'])}  "
        f"{row['images_per_sec']:,.0f} {session.task.unit}/s  "
        f"left {tqdm.format_interval((epochs - session.epoch) * seconds)}"
    )


def _keep_weights(session: Session, run: Run) -> None:
    """Saves this epoch's weights if --keep-every asks for them."""
    every = session.experiment.options.keep_every
    if every is not None and session.epoch % every == 0:
        run.keep_weights(session.weights())


def _score(row: dict[str, Any], task: Task) -> tuple[float, float]:
    """Highest for the best epoch: the metric, then the lower validation loss."""
    sign = 1 if task.metric.higher_is_better else -1
    return sign * row[f"val_{task.metric.key}"], -row["val_loss"]


def train_epoch(session: Session) -> tuple[dict[str, float], float]:
    """All training samples once; returns mean loss and ratios, and the last learning rate of the first group.

    Waits for the device only where progress is read.
    """
    train, task = session.experiment.train, session.task
    torch.manual_seed(seeds.derive("model", train.seed, session.epoch))  # dropout
    session.forward.train()
    n_samples, group = session.data.size("train"), train.batch_size * train.grad_accum
    sums, seen, rate = Sums(), 0, math.nan
    first_bad = torch.full((), -1, device=session.device)  # first step whose loss or gradient is not finite
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
                sums.add({"loss": loss * len(targets), **task.counts(outputs, targets)})
                seen += len(targets)
            finite &= _clip(session).isfinite()
            rate = optimizer_step(session)
            first_bad = torch.where((first_bad < 0) & ~finite, session.step - 1, first_bad)
            if session.step % session.experiment.options.log_every == 0:
                _read_progress(session, bar, sums, seen, first_bad)
        _read_progress(session, bar, sums, seen, first_bad)
    return _ratios(task, sums, seen), rate


def _clip(session: Session) -> Tensor:
    """Clips the gradients; returns their norm before, on the device."""
    return nn.utils.clip_grad_norm_(session.model.parameters(), session.experiment.train.max_grad_norm)


def optimizer_step(session: Session) -> float:
    """Steps at the schedule's rates and clears the gradients; returns the rate of the first group."""
    rate = session.optimizer.param_groups[0]["lr"]
    session.optimizer.step()
    session.optimizer.zero_grad()
    session.schedule.step()
    if session.average is not None:
        session.average.update_parameters(session.model)
    session.step += 1
    return rate


def _ratios(task: Task, sums: Sums, seen: int) -> dict[str, Any]:
    """Mean loss per sample and the task's ratios; waits for the device."""
    read = sums.read() | {"samples": seen}
    return {"loss": read["loss"] / seen, **task.ratios(read)}


def _read_progress(session: Session, bar: tqdm, sums: Sums, seen: int, first_bad: Tensor) -> None:
    """Updates the progress bar; the one place in an epoch that waits for the device."""
    if (step := int(first_bad)) >= 0:
        raise TrainingError(_not_finite(session, f"the loss or its gradient at step {step}"))
    task = session.task
    if task.shows_metric:
        ratios = _ratios(task, sums, seen)
        shown = {METRICS[key].label: METRICS[key].show(ratios[key]) for key in ("loss", task.metric.key)}
    else:
        shown = {"loss": METRICS["loss"].show(sums.read_one("loss") / seen)}
    bar.set_postfix(shown)
    bar.update(seen - bar.n)


def _not_finite(session: Session, what: str) -> str:
    folder = session.experiment.folder
    return (
        f"{what} is not finite: training stopped. The checkpoint of epoch {session.epoch} in {folder} is good; start "
        "again with a lower --learning-rate or --precision float32"
    )


@torch.no_grad()
def evaluate(session: Session, part: str) -> dict[str, float]:
    """Mean loss and ratios on "val" or "test"."""
    model = session.forward if session.average is None else session.evaluated
    model.eval()
    sums, seen = Sums(), 0
    for inputs, targets in session.data.eval_batches(part):
        with session.autocast:
            outputs = session.task.predict(model, inputs)
            loss = session.task.loss(outputs, targets)
        sums.add({"loss": loss * len(targets), **session.task.counts(outputs, targets)})
        seen += len(targets)
    return _ratios(session.task, sums, seen)


def _finish(session: Session, run: Run) -> dict[str, Any]:
    """Tests the best epoch's weights once, if there is a test set; writes summary.json."""
    best = run.load_best()
    session.evaluated.load_state_dict(best["model"])
    test = evaluate(session, "test") if session.data.size("test") else None  # without one, validation is the result
    kept = {key: value for key, value in best.items() if key == "epoch" or key.startswith("val_")}
    summary = {
        "test": test,
        "best": kept,
        "epochs": session.epoch,
        "parameters": _count_parameters(session.model),
        "images": {part: session.data.size(part) for part in ("train", "val", "test")},
    }
    if getattr(session.experiment.train, "eval_flip", False):
        summary["eval_flip"] = True  # the results are those of an image and its mirror image together
    run.write_summary(summary)
    return summary
