"""What differs between tasks: the data, the loss, what is counted, and the metric that picks the best epoch.

A task is made from its part of the configuration.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from models.masked_bdh import Reconstruction
from training.config import (
    ClassificationConfig,
    Experiment,
    PretrainingConfig,
    SegmentationConfig,
    TextConfig,
    TrainConfig,
    UserError,
)
from training.data import DataSet, ImageBatches, Split, data_folder, load_dataset, split_train
from training.masks import CLASSES, find_masks
from training.metrics import (
    METRICS,
    Metric,
    batch_miou,
    classification_ratios,
    confusion_matrices,
    reconstruction_ratios,
    segmentation_ratios,
    text_ratios,
)
from training.segmentation import MaskBatches, describe_masks, refuse
from training.text import TextBatches, describe, load_text

EVAL_BATCH_SIZE = 256
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

    def ratios(self, sums: dict[str, Any]) -> dict[str, float | None]:
        """ "loss" and the metric, and whatever else is worth a column, from the sums of counts."""


class Classification:
    """Cross-entropy and accuracy."""

    metric = METRICS["accuracy"]
    samples, unit = "images", "img"

    def __init__(self, train: ClassificationConfig):
        self.train = train

    def load(self, experiment: Experiment, split: Split | None, device: torch.device, check: Check) -> ImageBatches:
        train, options = self.train, experiment.options
        img_size, in_channels = experiment.model.img_size, experiment.model.in_channels
        dataset = load_dataset(train.dataset, options.data_dir, img_size, in_channels)
        check(dataset.description)
        _check_fit(experiment.model, dataset)
        split = split or split_train(dataset.train_labels, train.val_fraction, train.train_limit, train.seed)
        eval_batch_size = options.eval_batch_size or EVAL_BATCH_SIZE
        return ImageBatches(dataset, split, train, eval_batch_size, device, options.num_workers)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy in nats. logits: (B, classes), labels: (B,)."""
        return F.cross_entropy(logits.float(), labels)

    def counts(self, loss: Tensor, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        images = torch.full_like(labels[0], len(labels))
        return {"loss": loss * len(labels), "correct": (logits.argmax(1) == labels).sum(), "images": images}

    def ratios(self, sums: dict[str, float]) -> dict[str, float]:
        return classification_ratios(sums)


class MaskedImages(Classification):
    """Absolute error of masked pixels (SimMIM); the classes of the images are not looked at."""

    metric = METRICS["psnr"]

    def loss(self, outputs: Reconstruction, labels: Tensor) -> Tensor:
        """Mean over the masked pixels of |prediction - truth|, in the images' unit, [-1, 1]."""
        return (outputs.predicted.float() - outputs.truth.float()).abs().mean()

    def counts(self, loss: Tensor, outputs: Reconstruction, labels: Tensor) -> dict[str, Tensor]:
        squared = (outputs.predicted.float() - outputs.truth.float()).square().mean()
        images = torch.full_like(labels[0], len(labels))
        return {"loss": loss * len(labels), "squared_error": squared * len(labels), "images": images}

    def ratios(self, sums: dict[str, Any]) -> dict[str, float | None]:
        return reconstruction_ratios(sums)


class LanguageModelling:
    """Cross-entropy of the next byte."""

    metric = METRICS["bits_per_byte"]
    samples, unit = "pieces of text", "piece"

    def __init__(self, train: TextConfig):
        self.train = train

    def load(self, experiment: Experiment, split: Split | None, device: torch.device, check: Check) -> TextBatches:
        text, name = load_text(self.train.text)
        check(describe(text, name))
        if experiment.model.vocab_size < 256:
            raise UserError(
                f"text is bytes, and the model knows {experiment.model.vocab_size} tokens: set --vocab-size 256"
            )
        return TextBatches(text, name, self.train, experiment.options.eval_batch_size or EVAL_BATCH_SIZE, device)

    def loss(self, outputs: tuple[Tensor, Any], targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats. outputs[0]: logits (B, T, V), targets: (B, T)."""
        return F.cross_entropy(outputs[0].flatten(0, 1).float(), targets.flatten())

    def counts(self, loss: Tensor, outputs: tuple[Tensor, Any], targets: Tensor) -> dict[str, Tensor]:
        return {"loss": loss * len(targets), "images": torch.full_like(targets[0, 0], len(targets))}

    def ratios(self, sums: dict[str, float]) -> dict[str, float]:
        return text_ratios(sums)


class Segmentation:
    """A class for every pixel: cross-entropy and Dice, and the mean IoU of one confusion matrix over the whole part."""

    metric = METRICS["miou"]
    samples, unit = "images", "img"

    def __init__(self, train: SegmentationConfig):
        self.train = train
        self.classes = CLASSES[train.dataset]

    def load(self, experiment: Experiment, split: Split | None, device: torch.device, check: Check) -> MaskBatches:
        model, options = experiment.model, experiment.options
        for name, value in {"num_classes": len(self.classes.names), "in_channels": 3}.items():
            if getattr(model, name) != value:
                raise UserError(
                    f"{self.train.dataset} has {len(self.classes.names)} classes and colour images, but the model has "
                    f"{name} = {getattr(model, name)}: set --{name.replace('_', '-')} {value}"
                )
        if options.eval_batch_size not in (None, self.train.batch_size):
            raise UserError(
                "segmentation validates in batches of --batch-size, because its loss and val_miou_batch depend on "
                "them: leave out --eval-batch-size"
            )
        files = find_masks(self.train.dataset, data_folder(self.train.dataset, options.data_dir))
        refuse(files.problems, files.name)
        check(describe_masks(files))
        return MaskBatches(files, self.train, model.img_size, device, options.num_workers)

    def loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        """The weighted mean of cross-entropy (nats) and Dice loss. logits: (B, classes, h, w), masks: (B, h', w')."""
        logits = at_size_of(masks, logits)
        share = self.train.dice_weight
        return (1 - share) * pixel_cross_entropy(logits, masks) + share * dice_loss(logits, masks)

    def counts(self, loss: Tensor, logits: Tensor, masks: Tensor) -> dict[str, Tensor]:
        predicted = at_size_of(masks, logits).argmax(1)
        confusion = confusion_matrices(predicted, masks, len(self.classes.names)).sum(0)
        return {
            "loss": loss * len(masks),
            "images": torch.full_like(masks[0, 0, 0], len(masks)),
            "confusion": confusion,
            "miou_batch": batch_miou(confusion),
            "batches": torch.ones_like(masks[0, 0, 0]),
        }

    def ratios(self, sums: dict[str, Any]) -> dict[str, float | None]:
        return segmentation_ratios(sums, self.classes.names)


def at_size_of(masks: Tensor, logits: Tensor) -> Tensor:
    """logits: (B, classes, h, w) in float32, enlarged (bilinear) where the masks, (B, h', w'), are of another size."""
    logits = logits.float()
    if logits.shape[2:] == masks.shape[1:]:
        return logits
    return F.interpolate(logits, size=masks.shape[1:], mode="bilinear", align_corners=False)


def pixel_cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    """Mean over pixels but void, in nats; 0 if there are none. logits: (B, n, h, w), masks: (B, h, w), n is void."""
    void = logits.shape[1]
    total = F.cross_entropy(logits, masks, ignore_index=void, reduction="sum")
    return total / (masks != void).sum().clamp(min=1)


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """1 - 2 |P T| / (|P| + |T|), the mean over all classes of those that the batch's masks hold (others count 0).

    P: probabilities, T: truth, summed over all pixels of the batch but void. Milletari et al. 2016 (arXiv 1606.04797),
    with the sums in the denominator not squared, as segmentation-models-pytorch has it.
    logits: (B, n, h, w), masks: (B, h, w), n is void.
    """
    n = logits.shape[1]
    truth = F.one_hot(masks, n + 1)[..., :n].to(logits.dtype)  # (B, h, w, n), zero at void
    probabilities = logits.softmax(1).movedim(1, -1) * (masks != n).unsqueeze(-1)
    overlap = (probabilities * truth).sum((0, 1, 2))
    pixels = truth.sum((0, 1, 2))
    dice = 2 * overlap / (probabilities.sum((0, 1, 2)) + pixels).clamp(min=1e-7)
    return ((1 - dice) * (pixels > 0)).mean()


TASKS = {
    ClassificationConfig: Classification,
    PretrainingConfig: MaskedImages,
    SegmentationConfig: Segmentation,
    TextConfig: LanguageModelling,
}


def make_task(train: TrainConfig) -> Task:
    return TASKS[type(train)](train)


def _check_fit(model: Any, dataset: DataSet) -> None:
    """Raises UserError where the model's input or output does not suit the images."""
    channels, height, width = dataset.train_images.shape[1:]
    images = f"the images are {height} x {width} with {channels} channels and {len(dataset.class_names)} classes"
    if height != width:
        raise UserError(f"{images}, but the models here read square images only")
    for name, value in {"img_size": height, "in_channels": channels, "num_classes": len(dataset.class_names)}.items():
        if getattr(model, name, value) != value:  # pretraining has no classes
            is_flag = name in {field.name for field in dataclasses.fields(model)}
            mend = f"set --{name.replace('_', '-')} {value}" if is_flag else "choose another --dataset or model"
            raise UserError(f"{images}, but the model has {name} = {getattr(model, name)}: {mend}")
