"""From a script's experiment and the command line to a finished run: messages, exit codes, the closing table."""

import sys
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from training.config import Experiment, TrainConfig, UserError, parse_experiment
from training.device import is_out_of_memory
from training.loop import fit
from training.metrics import metric_of


def launch(name: str, model: Any, train: TrainConfig) -> Path:
    """What every train_*.py calls, once: parses the command line, trains, shows the result. Returns the run's folder.

    name: of the experiment; model, train: its configuration, which flags override. Leaves the process with exit code 1
    where the run failed, 2 where the command line is wrong, 130 after Ctrl-C, each with one message.
    """
    description = getattr(sys.modules["__main__"], "__doc__", None) or name
    return launch_experiment(parse_experiment(name, model, train, description, sys.argv[1:]))


def launch_experiment(experiment: Experiment) -> Path:
    """Trains and shows the result; returns the run's folder. Ends the process as `launch` says where that fails."""
    try:
        summary = fit(experiment)
    except UserError as error:
        exit_with(str(error), 1)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        exit_with(
            "the device's memory is full: try a smaller --batch-size with a larger --grad-accum (their product is what "
            "one optimiser step sees), a smaller --eval-batch-size, --precision bf16, or, for a BDH, --recompute",
            1,
        )
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):  # BatchNorm's words
            raise
        exit_with(
            "the last batch of an epoch holds one image, of which this model's BatchNorm cannot take a deviation: "
            "choose a --batch-size (or --train-limit) that leaves more",
            1,
        )
    except KeyboardInterrupt:
        exit_with(
            f"stopped. The same command with --resume goes on from the last finished epoch of {experiment.folder}", 130
        )
    show_summary(experiment, summary)
    return experiment.folder


def show_summary(experiment: Experiment, summary: dict[str, Any]) -> None:
    """The closing table."""
    table = Table(title=f"{experiment.name}, seed {experiment.train.seed}", show_header=False)
    for key, value in (summary["test"] or {}).items():
        table.add_row(f"test {metric_of(key).label}", metric_of(key).show(value))
    if summary["test"] is None:
        table.add_row("test", "the data have no test part: the validation is the result")
    table.add_row("best epoch", str(summary["best"]["epoch"]))
    for key, value in summary["best"].items():
        if key != "epoch":
            metric = metric_of(key.removeprefix("val_"))
            table.add_row(f"its validation {metric.label}", metric.show(value))
    table.add_row("parameters", f"{summary['parameters']:,}")
    Console().print(table)
    print(f"run: {experiment.folder}")


def exit_with(message: str, code: int) -> NoReturn:
    """Ends the process with a message for the user."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)
