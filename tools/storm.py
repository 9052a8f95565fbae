"""Tries to lose or falsify results: damages run folders, flips bits, kills processes, starts two on one folder.

Every try has one of three good ends: the run finishes with the weights of an undisturbed one, bit for bit; it is
refused with one message; or (analysis) it is left out by name. Anything else is counted as a fault, shown, and makes
the exit code 1. Runs in rounds with new random draws until --minutes are over, or Ctrl-C; then shows what it found.

    python tools/storm.py --minutes 20
    python tools/storm.py --minutes 2 --only damage
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import contextlib
import dataclasses
import io
import itertools
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from training import ClassificationConfig, Experiment, RunOptions, UserError, fit, loop
from analysis.reading import read_runs
from models.vision_bdh import v2_config
from training.command_line import flags_of, run_script
from training.config import ROOT
from training.runs import FILES, load_model
from training.stored import load_checkpoint, read_summary

SCRIPT = "train_v2_cifar10.py"
EPOCHS = 3
MODEL = dict(patch_size=8, n_layer=1, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4)
TRAIN = dict(dataset="digits", epochs=EPOCHS, batch_size=64, learning_rate=1e-2, train_limit=200, precision="float32")
SAME, MESSAGE, FAULT = "same result", "one message", "FAULT"

DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut": lambda content, draw: content[: draw.randrange(1, max(2, len(content)))],
    "empty": lambda content, draw: b"",
    "garbage": lambda content, draw: draw.randbytes(300),
    "letter b": lambda content, draw: b"b",
    "string": lambda content, draw: b'"x"',
    "list": lambda content, draw: b"[1, 2]",
    "object": lambda content, draw: b"{}",
    "not UTF-8": lambda content, draw: content[:20] + b"\xff\xfe\xe9" + content[20:],
    "flipped bit": lambda content, draw: _flip(content, draw),
    "zeros": lambda content, draw: content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How long, and which tries."""

    minutes: float = 20.0
    """stop after this time"""
    only: Literal["damage", "mix", "kill", "pair", "orphan"] | None = None
    """only this kind of try"""
    seed: int = 0
    """seed of the random draws"""

    def __post_init__(self):
        if not self.minutes > 0:
            raise ValueError(f"minutes = {self.minutes} must be above 0")


class Storm:
    """Tries in a temporary folder, and what became of them."""

    def __init__(self, folder: Path, seed: int):
        torch.set_num_threads(1)
        self.folder, self.draw, self.ends = folder, random.Random(seed), Counter()
        self.faults: list[str] = []
        self.reference = self.train("reference")
        self.expected = load_checkpoint(self.reference / "last.pt")["model"]

    def experiment(self, name: str, seed: int = 0, **options) -> Experiment:
        where = dict(runs_dir=self.folder / "runs", device="cpu") | options
        model = v2_config(**(MODEL | dict(img_size=8, patch_size=4, in_channels=1)))
        return Experiment(name, model, ClassificationConfig(**TRAIN, weight_decay=0.05, seed=seed), RunOptions(**where))

    def train(self, name: str, stop_after: int | None = None, seed: int = 0) -> Path:
        """A run of that name, stopped after an epoch if asked; returns its folder."""
        experiment = self.experiment(name, seed)
        with _quiet():
            if stop_after is None:
                fit(experiment)
            else:
                _fit_epochs(experiment, stop_after)
        return experiment.folder

    def end_of_resume(self, folder: Path) -> tuple[str, str]:
        """Resumes the run in the folder: what became of it, and the message."""
        experiment = self.experiment(folder.parent.name, resume=True)
        try:
            with _quiet():
                complete = bool(read_summary(folder))
                fit(experiment)
        except UserError as error:
            return (MESSAGE, str(error)) if "weights_only" not in str(error) else (FAULT, f"bad advice: {error}")
        except (Exception, SystemExit):  # not Ctrl-C
            return FAULT, traceback.format_exc(limit=-3)
        return (SAME, "") if complete else self.compare(folder)

    def compare(self, folder: Path) -> tuple[str, str]:
        """A finished run against the reference: weights and history."""
        weights = load_checkpoint(folder / "last.pt")["model"]
        if not all(torch.equal(value, self.expected[name]) for name, value in weights.items()):
            return FAULT, "finished with other weights"
        with _quiet():
            if len(read_runs([folder])) != 1:
                return FAULT, "finished, but analysis cannot read it"
        return SAME, ""

    def note(self, kind: str, what: str, end: str, why: str = "") -> None:
        self.ends[kind, end] += 1
        if end == FAULT:
            self.faults.append(f"{kind}, {what}: {why}")

    # ------------------------------------------------------------------------ the tries

    def damage(self) -> None:
        """Every file damaged in every way, of a stopped and of a finished run: resume, open, analyse."""
        stopped = self.train("stopped", stop_after=2)
        for source, name, how in itertools.product((stopped, self.reference), FILES, (*DAMAGES, "missing", "a folder")):
            if how in DAMAGES and not (source / name).exists():
                continue
            folder = self._copy(source)
            if how in DAMAGES:
                (folder / name).write_bytes(DAMAGES[how]((folder / name).read_bytes(), self.draw))
            else:
                (folder / name).unlink(missing_ok=True)
            if how == "a folder":
                (folder / name).mkdir()
            self._judge("damage", f"{name} {how} ({source.parent.name})", folder, source)
        shutil.rmtree(stopped.parent)

    def mix(self) -> None:
        """Files of another seed's run put into a stopped one."""
        stopped, other = self.train("stopped", stop_after=2), self.train("other", stop_after=2, seed=1)
        for name in FILES:
            if (other / name).exists():
                folder = self._copy(stopped)
                shutil.copy(other / name, folder / name)
                self._judge("mix", f"{name} of another run", folder, stopped)
        for folder in (stopped, other):
            shutil.rmtree(folder.parent)

    def kill(self) -> None:
        """A training killed with SIGKILL at a random moment, then resumed."""
        name = f"killed_{self.draw.randrange(10**9)}"
        process = _start(self._command(name))
        folder = self.folder / "runs" / name / "seed0"
        while process.poll() is None and not (folder / "config.json").exists():
            time.sleep(0.01)
        time.sleep(self.draw.uniform(0, 0.4))
        process.kill()
        process.wait()
        self.note("kill", name, *self.end_of_resume(folder))
        shutil.rmtree(folder.parent)

    def pair(self) -> None:
        """The same command twice within a moment: fresh, --resume, --overwrite, or mixed."""
        modes = [self.draw.choice(("", "--resume", "--overwrite")) for _ in range(2)]
        if "--resume" in modes or self.draw.random() < 0.5:
            folder = self.train(f"pair_{self.draw.randrange(10**9)}", stop_after=1)
        else:
            folder = self.folder / "runs" / f"pair_{self.draw.randrange(10**9)}" / "seed0"
        command = self._command(folder.parent.name)
        with contextlib.ExitStack() as stack:
            outputs = [stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8")) for _ in modes]
            both = [
                subprocess.Popen([*command, *filter(None, [mode])], stdout=out, stderr=subprocess.STDOUT)
                for mode, out in zip(modes, outputs, strict=True)
            ]
            codes = [process.wait() for process in both]
            texts = [out.seek(0) or out.read() for out in outputs]
        what = f"{modes} -> {codes}"
        if any("Traceback" in text for text in texts) or not set(codes) <= {0, 1}:
            self.note("pair", what, FAULT, "\n".join(texts))
        elif (folder / "summary.json").exists():
            self.note("pair", what, *self.compare(folder))
        else:
            self.note("pair", what, *(self.end_of_resume(folder) if folder.exists() else (MESSAGE, "")))
        shutil.rmtree(folder.parent, ignore_errors=True)

    def orphan(self) -> None:
        """A sweep killed with SIGKILL: its runs end with it."""
        name, runs = "ablation", self.folder / "orphans"
        flags = flags_of(MODEL | TRAIN | dict(epochs=500, img_size=8, patch_size=4, in_channels=1))
        sweep = [sys.executable, ROOT / "train_ablation.py", *flags, "--runs-dir", runs, "--device", "cpu"]
        process = _start([*map(str, sweep), "--sweep", "gate=none", "--jobs", "2"])
        deadline = time.monotonic() + 120
        while len(list(runs.rglob("last.pt"))) < 2 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 20
        while (left := _processes_with(str(runs))) and time.monotonic() < deadline:
            time.sleep(0.2)
        self.note("orphan", name, FAULT if left else MESSAGE, f"{len(left)} runs live on")
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(runs, ignore_errors=True)

    # ------------------------------------------------------------------------ helpers

    def _copy(self, source: Path) -> Path:
        folder = self.folder / "runs" / "trial" / "seed0"
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(source, folder)
        return folder

    def _judge(self, kind: str, what: str, folder: Path, source: Path) -> None:
        """Opens, analyses and resumes the run; what opens must be the best weights of source, which is undamaged."""
        best = load_model(source)[0].state_dict()

        def open_weights() -> None:
            found = load_model(folder)[0].state_dict()
            assert all(torch.equal(value, found[name]) for name, value in best.items()), "opened with other weights"

        for reader in (open_weights, lambda: read_runs([folder])):
            try:
                with _quiet():
                    reader()
            except UserError:
                pass
            except (Exception, SystemExit):  # not Ctrl-C
                self.note(kind, f"{what}, read", FAULT, traceback.format_exc(limit=-3))
        self.note(kind, what, *self.end_of_resume(folder))

    def _command(self, name: str) -> list[str]:
        fields = MODEL | TRAIN | dict(weight_decay=0.05, img_size=8, patch_size=4, in_channels=1, warmup_steps=500)
        fields |= dict(name=name, runs_dir=self.folder / "runs", device="cpu", crop_scale_min=1.0)
        flags = [*flags_of(fields), "--no-horizontal-flip"]
        return [sys.executable, str(ROOT / SCRIPT), *flags]


def _fit_epochs(experiment: Experiment, n: int) -> None:
    """Trains n epochs, then stops as Ctrl-C does."""
    real = loop.train_epoch

    def stopping(session):
        if session.epoch == n:
            raise KeyboardInterrupt
        return real(session)

    loop.train_epoch = stopping
    try:
        with contextlib.suppress(KeyboardInterrupt):
            fit(experiment)
    finally:
        loop.train_epoch = real


def _start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _flip(content: bytes, draw: random.Random) -> bytes:
    flipped = bytearray(content)
    flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
    return bytes(flipped)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _processes_with(argument: str) -> list[int]:
    """Processes with that text in their command line (Linux)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if argument.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def main(options: Options) -> None:
    ends = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as place:
        storm = Storm(Path(place), options.seed)
        rounds = 0
        try:
            while time.monotonic() < ends:
                rounds += 1
                for kind in [options.only] if options.only else ["damage", "mix", *["kill", "pair"] * 5, "orphan"]:
                    if time.monotonic() < ends:
                        getattr(storm, kind)()
        finally:  # after Ctrl-C, too
            show(storm, rounds)
    if storm.faults:
        raise UserError(f"{len(storm.faults)} faults")


def show(storm: Storm, rounds: int) -> None:
    """Prints how often each kind of try ended how, and the first faults."""
    table = Table("try", "end", "times", title=f"{rounds} rounds")
    for (kind, end), count in sorted(storm.ends.items()):
        table.add_row(kind, end, str(count))
    Console().print(table)
    for fault in storm.faults[:20]:
        print(fault, file=sys.stderr)


if __name__ == "__main__":
    run_script(main, __doc__)
