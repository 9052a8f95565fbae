"""Command lines: flags from configs and back, and the experiment of a script."""

import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import tyro

from training.config import ROOT, UserError
from training.console import prepare_streams
from training.experiment import Experiment, RunOptions, changed_fields, name_of_file
from training.files import unwritable

INTERRUPTED = 130  # exit code after Ctrl-C


def parse_experiment(
    experiment: Experiment, args: list[str], description: str = "", options: RunOptions | None = None
) -> Experiment:
    """The experiment with flags applied: each field of model, training and options is a flag of its name.

    options: options with more fields than the experiment's own. tyro prints help; unknown flags and values that a
    config refuses end the process with exit code 2.
    """
    options = options or experiment.options
    parts = {"model": experiment.model, "train": experiment.train, "run": options}
    flags_class = dataclasses.make_dataclass("Flags", [(key, type(of)) for key, of in parts.items()], frozen=True)
    flags = tyro.cli(
        flags_class,
        default=flags_class(**parts),
        description=description,
        args=args,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    encoder, start_from = getattr(flags.model, "encoder", None), flags.train.start_from
    if encoder and start_from not in (None, experiment.train.start_from):
        exit_with(f"encoder = {encoder} and start_from = {start_from} both say what to start from: leave one out", 2)
    name = flags.run.name or name_with_changes(experiment, flags.model, flags.train)
    # an encoder's checkpoint replaces that of the script, which is then not read and not recorded
    train = dataclasses.replace(flags.train, start_from=None) if encoder else flags.train
    made = Experiment(name, flags.model, train, flags.run)
    try:
        if not made.options.resume:
            made.check_new()
    except ValueError as error:
        exit_with(str(error), 2)
    return made


def name_with_changes(experiment: Experiment, model: Any, train: Any) -> str:
    """The experiment's name and every field but the seed that model and train change, as v2_cifar10+epochs=5."""
    changed = changed_fields(experiment.model, model) | changed_fields(experiment.train, train)
    changed.pop("seed", None)
    return "+".join([experiment.name, *(f"{key}={in_a_name(value)}" for key, value in sorted(changed.items()))])


def flags_of(fields: dict[str, Any]) -> list[str]:
    """Fields as command-line arguments: --n-layer 12, --skips or --no-skips, --img-size 360 480."""
    flags = []
    for key, value in fields.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", *(map(str, value) if isinstance(value, list | tuple) else [str(value)])]
    return flags


@cache
def experiment_of(script: str, flags: str = "") -> Experiment:
    """EXPERIMENT of a script at the top level, such as train_v2_cifar10.py, with flags applied."""
    return parse_experiment(_defined_in(script), flags.split(), description=script)


@cache
def _defined_in(script: str) -> Experiment:
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EXPERIMENT


def run_script(main: Callable, description: str) -> None:
    """Calls main with its one argument, a dataclass, made from the command line: its fields are the flags.

    Ends the process with one message: exit code 1 if main raises UserError, a file cannot be read or written, or memory
    runs out, 2 for a wrong flag, 130 after Ctrl-C.
    """
    prepare_streams()
    try:
        (options_class,) = (of for name, of in get_type_hints(main).items() if name != "return")
        options = tyro.cli(options_class, description=description, config=(tyro.conf.OmitArgPrefixes,))
        check_outputs(options)
        main(options)
    except (UserError, OSError) as error:
        exit_with(str(error), 1)
    except (RuntimeError, MemoryError) as error:
        from training.device import is_out_of_memory  # imports PyTorch

        if not is_out_of_memory(error):
            raise
        exit_with("out of memory: give smaller sizes, such as a smaller batch, image or model", 1)
    except KeyboardInterrupt:
        exit_with("stopped", INTERRUPTED)


def check_outputs(options: Any) -> None:
    """Raises UserError if the folder of --output-dir or --output cannot be written, before any work is done for it."""
    for name in ("output_dir", "output"):
        path = getattr(options, name, None)
        if isinstance(path, Path):
            folder = path if name == "output_dir" else path.absolute().parent
            if problem := unwritable(folder):
                raise UserError(f"--{name.replace('_', '-')} {path} cannot be written ({problem}): name another place")


def exit_with(message: str, code: int) -> NoReturn:
    """Ends the process with a message on stderr."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def in_a_name(value: Any) -> Any:
    """A value as part of a folder name."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return name_of_file(value) if isinstance(value, Path) else value
