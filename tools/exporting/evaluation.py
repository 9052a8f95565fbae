"""The score of any form of a model on the images that its run was tested on."""

from dataclasses import dataclass

import torch

from analysis.tables import accuracy_interval
from interpretability.common.trained import TrainedRun
from training.metrics import METRICS, confusion_matrices, confusion_ratios
from training.tasks import at_size_of
from training.views import Predict

BATCH, SEGMENTATION_BATCH = 128, 4  # images at once; those of segmentation are large, and their scores larger


@dataclass(frozen=True)
class Score:
    """Accuracy over images, or mIoU over the pixels of all images."""

    key: str
    """accuracy or miou, as in training.metrics"""
    value: float
    """a fraction"""
    n_images: int
    part: str
    """test, or validation for data without a test part"""

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval over the choice of images; None for mIoU."""
        if self.key != "accuracy":
            return None
        return accuracy_interval(round(self.value * self.n_images), self.n_images)

    def __str__(self) -> str:
        metric = METRICS[self.key]
        ends = "" if self.interval is None else " ({} to {})".format(*map(metric.number, self.interval))
        return f"{self.part} {metric.title} {metric.number(self.value)}{ends} on {self.n_images:,} images"


def score(run: TrainedRun, predict: Predict, n_images: int | None = None) -> Score:
    """Scores predict on images of the run's test part. n_images: evenly spaced; None for all.

    With eval_flip, eval_scales and eval_full_size as the run was evaluated, except that classifiers are asked at
    their own size alone: most of their exported forms take no other. Raises UserError if the data are not there.
    """
    indices = run.choose_images(n_images)
    if run.train.get("eval_full_size"):
        batches = run.full_size_batches(indices, "testing")
    else:
        batches = run.batches(indices, SEGMENTATION_BATCH if run.labels_pixels else BATCH, "testing")
    total = None
    with torch.inference_mode():
        for images, labels in batches:
            answer = run.answer(predict, images, at_scales=run.labels_pixels)
            if run.labels_pixels:
                predicted = at_size_of(labels, answer).argmax(1)
                counts = confusion_matrices(predicted, labels, len(run.class_names)).sum(0)
            else:
                counts = (answer.argmax(1) == labels).sum()
            total = counts if total is None else total + counts
    if run.labels_pixels:
        miou = confusion_ratios(total.tolist(), run.class_names)["miou"]
        return Score("miou", miou, len(indices), run.part)
    return Score("accuracy", total.item() / len(indices), len(indices), run.part)
