"""An experiment, which is one run: model, train config, and run options; and when two are the same configuration.

This module does not import PyTorch.
"""

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.config import ROOT, TrainConfig, require


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where things are and what is reported. Nothing here changes a result."""

    name: str | None = None
    """run folder under runs-dir; default: the experiment and every field changed from its script"""
    resume: bool = False
    """continue the run from its last checkpoint"""
    overwrite: bool = False
    """replace the run in the folder"""
    device: str = "auto"
    """auto, cuda, cuda:1, mps or cpu"""
    data_dir: Path | None = None
    """folder that holds data_cifar10 and the like; default: $VISION_BDH_DATA, else beside the scripts"""
    num_workers: int = 4
    """processes that augment images with masks, or read images in every epoch"""
    runs_dir: Path = ROOT / "runs"
    """folder of all runs"""
    eval_batch_size: int | None = None
    """samples per forward pass in validation and test; default: 256; segmentation and detection use
    batch_size"""
    recompute: bool = False
    """activation checkpointing (BDH only): less memory, more compute"""
    cuda_graph: bool = True
    """on a CUDA GPU, launch each training step at once, as a CUDA graph, where possible; otherwise kernel by kernel"""
    log_every: int = 50
    """steps between readings of the loss"""
    keep_every: int | None = None
    """also keep the weights of every n-th epoch and the initial ones, as epoch_<n>.pt in the run folder"""
    checkpoint_minutes: float | None = None
    """in long epochs, also write a checkpoint after this many minutes (looked at every log_every steps)"""
    tensorboard: bool = False
    """write TensorBoard events into the run folder"""
    wandb: str | None = None
    """log to this Weights & Biases project"""

    def __post_init__(self):
        for name in ("eval_batch_size", "log_every", "keep_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, self, name, "must be at least 1")
        require(self.num_workers >= 0, self, "num_workers", "must not be negative")
        minutes = self.checkpoint_minutes
        require(minutes is None or minutes > 0, self, "checkpoint_minutes", "must be above 0")
        if self.name is not None and (not re.fullmatch(r"[\w+=.,-]+", self.name) or self.name in (".", "..")):
            raise ValueError(f"name = {self.name!r} must be a plain folder name of letters, digits and _ + = . , -")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other: continue the run, or replace it")


@dataclass(frozen=True)
class Configuration:
    """What decides a run's result, as plain JSON values: equal configurations give runs that may be averaged.

    Made by `of` from config objects or by `training.stored` from config.json, which may lack fields younger than the
    run: `model_class` and `train_class` then fill in their defaults, which are the behaviour before the field existed.
    """

    model_class: str
    train_class: str
    model: dict[str, Any]
    train: dict[str, Any]

    @classmethod
    def of(cls, model: Any, train: TrainConfig) -> "Configuration":
        fields = [{key: _plain(value) for key, value in dataclasses.asdict(each).items()} for each in (model, train)]
        return cls(type(model).__name__, type(train).__name__, *fields)

    def fields(self) -> dict[str, dict[str, Any]]:
        """As config.json and checkpoints store them."""
        return {"model": self.model, "train": self.train}

    def flat(self) -> dict[str, Any]:
        """All fields in one dictionary; names are unique over model and training."""
        return {"model_class": self.model_class, "train_class": self.train_class} | self.model | self.train

    def differences(self, other: "Configuration", ignore: frozenset[str] | set[str] = frozenset()) -> list[str]:
        """Fields in which other differs, as "n_layer: 6 -> 12". THE answer to "the same configuration?"."""
        before, after = self.flat(), other.flat()
        keys = sorted((before.keys() | after.keys()) - ignore)
        return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys if before.get(key) != after.get(key)]


@dataclass(frozen=True)
class Experiment:
    """One run: `training.fit` trains it, `training.launch` adds the command line."""

    name: str
    """folder under runs_dir, shared by the seeds"""
    model: Any
    """config of the model; see docs/extending.md for its contract"""
    train: TrainConfig
    options: RunOptions = field(default_factory=RunOptions)

    @property
    def folder(self) -> Path:
        return self.options.runs_dir / self.name / f"seed{self.train.seed}"

    @property
    def configuration(self) -> Configuration:
        return Configuration.of(self.model, self.train)

    def check_new(self) -> None:
        """Raises ValueError if this may not be a new run; stored ones may have settings that are refused today."""
        for config in (self.model, self.train):
            for each in dataclasses.fields(config):
                value = getattr(config, each.name)
                numbers = [n for n in (value if isinstance(value, tuple) else (value,)) if isinstance(n, float)]
                require(all(map(math.isfinite, numbers)), config, each.name, "must be finite: JSON has no infinity")
            if hasattr(config, "check_new"):
                config.check_new()


def changed_fields(before: Any, after: Any) -> dict[str, Any]:
    """The fields of `after` that differ from `before`, two configs of one class."""
    old, new = dataclasses.asdict(before), dataclasses.asdict(after)
    return {key: new[key] for key in new if new[key] != old[key]}


def default_fields(config_class: type) -> dict[str, Any]:
    """The defaults of a config class as plain JSON values."""
    fields = dataclasses.fields(config_class)
    return {each.name: _plain(each.default) for each in fields if each.default is not dataclasses.MISSING}


def name_of_file(path: Path) -> str:
    """What identifies a file wherever it lies; of a checkpoint also its run, because all are called best.pt."""
    is_weights = path.suffix in (".pt", ".safetensors")
    name = "-".join(path.resolve().parts[-3:]) if is_weights else path.name
    return name.encode("utf-8", "backslashreplace").decode()  # file names need not be UTF-8


def _plain(value: Any) -> Any:
    """A value as JSON gives it back: tuples are lists, a file is its name."""
    return name_of_file(value) if isinstance(value, Path) else json.loads(json.dumps(value))
