"""Many runs, each a process of its own: several at once, stopped and continued at any time.

Finished runs are skipped, stopped ones resumed from their last epoch, and a failing one does not stop the others.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from training.config import UserError
from training.device import cpu_count
from training.experiment import Experiment
from training.parent import WATCH, heed_interrupts
from training.runs import Run

LOG = "log.txt"  # in a run's folder: the output of its process
LOOK = 0.1  # seconds between two looks at the running processes
STOP_SIGNALS = ("SIGTERM", "SIGHUP")  # SIGHUP: the terminal was closed; absent on Windows


@dataclass(frozen=True)
class Job:
    """A run to make."""

    experiment: Experiment
    """its options say where the run lies, and whether what lies there is replaced"""
    command: Sequence[str]
    """the command that makes it, without resume and overwrite"""

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
    """label -> reason"""
    elsewhere: dict[str, str] = field(default_factory=dict)
    """label -> who trains this run at the moment"""
    left: list[str] = field(default_factory=list)
    """not complete when the time was over"""


class Process(NamedTuple):
    job: Job
    popen: subprocess.Popen
    started: float
    gpus: list[str]
    log_start: int
    """bytes that earlier attempts wrote into the log"""


def run_jobs(
    jobs: Sequence[Job],
    at_once: int,
    minutes: float | None = None,
    keep: Callable[[Job], Any] = lambda job: None,
    processes: int = 1,
) -> Outcome:
    """Runs incomplete jobs in order, `at_once` at a time, spread over the visible GPUs.

    A run that starts from another's weights waits for that one, and fails if that one is not completed here. minutes:
    stop after this time and leave the rest; None for no limit. keep: called for each complete run, including those
    complete before; if it raises UserError, the run counts as failed. processes: that train each run together, each on
    a GPU of its own.

    Raises KeyboardInterrupt after Ctrl-C, SIGTERM or SIGHUP, when all runs have stopped.
    """
    outcome, waiting, complete = Outcome(), [], 0
    for job in jobs:
        try:
            if job.experiment.options.overwrite or not Run(job.experiment.folder).is_complete(job.experiment):
                waiting.append(job)
            else:
                keep(job)
                complete += 1
        except UserError as error:  # another configuration, or a damaged run
            outcome.failures[job.label] = str(error)
    print(f"{len(jobs)} runs, {complete} of them complete", flush=True)
    _Schedule(jobs, waiting, at_once, keep, outcome, processes).work(minutes)
    return outcome


def command_now(job: Job, processes: int = 1) -> list[str]:
    """The job's command with --resume or --overwrite, as the state of its folder requires.

    Through torchrun, if several processes train the run together.
    """
    folder, command = job.experiment.folder, list(job.command)
    if processes > 1:  # standalone: on a free port, so that several can run at once
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command[1:1] = torchrun
    if job.experiment.options.overwrite:
        return [*command, "--overwrite"]
    if Run(folder).has_checkpoint():
        return [*command, "--resume"]
    if (folder / "config.json").exists():
        return [*command, "--overwrite"]  # stopped before its first checkpoint: nothing is lost
    return command


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(number) for number in range(torch.cuda.device_count())]
    return [each.strip() for each in named.split(",")][: torch.cuda.device_count()]


def least_busy(gpus: Sequence[str], busy: Sequence[str], n: int) -> list[str]:
    """n of the GPUs, those first that occur least in busy (once for each run on them); all if there are fewer."""
    return sorted(gpus, key=busy.count)[:n]


class _Schedule:
    def __init__(
        self,
        jobs: Sequence[Job],
        waiting: list[Job],
        at_once: int,
        keep: Callable[[Job], Any],
        outcome: Outcome,
        processes: int = 1,
    ):
        """jobs: all of them, also those that are complete or cannot run."""
        self.waiting, self.at_once, self.keep, self.outcome = waiting, at_once, keep, outcome
        self.processes = processes
        self.labels = {job.experiment.folder.resolve(): job.label for job in jobs}
        self.gpus = visible_gpus() if at_once > 1 else []
        self.running: list[Process] = []
        self.ended, self.total = 0, len(waiting)
        # more threads than cores slow all runs down
        together = at_once * processes
        threads = {} if together == 1 else {"OMP_NUM_THREADS": str(max(1, cpu_count() // together))}
        self.environment = dict(os.environ) | threads | {WATCH: "1"}

    def work(self, minutes: float | None) -> None:
        ends = None if minutes is None else time.monotonic() + 60 * minutes
        with _interrupted_by(STOP_SIGNALS):
            try:
                while self.waiting or self.running:
                    if ends is not None and time.monotonic() >= ends:
                        break
                    self.look()
                    self.start_what_can()
                    time.sleep(LOOK)
            finally:
                self.stop()
        self.outcome.left += [job.label for job in self.waiting]

    def start_what_can(self) -> None:
        while len(self.running) < self.at_once and self.waiting:
            busy = {job.experiment.folder.resolve() for job in (*self.waiting, *(each.job for each in self.running))}
            ready = next((job for job in self.waiting if job.source not in busy), None)
            if ready is None and self.running:
                return
            ready = ready or self.waiting[0]  # its weights come from no job here: its own message says so
            self.waiting.remove(ready)
            if problem := self.problem_of_source(ready):
                self.report(ready, f"it goes on from a run that {problem}", 0.0)
            elif Run(ready.experiment.folder).is_locked():
                self.report_elsewhere(ready)
            else:
                self.start(ready)

    def problem_of_source(self, job: Job) -> str | None:
        """What became of the run whose weights it needs, if that one is not completed here."""
        label = self.labels.get(job.source)
        if label in self.outcome.failures:
            return f"failed ({label})"
        return f"is in work elsewhere ({label}): start it again later" if label in self.outcome.elsewhere else None

    def gpus_for(self, job: Job) -> list[str]:
        """The GPUs of a run; empty if it chooses its device itself: a single run, or one with a --device of its own."""
        if job.experiment.options.device not in ("auto", "cuda"):
            return []
        return least_busy(self.gpus, [gpu for each in self.running for gpu in each.gpus], self.processes)

    def start(self, job: Job) -> None:
        log = job.experiment.folder / LOG
        gpus = self.gpus_for(job)
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as file:
                log_start = file.tell()
                popen = subprocess.Popen(
                    command_now(job, self.processes),
                    stdin=subprocess.PIPE,  # stays open while this process lives: see training.parent
                    stdout=file,
                    stderr=file,
                    env=self.environment | visible,
                    start_new_session=True,  # Ctrl-C reaches it once, from here
                    preexec_fn=heed_interrupts if os.name == "posix" else None,
                )
        except OSError as error:
            self.report(job, f"{log} could not be written ({error.strerror})", 0.0)
            return
        self.running.append(Process(job, popen, time.perf_counter(), gpus, log_start))

    def look(self) -> None:
        """Takes note of runs that have ended."""
        for each in [each for each in self.running if each.popen.poll() is not None]:
            self.running.remove(each)
            folder = each.job.experiment.folder
            problem = _problem(each.popen.returncode, folder / LOG, each.log_start)
            if problem is None:
                try:
                    self.keep(each.job)
                except UserError as error:
                    problem = str(error)
            elif Run(folder).is_locked():  # another process was faster
                self.report_elsewhere(each.job)
                continue
            self.report(each.job, problem, time.perf_counter() - each.started)

    def report(self, job: Job, problem: str | None, seconds: float) -> None:
        self.ended += 1
        if problem:
            self.outcome.failures[job.label] = problem
        happened = f"failed: {problem}" if problem else "done"
        print(f"[{self.ended}/{self.total}] {job.label}: {happened} ({seconds:.0f} s)", flush=True)

    def report_elsewhere(self, job: Job) -> None:
        self.ended += 1
        self.outcome.elsewhere[job.label] = holder = Run(job.experiment.folder).holder()
        print(f"[{self.ended}/{self.total}] {job.label}: in work elsewhere ({holder})", flush=True)

    def stop(self) -> None:
        """Interrupts every process as Ctrl-C would, and waits; each keeps its last finished epoch."""
        self.look()  # what has ended by itself cannot be stopped
        for each in self.running:
            each.popen.send_signal(signal.SIGINT)
        for each in self.running:
            each.popen.wait()
        stopped = [each for each in self.running if each.popen.returncode != 0]
        self.running = [each for each in self.running if each not in stopped]
        self.look()  # those that finished all the same
        self.waiting[:0] = [each.job for each in stopped]


@contextlib.contextmanager
def _interrupted_by(names: Sequence[str]):
    """Inside, these signals raise KeyboardInterrupt."""
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, _interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _problem(code: int, log: Path, start: int) -> str | None:
    """The last message of a process that ended with this code; None if it succeeded. Its log begins at byte start."""
    if code == 0:
        return None
    try:
        text = log.read_bytes()[start:].decode(errors="replace")
    except OSError as error:
        return f"ended with exit code {code}, and {log} cannot be read ({error.strerror or error})"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("error: ")] or lines or ["no output"]
    how = f"killed by signal {-code}, last output: " if code < 0 else ""
    return f"{how}{said[-1].removeprefix('error: ')} (full log: {log})"
