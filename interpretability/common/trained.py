"""Opens a finished run for inspection: its model and the images that it was tested on."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from training import seeds
from interpretability.common.adapters import Adapter, adapter_of
from models import build_config
from models.pretrained import pretrained_folders
from models.vision_bdh import Grid, height_and_width
from training.augment import normalise
from training.config import ROOT, UserError
from training.data import DataSet, Split, data_folder, draw_split, load_dataset
from training.data.classes import CLASSES
from training.data.finding import count, cut_name
from training.data.image_files import MODES, read_images
from training.data.mask_files import BadFile, MaskFiles
from training.data.masks import find_masks
from training.data.segmentation import read_pair, refuse, scale_image, scale_mask, training_pairs
from training.device import prepare_device
from training.experiment import changed_fields
from training.runs import Run, load_model
from training.stored import EXPORTED, changed_data, configuration_of, task_of
from training.views import Predict, Views, views_of

Batches = Iterator[tuple[Tensor, Tensor]]
DATA_WORDS = {
    "class_names": "class names",
    "images": "numbers of images",
    "file_names_and_sizes": "files",
    "sha256": "images or labels",
}
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


class Samples(NamedTuple):
    """B images and their labels, on the CPU."""

    images: Tensor  # (B, C, height, width) uint8, at the model's size
    labels: Tensor  # (B,) int64 classes, or (B, height, width) for segmentation


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
    def _data(self) -> DataSet | MaskFiles:
        """The data that the run was trained on. Raises UserError if they cannot be used, or are others."""
        name = self.train["dataset"]
        if self.labels_pixels:
            files = find_masks(name, data_folder(name, self.data_dir), download=False)
            refuse(files.problems, name)
            self._require_same(files.description)
            return files
        dataset = load_dataset(name, self.data_dir, self.sizes.img_size, self.sizes.in_channels)
        self._require_same(dataset.description)
        return dataset.with_eval_crop(self.train.get("eval_crop", 1.0))

    def _require_same(self, found: dict[str, Any]) -> None:
        """Raises UserError unless the data with this description are those of the run, as far as it recorded them."""
        changed = changed_data(self.config["data"], found)
        if changed:
            key = next((key for key in DATA_WORDS if key in changed), changed[0])  # the one that says most
            raise UserError(
                f"{self.folder} was trained on other {DATA_WORDS.get(key, key)} of {self.train['dataset']}: "
                "give its data with --data-dir"
            )

    @cached_property
    def _training_pairs(self) -> list[Any]:
        """Of a segmentation run: image and mask files that it was trained on."""
        train = self.train
        return training_pairs(self._data, train.get("train_val", False), train["train_limit"], train["seed"])

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        return self._data.classes.names if self.labels_pixels else self._data.class_names

    @cached_property
    def _split(self) -> Split:
        """Which images the run was trained on and validated with; drawn again, by its seed, if split.npz is missing."""
        split = Run(self.folder).read_split()
        if split is None:
            train = self.train
            split = draw_split(self._data, train["val_fraction"], train["train_limit"], train["seed"])
        return split

    @cached_property
    def _part(self) -> tuple[str, np.ndarray]:
        """The part's key in the data set, and the numbers of its images in that part."""
        data = self._data
        if self.labels_pixels:
            part = "test" if data.pairs.get("test") else "val"
            return part, np.arange(len(data.pairs[part]))
        if len(data.test_labels):
            return "test", np.arange(len(data.test_labels))
        return "val", np.arange(len(self._split.val))

    @property
    def part(self) -> str:
        """test, or validation for data without a test part."""
        return "test" if self._part[0] == "test" else "validation"

    @property
    def n_images(self) -> int:
        return len(self._part[1])

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
        part, places = self._part
        for index in indices:
            if not 0 <= index < len(places):
                raise UserError(f"there is no {self.part} image {index}: numbers go from 0 to {len(places) - 1}")
        if not self.labels_pixels:
            return self._read(part, places[list(indices)])
        return self._read_pairs(self._data.pairs[part], indices)

    def _read(self, part: str, numbers: np.ndarray) -> Samples:
        """Images with one class each. part: train, val or test; numbers: of images in it."""
        if part == "test":
            images, labels = self._data.test_images[numbers], self._data.test_labels[numbers]
        else:
            places = getattr(self._split, part)[numbers]
            images, labels = self._data.part(part, dataclasses.replace(self._split, **{part: places}))
        return Samples(torch.from_numpy(read_images(images)), torch.from_numpy(labels))

    def _read_pairs(self, pairs: Sequence[Any], numbers: Sequence[int], full_size: bool = False) -> Samples:
        """Images with their masks. pairs: of image and mask files; full_size: masks of one size, their own."""
        read = [self._read_pair(pairs[number], full_size) for number in numbers]
        return Samples(*(torch.from_numpy(np.stack(each)) for each in zip(*read, strict=True)))

    def _read_pair(self, pair: Any, full_size: bool) -> tuple[np.ndarray, np.ndarray]:
        """(C, height, width) uint8 and (height, width) int64, at the model's size; full_size: the mask at its own."""
        try:
            image, mask = read_pair(pair, self._data)
        except BadFile as error:
            raise UserError(str(error)) from None
        size = self.sizes.img_size
        mask = mask if full_size else scale_mask(mask, size)
        return scale_image(image, size).transpose(2, 0, 1), mask.astype(np.int64)

    def full_size_batches(self, indices: Sequence[int], text: str | None = None) -> Batches:
        """As batches, of one image each, with its mask at the size that it is stored at."""
        pairs = self._data.pairs[self._part[0]]
        return self._batches(partial(self._read_pairs, pairs, full_size=True), indices, 1, text)

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
        if self.labels_pixels:
            return np.array(_evenly_spaced(n, len(self._training_pairs)))
        by_class = np.argsort(self._data.train_labels[self._split.train], kind="stable")
        return by_class[_evenly_spaced(n, len(by_class))]

    def training_batches(self, numbers: np.ndarray, size: int = 128, text: str | None = None) -> Batches:
        """The model's input and the labels for these training images, not augmented."""
        if self.labels_pixels:
            return self._batches(partial(self._read_pairs, self._training_pairs), numbers, size, text)
        return self._batches(partial(self._read, "train"), numbers, size, text)

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
    if drawn and not np.array_equal(first._split.val, second._split.val):
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
