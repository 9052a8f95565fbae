"""Many runs from one script: every setting of the swept fields with several seeds, each in a process of its own.

A run that is complete is not repeated, one that was stopped goes on where it was, and one that fails does not stop the
others. A run of a sweep is the same as the one that the script makes by itself with the same flags.
"""

import dataclasses
import difflib
import itertools
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.config import (
    Experiment,
    RunOptions,
    TrainConfig,
    UserError,
    changed_fields,
    full_experiment_name,
    parse_experiment,
)
from training.launch import exit_with, launch_experiment
from training.runs import Run
from training.schedule import Job, run_jobs

TRUTH = {"true": True, "yes": True, "false": False, "no": False}


@dataclass(frozen=True, kw_only=True)
class SweepOptions(RunOptions):
    """Options of a run, and of many."""

    sweep: str | None = None
    """fields to vary, each alone, with all values or those named: residual,init or residual=post/pre,n_layer=4/8"""
    cross: bool = False
    """sweep every combination of the fields' values instead of one change at a time"""
    seeds: int = 1
    """runs of each setting in a sweep: with --seed, --seed + 1 and so on"""
    jobs: int = 1
    """runs of a sweep at the same time"""

    def __post_init__(self):
        super().__post_init__()
        for name in ("seeds", "jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.sweep is None and (self.cross or self.seeds > 1 or self.jobs > 1):
            raise ValueError("cross, seeds and jobs are about a sweep: say of what with --sweep")
        if self.sweep is not None and self.name is not None:
            raise ValueError("a sweep names its runs by what is changed in them: leave out --name")


@dataclass(frozen=True)
class Plan:
    """The runs of a sweep."""

    default: str
    """name of the experiment with nothing varied"""
    experiments: list[Experiment]
    """one for each setting and seed; all settings of a seed before those of the next"""
    refused: dict[str, str]
    """settings that make no sense, and why"""
    fields: list[str]
    """what is varied"""


Report = Callable[[list[Path], str, Path], Any]  # finished runs, name of the default, file without suffix


def launch_sweep(name: str, model: Any, train: TrainConfig, report: Report) -> None:
    """As `launch`, for a script that can also sweep. report: makes the table of a sweep's runs.

    Ends the process with exit code 1 where a run failed (after all others are done), 130 after Ctrl-C.
    """
    description = getattr(sys.modules["__main__"], "__doc__", None) or name
    experiment = parse_experiment(name, model, train, description, sys.argv[1:], SweepOptions())
    if experiment.options.sweep is None:
        launch_experiment(experiment)
        return
    try:
        plan = make_plan(name, model, train, experiment)
        outcome = run_jobs(jobs_of(plan, model, train), experiment.options.jobs)
    except UserError as error:
        exit_with(str(error), 1)
    except KeyboardInterrupt:
        exit_with("stopped. The same command goes on where this one was", 130)
    failures = plan.refused | outcome.failures
    done = [each.folder for each in plan.experiments if Run(each.folder).read_summary()]
    if done:
        try:
            report(done, plan.default, experiment.options.runs_dir / plan.default / f"sweep_{'_'.join(plan.fields)}")
        except UserError as error:
            failures["the table"] = str(error)
    if failures:
        exit_with("\n".join(["these did not run:", *(f"  {what}: {why}" for what, why in failures.items())]), 1)


def make_plan(name: str, model: Any, train: TrainConfig, experiment: Experiment) -> Plan:
    """Expands the sweep. name, model, train: as the script has them; experiment: with the command line's changes.

    Raises UserError for a field or a value that is not there.
    """
    options = experiment.options
    axes = dict(_parse_axis(text, experiment.model, experiment.train) for text in options.sweep.split(","))
    experiments, refused = [], {}
    for changes in _settings(axes, options.cross):
        try:
            changed_model, changed_train = (
                _replace(config, changes) for config in (experiment.model, experiment.train)
            )
        except ValueError as error:
            refused[", ".join(f"{key}={value}" for key, value in changes.items())] = str(error)
            continue
        full_name = full_experiment_name(name, (model, train), (changed_model, changed_train))
        experiments.append(Experiment(full_name, changed_model, changed_train, options))
    seeded = [
        dataclasses.replace(each, train=dataclasses.replace(each.train, seed=each.train.seed + k))
        for k in range(options.seeds)
        for each in {each.name: each for each in experiments}.values()  # one value may be the default's
    ]
    return Plan(experiments[0].name, seeded, refused, list(axes))


def _settings(axes: dict[str, list], cross: bool) -> Iterator[dict[str, Any]]:
    """Changes to make, nothing first."""
    yield {}
    if cross:
        yield from (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
    else:
        yield from ({key: value} for key, values in axes.items() for value in values)


def _parse_axis(text: str, *configs: Any) -> tuple[str, list]:
    """A field and its values, from "field" or "field=value/value"."""
    key, _, listed = text.strip().partition("=")
    key = key.replace("-", "_")
    types_of = {field: kind for config in configs for field, kind in typing.get_type_hints(type(config)).items()}
    types_of.pop("seed", None)  # the other seeds have a flag of their own
    if key not in types_of:
        near = difflib.get_close_matches(key, types_of, n=1)
        hint = f", did you mean {near[0]}?" if near else f": there are {', '.join(sorted(types_of))}"
        raise UserError(f"--sweep {key}: there is no such field{hint}")
    choices = _choices(types_of[key])
    if not listed:
        if choices is None:
            raise UserError(f"--sweep {key}: name the values to try, for instance --sweep {key}=1/2")
        return key, choices
    return key, [_parse_value(key, each, types_of[key], choices) for each in listed.split("/")]


def _choices(kind: Any) -> list | None:
    """All values of a type, None where they cannot be counted."""
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


def jobs_of(plan: Plan, model: Any, train: TrainConfig) -> list[Job]:
    """The runs of a plan. model, train: the script's own configuration."""
    return [Job(each, command_of(each, model, train)) for each in plan.experiments]


def command_of(experiment: Experiment, model: Any, train: TrainConfig) -> list[str]:
    """The command line that makes this run by itself, from the script's own configuration."""
    own = {field.name for field in dataclasses.fields(SweepOptions)} - {
        field.name for field in dataclasses.fields(RunOptions)
    }
    changed = changed_fields(model, experiment.model) | changed_fields(train, experiment.train)
    options = changed_fields(SweepOptions(), experiment.options)
    options = {key: value for key, value in options.items() if key not in own | {"resume", "overwrite"}}
    return [sys.executable, str(Path(sys.argv[0]).resolve()), *_as_flags(changed | options)]


def _as_flags(fields: dict[str, Any]) -> Iterable[str]:
    for key, value in fields.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        else:
            yield from (f"--{flag}", str(value))
