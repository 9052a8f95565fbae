"""fit(): the only training loop."""

import dataclasses
import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from training import contracts, processes
from training.config import UserError
from training.device import describe_hardware, peak_memory_mb, prepare_device, synchronize
from training.experiment import Experiment
from training.metrics import METRICS, Sums
from training.onlooker import Onlooker
from training.optimiser import set_step
from training.progress import Progress, counts_of, loss_of, ratios_of, share_of_loss
from training.provenance import describe_run
from training.runs import Run
from training.session import Session, announce, build_model, count_parameters, make_session
from training.start import start_weights
from training.tasks import Task
from training.trackers import Trackers
from training.views import views_used

LEAST_SCALE = 1.0  # of the loss in fp16: 17 skipped steps below the first one, and no help against overflow


class TrainingError(UserError):
    """Training cannot continue; saved checkpoints stay."""


def fit(experiment: Experiment) -> dict[str, Any]:
    """Trains, validates after every epoch, tests the best epoch once at the end; returns the summary.

    Writes the run's folder (see training.runs). Started by torchrun, the processes train together (see
    training.processes). Raises UserError for what the user can fix, TrainingError if the loss is no longer finite.
    """
    contracts.check_experiment(experiment)
    processes.check_batch_size(experiment.train.batch_size)
    with processes.joined():
        if processes.is_main():
            return _fit(experiment, Run(experiment.folder))
        options = dataclasses.replace(experiment.options, tensorboard=False, wandb=None)
        return _fit(dataclasses.replace(experiment, options=options), Onlooker(experiment.folder))


def _fit(experiment: Experiment, run: Run) -> dict[str, Any]:
    with run.locked():
        resuming = processes.from_main(lambda: run.prepare(experiment))
        if resuming and (summary := processes.from_main(run.read_summary)):
            processes.from_main(lambda: run.check_own_files(experiment))
            processes.from_main(lambda: run.mend_metrics(summary["epochs"]))
            print(f"{run.folder} is complete: nothing to resume")
            return summary
        trackers = Trackers(experiment)
        try:
            session = _resume(experiment, run, trackers) if resuming else _start(experiment, run, trackers)
            announce(session)
            while session.epoch < experiment.train.epochs:
                trackers.log(_epoch(session))
            return _finish(session)
        finally:
            trackers.close()


def _start(experiment: Experiment, run: Run, trackers: Trackers) -> Session:
    """A new run. Everything that can fail for the user's reasons fails before the folder is touched."""
    device, task = prepare_device(experiment.options.device, say=print), experiment.train.make_task()
    with processes.main_first():
        source = task.open(experiment)
        contracts.check_source(experiment.train, source)
        data = task.load(source, None, experiment, device)
        model = build_model(experiment)
        origin = start_weights(model, experiment)
    facts = {"origin": origin, "parameters": count_parameters(model), "hardware": _hardware(device)}
    config = processes.from_main(lambda: describe_run(experiment, source.description, **facts))
    model = model.to(device)
    contracts.check_batches(model, data, task, experiment.train)
    session = make_session(experiment, run, config["run_id"], device, task, data, model)
    trackers.connect(config["run_id"])
    run.start(experiment, config, data.split, session.state())  # a checkpoint: resumable from the first epoch
    trackers.open_files(session.epoch + 1)
    _keep_weights(session)
    return session


def _hardware(device: torch.device) -> dict[str, Any]:
    several = {"processes": processes.count()} if processes.count() > 1 else {}
    return describe_hardware(device) | several


def _resume(experiment: Experiment, run: Run, trackers: Trackers) -> Session:
    """The run in the folder, as its last checkpoint has it."""
    config = processes.from_main(run.read_config)
    device, task = prepare_device(experiment.options.device, say=print), experiment.train.make_task()
    with processes.main_first():
        source = task.open(experiment)
    processes.from_main(lambda: run.check_data(source.description))
    split = processes.from_main(run.read_split)
    with processes.main_first():
        data = task.load(source, split, experiment, device)
    model = build_model(experiment).to(device)
    session = make_session(experiment, run, config.get("run_id", ""), device, task, data, model)
    state = processes.from_main(lambda: run.load_checkpoint(session.model))
    session.load_state(state)
    is_best = session.best is not None and session.progress is None and session.best["epoch"] == session.epoch
    only_in_file = session.best is not None and not is_best  # not in the checkpoint
    if only_in_file and processes.from_main(lambda: run.load_best()["epoch"]) > session.epoch:
        session.best = None  # its weights were replaced in epochs that are lost with last.pt: chosen anew from here on
    trackers.connect(config.get("run_id"))
    run.restore_metrics(session.epoch, session.history)
    run.restore_split(data.split, session.run_id)
    if session.epoch == 0 and session.progress is None:
        _keep_weights(session)  # the run may have been stopped before they were written
    if is_best:
        run.save_best(session.weights() | session.best)  # the run may have been stopped before it was written
    run.note_hardware(config, _hardware(device))
    trackers.open_files(session.epoch + 1)
    _say_resumed(session, state.get("processes", 1))
    return session


def _say_resumed(session: Session, processes_before: int) -> None:
    epochs, inside = session.experiment.train.epochs, session.progress
    if inside is None:
        print(f"resuming after epoch {session.epoch} of {epochs}")
    else:
        seen = f"{inside.seen:,} of {session.data.size('train'):,} {session.task.samples}"
        print(f"resuming in epoch {session.epoch + 1} of {epochs}, after {seen}")
    if (now := processes.count()) != processes_before:
        print(f"number of processes: {processes_before} before, {now} now; same batches, other draws of dropout")


def _epoch(session: Session) -> dict[str, Any]:
    """One epoch: training, validation, a row of metrics.csv, checkpoints. Returns the row."""
    task, device = session.task, session.device
    started = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if session.progress is not None:
        started = session.progress.started  # of a checkpoint inside this epoch
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
    session.run.append_metrics(row)
    if session.history is not None:
        session.history.append(row)
    if is_best := session.best is None or not task.selects_best or _score(row, task) > _score(session.best, task):
        session.best = {key: value for key, value in row.items() if key == "epoch" or key.startswith("val_")}
    _keep_weights(session)
    session.save()
    if is_best:  # after the checkpoint, from which a run that was stopped in between writes it: see _resume
        session.run.save_best(session.weights() | session.best)
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


def _keep_weights(session: Session) -> None:
    """Saves this epoch's weights if --keep-every asks for them."""
    every = session.experiment.options.keep_every
    if every is not None and session.epoch % every == 0:
        session.run.keep_weights(session.weights())


def _score(row: dict[str, Any], task: Task) -> tuple[float, float]:
    """Highest for the best epoch: the metric, then the lower validation loss."""
    sign = 1 if task.metric.higher_is_better else -1
    return sign * row[f"val_{task.metric.key}"], -row["val_loss"]


def train_epoch(session: Session) -> tuple[dict[str, float], float]:
    """All training samples once; returns mean loss and ratios, and the last learning rate of the first group.

    Continues inside the epoch after a checkpoint from there. Waits for the device only where progress is read.
    """
    train, progress = session.experiment.train, session.begin_epoch()
    session.trained.train()
    n_samples, group = session.data.size("train"), train.batch_size * train.grad_accum
    bar = tqdm(
        total=n_samples,
        initial=progress.seen,
        unit=session.task.unit,
        desc=f"epoch {session.epoch + 1}/{train.epochs}",
        leave=False,
        disable=processes.no_bar(),
    )
    batches = session.data.train_batches(session.epoch, progress.steps * train.grad_accum)
    with bar:
        for first in range(progress.steps * group, n_samples, group):
            finite = _train_on(session, progress, batches, min(group, n_samples - first))
            progress.steps += 1
            progress.note(session.step - 1, finite)
            if session.step % session.experiment.options.log_every == 0:
                _read_progress(session, progress, bar)
                session.save_if_due()
        _read_progress(session, progress, bar)
    session.progress = None
    return ratios_of(session.task, progress.sums, progress.seen), progress.rate


def _train_on(session: Session, progress: Progress, batches: Iterator, in_step: int) -> Tensor:
    """One optimizer step on `in_step` samples; returns whether loss and gradient were finite, on the device."""
    if session.graphs is not None:
        finite, counts = session.graphs.run(partial(_whole_step, session), *next(batches))
        progress.sums.add(counts)
        progress.seen += in_step
        progress.rate = _count_step(session)
        return finite
    finite = _accumulate(session, progress, batches, in_step)
    norm = _clip(session)
    if not session.scaler.is_enabled():  # in fp16 a gradient may overflow: the step is skipped
        finite &= norm.isfinite()
    progress.rate = optimizer_step(session)
    return finite


def _whole_step(session: Session, inputs: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """What a CUDA graph holds: the weights' update on one batch. Returns whether all was finite, and its counts."""
    finite, counts = _gradients(session, inputs, targets, len(targets), len(targets))
    finite &= _clip(session).isfinite()
    session.optimizer.step()
    return finite, counts


def _accumulate(session: Session, progress: Progress, batches: Iterator, in_step: int) -> Tensor:
    """The gradients of one optimizer step on `in_step` samples; returns whether all losses were finite."""
    size = session.experiment.train.batch_size
    finite = torch.ones((), dtype=torch.bool, device=session.device)
    for first in range(0, in_step, size):
        batch = min(size, in_step - first)
        inputs, targets = next(batches)
        with session.not_synced(last=first + batch == in_step):
            is_finite, counts = _gradients(session, inputs, targets, batch, in_step)
        finite &= is_finite
        progress.sums.add(counts)
        progress.seen += batch
    return finite


def _gradients(
    session: Session, inputs: Tensor, targets: Tensor, batch: int, in_step: int
) -> tuple[Tensor, dict[str, Any]]:
    """Adds a batch's gradients, or this process's share; returns whether the loss is finite, and what is counted.

    batch, in_step: samples of the whole batch, and of the optimizer step.
    """
    task = session.task
    with session.autocast:
        outputs = session.trained(inputs)
        loss = loss_of(task, outputs, targets)
    session.scaler.scale(share_of_loss(task, loss, len(targets), batch, in_step)).backward()
    return loss.detach().isfinite(), counts_of(task, outputs, targets, loss)


def _clip(session: Session) -> Tensor:
    """Clips the gradients, in fp16 after dividing by the loss scale; returns their norm before, on the device."""
    session.scaler.unscale_(session.optimizer)
    return nn.utils.clip_grad_norm_(session.model.parameters(), session.experiment.train.max_grad_norm)


def optimizer_step(session: Session) -> float:
    """Steps at the schedule's rates and clears the gradients; returns the rate of the first group.

    A step that fp16 skips leaves weights and optimizer as they are. It counts as a step all the same, so the schedule
    does not depend on it. Skipping takes no waiting with AdamW; with other optimizers the scaler reads a value.
    """
    session.scaler.step(session.optimizer)
    session.scaler.update()
    session.optimizer.zero_grad()
    return _count_step(session)


def _count_step(session: Session) -> float:
    """After an optimizer step: the averaged weights and the next step's rates; returns the rate of the first group."""
    rate = session.optimizer.param_groups[0]["lr"]
    if session.average is not None:
        session.average.update_parameters(session.model)
    session.step += 1
    set_step(session.schedule, session.step)
    return rate


def _read_progress(session: Session, progress: Progress, bar: tqdm) -> None:
    """Updates the progress bar; the one place in an epoch that waits for the device."""
    if (step := progress.bad_step()) is not None:
        raise TrainingError(_not_finite(session, f"the loss or its gradient at step {step}"))
    if (scale := session.scaler.get_scale()) < LEAST_SCALE:
        raise TrainingError(_not_finite(session, f"the gradient in fp16, even with the loss scaled by {scale:g},"))
    task = session.task
    if task.shows_metric:
        ratios = ratios_of(task, progress.sums, progress.seen)
        shown = {METRICS[key].label: METRICS[key].show(ratios[key]) for key in ("loss", task.metric.key)}
    else:
        shown = {"loss": METRICS["loss"].show(progress.sums.read_one("loss") / progress.seen)}
    bar.set_postfix(shown)
    bar.update(progress.seen - bar.n)


def _not_finite(session: Session, what: str) -> str:
    folder = session.experiment.folder
    return (
        f"{what} is not finite: training stopped. The checkpoint of epoch {session.epoch} in {folder} is good; start "
        "again with a lower --learning-rate or --precision float32"
    )


@torch.no_grad()
def evaluate(session: Session, part: str) -> dict[str, float]:
    """Mean loss and ratios on "val" or "test"."""
    model, task = session.forward if session.average is None else session.evaluated, session.task
    processes.copy_buffers(session.evaluated)
    model.eval()
    sums, seen = Sums(), 0
    for inputs, targets in session.data.eval_batches(part):
        with session.autocast:
            outputs = task.predict(model, inputs)
            loss = loss_of(task, outputs, targets)
        sums.add(counts_of(task, outputs, targets, loss))
        seen += len(targets)
    seen = int(processes.total(torch.tensor(seen)))
    if seen != (size := session.data.size(part)):
        raise UserError(
            f"eval_batches({part!r}) gave {seen} samples, but size({part!r}) is {size}: with several processes, each "
            "must yield its share of every batch (training.processes.share)"
        )
    return ratios_of(task, sums, seen)


def _finish(session: Session) -> dict[str, Any]:
    """Tests the best epoch's weights once, if there is a test set; writes summary.json."""
    best = processes.from_main(session.run.load_best)
    session.evaluated.load_state_dict(best["model"])
    test = evaluate(session, "test") if session.data.size("test") else None  # without one, validation is the result
    kept = {key: value for key, value in best.items() if key == "epoch" or key.startswith("val_")}
    summary = {
        "test": test,
        "best": kept,
        "epochs": session.epoch,
        "parameters": count_parameters(session.model),
        "images": {part: session.data.size(part) for part in ("train", "val", "test")},
    }
    summary |= views_used(session.experiment.train)
    session.run.write_summary(summary)
    return summary
