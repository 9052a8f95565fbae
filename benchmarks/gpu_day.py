"""What to run first on a CUDA GPU, most valuable first, in the time there is.

The tests on the GPU, the training speed in bf16 and TF32, then reproduce.py's published rows with the rest of the time.
Start it again to continue: steps that are done are not repeated, and reproduce.py resumes its runs. What each step
printed is in OUTPUT_DIR/<step>.txt, and its files are beside it, from the first moment on; steps.json has the times.

    python benchmarks/gpu_day.py --minutes 25 --output-dir runs/gpu_day
    python benchmarks/gpu_day.py --rehearse --output-dir /tmp/gpu_day     # tiny sizes, on the CPU
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.command_line import exit_with, run_script
from training.config import ROOT, UserError
from training.device import pick_device

LEAST_SECONDS = 20  # what a step needs to begin with


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run, and for how long."""

    output_dir: Path = ROOT / "runs" / "gpu_day"
    """folder for everything that the steps write; what its results/ holds belongs into the repository's own"""
    minutes: float = 25.0
    """time for all steps"""
    data_dir: Path | None = None
    """folder that holds data_cifar10 and the like; default: $VISION_BDH_DATA, else beside the scripts"""
    compile: bool = False
    """run reproduce.py with --compile"""
    rehearse: bool = False
    """tiny sizes on the CPU, to see that every step starts; writes to OUTPUT_DIR/rehearsal"""

    def __post_init__(self):
        if not self.minutes > 0:
            raise ValueError(f"minutes = {self.minutes} must be above 0")

    @property
    def folder(self) -> Path:
        """For what the steps write."""
        return (self.output_dir / "rehearsal" if self.rehearse else self.output_dir).resolve()


@dataclass(frozen=True)
class Step:
    """One command."""

    name: str
    command: Callable[[float], list[str]]
    """arguments of Python, from the minutes that the step has"""
    share: float = 1.0
    """most of the time left that it may take"""
    repeats: bool = False
    """run it again though it ended well: it knows by itself what is done"""


def steps_of(options: Options) -> list[Step]:
    """The steps, most valuable first."""
    device = "cpu" if options.rehearse else "cuda"
    tests = ["-m", "pytest", "-rs", "tests/test_cuda.py", "--device", device]
    speed = ["benchmarks/train_speed.py", "--device", device]
    if options.rehearse:
        tests += ["-k", "rotation"]
        speed += "--models resnet20 --batch-size 2 --repeats 1 --steps 1 --compile False".split()

    def speed_in(precision: str) -> list[str]:
        folder = options.folder / f"train_speed_{precision}"
        return [*speed, "--precisions", precision, "--output-dir", str(folder)]

    def reproduce(minutes: float) -> list[str]:
        folders = [f"--{name}-dir={options.folder / name}" for name in ("runs", "results")]
        flags = ["--device", device, "--precision", "bf16", "--budget-minutes", f"{minutes:.2f}", *folders]
        flags += ["--compile"] if options.compile else []
        flags += [f"--data-dir={options.data_dir.resolve()}"] if options.data_dir else []
        return ["reproduce.py", *flags]

    return [
        Step("tests", lambda minutes: tests, share=0.4),
        Step("train_speed_bf16", lambda minutes: speed_in("bf16"), share=0.4),
        Step("train_speed_tf32", lambda minutes: speed_in("float32" if options.rehearse else "tf32"), share=0.4),
        Step("reproduce", reproduce, repeats=True),
    ]


def run(step: Step, seconds: float, folder: Path) -> dict:
    """Runs the step for at most that time; what it prints goes to a file. Returns its line of steps.json."""
    limit = seconds * step.share
    command = [sys.executable, *step.command((limit - LEAST_SECONDS) / 60)]
    started = time.monotonic()
    with (folder / f"{step.name}.txt").open("a", encoding="utf-8") as log:
        print("+", *command, file=log, flush=True)
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=limit
            ).returncode
            state = "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:  # the process is ended; runs of reproduce.py end with it
            state = f"stopped after {limit:.0f} seconds"
    return {"state": state, "seconds": round(time.monotonic() - started, 1), "command": " ".join(command[1:])}


def main(options: Options) -> None:
    if not options.rehearse:
        pick_device("cuda")  # one message where there is none
    run_steps(steps_of(options), options)


def run_steps(steps: list[Step], options: Options) -> None:
    """Runs what is not done yet while there is time; exits with code 1 if a step failed."""
    folder, ends = options.folder, time.monotonic() + 60 * options.minutes
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "steps.json"
    try:
        done = json.loads(table.read_text(encoding="utf-8")) if table.exists() else {}
    except ValueError:
        raise UserError(f"{table} is damaged: remove it to run every step again") from None
    for step in steps:
        if done.get(step.name, {}).get("state") == "done" and not step.repeats:
            print(f"{step.name}: already done")
            continue
        if (left := ends - time.monotonic()) * step.share < LEAST_SECONDS:
            print(f"{step.name}: no time left; the same command continues")
            continue
        print(f"{step.name}: at most {left * step.share / 60:.1f} minutes, {folder / step.name}.txt", flush=True)
        done[step.name] = run(step, left, folder)
        table.write_text(json.dumps(done, indent=2), encoding="utf-8")
        print(f"{step.name}: {done[step.name]['state']} in {done[step.name]['seconds']} s", flush=True)
    failed = [name for name, each in done.items() if each["state"].startswith("failed")]
    if failed:
        exit_with(f"{', '.join(failed)} failed: see {folder / failed[0]}.txt; the same command tries again", 1)


if __name__ == "__main__":
    run_script(main, __doc__)
