"""What defines a training run, and the command line made from it."""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

ROOT = Path(__file__).resolve().parents[1]


class UserError(Exception):
    """A mistake or a circumstance that the user can mend; the message says how."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything beside the model that decides a run's result, for any task; each task adds its own."""

    epochs: int
    """passes over the training part"""
    batch_size: int
    """images (or texts) a forward pass"""
    learning_rate: float
    """peak rate of AdamW"""
    weight_decay: float
    """decoupled weight decay of AdamW"""
    warmup_steps: int = 500
    """optimiser steps of linear warm-up, capped at a tenth of all"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    grad_accum: int = 1
    """batches whose gradients are averaged into one optimiser step"""
    precision: Literal["float32", "tf32", "bf16"] = "tf32"
    """of matrix products; tf32 is float32 where the device has none"""
    compile: bool = False
    """run the model through torch.compile"""
    start_from: Path | None = None
    """best.pt or last.pt of a run of the same model, whose weights the training starts from"""
    seed: int = 0
    """of the split, the weights, and every draw in training"""

    def __post_init__(self):
        for name in ("epochs", "batch_size", "grad_accum"):
            _require(getattr(self, name) >= 1, self, name, "must be at least 1")
        _require(self.learning_rate > 0, self, "learning_rate", "must be above 0")
        _require(self.max_grad_norm > 0, self, "max_grad_norm", "must be above 0")
        for name in ("weight_decay", "warmup_steps", "seed"):
            _require(getattr(self, name) >= 0, self, name, "must not be negative")


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig(TrainConfig):
    """Training on data that have no validation part of their own."""

    val_fraction: float = 0.2
    """share of the training data held out for validation"""

    def __post_init__(self):
        super().__post_init__()
        _require(0 < self.val_fraction < 1, self, "val_fraction", "must be above 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig(HeldOutConfig):
    """Training on images with one class each."""

    dataset: Literal["digits", "cifar10", "cifar100", "folder"]
    """images to train on; folder: those in data-dir, train/CLASS/IMAGE and test/CLASS/IMAGE"""
    crop_scale_min: float = 1.0
    """smallest area of a random crop, as a share of the image; 1 for no crops"""
    horizontal_flip: bool = False
    """mirror half of the training images"""
    train_limit: int | None = None
    """use only this many of the training images (validation included), drawn by the seed"""

    def __post_init__(self):
        super().__post_init__()
        _require(0 < self.crop_scale_min <= 1, self, "crop_scale_min", "must be above 0 and at most 1")
        _require(self.train_limit is None or self.train_limit >= 2, self, "train_limit", "must be at least 2")


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig(ClassificationConfig):
    """Training on the same images without their classes, by filling in what is masked."""


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig(TrainConfig):
    """Training on images with a class for every pixel."""

    dataset: Literal["camvid", "voc", "cityscapes"] = "camvid"
    """images and masks to train on"""
    dice_weight: float = 0.5
    """share of the Dice loss; the rest is cross-entropy"""
    horizontal_flip: float = 0.0
    """probability of mirroring a training image"""
    brightness_contrast: float = 0.0
    """probability of changing brightness and contrast, each by at most a fifth"""
    shift_scale_rotate: float = 0.0
    """probability of shifting (by at most 1/16), scaling (0.9 to 1.1) and rotating (at most 15 degrees)"""
    eval_full_size: bool = False
    """validate against the masks at their original size, the prediction being enlarged to it"""
    train_limit: int | None = None
    """use only this many of the training images, drawn by the seed"""

    def __post_init__(self):
        super().__post_init__()
        for name in ("dice_weight", "horizontal_flip", "brightness_contrast", "shift_scale_rotate"):
            _require(0 <= getattr(self, name) <= 1, self, name, "must be between 0 and 1")
        _require(self.train_limit is None or self.train_limit >= 1, self, "train_limit", "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class TextConfig(HeldOutConfig):
    """Training a language model on the bytes of one text."""

    text: Path | None = None
    """file to read; default: the English text that ships with Python, pydoc_data.topics"""
    context: int = 128
    """bytes the model sees at once"""
    test_fraction: float = 0.1
    """share of the text, at its end, that is the test part; the validation part comes before it"""

    def __post_init__(self):
        super().__post_init__()
        _require(self.context >= 2, self, "context", "must be at least 2")
        _require(0 < self.test_fraction < 1, self, "test_fraction", "must be above 0 and below 1")
        _require(self.test_fraction + self.val_fraction < 1, self, "test_fraction", "and val_fraction leave no text")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where things are and what is reported; nothing here changes a result."""

    name: str | None = None
    """folder of the run under runs-dir; default: the experiment and every field changed from its script"""
    resume: bool = False
    """continue the run where it stopped"""
    overwrite: bool = False
    """replace the run that is in the folder"""
    device: str = "auto"
    """auto, cuda, cuda:1, mps or cpu"""
    data_dir: Path | None = None
    """folder that holds data_cifar10 and the like; default: $VISION_BDH_DATA, else beside the scripts"""
    num_workers: int = 4
    """processes that augment images with masks, or read images which do not fit in memory"""
    runs_dir: Path = ROOT / "runs"
    """folder of all runs"""
    eval_batch_size: int | None = None
    """images (or texts) a forward pass in validation and test; default: 256; segmentation takes batch_size"""
    recompute: bool = False
    """of a BDH: keep little of each level for the backward pass and compute it again there; for large batches"""
    log_every: int = 50
    """steps between two readings of the loss"""
    keep_every: int | None = None
    """also keep the first weights and those after every so many epochs, as epoch_<n>.pt in the run's folder"""
    tensorboard: bool = False
    """write TensorBoard events into the run's folder"""
    wandb: str | None = None
    """report to this Weights & Biases project"""

    def __post_init__(self):
        _require(
            self.eval_batch_size is None or self.eval_batch_size >= 1, self, "eval_batch_size", "must be at least 1"
        )
        _require(self.log_every >= 1, self, "log_every", "must be at least 1")
        _require(self.keep_every is None or self.keep_every >= 1, self, "keep_every", "must be at least 1")
        _require(self.num_workers >= 0, self, "num_workers", "must not be negative")
        if self.name is not None and (not re.fullmatch(r"[\w+=.,-]+", self.name) or self.name in (".", "..")):
            raise ValueError(f"name = {self.name!r} must be a plain folder name of letters, digits and _ + = . , -")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other: continue the run, or replace it")


@dataclass(frozen=True)
class Experiment:
    """One run to make: `training.loop.fit` takes it."""

    name: str
    """folder under runs_dir, shared by the seeds"""
    model: Any
    """config of the model; has build()"""
    train: TrainConfig
    options: RunOptions = field(default_factory=RunOptions)

    @property
    def folder(self) -> Path:
        return self.options.runs_dir / self.name / f"seed{self.train.seed}"

    def fields(self) -> dict[str, dict]:
        """The fields that decide the result, as plain values; of a file its name, wherever it lies."""
        fields = {"model": dataclasses.asdict(self.model), "train": dataclasses.asdict(self.train)}
        return {
            part: {key: name_of_file(value) if isinstance(value, Path) else value for key, value in of.items()}
            for part, of in fields.items()
        }


def parse_experiment(
    name: str, model: Any, train: TrainConfig, description: str, args: list[str], options: RunOptions | None = None
) -> Experiment:
    """The script's experiment with the command line's changes; every field is a flag of its own name.

    tyro prints help, and refuses unknown flags and values at which a config raises ValueError, with exit code 2.
    """
    options = options or RunOptions()
    defaults = dataclasses.make_dataclass(
        "Flags", [("model", type(model)), ("train", type(train)), ("options", type(options))], frozen=True
    )
    flags = tyro.cli(
        defaults,
        default=defaults(model, train, options),
        description=description,
        args=args,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    full_name = full_experiment_name(name, (model, train), (flags.model, flags.train))
    # what is not read is not recorded: an encoder's checkpoint replaces the whole model's
    start_from = None if getattr(flags.model, "encoder", None) else flags.train.start_from
    asked = dataclasses.replace(flags.train, start_from=start_from)
    return Experiment(flags.options.name or full_name, flags.model, asked, flags.options)


def full_experiment_name(name: str, before: tuple, after: tuple) -> str:
    """The experiment's name and every field but the seed that was changed in its configs; of a file its name."""
    changed = {key: value for pair in zip(before, after, strict=True) for key, value in changed_fields(*pair).items()}
    changed.pop("seed", None)
    return "+".join([name, *(f"{key}={_in_a_name(value)}" for key, value in sorted(changed.items()))])


def changed_fields(before: Any, after: Any) -> dict:
    """The fields of `after` that differ from `before`, two configs of one class."""
    old, new = dataclasses.asdict(before), dataclasses.asdict(after)
    return {key: new[key] for key in new if new[key] != old[key]}


def default_fields(config: Any) -> dict[str, Any]:
    """The defaults of a config's class as JSON gives them back, for what is stored of a run older than a field."""
    fields = dataclasses.fields(config)
    defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    return json.loads(json.dumps(defaults))


def name_of_file(path: Path) -> str:
    """What tells a file from others; of a checkpoint also its run, because all of them are called best.pt."""
    return "-".join(path.resolve().parts[-3:]) if path.suffix == ".pt" else path.name


def _in_a_name(value: Any) -> Any:
    """A value as part of a folder's name."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return name_of_file(value) if isinstance(value, Path) else value


def _require(holds: bool, config: Any, name: str, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name} = {getattr(config, name)} {rule}")
