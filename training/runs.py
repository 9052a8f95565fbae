"""A run's folder: config.json, split.npz, metrics.csv, last.pt, previous.pt, best.pt, epoch_<n>.pt, summary.json.

Every file but metrics.csv is written under a temporary name and renamed, so that whatever stops the process leaves
whole files.
"""

import csv
import json
import os
import pickle
import platform
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file as load_safetensors
from torch import nn

from models import build_config
from training.config import ROOT, Experiment, UserError, default_fields
from training.data import Split

FILES = ("config.json", "split.npz", "metrics.csv", "last.pt", "previous.pt", "best.pt", "summary.json", "damaged.pt")
EXPORTED = "best_bf16.safetensors"  # what tools/export_weights.py makes of best.pt
LONGEST_NAME = 255  # bytes, in the usual file systems
UNREADABLE = (
    OSError,
    RuntimeError,
    EOFError,
    KeyError,
    ValueError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    SafetensorError,
)


class Run:
    """The folder of one run. `prepare` first: it refuses what would lose or mix results."""

    def __init__(self, folder: Path):
        self.folder = folder

    def prepare(self, experiment: Experiment) -> bool:
        """Checks the folder against what is asked; returns whether there is something to go on with. Writes nothing.

        Raises UserError for a folder that holds a run (without resume or overwrite), for nothing to resume, and
        for a resume with another configuration.
        """
        options = experiment.options
        if len(experiment.name.encode()) > LONGEST_NAME:
            raise UserError(f"{experiment.name} is too long for a folder's name: give a shorter one with --name")
        there = [name for name in FILES if (self.folder / name).exists()]
        if not options.resume:
            if there and not options.overwrite:
                raise UserError(
                    f"{self.folder} holds a run already: continue it with --resume, replace it with --overwrite, "
                    "or choose another folder with --name"
                )
            return False
        if "config.json" not in there or not {"last.pt", "previous.pt"} & set(there):
            way = "start it anew with --overwrite" if there else "leave out --resume to start this run"
            raise UserError(f"{self.folder} holds nothing to resume: {way}")
        changes = self.differences(experiment)
        if changes:
            raise UserError(
                f"{self.folder} was started with another configuration ({'; '.join(changes)}): resume it with its own, "
                "or start another run without --resume under another --name"
            )
        return True

    def differences(self, experiment: Experiment) -> list[str]:
        """Fields of the run in the folder that are others than the experiment's; those it is too old for, by default.

        Raises UserError where they cannot be read.
        """
        try:
            before = self.read_config()["config"]
            configs = {"model": experiment.model, "train": experiment.train}
            fields = {part: default_fields(config) | before[part] for part, config in configs.items()}
        except (*UNREADABLE, TypeError):
            raise UserError(f"{self.folder / 'config.json'} cannot be read: start again with --overwrite") from None
        after = json.loads(json.dumps(experiment.fields()))
        return [
            f"{key}: {fields[part].get(key)} -> {after[part].get(key)}"
            for part in after
            for key in sorted(fields[part].keys() | after[part].keys())
            if fields[part].get(key) != after[part].get(key)
        ]

    def start(
        self, experiment: Experiment, data: Any, hardware: dict, parameters: int, origin: dict | None = None
    ) -> None:
        """Makes the folder, removes what an overwritten run left there, and writes config.json and split.npz.

        data: `tasks.Batches`; split.npz is there if its split is. origin: of the first weights, if not drawn.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be made ({error.strerror}): name another place with --runs-dir"
            ) from None
        optional = [*self.folder.glob("events.out.tfevents*"), *self.kept_weights().values()]
        for old in (*(self.folder / name for name in FILES), *optional):
            old.unlink(missing_ok=True)
        config = {
            "experiment": experiment.name,
            "config": experiment.fields(),
            "model_class": type(experiment.model).__name__,
            "data": data.description,
            "origin": origin,
            "parameters": parameters,
            "hardware": hardware,
            "versions": _versions(),
            "commit": _commit(),
        }
        if data.split is not None:
            self._replace("split.npz", lambda path: _save_split(path, data.split))
        self._write_json("config.json", config)

    def read_config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    def check_data(self, description: dict[str, Any]) -> None:
        """Raises UserError where these are not the data that the run was started with."""
        before, now = self.read_config().get("data", {}), json.loads(json.dumps(description))
        changes = [
            f"{key}: {_shorten(before.get(key))} -> {_shorten(now.get(key))}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if changes:
            raise UserError(
                f"{self.folder} was started on other data than are there now ({'; '.join(changes)}): "
                "bring them back, or start another run without --resume under another --name"
            )

    def read_split(self) -> Split | None:
        """Which images train and which validate; None for a run whose data are not split by a draw."""
        if not (self.folder / "split.npz").exists():
            return None
        try:
            with np.load(self.folder / "split.npz") as arrays:
                return Split(train=arrays["train"], val=arrays["val"])
        except UNREADABLE as error:
            raise UserError(f"{self.folder / 'split.npz'} cannot be read ({error}): start with --overwrite") from None

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """state becomes last.pt; what was last.pt becomes previous.pt. Raises UserError if the disk refuses."""
        last = self.folder / "last.pt"
        self._replace("last.pt", lambda path: _save(state, path), keep_old_as="previous.pt" if last.exists() else None)

    def save_best(self, state: dict[str, Any]) -> None:
        self._replace("best.pt", lambda path: _save(state, path))

    def keep_weights(self, state: dict[str, Any]) -> None:
        """state becomes epoch_<n>.pt, n being its epoch."""
        self._replace(f"epoch_{state['epoch']:03d}.pt", lambda path: _save(state, path))

    def kept_weights(self) -> dict[int, Path]:
        """The files that `keep_weights` wrote, by epoch, 0 being before training; in order."""
        numbers = {path: path.stem.removeprefix("epoch_") for path in self.folder.glob("epoch_*.pt")}
        return dict(sorted((int(number), path) for path, number in numbers.items() if number.isdecimal()))

    def load_checkpoint(self, say: Callable[[str], None]) -> dict[str, Any]:
        """last.pt, or previous.pt where that cannot be read. Raises UserError where neither can.

        A damaged last.pt is then set aside as damaged.pt: it must not become the next previous.pt.
        """
        problems, last = [], self.folder / "last.pt"
        for name in ("last.pt", "previous.pt"):
            try:
                state = load_file(self.folder / name)
            except UNREADABLE as error:
                problems.append(f"{name}: {first_line(error)}")
                continue
            if problems:
                say(f"last.pt cannot be read ({problems[0]}); going on from previous.pt, epoch {state['epoch']}")
                if last.exists():
                    last.replace(self.folder / "damaged.pt")
            return state
        raise UserError(f"no checkpoint of {self.folder} can be read ({'; '.join(problems)}): start with --overwrite")

    def load_best(self) -> dict[str, Any]:
        """best.pt. Raises UserError where it cannot be read."""
        try:
            return load_file(self.folder / "best.pt")
        except UNREADABLE as error:
            raise UserError(
                f"{self.folder / 'best.pt'} cannot be read ({first_line(error)}): start with --overwrite"
            ) from None

    def append_metrics(self, row: dict[str, Any]) -> None:
        """One line of metrics.csv, on disk when this returns."""
        path = self.folder / "metrics.csv"
        header = path.read_text().partition("\n")[0].split(",") if path.exists() else [""]
        is_new = header == [""]
        try:
            with path.open("a", newline="") as file:
                # an earlier version may have begun the file with fewer columns; line ends as cut_metrics leaves them
                fields = list(row) if is_new else header
                writer = csv.DictWriter(file, fields, extrasaction="ignore", lineterminator="\n")
                if is_new:
                    writer.writeheader()
                writer.writerow(row)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _disk_error(path, error) from None

    def cut_metrics(self, epoch: int) -> None:
        """Drops the lines of metrics.csv after that epoch, half-written ones among them."""
        path = self.folder / "metrics.csv"
        if not path.exists():
            return
        lines = path.read_text().splitlines(keepends=True)[: epoch + 1]
        kept = [line for line in lines if line.endswith("\n")] if epoch else []  # the header comes with the first epoch
        self._replace("metrics.csv", lambda partial: partial.write_text("".join(kept)))

    def write_summary(self, summary: dict[str, Any]) -> None:
        self._write_json("summary.json", summary)

    def read_summary(self) -> dict[str, Any] | None:
        """The summary of a complete run, None before the end."""
        path = self.folder / "summary.json"
        return json.loads(path.read_text()) if path.exists() else None

    def _write_json(self, name: str, content: dict) -> None:
        self._replace(name, lambda path: path.write_text(json.dumps(content, indent=2) + "\n"))

    def _replace(self, name: str, write: Callable[[Path], Any], keep_old_as: str | None = None) -> None:
        """Writes a whole new file beside the old one, then renames. A failure leaves the old one as it was."""
        target, partial = self.folder / name, self.folder / f"{name}.partial"
        try:
            write(partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            if keep_old_as:
                target.replace(self.folder / keep_old_as)
            partial.replace(target)
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            if isinstance(error.__context__, KeyboardInterrupt):  # torch.save turns it into a RuntimeError
                raise KeyboardInterrupt from None
            raise _disk_error(target, error) from None


def load_file(path: Path) -> dict[str, Any]:
    """A checkpoint, on the CPU, with nothing in it executed."""
    return torch.load(path, map_location="cpu", weights_only=True)


def load_model(run: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a run with the weights of its best epoch, in evaluation mode, and its config.json.

    run: its folder, or one of the checkpoints in it; a folder may have EXPORTED instead. Raises UserError where there
    is no finished epoch.
    """
    folder, checkpoint = (run.parent, run) if run.suffix == ".pt" else (run, run / "best.pt")
    try:
        config = Run(folder).read_config()
        exported = folder / EXPORTED
        is_exported = exported.exists() and not checkpoint.exists()
        weights = load_safetensors(exported) if is_exported else load_file(checkpoint)["model"]
        model = build_config(config["model_class"], config["config"]["model"]).build()
        model.load_state_dict(weights)
    except (*UNREADABLE, TypeError, ImportError) as error:  # TypeError: a field that this version does not know
        raise UserError(
            f"{run} is no run whose model can be read ({first_line(error)}): "
            "give a folder with config.json and best.pt, such as runs/v2_cifar10/seed0"
        ) from None
    return model.eval(), config


def _save(state: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        torch.save(state, file)


def _save_split(path: Path, split: Split) -> None:
    with path.open("wb") as file:
        np.savez(file, train=split.train, val=split.val)


def _disk_error(path: Path, error: Exception) -> UserError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    return UserError(
        f"{path} could not be written ({reason}); what was there before is untouched. "
        "Free some space, then go on with --resume"
    )


def _shorten(value: Any, longest: int = 120) -> str:
    text = str(value)
    return text if len(text) <= longest else f"{text[:longest]}..."


def first_line(error: Exception) -> str:
    """What the error says in short; its class where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _versions() -> dict[str, str | None]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda,
    }


def _commit() -> str | None:
    """Commit of this repository, with "+changes" where the working tree differs; None outside git."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
