"""What differs between tasks: data, loss, what is counted, and the metric that selects the best epoch.

A train config makes its task (`make_task`). docs/extending.md describes the contract.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import processes
from models.masked_bdh import Reconstruction
from training.config import ClassificationConfig, SegmentationConfig, TextConfig, UserError
from training.data import DataSet, ImageBatches, Split, data_folder, draw_split, load_dataset
from training.data.classes import CLASSES
from training.data.mask_files import MaskFiles
from training.data.masks import find_masks
from training.data.segmentation import MaskBatches, refuse
from training.data.text import Text, TextBatches, load_text
from training.experiment import Experiment
from training.metrics import METRICS, Items, Metric, batch_miou, confusion_matrices, confusion_ratios
from training.views import Views, check_train_sizes, views_of

EVAL_BATCH_SIZE = 256


class Source(Protocol):
    """Data found but not yet loaded onto the device."""

    description: dict[str, Any]
    """identifies the data: stored in config.json and compared at resume"""


class Batches(Protocol):
    """The data of a run on its device, as batches: pairs of what the model reads and the targets.

    With several processes, each yields its share of every batch (`processes.share`).
    """

    split: Split | None
    """which samples validate, if that is drawn"""

    def size(self, part: str) -> int:
        """Samples of "train", "val" or "test"; 0 if there is no such part."""

    def train_batches(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Every training sample once, in batches of train.batch_size, from batch number `first` on.

        Random draws depend on seed and epoch alone.
        """

    def eval_batches(self, part: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Every sample of a part once, in order."""


class Task(Protocol):
    metric: Metric
    """its val_<key> selects the best epoch; an entry of METRICS"""
    samples: str
    """what the samples are called in messages"""
    unit: str
    """the same, short, in the progress bar"""
    selects_best: bool
    """whether the best validation epoch is tested; otherwise the last one"""
    shows_metric: bool
    """whether the progress bar computes the ratios during training; False if they are costly"""
    whole_batch: bool
    """whether the loss is no mean over samples, so that with several processes `loss` adds up their shares itself
    (`processes.total`) and returns the same in all of them"""

    reads_values: bool
    """whether the loss reads values from the device, so that a training step cannot be a CUDA graph"""

    def open(self, experiment: Experiment) -> Source:
        """Finds the data. Raises UserError if they are missing."""

    def load(self, source: Any, split: Split | None, experiment: Experiment, device: torch.device) -> Batches:
        """split: the resumed run's, None to draw one. Raises UserError if data are damaged or do not fit the model."""

    def predict(self, model: nn.Module, inputs: Tensor) -> Any:
        """Outputs in validation and test."""

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """A mean over the batch's samples; of several processes, over this one's share, which may be empty."""

    def counts(self, outputs: Any, targets: Tensor) -> dict[str, Tensor | Items]:
        """What the ratios need of a batch: tensors that are added over batches, or `Items` that are gathered.

        Stays on the device. The loop itself adds "loss" (summed over samples) and "samples". Several processes' counts
        are added or gathered too; what is not a sum over shares is counted by one (`processes.once`).
        """

    def ratios(self, sums: dict[str, Any]) -> dict[str, float | None]:
        """The metric and further columns, from the sums of `counts`, as numbers and lists."""


class OneForward:
    """What most tasks share: one forward pass in validation and test, ratios cheap enough for the progress bar."""

    selects_best = shows_metric = True
    whole_batch = reads_values = False
    views: Views | None = None
    """forms of an image that are evaluated, once the model is known"""

    def predict(self, model: nn.Module, inputs: Tensor) -> Any:
        return model(inputs)


class Classification(OneForward):
    """Cross-entropy and accuracy; with soft targets (label smoothing, mixup, cutmix) against the heaviest class."""

    metric = METRICS["accuracy"]
    samples, unit = "images", "img"

    def __init__(self, train: ClassificationConfig):
        self.train = train

    def open(self, experiment: Experiment) -> DataSet:
        train, model = self.train, experiment.model
        self.views = views_of(model, train.eval_scales, train.eval_flip)
        check_train_sizes(model, train.train_sizes)
        source = load_dataset(train.dataset, experiment.options.data_dir, model.img_size, model.in_channels)
        if train.crop_original and isinstance(source.train_images, np.ndarray):
            raise UserError(f"--crop-original is for image files, which {source.name} does not have: leave it out")
        return source.with_eval_crop(train.eval_crop)

    def load(self, source: DataSet, split: Split | None, experiment: Experiment, device: torch.device) -> ImageBatches:
        _check_fit(experiment.model, source)
        train, options = self.train, experiment.options
        split = split or draw_split(source, train.val_fraction, train.train_limit, train.seed)
        eval_batch_size = options.eval_batch_size or EVAL_BATCH_SIZE
        return ImageBatches(source, split, train, eval_batch_size, device, options.num_workers)

    def predict(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Logits; with eval_flip and eval_scales the mean of those of all forms of an image."""
        views = self.views or Views(self.train.eval_flip)
        return views.classify(model, inputs)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy in nats. logits: (B, classes), labels: (B,), or (B, classes) probabilities."""
        return F.cross_entropy(logits.float(), labels)

    def counts(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        heaviest = labels if labels.ndim == 1 else labels.argmax(1)
        return {"correct": (logits.argmax(1) == heaviest).sum()}

    def ratios(self, sums: dict[str, Any]) -> dict[str, float | None]:
        return {"accuracy": sums["correct"] / sums["samples"]}


class MaskedImages(Classification):
    """Mean absolute error of masked pixels (SimMIM); class labels are not used."""

    metric = METRICS["psnr"]
    predict = OneForward.predict

    def loss(self, outputs: Reconstruction, labels: Tensor) -> Tensor:
        """Mean over masked pixels of |prediction - truth|, in units of the images, [-1, 1]."""
        return (outputs.predicted.float() - outputs.truth.float()).abs().mean()

    def counts(self, outputs: Reconstruction, labels: Tensor) -> dict[str, Tensor]:
        squared = (outputs.predicted.float() - outputs.truth.float()).square().mean()
        return {"squared_error": squared * len(labels)}

    def ratios(self, sums: dict[str, Any]) -> dict[str, float | None]:
        """Peak signal-to-noise ratio in dB; the pixels span 2."""
        error = sums["squared_error"] / sums["samples"]
        return {"psnr": 10 * math.log10(2**2 / max(error, 1e-12))}


class LanguageModelling(OneForward):
    """Cross-entropy of the next byte."""

    metric = METRICS["bits_per_byte"]
    samples, unit = "text pieces", "piece"

    def __init__(self, train: TextConfig):
        self.train = train

    def open(self, experiment: Experiment) -> Text:
        if (vocab_size := experiment.model.vocab_size) != 256:
            raise UserError(f"text is bytes, so the model needs 256 tokens, not {vocab_size}: set --vocab-size 256")
        return load_text(self.train.text)

    def load(self, source: Text, split: Split | None, experiment: Experiment, device: torch.device) -> TextBatches:
        return TextBatches(source, self.train, experiment.options.eval_batch_size or EVAL_BATCH_SIZE, device)

    def loss(self, outputs: tuple[Tensor, Any], targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats. outputs[0]: logits (B, T, V), targets: (B, T)."""
        return F.cross_entropy(outputs[0].flatten(0, 1).float(), targets.flatten())

    def counts(self, outputs: tuple[Tensor, Any], targets: Tensor) -> dict[str, Tensor]:
        return {}

    def ratios(self, sums: dict[str, Any]) -> dict[str, float | None]:
        return {"bits_per_byte": sums["loss"] / sums["samples"] / math.log(2)}


class Segmentation(OneForward):
    """Cross-entropy and Dice per pixel; mean IoU of one confusion matrix over the whole set."""

    metric = METRICS["miou"]
    samples, unit = "images", "img"
    whole_batch = True  # Dice and the mean over pixels are not means over images

    def __init__(self, train: SegmentationConfig):
        self.train = train
        self.classes = CLASSES[train.dataset]
        self.selects_best = not train.train_val
        self.weights: Tensor | None = None  # of the classes in the cross-entropy

    def open(self, experiment: Experiment) -> MaskFiles:
        model, options, n_classes = experiment.model, experiment.options, len(self.classes.names)
        self.views = views_of(model, self.train.eval_scales, self.train.eval_flip)
        for name, value in {"num_classes": n_classes, "in_channels": 3}.items():
            if getattr(model, name) != value:
                raise UserError(
                    f"{self.train.dataset} has {n_classes} classes and colour images, but the model has "
                    f"{name} = {getattr(model, name)}: set --{name.replace('_', '-')} {value}"
                )
        if options.eval_batch_size not in (None, self.train.batch_size):
            raise UserError(
                "segmentation validates in batches of --batch-size, because the loss and val_miou_batch depend on it: "
                "leave out --eval-batch-size"
            )
        files = find_masks(self.train.dataset, data_folder(self.train.dataset, options.data_dir))
        refuse(files.problems, files.name)
        if self.train.train_val and not files.pairs["test"]:
            raise UserError(f"--train-val tests on the test set, and {files.name} has none here: leave it out")
        return files

    def load(self, source: MaskFiles, split: Split | None, experiment: Experiment, device: torch.device) -> MaskBatches:
        data = MaskBatches(source, self.train, experiment.model.img_size, device, experiment.options.num_workers)
        if self.train.class_weighting == "median_frequency":
            self.weights = median_frequencies(data.parts["train"].each_mask(), len(self.classes.names)).to(device)
        return data

    def predict(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Logits; with eval_flip and eval_scales those of the mean class probabilities of all forms of an image."""
        views = self.views or Views(self.train.eval_flip)
        return views.segment(model, inputs)

    def loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Weighted mean of cross-entropy (nats) and Dice loss. logits: (B, classes, h, w), masks: (B, h', w')."""
        logits = at_size_of(masks, logits)
        share = self.train.dice_weight
        return (1 - share) * pixel_cross_entropy(logits, masks, self.weights) + share * dice_loss(logits, masks)

    def counts(self, logits: Tensor, masks: Tensor) -> dict[str, Tensor]:
        predicted = at_size_of(masks, logits).argmax(1)
        confusion = confusion_matrices(predicted, masks, len(self.classes.names)).sum(0)
        of_all = processes.total(confusion)
        return {
            "confusion": confusion,
            "miou_batch": processes.once(batch_miou(of_all)),
            "batches": processes.once((of_all.sum() > 0).long()),  # one that is all void does not count
        }

    def ratios(self, sums: dict[str, Any]) -> dict[str, float | None]:
        """`confusion_ratios`, and the mean over batches of `batch_miou`, for comparison with published numbers."""
        ratios = confusion_ratios(sums["confusion"], self.classes.names)
        first = {key: ratios.pop(key) for key in ("miou", "pixel_accuracy")}
        return {**first, "miou_batch": sums["miou_batch"] / max(1, sums["batches"]), **ratios}


def at_size_of(masks: Tensor, logits: Tensor) -> Tensor:
    """logits (B, classes, h, w) in float32, upsampled (bilinear) to the size of masks (B, h', w') if they differ."""
    logits = logits.float()
    if logits.shape[2:] == masks.shape[1:]:
        return logits
    return F.interpolate(logits, size=masks.shape[1:], mode="bilinear", align_corners=False)


def pixel_cross_entropy(logits: Tensor, masks: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over non-void pixels, in nats; 0 if there are none. logits: (B, n, h, w), masks: (B, h, w), n is void.

    weights: (n,) of the classes; the mean is then weighted. Of several processes, the mean over all their pixels.
    """
    void, total = logits.shape[1], processes.total
    entropy = total(F.cross_entropy(logits, masks, weight=weights, ignore_index=void, reduction="sum"))
    if weights is None:
        return entropy / total((masks != void).sum()).clamp(min=1)
    return entropy / total(F.pad(weights, (0, 1))[masks].sum()).clamp(min=1e-6)  # void weighs 0


def median_frequencies(masks: Iterable[np.ndarray], n_classes: int) -> Tensor:
    """(n_classes,) class weights median(f) / f: Eigen and Fergus 2015 (arXiv 1411.4734), section 6.3.2.

    f: pixels of a class / non-void pixels of the images that hold it. A class that no image holds gets weight 1.
    masks: (h, w) uint8 each; n_classes is void.
    """
    counts = np.stack([np.bincount(mask.ravel(), minlength=n_classes + 1)[:n_classes] for mask in masks])
    present = counts > 0
    frequency = counts.sum(0) / np.maximum(1, (counts.sum(1, keepdims=True) * present).sum(0))
    there = frequency > 0
    weights = np.ones(n_classes)
    weights[there] = np.median(frequency[there]) / frequency[there]
    return torch.from_numpy(weights).float()


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """1 - 2 |P T| / (|P| + |T|), a mean over all classes; classes absent from the batch's masks count 0.

    P: probabilities, T: truth, summed over the batch's non-void pixels, of all processes. Milletari et al. 2016
    (arXiv 1606.04797), with plain instead of squared sums in the denominator, as in segmentation-models-pytorch.
    logits: (B, n, h, w), masks: (B, h, w), n is void.
    """
    n = logits.shape[1]
    truth = F.one_hot(masks, n + 1)[..., :n].to(logits.dtype)  # (B, h, w, n), zero at void
    probabilities = logits.softmax(1).movedim(1, -1) * (masks != n).unsqueeze(-1)
    overlap = processes.total((probabilities * truth).sum((0, 1, 2)))
    pixels = processes.total(truth.sum((0, 1, 2)))
    dice = 2 * overlap / (processes.total(probabilities.sum((0, 1, 2))) + pixels).clamp(min=1e-7)
    return ((1 - dice) * (pixels > 0)).mean()


def _check_fit(model: Any, dataset: DataSet) -> None:
    """Raises UserError if the model's input or output does not fit the images."""
    channels, height, width = dataset.train_images.shape[1:]
    images = f"the images are {height} x {width} with {channels} channels and {len(dataset.class_names)} classes"
    if height != width:
        raise UserError(f"{images}, but the models here read square images only")
    for name, value in {"img_size": height, "in_channels": channels, "num_classes": len(dataset.class_names)}.items():
        if getattr(model, name, value) != value:  # pretraining has no classes
            is_flag = name in {field.name for field in dataclasses.fields(model)}
            remedy = f"set --{name.replace('_', '-')} {value}" if is_flag else "choose another --dataset or model"
            raise UserError(f"{images}, but the model has {name} = {getattr(model, name)}: {remedy}")
