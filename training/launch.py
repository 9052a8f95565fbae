"""From a script's experiment and the command line to a finished run: messages, exit codes, the closing table."""

import signal
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from training.command_line import INTERRUPTED, exit_with, parse_experiment
from training.config import Experiment, UserError
from training.console import prepare_streams
from training.device import is_out_of_memory
from training.loop import fit
from training.metrics import metric_of
from training.parent import end_with_parent


def launch(experiment: Experiment) -> Path:
    """Applies the command line to the experiment, trains it, prints the result; returns the run's folder.

    Every train_*.py calls this. Ends the process with one message: exit code 1 if the run failed, 2 for a wrong flag,
    130 after Ctrl-C. In a notebook call `training.fit(experiment)` instead.
    """
    description = getattr(sys.modules["__main__"], "__doc__", None) or experiment.name
    return train(parse_experiment(experiment, sys.argv[1:], description))


def train(experiment: Experiment) -> Path:
    """Trains and prints the result; returns the run's folder. Ends the process as `launch` does."""
    prepare_streams()
    end_with_parent()
    try:
        summary = fit(experiment)
    except UserError as error:
        exit_with(str(error), 1)
    except OSError as error:
        exit_with(f"{error.filename or 'a file'}: {error.strerror or error}", 1)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        exit_with(
            "out of memory: try a smaller --batch-size with a larger --grad-accum (their product is what one optimizer "
            "step sees), a smaller --eval-batch-size, --precision bf16, for a BDH --recompute, or a smaller model",
            1,
        )
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C changes nothing
        exit_with(f"stopped. Add --resume to continue from the last finished epoch of {experiment.folder}", INTERRUPTED)
    show_summary(experiment, summary)
    return experiment.folder


def show_summary(experiment: Experiment, summary: dict[str, Any]) -> None:
    """The closing table."""
    table = Table(title=f"{experiment.name}, seed {experiment.train.seed}", show_header=False)
    for key, value in (summary["test"] or {}).items():
        table.add_row(f"test {metric_of(key).label}", metric_of(key).show(value))
    if summary["test"] is None:
        table.add_row("test", "no test set: validation is the result")
    if summary.get("eval_flip"):
        table.add_row("evaluated", "mean logits of each image and its mirror image")
    table.add_row("best epoch", str(summary["best"]["epoch"]))
    for key, value in summary["best"].items():
        if key != "epoch":
            metric = metric_of(key.removeprefix("val_"))
            table.add_row(f"its validation {metric.label}", metric.show(value))
    table.add_row("parameters", f"{summary['parameters']:,}")
    Console().print(table)
    print(f"run: {experiment.folder}")
