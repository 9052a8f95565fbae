"""What the neurons of a BDH do on the images that it was tested with, patch by patch: what sparsity and neurons count.

Active is what lies above 0: of ReLU and its square everything that is not zero. GELU is zero nowhere; what it gives
below 0 (down to -0.17) counts as no activity.

Letters in shapes: B images, T patches, H heads, N neurons a head, C classes.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from interpretability.common.adapters import pass_through
from interpretability.common.recorder import record
from interpretability.common.trained import TrainedRun
from models.bdh import Activity, CoreConfig
from models.vision_bdh import Grid
from training.config import UserError
from training.runs import Run, load_model

QUANTITIES = Activity._fields
NO_CLASS = -1
DEFAULT_PATCHES = 64_000  # of so many images together: a minute on two CPU cores at the sizes of CIFAR-10
BATCH_NUMBERS = 2**24  # of one quantity at one level: 64 MB
LARGEST_BATCH = 128

GELU_NOTE = "its neurons go through GELU, which is zero nowhere: active is what lies above 0, the rest is not silent"


class LevelActivity(NamedTuple):
    """One level of a batch."""

    level: int
    """from 0"""
    activity: Activity
    """(B, H, T, N) each, of patches; a class token is not among them"""
    classes: Tensor
    """(B, T) int64, of each patch, NO_CLASS where it has none"""


def core_sizes(run: TrainedRun) -> CoreConfig:
    """Sizes and design of the run's BDH. Raises UserError where it is none."""
    run.require(*QUANTITIES)
    return run.sizes


def choose_images(run: TrainedRun, n: int | None) -> list[int]:
    """Numbers of n images spread over the part; None: as many as have DEFAULT_PATCHES patches."""
    rows, columns = run.grid
    return run.spread(max(1, DEFAULT_PATCHES // (rows * columns)) if n is None else n)


def batches_of_patches(run: TrainedRun, indices: Sequence[int], text: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixels of images and the class of each patch, (B, T), in order, with a bar on the screen that says the text."""
    sizes, (rows, columns) = core_sizes(run), run.grid
    numbers = rows * columns * sizes.n_head * sizes.n_neurons  # of an image
    batch_size = min(max(1, BATCH_NUMBERS // numbers), LARGEST_BATCH)
    with tqdm(total=len(indices), desc=text, unit="img", leave=False, disable=None) as bar:
        for pixels, labels in run.batches(indices, batch_size):
            yield pixels, patch_classes(labels, run.grid, len(run.class_names))
            bar.update(len(pixels))


def patch_classes(labels: Tensor, grid: Grid, n_classes: int) -> Tensor:
    """(B, T) int64: the image's class, or what most pixels of the patch are; NO_CLASS where that is void.

    labels: (B,) of images, or (B, height, width) of pixels, void being n_classes. Of equally many, the lower label.
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
    """Every level of every batch, one at a time: no more than one level's activity of a batch is ever held.

    batches: pixels as the model reads them, and (B, T) the class of each patch.
    """
    with record(model, *QUANTITIES) as trace:
        for pixels, classes in batches:
            pass_through(model, pixels)
            first = trace.adapter.class_tokens
            for level in trace.levels:
                activity = trace.activity(level)
                yield LevelActivity(level, Activity(*(each[:, :, first:] for each in activity)), classes)


def kept_model(run: TrainedRun, epoch: int) -> nn.Module | None:
    """The model with the weights that training kept after that epoch, 0 being before it; None where there are none.

    Of weights that cannot be read, a line on stderr says so.
    """
    path = Run(run.folder).kept_weights().get(epoch)
    try:
        return path and load_model(path)[0].to(run.device)
    except UserError as error:
        print(f"warning: epoch {epoch} is left out: {error}", file=sys.stderr)
        return None


def seen_text(run: TrainedRun, n_images: int) -> str:
    """How much was looked at: numbers of dead neurons and the like depend on it."""
    rows, columns = run.grid
    return f"{n_images:,} {run.part_name} image{'s' * (n_images != 1)} of {rows * columns:,} patches"
