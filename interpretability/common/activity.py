"""Neurons of a BDH on its test images, patch by patch: the data for sparsity.py and neurons.py.

A neuron is active where it is above 0: for ReLU and its square, wherever it is not zero. GELU is zero nowhere; its
negative values (down to -0.17) count as inactive. The product of two negative values is positive, so a gated neuron of
GELU can be active where neither of its factors is.

Shapes: B images, T patches, H heads, N neurons per head, C classes.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interpretability.common.adapters import pass_through
from interpretability.common.recorder import record
from interpretability.common.trained import TrainedRun
from models.bdh import Activity
from models.vision_bdh import Grid
from training.config import UserError
from training.runs import Run, load_model

QUANTITIES = Activity._fields
NO_CLASS = -1
DEFAULT_PATCHES = 64_000  # in all images together: about a minute on two CPU cores for CIFAR-10
BATCH_NUMBERS = 2**24  # per quantity and level: 64 MB
LARGEST_BATCH = 128
GELU_NOTE = (
    "GELU is zero nowhere: active means above 0, inactive neurons are not silent, and two negative factors make an "
    "active gated neuron"
)


class LevelActivity(NamedTuple):
    """One level of a batch."""

    level: int  # from 0
    activity: Activity  # (B, H, T, N) each, without the class token
    classes: Tensor  # (B, T) int64, the class of each patch, or NO_CLASS


def choose_images(run: TrainedRun, n: int | None) -> list[int]:
    """Numbers of n evenly spaced images; None: as many as have DEFAULT_PATCHES patches. Raises UserError if no BDH."""
    run.require(*QUANTITIES)
    return run.choose_images(max(1, DEFAULT_PATCHES // run.n_patches) if n is None else n)


def measured_on(run: TrainedRun, n_images: int) -> str:
    """For titles: how many images and patches were measured, which numbers of dead neurons depend on; note on GELU."""
    images = f"{n_images:,} {run.part} image{'s' * (n_images != 1)} of {run.n_patches:,} patches"
    return f"{images}; {GELU_NOTE}" if run.sizes.activation == "gelu" else images


def batches_of_patches(run: TrainedRun, indices: Sequence[int], text: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The model's input and the class of each patch (B, T), in order. text: label of the progress bar."""
    per_image = run.n_patches * run.sizes.n_head * run.sizes.n_neurons
    batch_size = min(max(1, BATCH_NUMBERS // per_image), LARGEST_BATCH)
    for pixels, labels in run.batches(indices, batch_size, text):
        yield pixels, patch_classes(labels, run.grid, len(run.class_names))


def patch_classes(labels: Tensor, grid: Grid, n_classes: int) -> Tensor:
    """(B, T) int64: the image's class, or the class of most pixels in the patch; NO_CLASS if most are void.

    labels: (B,), or (B, height, width) with void = n_classes. Ties go to the lower label.
    """
    rows, columns = grid
    if labels.ndim == 1:
        return labels[:, None].expand(-1, rows * columns)
    patches = labels.unflatten(2, (columns, -1)).unflatten(1, (rows, -1))  # (B, rows, side, columns, side)
    votes = F.one_hot(patches.transpose(2, 3).flatten(3), n_classes + 1).sum(3).flatten(1, 2)  # (B, T, C + 1)
    most = votes.argmax(-1)
    return most.where(most < n_classes, NO_CLASS)


@torch.no_grad()
def levels_of(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[LevelActivity]:
    """Every level of every batch, holding the activity of one level of one batch at a time.

    batches: the model's input, and the class of each patch (B, T).
    """
    with record(model, *QUANTITIES) as trace:
        for pixels, classes in batches:
            pass_through(model, pixels)
            first = trace.adapter.class_tokens
            for level in trace.levels:
                activity = trace.activity(level)
                yield LevelActivity(level, Activity(*(each[:, :, first:] for each in activity)), classes)


def kept_model(run: TrainedRun, epoch: int) -> nn.Module | None:
    """The model with the weights kept after an epoch (--keep-every; 0: before training), or None.

    Warns on stderr about weights that cannot be read.
    """
    path = Run(run.folder).kept_weights().get(epoch)
    try:
        return path and load_model(path)[0].to(run.device)
    except UserError as error:
        print(f"warning: epoch {epoch} is skipped: {error}", file=sys.stderr)
        return None
