"""What differs between tasks: the data, the loss, what is counted, and the metric that picks the best epoch."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from training.config import ClassificationConfig, Experiment, TextConfig, TrainConfig, UserError
from training.data import DataSet, ImageBatches, Split, load_dataset, split_train
from training.metrics import METRICS, Metric, classification_ratios, text_ratios
from training.text import TextBatches, describe, load_text

Check = Callable[[dict[str, Any]], None]


class Batches(Protocol):
    """The data of a run on its device, given out in batches: pairs of what the model reads and what it should say."""

    description: dict[str, Any]
    """name and whatever else tells these data from others; stored with the run, and compared when it is resumed"""
    split: Split | None
    """which samples validate, where that is drawn"""

    def size(self, part: str) -> int:
        """Samples of "train", "val" or "test"; 0 where there is no such part."""

    def train_batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every training sample once, in batches of train.batch_size; draws follow from the seed and the epoch."""

    def eval_batches(self, part: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Every sample of a part once, in order."""


class Task(Protocol):
    metric: Metric
    """val_<key> picks the best epoch"""
    samples: str
    """what the samples are called"""
    unit: str
    """one of them in the progress bar"""

    def load(self, experiment: Experiment, split: Split | None, device: torch.device, check: Check) -> Batches:
        """The data. split: of the run that is resumed. Raises UserError where they are missing or the model misfits.

        check: called with their description before anything is made of them.
        """

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """What training lowers, averaged over the batch."""

    def counts(self, loss: Tensor, outputs: Any, targets: Tensor) -> dict[str, Tensor]:
        """What is summed over batches, as tensors on the device; "images" are the samples."""

    def ratios(self, sums: dict[str, float]) -> dict[str, float]:
        """ "loss" and the metric, from the sums of counts."""


class Classification:
    """Cross-entropy and accuracy."""

    metric = METRICS["accuracy"]
    samples, unit = "images", "img"

    def load(self, experiment: Experiment, split: Split | None, device: torch.device, check: Check) -> ImageBatches:
        train, options = experiment.train, experiment.options
        img_size, in_channels = experiment.model.img_size, experiment.model.in_channels
        dataset = load_dataset(train.dataset, options.data_dir, img_size, in_channels)
        check(dataset.description)
        _check_fit(experiment.model, dataset)
        split = split or split_train(dataset.train_labels, train.val_fraction, train.train_limit, train.seed)
        return ImageBatches(dataset, split, train, options.eval_batch_size, device, options.num_workers)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy in nats. logits: (B, classes), labels: (B,)."""
        return F.cross_entropy(logits.float(), labels)

    def counts(self, loss: Tensor, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        images = torch.full_like(labels[0], len(labels))
        return {"loss": loss * len(labels), "correct": (logits.argmax(1) == labels).sum(), "images": images}

    def ratios(self, sums: dict[str, float]) -> dict[str, float]:
        return classification_ratios(sums)


class LanguageModelling:
    """Cross-entropy of the next byte."""

    metric = METRICS["bits_per_byte"]
    samples, unit = "pieces of text", "piece"

    def load(self, experiment: Experiment, split: Split | None, device: torch.device, check: Check) -> TextBatches:
        text, name = load_text(experiment.train.text)
        check(describe(text, name))
        if experiment.model.vocab_size < 256:
            raise UserError(
                f"text is bytes, and the model knows {experiment.model.vocab_size} tokens: set --vocab-size 256"
            )
        return TextBatches(text, name, experiment.train, experiment.options.eval_batch_size, device)

    def loss(self, outputs: tuple[Tensor, Any], targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats. outputs[0]: logits (B, T, V), targets: (B, T)."""
        return F.cross_entropy(outputs[0].flatten(0, 1).float(), targets.flatten())

    def counts(self, loss: Tensor, outputs: tuple[Tensor, Any], targets: Tensor) -> dict[str, Tensor]:
        return {"loss": loss * len(targets), "images": torch.full_like(targets[0, 0], len(targets))}

    def ratios(self, sums: dict[str, float]) -> dict[str, float]:
        return text_ratios(sums)


TASKS = {ClassificationConfig: Classification, TextConfig: LanguageModelling}


def make_task(train: TrainConfig) -> Task:
    return TASKS[type(train)]()


def _check_fit(model: Any, dataset: DataSet) -> None:
    """Raises UserError where the model's input or output does not suit the images."""
    channels, height, width = dataset.train_images.shape[1:]
    images = f"the images are {height} x {width} with {channels} channels and {len(dataset.class_names)} classes"
    if height != width:
        raise UserError(f"{images}, but the models here read square images only")
    for name, value in {"img_size": height, "in_channels": channels, "num_classes": len(dataset.class_names)}.items():
        if getattr(model, name) != value:
            is_flag = name in {field.name for field in dataclasses.fields(model)}
            mend = f"set --{name.replace('_', '-')} {value}" if is_flag else "choose another --dataset or model"
            raise UserError(f"{images}, but the model has {name} = {getattr(model, name)}: {mend}")
