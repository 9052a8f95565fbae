"""Makes the runs behind results/: a plan of experiments with seeds, most valuable first.

Complete runs are not repeated, stopped runs are resumed, and a failing run does not stop the others. config.json,
metrics.csv and summary.json of every complete run are copied to results/; python analysis/claims.py then updates
CLAIMS.md and the tables of README.md and docs/results.md. By default one run at a time uses all threads; --jobs 2 on
two cores gives each of two runs one thread. On a GPU, compare the images_per_sec of parallel runs with one run alone.

The plans whose names end in _cpu train on a CPU: in bf16 if it has bf16 instructions, otherwise in float32 (--precision
overrides; use it to continue runs of another machine). full_cpu is the published protocol at full size. --list measures
a few training steps of each model (about a minute) and estimates each run's minutes. With --budget-minutes the same
estimates decide: runs that fit into what is left of the budget are made in the plan's order, skipping longer ones. The
rest of the time goes to the longer ones: they are stopped when the budget ends and resume from their last epoch with
the same command, so one is started only if the rest is enough for one epoch.

    python reproduce.py --list
    python reproduce.py --precision bf16 --compile --budget-minutes 25     # on a CUDA GPU
    python reproduce.py --plan full_cpu --budget-minutes 600
    python reproduce.py --plan small_cpu --jobs 2     # reduced size: two hours on two cores with bf16
"""

import dataclasses
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from training import processes
from analysis.reading import RunFiles, read_runs
from plans import PLANS, Entry, Part, Plan, epoch_minutes, measure_step, training_flop
from training.command_line import INTERRUPTED, exit_with, experiment_of, flags_of, run_script
from training.config import ROOT, UserError, require
from training.device import cpu_count, describe_hardware, has_fast_bf16, tune_cpu_allocator
from training.experiment import RunOptions
from training.files import written_whole
from training.runs import Run
from training.schedule import Job, run_jobs
from training.stored import EXPORTED, SMALL_FILES, read_metrics


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run, and how."""

    plan: Literal["published", "full_cpu", "small_cpu", "recipe_small_cpu", "v4_small_cpu"] = "published"
    """published: all published experiments; full_cpu: those a CPU can do at full size; small_cpu: reduced size;
    recipe_small_cpu: what each field of the recipe brings; v4_small_cpu: v4 beside v2 and two ViTs, and what each of
    its parts is worth; both at reduced size"""
    list: bool = False
    """show the runs, their cost and state, and exit"""
    only: str | None = None
    """only experiments whose name contains this"""
    jobs: int = 1
    """runs at the same time, spread over the visible GPUs"""
    nproc_per_node: int = 1
    """processes that train each run together, each on a GPU of its own"""
    budget_minutes: float | None = None
    """stop after this time; the same command continues"""
    precision: Literal["float32", "tf32", "bf16", "fp16"] | None = None
    """matmul precision of all runs; default: the plan's"""
    compile: bool = False
    """use torch.compile"""
    device: str = "auto"
    """auto (plans that end in _cpu: the CPU), cuda, cuda:1, mps or cpu"""
    data_dir: Path | None = None
    """folder that holds data_cifar10 and the like; default: $VISION_BDH_DATA, else beside the scripts"""
    runs_dir: Path = ROOT / "runs"
    """folder for runs and their checkpoints"""
    results_dir: Path = ROOT / "results"
    """folder for the small files of complete runs"""

    def __post_init__(self):
        for name in ("jobs", "nproc_per_node"):
            require(getattr(self, name) >= 1, self, name, "must be at least 1")
        budget = self.budget_minutes
        require(budget is None or budget > 0, self, "budget_minutes", "must be above 0")

    @property
    def threads(self) -> int:
        """Threads of each process on a CPU."""
        together = self.jobs * self.nproc_per_node
        return torch.get_num_threads() if together == 1 else max(1, cpu_count() // together)


@dataclass(frozen=True)
class Planned:
    """A run of a plan."""

    part: Part
    job: Job
    kept: Path
    """folder under results/ for its small files"""

    def is_kept(self) -> bool:
        """Whether its files are under results/. Raises UserError if a damaged or different run is there, or a part."""
        remedy = "restore it, or move the folder away"
        complete = Run(self.kept).is_complete(self.job.experiment)
        missing = [name for name in SMALL_FILES if not (self.kept / name).is_file()]
        if missing and (self.kept / EXPORTED).exists():
            raise UserError(f"{self.kept} has weights but not {missing[0]}: {remedy}")
        if complete and not missing and len(read_metrics(self.kept, remedy)) != self.job.experiment.train.epochs:
            raise UserError(f"{self.kept / 'metrics.csv'} has lost rows: {remedy}")
        return complete and not missing

    def run(self) -> RunFiles | None:
        """The run so far; None if it has not started or cannot be read."""
        folder = self.job.experiment.folder
        started = (folder / "config.json").exists() and (folder / "metrics.csv").exists()
        return next(iter(read_runs([folder] * started)), None)

    def keep(self) -> None:
        """Copies the files from the run, unless they are there. Raises UserError if that fails."""
        if self.is_kept():
            return
        run = Run(self.job.experiment.folder)
        if not run.is_complete(self.job.experiment):
            raise UserError(f"{run.folder / 'summary.json'} is missing: the same command tests the run again")
        run.mend_metrics(self.job.experiment.train.epochs)
        for name in SMALL_FILES:
            with written_whole(self.kept / name) as partial:
                shutil.copyfile(run.folder / name, partial)


def planned_runs(plan: Plan, options: Options) -> list[Planned]:
    """Every run of the plan in order; a run in several parts belongs to the first."""
    planned: dict[str, Planned] = {}
    for part in plan.parts:
        for job in (job for entry in part.entries for job in jobs_of(plan, entry, options)):
            kept = options.results_dir.joinpath(plan.folder, *job.experiment.folder.parts[-2:])
            if options.only is None or options.only in job.experiment.name:
                planned.setdefault(job.label, Planned(part, job, kept))
    return list(planned.values())


def precision_of(plan: Plan, options: Options) -> str | None:
    """Precision of all runs; None: as in each script and its flags."""
    if options.precision or not plan.on_cpu:
        return options.precision
    return "bf16" if has_fast_bf16(torch.device("cpu")) else "float32"


def jobs_of(plan: Plan, entry: Entry, options: Options) -> Iterator[Job]:
    """The runs of one experiment."""
    precision = precision_of(plan, options)
    common = [*(["--precision", precision] if precision else []), *["--compile"] * options.compile]
    flags = [*entry.flags.split(), *common]
    asked = experiment_of(entry.script, " ".join(flags))
    device = "cpu" if plan.on_cpu and options.device == "auto" else options.device
    places = {"device": device, "runs_dir": options.runs_dir.resolve()}
    places |= {"data_dir": options.data_dir.resolve()} if options.data_dir else {}
    for seed in entry.seeds:
        changed, named = {"seed": seed}, {}
        if entry.goes_on_from:
            source = experiment_of(entry.goes_on_from, " ".join(common)).name
            changed["start_from"] = options.runs_dir.resolve() / source / f"seed{seed}" / "best.pt"
            named["name"] = asked.name  # otherwise the name would contain the path of the weights
        experiment = dataclasses.replace(
            asked, train=dataclasses.replace(asked.train, **changed), options=RunOptions(**places, **named)
        )
        given = flags_of(changed | places | named)
        yield Job(experiment, [sys.executable, str(ROOT / entry.script), *flags, *given])


# ---------------------------------------------------------------------------- time


def estimate(planned: Sequence[Planned], options: Options) -> dict[str, float]:
    """Minutes of an epoch of each run, by label, from measured steps. Prints what was measured."""
    torch.set_num_threads(options.threads)
    tune_cpu_allocator()
    about = describe_hardware(torch.device("cpu"))
    print(f"measuring training steps on {about['name']}, {options.threads} threads", flush=True)
    seconds: dict[str, float] = {}  # by model, batch size and precision
    minutes = {}
    for each in planned:
        experiment = each.job.experiment
        key = f"{experiment.model}, batch {experiment.train.batch_size}, {experiment.train.precision}"
        if key not in seconds:
            seconds[key] = measure_step(experiment)
            print(
                f"  {experiment.name}: {seconds[key]:.3f} s a step of {experiment.train.batch_size} images", flush=True
            )
        minutes[each.job.label] = epoch_minutes(experiment, seconds[key]) / options.nproc_per_node
    return minutes


def choose_runs(planned: Sequence[Planned], epoch: dict[str, float], budget: float, jobs: int = 1) -> list[Planned]:
    """The runs to make in this time, in order: those that fit, then longer ones if the rest is enough for an epoch.

    epoch: minutes of an epoch of each run. budget: minutes. jobs: runs at once.
    """
    fitting, longer, left = [], [], budget * jobs
    for each in planned:
        run = each.run()
        minutes = epoch[each.job.label] * (each.job.experiment.train.epochs - (len(run.epochs) if run else 0))
        if minutes <= min(left, budget):
            fitting.append(each)
            left -= minutes
        else:
            longer.append(each)
    return [*fitting, *(each for each in longer if epoch[each.job.label] <= min(left, budget))]


# ---------------------------------------------------------------------------- output


def show(planned: Sequence[Planned], epoch: dict[str, float]) -> None:
    """A table for each part: cost and state of each run. epoch: as in `choose_runs`, or empty."""
    console = Console()
    for question, group in groupby(planned, lambda each: each.part.question):
        members = list(group)
        names = [each.job.experiment.name.split("+") for each in members]
        several = len(set(map(tuple, names))) > 1
        shared = [part for part in names[0][1:] if several and all(part in name for name in names)]
        table = Table(title=question, title_justify="left", caption="all with " + ", ".join(shared) if shared else None)
        table.add_column("experiment", overflow="fold")
        for title in ("seed", "PFLOP", "state", "minutes", *(["estimated minutes"] if epoch else [])):
            table.add_column(title, no_wrap=True)
        for each, name in zip(members, names, strict=True):
            experiment = each.job.experiment
            own = ", ".join(part for part in name if part not in shared)
            work = f"{training_flop(experiment) / 1e15:.3g}"
            whole = [f"{experiment.train.epochs * epoch[each.job.label]:.0f}"] if epoch else []
            table.add_row(own, str(experiment.train.seed), work, *state_of(each), *whole)
        console.print(table)


def state_of(planned: Planned) -> tuple[str, str]:
    """How far a run is, and the minutes it took if it is complete."""
    try:
        kept = planned.is_kept()
    except UserError:
        return "other or damaged run", ""
    run = next(iter(read_runs([planned.kept])), None) if kept else planned.run()
    if run is None:
        return "", ""
    if run.summary is None:
        return f"epoch {len(run.epochs)} of {planned.job.experiment.train.epochs}", ""
    return "kept" if kept else "complete", f"{run.seconds / 60:.1f}"


def main(options: Options) -> None:
    if refusal := processes.refusal("reproduce.py"):
        time.sleep(10 * processes.rank())  # the main process is the first to end, and says why
        raise UserError(refusal)
    plan = PLANS[options.plan]
    planned = planned_runs(plan, options)
    if not planned:
        raise UserError(f"--only {options.only}: no experiment of this plan has that in its name, see --list")
    if plan.on_cpu:
        has = "the CPU has bf16 instructions" if has_fast_bf16(torch.device("cpu")) else "no bf16 instructions found"
        print(f"precision {precision_of(plan, options)} ({'--precision' if options.precision else has})")
    if options.list:
        show(planned, estimate(planned, options) if plan.on_cpu else {})
        return
    make(plan, planned, options)


def add_sources(todo: dict[str, Planned], planned: Sequence[Planned]) -> dict[str, Planned]:
    """todo and the runs that it starts from, also those of which only the small files are here; in the plan's order."""
    needed = {each.job.source for each in todo.values()}
    return {
        each.job.label: each
        for each in planned
        if each.job.label in todo or each.job.experiment.folder.resolve() in needed
    }


def make(plan: Plan, planned: Sequence[Planned], options: Options) -> None:
    """Makes the runs that are not under results/ yet; exits with code 1 if one fails, 130 after Ctrl-C."""
    failures, todo = {}, {}
    for each in planned:
        try:
            if not each.is_kept():
                todo[each.job.label] = each
        except UserError as error:
            failures[each.job.label] = str(error)
    print(
        f"{len(planned)} runs in the plan, {len(planned) - len(todo) - len(failures)} already in {options.results_dir}"
    )
    todo = add_sources(todo, [each for each in planned if each.job.label not in failures])
    chosen, budget = list(todo.values()), options.budget_minutes
    if plan.on_cpu and budget and chosen:
        started = time.monotonic()
        epoch = estimate(chosen, options)
        budget -= (time.monotonic() - started) / 60
        chosen = choose_runs(chosen, epoch, budget, options.jobs)
    try:
        jobs = [each.job for each in chosen]
        outcome = run_jobs(
            jobs, options.jobs, budget, lambda job: todo[job.label].keep(), processes=options.nproc_per_node
        )
    except KeyboardInterrupt:
        exit_with("stopped; the same command continues", INTERRUPTED)
    started = {each.job.label for each in chosen}
    if left := [label for label in todo if label not in started or label in outcome.left]:
        print(f"the time is over, {len(left)} runs left; the same command continues with {left[0]}")
    if failures := failures | outcome.failures:
        exit_with("\n".join(["these runs failed:", *(f"  {what}: {why}" for what, why in failures.items())]), 1)


if __name__ == "__main__":
    run_script(main, __doc__)
