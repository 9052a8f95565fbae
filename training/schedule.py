"""Many runs, each in a process of its own: several at once, one failing alone, stopped and continued at any time.

What is complete is not repeated, and what was stopped goes on from its last finished epoch.
"""

import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from training.config import Experiment, UserError
from training.runs import Run

LOG = "log.txt"  # in a run's folder: what its process printed
LOOK = 0.1  # seconds between two looks at what runs


@dataclass(frozen=True)
class Job:
    """A run to make."""

    experiment: Experiment
    """what it is; its options say where it lies, and whether what lies there is replaced"""
    command: Sequence[str]
    """the command line that makes it by itself, without resume and overwrite"""

    @property
    def label(self) -> str:
        return f"{self.experiment.name}, seed {self.experiment.train.seed}"

    @property
    def source(self) -> Path | None:
        """Folder of the run whose weights it starts from."""
        start = self.experiment.train.start_from
        return start.resolve().parent if start else None


@dataclass
class Outcome:
    """What became of the jobs."""

    failures: dict[str, str] = field(default_factory=dict)
    """what could not be made, and why"""
    left: list[str] = field(default_factory=list)
    """what is not complete because the time was over"""


class Process(NamedTuple):
    job: Job
    popen: subprocess.Popen
    started: float


def run_jobs(
    jobs: Sequence[Job], at_once: int, minutes: float | None = None, keep: Callable[[Job], Any] = lambda job: None
) -> Outcome:
    """Makes every run that is not complete, in this order, so many at once.

    A run that starts from the weights of another waits until that is complete. minutes: when they are over, what runs
    is stopped, and the rest is left; None for no limit. keep: called for each run that is complete, also for those that
    were so before; where it raises UserError, the run counts as failed.

    Raises KeyboardInterrupt after Ctrl-C or SIGTERM, when all runs have stopped.
    """
    outcome, waiting, complete = Outcome(), [], 0
    for job in jobs:
        try:
            if job.experiment.options.overwrite or not is_complete(job.experiment):
                waiting.append(job)
            else:
                keep(job)
                complete += 1
        except UserError as error:  # a run of this name, but of another configuration
            outcome.failures[job.label] = str(error)
    print(f"{len(jobs)} runs, {complete} of them complete", flush=True)
    _Schedule(waiting, at_once, keep, outcome).work(minutes)
    return outcome


def is_complete(experiment: Experiment) -> bool:
    """Whether there is a finished run of this very configuration. Raises UserError for one of another."""
    run = Run(experiment.folder)
    if not run.read_summary():
        return False
    options = dataclasses.replace(experiment.options, resume=True, overwrite=False)
    run.prepare(dataclasses.replace(experiment, options=options))
    return True


def command_now(job: Job) -> list[str]:
    """The job's command with the flag that what lies in the run's folder asks for."""
    folder = job.experiment.folder
    if job.experiment.options.overwrite:
        return [*job.command, "--overwrite"]
    if any((folder / name).exists() for name in ("last.pt", "previous.pt")):
        return [*job.command, "--resume"]
    if (folder / "config.json").exists():
        return [*job.command, "--overwrite"]  # stopped before its first checkpoint: nothing is lost
    return [*job.command]


class _Schedule:
    def __init__(self, waiting: list[Job], at_once: int, keep: Callable[[Job], Any], outcome: Outcome):
        self.waiting, self.at_once, self.keep, self.outcome = waiting, at_once, keep, outcome
        self.running: list[Process] = []
        self.ended, self.total = 0, len(waiting)
        # more threads than cores slow all runs down
        threads = {} if at_once == 1 else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // at_once))}
        self.environment = dict(os.environ) | threads

    def work(self, minutes: float | None) -> None:
        ends = None if minutes is None else time.monotonic() + 60 * minutes
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            while self.waiting or self.running:
                if ends is not None and time.monotonic() >= ends:
                    break
                self.look()
                self.start_what_can()
                time.sleep(LOOK)
        finally:
            self.stop()
            signal.signal(signal.SIGTERM, before)
        self.outcome.left += [job.label for job in self.waiting]

    def start_what_can(self) -> None:
        while len(self.running) < self.at_once and self.waiting:
            busy = {job.experiment.folder.resolve() for job in (*self.waiting, *(each.job for each in self.running))}
            ready = next((job for job in self.waiting if job.source not in busy), None)
            if ready is None and self.running:
                return
            ready = ready or self.waiting[0]  # what it starts from is no run to be made: its own message says so
            self.waiting.remove(ready)
            self.start(ready)

    def start(self, job: Job) -> None:
        log = job.experiment.folder / LOG
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as file:
                popen = subprocess.Popen(
                    command_now(job),
                    stdout=file,
                    stderr=file,
                    env=self.environment,
                    start_new_session=True,  # so that Ctrl-C reaches it once, from here
                    preexec_fn=_heed_interrupts,
                )
        except OSError as error:
            self.report(job, f"{log} could not be written ({error.strerror})", 0.0)
            return
        self.running.append(Process(job, popen, time.perf_counter()))

    def look(self) -> None:
        """Takes note of runs that have ended."""
        for each in [each for each in self.running if each.popen.poll() is not None]:
            self.running.remove(each)
            problem = _problem(each.popen.returncode, each.job.experiment.folder / LOG)
            if problem is None:
                try:
                    self.keep(each.job)
                except UserError as error:
                    problem = str(error)
            self.report(each.job, problem, time.perf_counter() - each.started)

    def report(self, job: Job, problem: str | None, seconds: float) -> None:
        self.ended += 1
        if problem:
            self.outcome.failures[job.label] = problem
        happened = f"failed: {problem}" if problem else "done"
        print(f"[{self.ended}/{self.total}] {job.label}: {happened} ({seconds:.0f} s)", flush=True)

    def stop(self) -> None:
        """Tells every process to stop, as Ctrl-C would, and waits; each keeps its last finished epoch."""
        self.look()  # what has ended by itself is no longer there to be stopped
        for each in self.running:
            each.popen.send_signal(signal.SIGINT)
        for each in self.running:
            each.popen.wait()
        stopped = [each for each in self.running if each.popen.returncode != 0]
        self.running = [each for each in self.running if each not in stopped]
        self.look()  # those that came to their end all the same
        self.waiting[:0] = [each.job for each in stopped]


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _heed_interrupts() -> None:
    """In a new process: a shell lets what it starts in the background ignore SIGINT, and that is inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _problem(code: int, log: Path) -> str | None:
    """What a process that ended with this code said last."""
    if code == 0:
        return None
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("error: ")] or lines or ["it said nothing"]
    how = f"killed by signal {-code}, after saying: " if code < 0 else ""
    return f"{how}{said[-1].removeprefix('error: ')} (all of it in {log})"
