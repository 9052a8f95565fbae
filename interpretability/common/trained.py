"""A finished run opened for looking inside: its model, and the images that it was tested with."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from interpretability.common.adapters import Adapter, adapter_of
from models import build_config
from models.vision_bdh import Grid, height_and_width
from training.augment import normalise
from training.config import ROOT, UserError, changed_fields
from training.data import DataSet, data_folder, load_dataset
from training.data.image_files import read_images
from training.data.masks import CLASSES, BadFile, MaskFiles, find_masks
from training.data.segmentation import read_pair, scale_image, scale_mask
from training.device import pick_device, tune_cpu_allocator
from training.runs import Run, load_model

RESULTS = ROOT / "interpretability_results"  # pictures and tables go into a folder of the run's name in it
LONGEST_STEM = 200  # characters: file systems allow names of 255 bytes


@dataclass(frozen=True, kw_only=True)
class RunChoice:
    """Which run to look into."""

    run: Path | None = None
    """folder of one run, such as runs/v2_cifar10/seed0; default: the most recent finished run in runs/"""
    data_dir: Path | None = None
    """folder that holds data_cifar10 and the like; default: $VISION_BDH_DATA, else beside the scripts"""
    device: str = "auto"
    """auto, cuda, cuda:1, mps or cpu"""

    def changed(self, *names: str) -> list[str]:
        """Such as tokens=mean, of the flags by these names that are not as they come: results differ by them."""
        changed = changed_fields(type(self)(), self)
        return [f"{name}={changed[name]}" for name in names if name in changed]


class Samples(NamedTuple):
    """B images with their truth, on the CPU."""

    images: Tensor
    """(B, C, height, width) uint8, at the model's size"""
    labels: Tensor
    """(B,) int64, the class of each; of segmentation (B, height, width), at the model's size"""


class TrainedRun:
    """The model with its best weights in evaluation mode, and its test images (validation, where there is no test)."""

    def __init__(self, folder: Path, data_dir: Path | None = None, device: str = "auto"):
        """folder: of the run, or a checkpoint in it. Raises UserError for what is no run of a model on images."""
        self.checkpoint = folder
        self.folder = folder.parent if folder.suffix == ".pt" else folder
        self.data_dir = data_dir
        self.device = pick_device(device)
        if self.device.type == "cpu":
            tune_cpu_allocator()
        model, self.config = load_model(folder)
        self.model: nn.Module = model.to(self.device)
        self.sizes: Any = build_config(self.config["model_class"], self.config["config"]["model"])
        self.train: dict[str, Any] = self.config["config"]["train"]
        try:
            self.adapter: Adapter = adapter_of(model)
        except TypeError as error:
            raise UserError(f"{folder} cannot be looked into: {error}") from None
        if not hasattr(self.sizes, "patch_size"):
            raise UserError(f"{folder} cannot be looked into: its model reads no images")

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches."""
        height, width = height_and_width(self.sizes.img_size)
        return height // self.sizes.patch_size, width // self.sizes.patch_size

    @property
    def labels_pixels(self) -> bool:
        """Whether it is a segmentation model."""
        return self.train["dataset"] in CLASSES

    @property
    def title(self) -> str:
        """For people: the run, and which of its checkpoints, if not the best."""
        return title_of(self.config, self.checkpoint)

    @property
    def stem(self) -> str:
        """For names of files and folders; the same for all checkpoints."""
        return stem_of(self.config)

    @property
    def checkpoint_name(self) -> str:
        return checkpoint_name(self.checkpoint)

    def file_name(self, name: str) -> str:
        return with_checkpoint(name, self.checkpoint)

    def require(self, *names: str) -> None:
        """Raises UserError where a trace of this model cannot give all of these quantities."""
        for name in names:
            if name not in self.adapter.quantities:
                family = type(self.model).__name__
                mend = "that classifies images" if name == "logits" else "of a BDH"
                raise UserError(f"{self.checkpoint} is a {family}, which has no {name}: give a run {mend}")

    @cached_property
    def _data(self) -> DataSet | MaskFiles:
        name = self.train["dataset"]
        if self.labels_pixels:
            return find_masks(name, data_folder(name, self.data_dir), download=False)
        dataset = load_dataset(name, self.data_dir, self.sizes.img_size, self.sizes.in_channels)
        known, now = self.config["data"], dataset.description
        for key, word in (("class_names", "classes"), ("images", "numbers")):  # the split counts on both
            if known.get(key, now[key]) != now[key]:
                raise UserError(
                    f"the images of {name} have other {word} than those that {self.folder} was trained on: "
                    "name their folder with --data-dir"
                )
        return dataset

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        return self._data.classes.names if self.labels_pixels else self._data.class_names

    @cached_property
    def _part(self) -> tuple[str, np.ndarray]:
        """The part's name, and where in the data set its images are (None of a test part: in order)."""
        data = self._data
        if self.labels_pixels:
            part = "test" if data.pairs.get("test") else "val"
            return part, np.arange(len(data.pairs[part]))
        if len(data.test_labels):
            return "test", np.arange(len(data.test_labels))
        return "val", Run(self.folder).read_split().val

    @property
    def part(self) -> str:
        """ "test", or "val" where the data have no test part."""
        return self._part[0]

    @property
    def part_name(self) -> str:
        """The part, for people."""
        return {"test": "test", "val": "validation"}[self.part]

    @property
    def n_images(self) -> int:
        """Images of that part."""
        return len(self._part[1])

    def spread(self, n: int | None) -> list[int]:
        """Numbers of n images at equal distances over the part, so that parts sorted by class give all of them.

        None, or more than there are: all. Raises UserError for none.
        """
        return _spread(n, self.n_images)

    def samples(self, indices: Sequence[int]) -> Samples:
        """Images of the part by their numbers, from 0. Raises UserError for a number that is not there."""
        part, places = self._part
        for index in indices:
            if not 0 <= index < len(places):
                raise UserError(f"there is no {self.part_name} image {index}: there are {len(places)}, numbered from 0")
        data, places = self._data, places[list(indices)]
        if self.labels_pixels:
            pairs = [self._read_pair(data, part, place) for place in places]
            return Samples(*(torch.from_numpy(np.stack(each)) for each in zip(*pairs, strict=True)))
        images, labels = (
            (data.test_images, data.test_labels) if part == "test" else (data.train_images, data.train_labels)
        )
        return Samples(torch.from_numpy(read_images(images[places])), torch.from_numpy(labels[places]))

    def _read_pair(self, files: MaskFiles, part: str, place: int) -> tuple[np.ndarray, np.ndarray]:
        """(C, height, width) uint8 and (height, width) int64, at the model's size."""
        try:
            image, mask = read_pair(files.pairs[part][place], files)
        except BadFile as error:
            raise UserError(str(error)) from None
        size = self.sizes.img_size
        return scale_image(image, size).transpose(2, 0, 1), scale_mask(mask, size).astype(np.int64)

    def pixels(self, images: Tensor) -> Tensor:
        """What the model reads. images: (B, C, height, width) uint8 -> float32 in [-1, 1], on the device."""
        return normalise(images.to(self.device))

    def batches(self, indices: Sequence[int], batch_size: int = 128) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels as the model reads them and labels of these images, in order, on the device."""
        for first in range(0, len(indices), batch_size):
            images, labels = self.samples(indices[first : first + batch_size])
            yield self.pixels(images), labels.to(self.device)

    def training_places(self, n: int) -> np.ndarray:
        """Where in the data set n images that the run trained on are: every class in proportion; all if there are less.

        Raises UserError for none, and for a run whose data were not split by a draw.
        """
        split = Run(self.folder).read_split()
        if split is None:
            raise UserError(f"{self.folder} has no split.npz, which says what it trained on")
        by_class = split.train[np.argsort(self._data.train_labels[split.train], kind="stable")]
        return by_class[_spread(n, len(by_class))]

    def training_batches(self, places: np.ndarray, batch_size: int = 128) -> Iterator[tuple[Tensor, Tensor]]:
        """What `batches` gives, of these images of the training part; not augmented."""
        for first in range(0, len(places), batch_size):
            here = places[first : first + batch_size]
            images = torch.from_numpy(read_images(self._data.train_images[here]))
            yield self.pixels(images), torch.from_numpy(self._data.train_labels[here]).to(self.device)


def checkpoint_name(path: Path) -> str:
    """Such as epoch_004; empty for the best weights, which a run's folder stands for. path: of either."""
    return path.stem if path.suffix == ".pt" and path.stem != "best" else ""


def with_checkpoint(name: str, checkpoint: Path) -> str:
    """The name, with that of the checkpoint, if not the best: results of several must not replace each other."""
    return "_".join(filter(None, (name, checkpoint_name(checkpoint))))


def title_of(config: dict[str, Any], checkpoint: Path | None = None) -> str:
    """What to call a run before people, and its checkpoint, if not the best. config: its config.json."""
    run = f"{config['experiment'].replace('+', ', ')}, seed {config['config']['train']['seed']}"
    return ", ".join(filter(None, (run, checkpoint and checkpoint_name(checkpoint))))


def stem_of(config: dict[str, Any]) -> str:
    """What to call files and folders about a run. config: its config.json."""
    return f"{config['experiment'][:LONGEST_STEM]}_seed{config['config']['train']['seed']}"


def _spread(n: int | None, n_images: int) -> list[int]:
    """n of the numbers from 0 to n_images - 1 at equal distances; see `TrainedRun.spread`."""
    if n is not None and n < 1:
        raise UserError("there is no image to look at: give --images 1 or more")
    if n is None or n >= n_images:
        return list(range(n_images))
    return [k * n_images // n for k in range(n)]


def open_run(choice: RunChoice) -> TrainedRun:
    """The run that the flags name. Raises UserError where there is none."""
    return TrainedRun(choice.run or latest_run(ROOT / "runs"), choice.data_dir, choice.device)


def check_same_images(first: TrainedRun, second: TrainedRun) -> None:
    """Raises UserError where an image's number does not mean the same image to both."""
    runs = (first, second)
    names = [run.train["dataset"] for run in runs]
    if names[0] != names[1]:
        raise UserError(
            f"{first.checkpoint} was trained on {names[0]}, {second.checkpoint} on {names[1]}: "
            "two runs are compared on the same images, so give two on one data set"
        )
    if first.part == "test" or first.labels_pixels:  # these come with the data
        return
    if not np.array_equal(*(Run(run.folder).read_split().val for run in runs)):
        raise UserError(
            f"{first.checkpoint} and {second.checkpoint} hold out other images, and {names[0]} has no test part: "
            "two runs are compared on the same images, so give two of one seed"
        )


def latest_run(runs_dir: Path) -> Path:
    """Folder of the run that was finished last, anywhere below runs_dir. Raises UserError where there is none."""
    finished = [path for path in runs_dir.rglob("summary.json") if (path.parent / "best.pt").is_file()]
    if not finished:
        raise UserError(
            f"there is no finished run in {runs_dir}: train one first (python train_quickstart.py takes about a "
            "minute), or name its folder with --run"
        )
    return max(finished, key=lambda path: path.stat().st_mtime).parent
