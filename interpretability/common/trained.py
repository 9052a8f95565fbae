"""Opens a finished run for inspection: its model and the images that it was tested on."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from training import seeds
from interpretability.common.adapters import Adapter, adapter_of
from interpretability.common.run_images import ClassifiedImages, RunImages, Samples, SegmentedImages
from models import build_config
from models.pretrained import pretrained_folders
from models.vision_bdh import Grid, height_and_width
from training.augment import normalise
from training.config import ROOT, UserError
from training.data.classes import CLASSES
from training.data.finding import count, cut_name
from training.data.image_files import MODES
from training.device import prepare_device
from training.experiment import changed_fields
from training.runs import load_model
from training.stored import EXPORTED, configuration_of, task_of
from training.views import Predict, Views, views_of

Batches = Iterator[tuple[Tensor, Tensor]]
LONGEST_STEM = 150  # bytes; file systems allow names of 255, and scripts add their own words
progress = partial(tqdm, leave=False, disable=None)  # a bar if stderr is a terminal


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where things are."""

    data_dir: Path | None = None
    """folder that contains data_cifar10 etc.; default: $VISION_BDH_DATA, else the folder of the train scripts; for a
    run on your own images (--dataset folder): their folder"""
    device: str = "auto"
    """auto, cuda, cuda:1, mps or cpu"""
    output_dir: Path = ROOT / "interpretability_results"
    """results are written to a subfolder named after the run"""


@dataclass(frozen=True, kw_only=True)
class RunChoice(Places):
    """Which run to inspect."""

    run: Path | None = None
    """run folder, such as runs/v2_cifar10/seed0, or a checkpoint in it; default: the last finished run in runs/"""

    def changed(self, *names: str) -> list[str]:
        """The non-default options among names, as tokens=mean, for file names."""
        changed = changed_fields(type(self)(), self)
        return [f"{name}={changed[name]}" for name in names if name in changed]


@dataclass(frozen=True, kw_only=True)
class PairChoice(RunChoice):
    """One run, or two to compare."""

    versus: Path | None = None
    """second run (or checkpoint) on the same data set, to compare with the first"""


@dataclass(frozen=True, kw_only=True)
class SeveralChoice(Places):
    """One or more runs, side by side."""

    run: tuple[Path, ...] = ()
    """run folders, such as runs/v2_cifar10/seed0 runs/vit_tiny_cifar10/seed0, or checkpoints in them; default: the last
    finished run in runs/"""
    names: tuple[str, ...] = ()
    """short names of the runs in tables and figures, in the same order; default: their experiments' names"""
    untrained: bool = True
    """also measure each run's model with newly drawn weights, as before training: what is the same there comes from the
    architecture (of --encoder, --start-from and pruning these weights know nothing)"""


class TrainedRun:
    """A run's model in evaluation mode, with its best weights, and its test images (validation if there is no test)."""

    def __init__(self, folder: Path, data_dir: Path | None = None, device: str = "auto", any_model: bool = False):
        """folder: of the run, or a checkpoint in it. any_model: accept models that the recorder does not support.

        Raises UserError if there is no such run, or its model cannot be inspected.
        """
        self.checkpoint = folder
        self.folder = folder.parent if folder.suffix in (".pt", ".safetensors") else folder
        self.data_dir = data_dir
        self.device = prepare_device(device)
        model, self.config = load_model(folder)
        self.model: nn.Module = model.to(self.device)
        self.sizes: Any = build_config(self.config["model_class"], self.config["config"]["model"])
        self.train: dict[str, Any] = configuration_of(self.config).train
        if any_model:
            return
        try:
            self.adapter: Adapter = adapter_of(model)
        except TypeError as error:
            raise UserError(f"{folder} cannot be inspected: {error}") from None
        if not hasattr(self.sizes, "patch_size") or task_of(self.config) == "video":
            raise UserError(f"{folder} cannot be inspected: its model does not read images")

    def untrained_model(self) -> nn.Module:
        """The model before training: the run's initial weights, as far as this version of PyTorch draws the same ones.

        Without the weights of another run (--encoder, --start-from) that it may have started from.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.derive("weights", self.train["seed"]))
            return self.sizes.build().eval().to(self.device)

    def answer(self, predict: Predict, images: Tensor, at_scales: bool = True) -> Tensor:
        """What predict answers in the views that the run was evaluated in (`training.views`), as logits.

        at_scales: in those of other sizes, too.
        """
        views = self._views(at_scales)
        return (views.segment if self.labels_pixels else views.classify)(predict, images)

    def _views(self, at_scales: bool = True) -> Views:
        scales = self.train.get("eval_scales", (1.0,)) if at_scales else (1.0,)
        return views_of(self.sizes, scales, self.train.get("eval_flip", False))

    @property
    def views_note(self) -> list[str]:
        """What a figure has to say that shows answers for each image as it is: nothing if the run is evaluated so."""
        plain = self._views() == Views()
        return [] if plain else ["each image as it is, not in the views that the run was evaluated in"]

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches."""
        height, width = height_and_width(self.sizes.img_size)
        return height // self.sizes.patch_size, width // self.sizes.patch_size

    @property
    def n_patches(self) -> int:
        return math.prod(self.grid)

    @property
    def labels_pixels(self) -> bool:
        """Whether this is a segmentation run."""
        return self.train.get("dataset") in CLASSES

    @property
    def experiment_title(self) -> str:
        """The run's title in figures, whichever checkpoint is open."""
        return f"{self.config['experiment'].replace('+', ', ')}, seed {self.train['seed']}"

    @property
    def title(self) -> str:
        """The run's title in figures, with the checkpoint unless it is the best."""
        return ", ".join(filter(None, (self.experiment_title, self.checkpoint_name)))

    @property
    def stem(self) -> str:
        """The run's name in file and folder names; the same for all checkpoints."""
        return f"{cut_name(self.config['experiment'], LONGEST_STEM)}_seed{self.train['seed']}"

    @property
    def checkpoint_name(self) -> str:
        """Such as epoch_004; empty for the best weights."""
        best = (self.folder, self.folder / "best.pt", self.folder / EXPORTED)
        return "" if self.checkpoint in best else self.checkpoint.stem

    def file_name(self, name: str) -> str:
        """The name, with the checkpoint's appended unless it is the best, so that results are not overwritten."""
        return "_".join(filter(None, (name, self.checkpoint_name)))

    def require(self, *names: str) -> None:
        """Raises UserError unless the recorder supports all these quantities for this model."""
        for name in names:
            if name not in self.adapter.quantities:
                model, needed = type(self.model).__name__, "that classifies images" if name == "logits" else "of a BDH"
                raise UserError(f"{self.checkpoint} is a {model}, which has no {name}: give a run {needed}")

    def require_classifier(self) -> None:
        """Raises UserError unless the model gives one class per image."""
        size, channels = getattr(self.sizes, "img_size", None), getattr(self.sizes, "in_channels", None)
        if task_of(self.config) != "classification" or not isinstance(size, int) or channels not in MODES:
            raise UserError(
                f"{self.checkpoint} does not classify images: give a run that does, such as runs/v2_cifar10/seed0"
            )

    @cached_property
    def images(self) -> RunImages:
        """Raises UserError if they cannot be used, or are not those of the run."""
        kind = SegmentedImages if self.labels_pixels else ClassifiedImages
        return kind(self.folder, self.config["data"], self.sizes, self.train, self.data_dir)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.images.class_names

    @property
    def part(self) -> str:
        """test, or validation for data without a test part."""
        return self.images.part

    @property
    def n_images(self) -> int:
        return self.images.n_images

    def choose_images(self, n: int | None, indices: Sequence[int] | None = None) -> list[int]:
        """Numbers of n evenly spaced images of the part, so that data sorted by class give all classes; or `indices`.

        n: None, or more than there are, for all. Raises UserError if none are chosen.
        """
        if indices is None:
            return _evenly_spaced(n, self.n_images)
        if not len(indices):
            raise UserError("no images chosen: give one or more numbers after --indices")
        return list(indices)

    def samples(self, indices: Sequence[int]) -> Samples:
        """Images of the part by number, from 0. Raises UserError for a number that does not exist."""
        for index in indices:
            if not 0 <= index < self.n_images:
                raise UserError(f"there is no {self.part} image {index}: numbers go from 0 to {self.n_images - 1}")
        return self.images.samples(indices)

    def full_size_batches(self, indices: Sequence[int], text: str | None = None) -> Batches:
        """As batches, of one image each, with its mask at the size that it is stored at."""
        return self._batches(partial(self.images.samples, full_size=True), indices, 1, text)

    def pixels(self, images: Tensor) -> Tensor:
        """The model's input: images (B, C, height, width) uint8 as float32 in [-1, 1], on the device."""
        return normalise(images.to(self.device))

    def batches(self, indices: Sequence[int], size: int = 128, text: str | None = None) -> Batches:
        """The model's input and the labels for images of the part, in order, on the device. text: of a progress bar."""
        return self._batches(self.samples, indices, size, text)

    def choose_training_images(self, n: int) -> np.ndarray:
        """Numbers of n images that the run was trained on, every class in proportion; all if there are fewer.

        In segmentation, evenly spaced ones. Raises UserError if n is below 1.
        """
        order = self.images.training_order
        return order[_evenly_spaced(n, len(order))]

    def training_batches(self, numbers: np.ndarray, size: int = 128, text: str | None = None) -> Batches:
        """The model's input and the labels for these training images, not augmented."""
        return self._batches(self.images.training_samples, numbers, size, text)

    def _batches(self, read: Callable[[Any], Samples], numbers: Any, size: int, text: str | None) -> Batches:
        with tqdm(total=len(numbers), desc=text, unit="img", leave=False, disable=None if text else True) as bar:
            for first in range(0, len(numbers), size):
                images, labels = read(numbers[first : first + size])
                yield self.pixels(images), labels.to(self.device)
                bar.update(len(labels))


def _evenly_spaced(n: int | None, n_images: int) -> list[int]:
    if n is not None and n < 1:
        raise UserError("no images chosen: give --images 1 or more")
    n = n_images if n is None else min(n, n_images)
    return [k * n_images // n for k in range(n)]


def open_run(choice: RunChoice) -> TrainedRun:
    """The run that the options name. Raises UserError if there is none."""
    return TrainedRun(choice.run or latest_run(ROOT / "runs"), choice.data_dir, choice.device)


def open_runs(choice: PairChoice) -> list[TrainedRun]:
    """One run, or two tested on the same images. Raises UserError if they were not."""
    runs = [open_run(choice)]
    if choice.versus is None:
        return runs
    runs.append(TrainedRun(choice.versus, choice.data_dir, choice.device))
    first, second = runs
    name, other = first.train["dataset"], second.train["dataset"]
    if name != other:
        raise UserError(f"--versus {second.checkpoint} was trained on {other}, not on {name}: give another run")
    drawn = first.part == "validation" and not first.labels_pixels  # other parts are fixed by the data set
    if drawn and not np.array_equal(first.images.split.val, second.images.split.val):
        raise UserError(f"--versus {second.checkpoint} has another validation part: give two runs with the same seed")
    return runs


def open_several(choice: SeveralChoice, any_model: bool = False) -> dict[str, TrainedRun]:
    """The runs that the options name, by short name. any_model: see `TrainedRun`. Raises UserError."""
    paths = choice.run or (latest_run(ROOT / "runs"),)
    if choice.names and len(choice.names) != len(paths):
        raise UserError(f"{len(choice.names)} --names for {count(len(paths), 'run')}: give one name per run, or none")
    runs = [TrainedRun(path, choice.data_dir, choice.device, any_model) for path in paths]
    names = choice.names or tuple(run.config["experiment"].partition("+")[0] for run in runs)
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{names.count(name)} runs are called {name}: tell them apart with --names")
    return dict(zip(names, runs, strict=True))


def several_folder(choice: SeveralChoice, runs: dict[str, TrainedRun]) -> Path:
    """Where results of these runs together are written: a folder named after all of them and their checkpoints."""
    return choice.output_dir / cut_name("_versus_".join(run.file_name(run.stem) for run in runs.values()))


def latest_run(runs_dir: Path) -> Path:
    """Folder of the last finished run anywhere in runs_dir. Raises UserError if there is none."""
    finished = [path for path in runs_dir.rglob("summary.json") if (path.parent / "best.pt").is_file()]
    if not finished:
        names = ", ".join(str(folder) for folder in pretrained_folders().values())
        there = f" (with weights in this repository: {names})" if names else ""
        raise UserError(f"no finished run in {runs_dir}: train one (python train_quickstart.py), or give --run{there}")
    return max(finished, key=lambda path: path.stat().st_mtime).parent
