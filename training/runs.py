"""A run's folder: writing, resuming. `training.stored` reads and validates it, `training.locks` holds it.

    config.json           configuration, data, hardware, versions, commit, run_id
    split.npz             which samples train and which validate, if that is drawn
    metrics.csv           one row per epoch
    last.pt, previous.pt  checkpoints of the last two epochs: model, optimizer, history
    best.pt               weights of the best validation epoch
    epoch_<n>.pt          weights kept by --keep-every
    summary.json          the test result of a finished run
    lock                  held while a process trains the run

Files are written under a temporary name and renamed, so that whatever stops the process leaves whole files.
"""

import contextlib
import csv
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from training import stored
from models import build_config
from training.config import UserError
from training.data.batches import Split
from training.experiment import Experiment
from training.locks import LockedFolder
from training.stored import Damaged, configuration_of, first_line

FILES = ("config.json", "split.npz", "metrics.csv", "last.pt", "previous.pt", "best.pt", "summary.json", "damaged.pt")


class Run(LockedFolder):
    """The folder of one run."""

    # ------------------------------------------------------------------------ before training

    def id(self) -> str | None:
        """The run_id of what is in the folder; None if there is none that can be read."""
        try:
            return self.read_config().get("run_id")
        except UserError:
            return None

    def has_checkpoint(self) -> bool:
        return any((self.folder / name).exists() for name in ("last.pt", "previous.pt"))

    def prepare(self, experiment: Experiment) -> bool:
        """Checks the folder against the experiment; returns whether to resume. Writes nothing.

        Raises UserError if the folder holds a run (without resume or overwrite), if there is nothing to resume, or if
        the run to resume has another configuration.
        """
        options = experiment.options
        there = [name for name in FILES if (self.folder / name).exists()]
        if not options.resume:
            if there and not options.overwrite:
                raise UserError(
                    f"{self.folder} already holds a run: continue it with --resume, replace it with --overwrite, or "
                    "choose another folder with --name"
                )
            return False
        if "config.json" not in there or not self.has_checkpoint():
            remedy = "start it again with --overwrite" if there else "leave out --resume to start this run"
            raise UserError(f"{self.folder} holds nothing to resume: {remedy}")
        if changes := self.differences(experiment):
            raise UserError(
                f"{self.folder} was started with another configuration ({'; '.join(changes)}): resume it with its own, "
                "or start another run without --resume under another --name"
            )
        return True

    def differences(self, experiment: Experiment) -> list[str]:
        """Fields that differ from the experiment's; missing ones take their defaults. Raises Damaged."""
        return configuration_of(self.read_config()).differences(experiment.configuration)

    def is_complete(self, experiment: Experiment) -> bool:
        """Whether this experiment is finished here. Raises UserError if another one is: configuration, or own data."""
        if not self.read_summary():
            return False
        if changes := self.differences(experiment):
            raise UserError(f"{self.folder} holds a run of another configuration ({'; '.join(changes)}): move it away")
        self.check_own_files(experiment)
        return True

    def check_own_files(self, experiment: Experiment) -> None:
        """`check_data` of a complete run, if its configuration does not say which data it was trained on."""
        if experiment.train.of_own_files:
            self.check_data(experiment.train.make_task().open(experiment).description)

    # ------------------------------------------------------------------------ reading

    def read_config(self) -> dict[str, Any]:
        return stored.read_config(self.folder)

    def read_summary(self) -> dict[str, Any] | None:
        return stored.read_summary(self.folder)

    def read_split(self) -> Split | None:
        return stored.read_split(self.folder, self.read_config())

    def check_data(self, description: dict[str, Any]) -> None:
        """Raises UserError if these are not the data that the run was started with, as far as it recorded them."""
        before, now = self.read_config()["data"], json.loads(json.dumps(description))
        changes = [
            f"{key}: {_shorten(before[key])} -> {_shorten(now.get(key))}" for key in stored.changed_data(before, now)
        ]
        if changes:
            raise UserError(
                f"{self.folder} was started on other data ({'; '.join(changes)}): restore them, or start another run "
                "without --resume under another --name"
            )

    def load_checkpoint(self, model: nn.Module) -> dict[str, Any]:
        """last.pt, or previous.pt if that cannot be used for the model. Raises UserError if neither can.

        A damaged last.pt is then renamed to damaged.pt, so that it does not become the next previous.pt.
        """
        problems = []
        for name in ("last.pt", "previous.pt"):
            path = self.folder / name
            if not path.exists():
                problems.append(f"{name} is missing")
                continue
            try:
                state = stored.load_checkpoint(path)
                self._check_origin(state, path)
                if "optimizer" not in state or "step" not in state:
                    raise Damaged(f"{path} holds weights only: start with --overwrite")
                if _shapes(state["model"]) != _shapes(model.state_dict()):
                    raise Damaged(f"{path} holds weights of another architecture: start with --overwrite")
            except Damaged as error:
                problems.append(str(error).rpartition(": ")[0].removeprefix(f"{self.folder}{os.sep}"))
                continue
            if problems:
                print(f"{problems[0]}; resuming from previous.pt, epoch {state['epoch']}")
                with contextlib.suppress(FileNotFoundError):
                    (self.folder / "last.pt").replace(self.folder / "damaged.pt")
            return state
        raise UserError(f"{self.folder} has no usable checkpoint ({'; '.join(problems)}): start with --overwrite")

    def load_best(self) -> dict[str, Any]:
        """best.pt. Raises Damaged."""
        path = self.folder / "best.pt"
        state = stored.load_checkpoint(path, remedy="put it back, or start with --overwrite")
        self._check_origin(state, path)
        return state

    def _check_origin(self, state: dict[str, Any], path: Path) -> None:
        """Raises Damaged for a checkpoint of another run."""
        stored.check_origin(state, self.read_config(), path, "start with --overwrite")

    def kept_weights(self) -> dict[int, Path]:
        """Files of `keep_weights` by epoch, in order; 0 is before training."""
        numbers = {path: path.stem.removeprefix("epoch_") for path in self.folder.glob("epoch_*.pt")}
        return dict(sorted((int(number), path) for path, number in numbers.items() if number.isdecimal()))

    # ------------------------------------------------------------------------ writing

    def start(self, experiment: Experiment, config: dict[str, Any], split: Split | None, state: dict[str, Any]) -> None:
        """Writes config.json, split.npz and the first checkpoint, then removes an overwritten run with its exports.

        The new files are complete under temporary names before anything old is removed.
        """
        new: dict[str, Callable[[Path], Any]] = {
            "split.npz": lambda path: _save_split(path, split, config["run_id"]),
            "config.json": lambda path: _write_json(path, config),
            "last.pt": lambda path: _save(path, state),
        }
        if split is None:
            del new["split.npz"]
        try:
            for name, write in new.items():
                self._write_partial(name, write)
        except BaseException:
            for name in new:
                with contextlib.suppress(OSError):
                    (self.folder / f"{name}.partial").unlink()
            raise
        events = self.folder.glob("events.out.tfevents*")
        names = [self.folder / name for name in FILES]
        for old in (*self._exports(), *events, *self.kept_weights().values(), *names):
            with _disk_errors(old):  # a folder: a damaged run, or a pruned model
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink(missing_ok=True)
        for name in new:
            self._finish_partial(name)

    def _exports(self) -> list[Path]:
        """What tools/export.py wrote beside the run."""
        found = [path for pattern in stored.EXPORTS for path in self.folder.glob(pattern)]
        pruned = [path for path in self.folder.glob("pruned_*") if (path / stored.EXPORTED).exists()]
        card = [self.folder / stored.CARD] if (self.folder / stored.EXPORTED).exists() else []
        return [*found, *pruned, *card]

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Writes last.pt; the old last.pt becomes previous.pt. Raises UserError if the disk refuses."""
        self._write_partial("last.pt", lambda path: _save(path, state))
        with _disk_errors(self.folder / "previous.pt"):
            if (self.folder / "last.pt").exists():
                (self.folder / "last.pt").replace(self.folder / "previous.pt")
        self._finish_partial("last.pt")

    def save_best(self, state: dict[str, Any]) -> None:
        self._replace("best.pt", lambda path: _save(path, state))

    def keep_weights(self, state: dict[str, Any]) -> None:
        """Writes epoch_<n>.pt, n being the state's epoch."""
        self._replace(f"epoch_{state['epoch']:03d}.pt", lambda path: _save(path, state))

    def write_summary(self, summary: dict[str, Any]) -> None:
        self._replace("summary.json", lambda path: _write_json(path, summary))

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Appends a row to metrics.csv, on disk when this returns."""
        path = self.folder / "metrics.csv"
        with _disk_errors(path):
            columns = _columns(path)
            with path.open("a", newline="", encoding="utf-8") as file:
                # an older version may have started the file with fewer columns
                writer = csv.DictWriter(file, columns or list(row), extrasaction="ignore", lineterminator="\n")
                if not columns:
                    writer.writeheader()
                writer.writerow(row)
                file.flush()
                os.fsync(file.fileno())

    def note_hardware(self, config: dict[str, Any], hardware: dict[str, Any]) -> None:
        """Adds hardware on which the run goes on to config.json, under resumed_on, unless it is there."""
        if hardware not in stored.hardware_of(config):
            config = config | {"resumed_on": [*config.get("resumed_on", []), hardware]}
            self._replace("config.json", lambda path: _write_json(path, config))

    def restore_split(self, split: Split | None, run_id: str) -> None:
        """Writes split.npz again if it is missing; it was drawn from the seed alone."""
        if split is not None and not (self.folder / "split.npz").exists():
            self._replace("split.npz", lambda path: _save_split(path, split, run_id))

    def restore_metrics(self, epoch: int, history: list[dict[str, Any]] | None) -> None:
        """metrics.csv as it was after that epoch, from the checkpoint's history, whatever became of the file since.

        history: one row per epoch; None in checkpoints of an older version, for which the file itself is cut back.
        """
        if history is not None:
            self._replace("metrics.csv", lambda path: _write_rows(path, history))
            return
        path = self.folder / "metrics.csv"
        try:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[: epoch + 1] if path.exists() else []
        except ValueError:
            lines = []
        if len(lines) < epoch + 1 and epoch:
            print(f"{path} has lost rows, and the checkpoint of this older run holds no copy: its history is cut")
        kept = [line for line in lines if line.endswith("\n")] if epoch else []  # the header comes with epoch 1
        self._replace("metrics.csv", lambda path: path.write_text("".join(kept), encoding="utf-8"))

    def mend_metrics(self, epochs: int) -> None:
        """metrics.csv of the complete run, restored from a checkpoint if rows were lost. Raises Damaged without one."""
        path = self.folder / "metrics.csv"
        with contextlib.suppress(Damaged):
            if len(stored.read_metrics(self.folder)) == epochs:
                return
        for name in ("last.pt", "previous.pt"):
            with contextlib.suppress(Damaged):
                state = stored.load_checkpoint(self.folder / name)
                self._check_origin(state, self.folder / name)
                if len(history := state.get("history") or []) == epochs:
                    self.restore_metrics(epochs, history)
                    print(f"{path} was damaged: restored from {name}")
                    return
        raise Damaged(f"{path} is damaged, and no checkpoint holds a copy: put it back, or start with --overwrite")

    def _replace(self, name: str, write: Callable[[Path], Any]) -> None:
        self._write_partial(name, write)
        self._finish_partial(name)

    def _write_partial(self, name: str, write: Callable[[Path], Any]) -> None:
        """Writes a complete file NAME.partial. Raises UserError if the disk refuses."""
        partial = self.folder / f"{name}.partial"
        try:
            write(partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            if isinstance(error.__context__, KeyboardInterrupt):  # torch.save turns it into a RuntimeError
                raise KeyboardInterrupt from None
            raise _disk_error(self.folder / name, error) from None

    def _finish_partial(self, name: str) -> None:
        try:
            (self.folder / f"{name}.partial").replace(self.folder / name)
        except OSError as error:
            with contextlib.suppress(OSError):
                (self.folder / f"{name}.partial").unlink()
            raise _disk_error(self.folder / name, error) from None


def _why_no_weights(run: Path) -> str:
    """Why no weights can be opened there, with the folders of runs that may have been meant."""
    if not run.exists():
        return f"{run} does not exist"
    near = itertools.product(("*", "*/*"), ("best.pt", stored.EXPORTED))
    below = next((path.parent for place in near for path in run.glob("/".join(place))), None)
    return f"{run} has no weights to open" + (f", but {below} has" if below else "")


def load_model(run: Path | str) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a run with the weights of its best epoch, in evaluation mode, and its config.json.

    run: its folder, or a checkpoint in it; a folder may have exported safetensors instead. Raises UserError.
    """
    run = Path(run)
    remedy = f"give a folder with config.json and best.pt or {stored.EXPORTED}, such as runs/v2_cifar10/seed0"
    folder, checkpoint = (run.parent, run) if run.suffix in (".pt", ".safetensors") else (run, run / "best.pt")
    if not checkpoint.exists() and checkpoint.name == "best.pt":
        checkpoint = folder / stored.EXPORTED
    if not checkpoint.exists():
        raise UserError(f"{_why_no_weights(run)}: {remedy}")
    config = stored.read_config(folder, remedy)
    weights = stored.load_weights(checkpoint, remedy, config)
    try:
        model = build_config(config["model_class"], config["config"]["model"]).build()
        model.load_state_dict(weights)
        for name, own in model.named_parameters():  # load_state_dict converts integers and complex numbers
            if not (weights[name].is_floating_point() and own.isfinite().all()):
                raise ValueError(f"{name} has values that are not finite real numbers")
    except (KeyError, TypeError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(
            f"{checkpoint} holds no model that this version can build ({first_line(error)}): {remedy}"
        ) from None
    return model.eval(), config


def _shapes(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Shapes by name; of rotary frequencies the number of neurons only, as those of a pruned model differ by head."""
    return {name: value.shape[-1:] if name.endswith("attn.freqs") else value.shape for name, value in weights.items()}


def _save(path: Path, state: dict[str, Any]) -> None:
    with path.open("wb") as file:
        torch.save(state, file)


def _save_split(path: Path, split: Split, run_id: str) -> None:
    with path.open("wb") as file:
        np.savez(file, train=split.train, val=split.val, run_id=np.array(run_id))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        if rows:
            writer = csv.DictWriter(file, list(rows[0]), extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def _columns(path: Path) -> list[str]:
    """The header of a CSV file; empty if there is none."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Inside, an error of the file system becomes the UserError that names the path."""
    try:
        yield
    except OSError as error:
        raise _disk_error(path, error) from None


def _disk_error(path: Path, error: Exception) -> UserError:
    if not path.parent.is_dir():
        return UserError(f"{path.parent} no longer exists: it was removed during the run. Start again without --resume")
    return UserError(
        f"{path} could not be written ({first_line(error)}). Earlier checkpoints in {path.parent} are intact: free "
        "space or make the folder writable, then repeat the command, with --resume if there is a last.pt"
    )


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:120]}..."
