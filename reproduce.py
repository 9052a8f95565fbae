"""Makes the runs for results/: every published experiment again, with seeds, in the order of their value.

What is complete is not repeated, what was stopped goes on, and a run that fails does not stop the others. Of each
complete run config.json, metrics.csv and summary.json are kept, a few kB; python analysis/update_readme.py then brings
README and CLAIMS.md up to date. On one GPU several runs at once (--jobs) may or may not be faster: compare their
images_per_sec, added up, with that of one alone.

    python benchmarks/reproduce.py --list
    python benchmarks/reproduce.py --precision bf16 --compile --budget-minutes 25
    python benchmarks/reproduce.py --plan small_cpu --jobs 2       # no GPU: two hours on two cores that have bf16
"""

import dataclasses
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from analysis.published import asked_of
from analysis.reading import DAMAGED, read_run
from benchmarks.plans import PLANS, Entry, Part, Plan, training_flop
from training.config import ROOT, RunOptions, UserError
from training.launch import exit_with
from training.runs import Run
from training.schedule import Job, run_jobs
from training.script import run_script

KEPT = ("config.json", "metrics.csv", "summary.json")  # the last one says that the others are there


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which runs, and how."""

    plan: Literal["published", "small_cpu"] = "published"
    """all published experiments at their size; or a version of reduced width and data for two CPU cores"""
    list: bool = False
    """only show the runs, what each takes and what is there already"""
    only: str | None = None
    """only experiments whose name has this in it"""
    jobs: int = 1
    """runs at the same time"""
    budget_minutes: float | None = None
    """stop after this time; the same command goes on"""
    precision: Literal["float32", "tf32", "bf16"] | None = None
    """of the products in all runs; default: the plan's"""
    compile: bool = False
    """run the models through torch.compile"""
    device: str = "auto"
    """auto, cuda, cuda:1, mps or cpu"""
    data_dir: Path | None = None
    """folder that holds data_cifar10 and the like; default: $VISION_BDH_DATA, else beside the scripts"""
    runs_dir: Path = ROOT / "runs"
    """folder of the runs, with their checkpoints"""
    results_dir: Path = ROOT / "results"
    """folder in which the small files of complete runs are kept"""

    def __post_init__(self):
        if self.jobs < 1:
            raise ValueError(f"jobs = {self.jobs} must be at least 1")
        if self.budget_minutes is not None and not self.budget_minutes > 0:
            raise ValueError(f"budget_minutes = {self.budget_minutes} must be above 0")


@dataclass(frozen=True)
class Planned:
    """A run of a plan."""

    part: Part
    job: Job
    kept: Path
    """folder of its small files"""

    def is_kept(self) -> bool:
        """Whether they are there. Raises UserError where they are those of another configuration."""
        run = Run(self.kept)
        if not run.read_summary():
            return False
        if changes := run.differences(self.job.experiment):
            raise UserError(f"{self.kept} holds a run of another configuration ({'; '.join(changes)}): move it away")
        return True

    def keep(self) -> None:
        """Copies them from the run. Raises UserError if the disk refuses."""
        try:
            self.kept.mkdir(parents=True, exist_ok=True)
            for name in KEPT:
                shutil.copyfile(self.job.experiment.folder / name, self.kept / f"{name}.partial")
                (self.kept / f"{name}.partial").replace(self.kept / name)
        except OSError as error:
            raise UserError(
                f"{self.kept} could not be written ({error.strerror}): the same command tries again"
            ) from None


def planned_runs(plan: Plan, options: Options) -> list[Planned]:
    """Every run of the plan in order, once, where it comes first."""
    planned: dict[str, Planned] = {}
    for part in plan.parts:
        for job in (job for entry in part.entries for job in jobs_of(entry, options)):
            kept = options.results_dir.joinpath(plan.folder, *job.experiment.folder.parts[-2:])
            if options.only is None or options.only in job.experiment.name:
                planned.setdefault(job.label, Planned(part, job, kept))
    return list(planned.values())


def jobs_of(entry: Entry, options: Options) -> Iterator[Job]:
    """The runs of one experiment."""
    common = [*(["--precision", options.precision] if options.precision else []), *["--compile"] * options.compile]
    flags = [*entry.flags.split(), *common]
    asked = asked_of(entry.script, " ".join(flags))
    places = {"device": options.device, "runs_dir": options.runs_dir.resolve()}
    places |= {"data_dir": options.data_dir.resolve()} if options.data_dir else {}
    for seed in entry.seeds:
        changed, named = {"seed": seed}, {}
        if entry.goes_on_from:
            source = asked_of(entry.goes_on_from, " ".join(common)).name
            changed["start_from"] = options.runs_dir.resolve() / source / f"seed{seed}" / "best.pt"
            named["name"] = asked.name  # or it would tell where the weights lay
        experiment = dataclasses.replace(
            asked, train=dataclasses.replace(asked.train, **changed), options=RunOptions(**places, **named)
        )
        given = [f"--{key.replace('_', '-')}={value}" for key, value in (changed | places | named).items()]
        yield Job(experiment, [sys.executable, str(ROOT / entry.script), *flags, *given])


def show(planned: Sequence[Planned]) -> None:
    """What there is to run: the work of its training, how far it is, and what it took where it is complete."""
    console = Console()
    for question, group in groupby(planned, lambda each: each.part.question):
        members = list(group)
        names = [each.job.experiment.name.split("+") for each in members]
        shared = (
            [part for part in names[0][1:] if all(part in name for name in names)]
            if len({*map(tuple, names)}) > 1
            else []
        )
        table = Table(title=question, title_justify="left", caption="all with " + ", ".join(shared) if shared else None)
        table.add_column("experiment", overflow="fold")
        for title in ("seed", "PFLOP", "state", "minutes"):
            table.add_column(title, no_wrap=True)
        for each, name in zip(members, names, strict=True):
            experiment = each.job.experiment
            own = ", ".join(part for part in name if part not in shared)
            work = f"{training_flop(experiment) / 1e15:.3g}"
            table.add_row(own, str(experiment.train.seed), work, *state_of(each))
        console.print(table)


def state_of(planned: Planned) -> tuple[str, str]:
    """How far a run is, in words, and the minutes that it took, if it is complete."""
    experiment = planned.job.experiment
    try:
        kept = planned.is_kept()
        run = read_run(planned.kept if kept else experiment.folder)
    except UserError:
        return "another configuration", ""
    except DAMAGED:
        return "", ""  # not begun
    if run.summary is None:
        return f"epoch {len(run.epochs)} of {experiment.train.epochs}", ""
    return "kept" if kept else "complete", f"{run.seconds / 60:.1f}"


def main(options: Options) -> None:
    planned = planned_runs(PLANS[options.plan], options)
    if not planned:
        raise UserError(f"--only {options.only}: no experiment of this plan has that in its name: see --list")
    if options.list:
        show(planned)
        return
    failures, todo = {}, {}
    for each in planned:
        try:
            if not each.is_kept():
                todo[each.job.label] = each
        except UserError as error:
            failures[each.job.label] = str(error)
    print(f"{len(planned)} runs in the plan, results of {len(planned) - len(todo) - len(failures)} are kept already")
    try:
        jobs = [each.job for each in todo.values()]
        outcome = run_jobs(jobs, options.jobs, options.budget_minutes, keep=lambda job: todo[job.label].keep())
    except KeyboardInterrupt:
        exit_with("stopped. The same command goes on where this one was", 130)
    if outcome.left:
        print(f"the time is over; runs left: {len(outcome.left)}. The same command goes on, with {outcome.left[0]}")
    if failures := failures | outcome.failures:
        exit_with("\n".join(["these did not run:", *(f"  {what}: {why}" for what, why in failures.items())]), 1)


if __name__ == "__main__":
    run_script(main, __doc__)
