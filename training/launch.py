"""From a script's experiment and the command line to a finished run: messages, exit codes, the closing table."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from training import processes
from training.command_line import INTERRUPTED, exit_with, parse_experiment
from training.config import UserError
from training.console import prepare_streams
from training.data.streaming import WORKER_ENDED, is_ended_worker
from training.device import is_out_of_memory
from training.experiment import Experiment
from training.loop import fit
from training.metrics import metric_of
from training.parent import end_with_parent
from training.runs import Run
from training.views import views_text

SHOWN_CLASSES = 30  # of more, the closing table leaves out the IoU of each


def launch(experiment: Experiment) -> Path:
    """Applies the command line to the experiment, trains it, prints the result; returns the run's folder.

    Every train_*.py calls this. Ends the process with one message: exit code 1 if the run failed, 2 for a wrong flag,
    130 after Ctrl-C. Started by torchrun, it returns in the main process; the others end. In a notebook call
    `training.fit(experiment)` instead.
    """
    description = getattr(sys.modules["__main__"], "__doc__", None) or experiment.name
    return train_asked(lambda: parse_experiment(experiment, sys.argv[1:], description))


def train(experiment: Experiment) -> Path:
    """Trains and prints the result; returns the run's folder. Ends the process as `launch` does."""
    return train_asked(lambda: experiment)


def train_asked(ask: Callable[[], Experiment]) -> Path:
    """As `train`, for what ask() returns in the main process: a wrong flag is then said once."""
    prepare_streams()
    end_with_parent()
    with processes.joined():
        experiment = processes.from_main(ask)
        summary = _fit(experiment)
    if not processes.is_main():
        raise SystemExit(0)
    processes.leave()
    show_summary(experiment, summary)
    return experiment.folder


def _fit(experiment: Experiment) -> dict[str, Any]:
    """fit(), whose errors end the process with one message."""
    before = Run(experiment.folder).id()
    try:
        return fit(experiment)
    except UserError as error:
        _end(str(error), 1)
    except OSError as error:
        _end(f"{error.filename or 'a file'}: {error.strerror or error}", 1)
    except (RuntimeError, MemoryError) as error:
        if is_ended_worker(error):
            _end(WORKER_ENDED, 1)
        if not is_out_of_memory(error):
            raise
        _end(
            "out of memory: try a smaller --batch-size with a larger --grad-accum (their product is what one optimizer "
            "step sees), a smaller --eval-batch-size, --precision bf16, for a BDH --recompute, or a smaller model",
            1,
        )
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C changes nothing
        point = "finished epoch" if experiment.options.checkpoint_minutes is None else "checkpoint"
        untouched = experiment.options.overwrite and Run(experiment.folder).id() == before
        if untouched or not Run(experiment.folder).has_checkpoint():
            _end("stopped before the first epoch. Repeat the command", INTERRUPTED)
        how = "Give --resume instead of --overwrite" if experiment.options.overwrite else "Add --resume"
        _end(f"stopped. {how} to continue from the last {point} of {experiment.folder}", INTERRUPTED)


def _end(message: str, code: int) -> NoReturn:
    """Ends the process with a message; of several processes, the first to end has it."""
    if processes.may_report(code):
        exit_with(message, code)
    raise SystemExit(code)


def show_summary(experiment: Experiment, summary: dict[str, Any]) -> None:
    """The closing table."""
    table = Table(title=f"{experiment.name}, seed {experiment.train.seed}", show_header=False)
    for key, value in _shown(summary["test"] or {}, "iou_"):
        table.add_row(f"test {metric_of(key).label}", metric_of(key).show(value))
    if summary["test"] is None:
        table.add_row("test", "no test set: validation is the result")
    if views := views_text(summary, experiment.train.task):
        table.add_row("evaluated", views)
    table.add_row("best epoch", str(summary["best"]["epoch"]))
    for key, value in _shown(summary["best"], "val_iou_"):
        if key != "epoch":
            metric = metric_of(key.removeprefix("val_"))
            table.add_row(f"its validation {metric.label}", metric.show(value))
    table.add_row("parameters", f"{summary['parameters']:,}")
    Console().print(table)
    print(f"run: {experiment.folder}")


def _shown(results: dict[str, Any], of_class: str) -> list[tuple[str, Any]]:
    """Results for the closing table: the IoU of each class, whose names start with of_class, only if they are few."""
    few = sum(key.startswith(of_class) for key in results) <= SHOWN_CLASSES
    return [(key, value) for key, value in results.items() if few or not key.startswith(of_class)]
