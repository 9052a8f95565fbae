"""Sweeps: many runs from one script, every setting of the swept fields with several seeds.

Each run is a process of its own and equals the run that the script makes with the same flags. Finished runs are
skipped, stopped ones resumed, and a failing one does not stop the others.
"""

import dataclasses
import difflib
import itertools
import sys
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training import processes
from training.command_line import INTERRUPTED, exit_with, flags_of, name_with_changes, parse_experiment
from training.config import UserError, require
from training.console import prepare_streams
from training.data.finding import cut_name
from training.experiment import Experiment, RunOptions, changed_fields
from training.launch import train, train_asked
from training.schedule import Job, Outcome, run_jobs

TRUTH = {"true": True, "yes": True, "false": False, "no": False}


@dataclass(frozen=True, kw_only=True)
class SweepOptions(RunOptions):
    """Options of a run or of a sweep."""

    sweep: str | None = None
    """fields to vary one at a time, with all values or those named: residual,init or residual=post/pre,n_layer=4/8"""
    cross: bool = False
    """sweep every combination of the fields' values instead of one change at a time"""
    seeds: int = 1
    """runs per setting: --seed, --seed + 1 and so on"""
    jobs: int = 1
    """runs at the same time, spread over the visible GPUs"""
    nproc_per_node: int = 1
    """processes that train each run together, each on a GPU of its own"""

    def __post_init__(self):
        super().__post_init__()
        for name in ("seeds", "jobs", "nproc_per_node"):
            require(getattr(self, name) >= 1, self, name, "must be at least 1")
        if self.sweep is None and (self.cross or self.seeds > 1 or self.jobs > 1):
            raise ValueError("cross, seeds and jobs belong to a sweep: name its fields with --sweep")
        if self.sweep is None and self.nproc_per_node > 1:
            raise ValueError("nproc_per_node belongs to a sweep: start a single run with torchrun --nproc-per-node")
        if self.sweep is not None and self.name is not None:
            raise ValueError("a sweep names its runs by their changes: leave out --name")


@dataclass(frozen=True)
class Plan:
    """The runs of a sweep."""

    default: str
    """name of the experiment with nothing varied"""
    experiments: list[Experiment]
    """one per setting and seed; all settings of a seed before those of the next"""
    refused: dict[str, str]
    """invalid settings, with the reason"""
    fields: list[str]
    """swept fields"""


Report = Callable[[list[Path], str, Path], Any]  # finished runs, name of the default, output file without suffix


def launch_sweep(experiment: Experiment, report: Report) -> None:
    """As `launch`, for a script that can also sweep. report: writes the table of the sweep's runs.

    Ends the process with exit code 2 for a wrong flag, 1 if a run failed (after all others are done), 130 after Ctrl-C.
    """
    prepare_streams()
    description = getattr(sys.modules["__main__"], "__doc__", None) or experiment.name

    def ask() -> Experiment:
        asked = parse_experiment(experiment, sys.argv[1:], description, SweepOptions())
        if asked.options.sweep is not None and (refusal := processes.refusal("a sweep")):
            exit_with(refusal, 1)
        return asked

    if processes.count() > 1:
        train_asked(ask)
        return
    asked = ask()
    options = asked.options
    if options.sweep is None:
        train(asked)
        return
    try:
        plan = make_plan(experiment, asked)
    except UserError as error:
        exit_with(str(error), 2)
    try:
        outcome = run_jobs(jobs_of(plan, experiment), options.jobs, processes=options.nproc_per_node)
    except UserError as error:
        exit_with(str(error), 1)
    except KeyboardInterrupt:
        without = " without --overwrite" if options.overwrite else ""
        exit_with(f"stopped. Repeat the command{without} to continue", INTERRUPTED)
    _report_sweep(plan, outcome, report, asked.options.runs_dir)


def _report_sweep(plan: Plan, outcome: Outcome, report: Report, runs_dir: Path) -> None:
    failures = plan.refused | outcome.failures
    failed = {*outcome.failures, *outcome.elsewhere}
    done = [each.folder for each in plan.experiments if Job(each, []).label not in failed]
    if done:
        try:
            report(done, plan.default, runs_dir / plan.default / cut_name(f"sweep_{'_'.join(plan.fields)}"))
        except (UserError, OSError) as error:
            failures["the table"] = str(error)
    if failures:
        exit_with("\n".join(["failed:", *(f"  {what}: {why}" for what, why in failures.items())]), 1)


def make_plan(experiment: Experiment, asked: Experiment) -> Plan:
    """The runs of a sweep. experiment: the script's; asked: with the command line's changes.

    Raises UserError for an unknown field or value.
    """
    options = asked.options
    axes: dict[str, list] = {}
    for text in filter(str.strip, options.sweep.split(",")):
        key, values = _parse_axis(text, asked.model, asked.train)
        axes[key] = list(dict.fromkeys([*axes.get(key, []), *values]))  # what is named twice is run once
    if not axes:
        raise UserError("--sweep: name the fields to vary, for instance --sweep residual,n_layer=4/8")
    experiments, refused = {}, {}
    for changes in _settings(axes, options.cross):
        try:
            model, train = (_replace(config, changes) for config in (asked.model, asked.train))
        except ValueError as error:
            refused[", ".join(f"{key}={value}" for key, value in changes.items())] = str(error)
            continue
        name = name_with_changes(experiment, model, train)
        experiments.setdefault(name, Experiment(name, model, train, options))  # one value may be the default's
    seeded = [
        dataclasses.replace(each, train=dataclasses.replace(each.train, seed=each.train.seed + k))
        for k in range(options.seeds)
        for each in experiments.values()
    ]
    return Plan(next(iter(experiments)), seeded, refused, list(axes))


def _settings(axes: dict[str, list], cross: bool) -> Iterator[dict[str, Any]]:
    """Changes to make; the first makes none."""
    yield {}
    if cross:
        yield from (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
    else:
        yield from ({key: value} for key, values in axes.items() for value in values)


def _parse_axis(text: str, *configs: Any) -> tuple[str, list]:
    """A field and its values, from "field" or "field=value/value"."""
    key, _, listed = text.strip().partition("=")
    key = key.replace("-", "_")
    hints = {name: kind for config in configs for name, kind in typing.get_type_hints(type(config)).items()}
    types_of = {field.name: hints[field.name] for config in configs for field in dataclasses.fields(config)}
    if key == "seed":
        raise UserError("--sweep seed: give the number of seeds with --seeds, as in --seeds 3")
    if key not in types_of:
        near = difflib.get_close_matches(key, types_of, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(sorted(types_of))}"
        raise UserError(f"--sweep {key}: no such field, {hint}")
    if tuple in (typing.get_origin(each) for each in (types_of[key], *typing.get_args(types_of[key]))):
        raise UserError(f"--sweep {key}: it takes several numbers at once, which a sweep cannot vary; use --{key}")
    choices = _choices(types_of[key])
    if not listed:
        if choices is None:
            raise UserError(f"--sweep {key}: name the values to try, for instance --sweep {key}=1/2")
        return key, choices
    return key, [_parse_value(key, each, types_of[key], choices) for each in _values(listed, types_of[key])]


def _values(listed: str, kind: Any) -> list[str]:
    """The values between slashes; a path keeps its slashes, and is a single value."""
    is_path = Path in (*typing.get_args(kind), kind)
    return [listed] if is_path else listed.split("/")


def _choices(kind: Any) -> list | None:
    """All values of a type, None if it has no list of them."""
    if kind is bool:
        return [True, False]
    return list(typing.get_args(kind)) if typing.get_origin(kind) is typing.Literal else None


def _parse_value(key: str, text: str, kind: Any, choices: list | None) -> Any:
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    try:
        if text == "None" and type(None) in kinds:
            return None
        if kind is bool:
            return TRUTH[text.lower()]
        if choices is not None:
            return choices[choices.index(text)]
        return kinds[0](text)
    except (ValueError, KeyError):
        allowed = f"choose from {', '.join(map(str, choices))}" if choices else f"it must be {kinds[0].__name__}"
        raise UserError(f"--sweep {key}={text}: {allowed}") from None


def _replace(config: Any, changes: dict[str, Any]) -> Any:
    """The config with those of the changes that it has fields for."""
    own = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{key: value for key, value in changes.items() if key in own})


def jobs_of(plan: Plan, experiment: Experiment) -> list[Job]:
    """The runs of a plan. experiment: the script's own."""
    return [Job(each, command_of(each, experiment)) for each in plan.experiments]


def command_of(asked: Experiment, experiment: Experiment) -> list[str]:
    """The command that makes this run by itself, with the script of the present process."""
    sweeping = {field.name for field in dataclasses.fields(SweepOptions)}
    sweeping -= {field.name for field in dataclasses.fields(RunOptions)}
    changed = changed_fields(experiment.model, asked.model) | changed_fields(experiment.train, asked.train)
    options = changed_fields(SweepOptions(), asked.options)
    options = {key: value for key, value in options.items() if key not in sweeping | {"resume", "overwrite"}}
    return [sys.executable, str(Path(sys.argv[0]).resolve()), *flags_of(changed | options)]
