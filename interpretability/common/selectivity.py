"""How selective single neurons are for a class, and how selective they would look by chance.

A neuron's best class is the one with the highest mean activity. Three measures for it:

    index      class selectivity index (m - r) / (m + r): m is the mean activity for the best class, r the average of
               the other classes' means (Morcos et al. 2018, arXiv 1803.06959). 0: equal for all classes; 1: active for
               one class only, even if on a single image.
    auroc      area under the ROC curve for telling the best class from the rest by the mean activity. 0.5: chance; 1:
               perfect. Falls if the neuron is silent on part of the class; does not rise if it is active once.
    precision  share of the best class among the patches (of different units, see below) that activate the neuron most.

Chance is the same measure with shuffled labels, for the same neuron: one that is active on a single image has an index
of 1 with any labels. p is the share of shuffles that reach the true value, counting the true value itself as one of
them (Phipson and Smyth 2010, arXiv 1603.05766).

Labels belong to units. A unit is all patches of one class in one image: the whole image for classification; in
segmentation (a patch has the class of most of its pixels) an image has as many units as classes. Shuffling permutes
labels over all units. In segmentation this makes p too small, because shuffled labels lose the size of a class (small
units vary more than large ones) and its usual place in the image.

Shapes: U units, M = H N neurons of a level, C classes, K patches kept per neuron, S shuffles.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from interpretability.common.activity import NO_CLASS, levels_of

ROUNDING = 1e-6  # float32 rounding of an index: shuffles that move labels within a class must count as reaching it
Unit = tuple[int, int, slice | Tensor]  # image in the batch, class, and which of its patches have the class


class Top(NamedTuple):
    """The patches that activate each neuron of a level most, strongest first, each from another unit; (K, M) each."""

    values: np.ndarray  # float32; 0 if fewer than K patches activate the neuron
    units: np.ndarray  # int64, unit number
    patches: np.ndarray  # int64, patch number in the image, in raster order


@dataclass(frozen=True)
class Responses:
    """Responses of all neurons to all units; lists are by level."""

    n_heads: int
    images: np.ndarray  # (U,) int64, image of each unit, numbered in the order seen
    labels: np.ndarray  # (U,) int64, class of each unit
    means: list[np.ndarray]  # (U, M) float32, positive part of the activity, averaged over the unit's patches
    active: list[np.ndarray]  # (M,) share of all patches (with or without a class) on which the neuron is active
    top: list[Top]


def collect(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], quantity: str, k: int) -> Responses:
    """One pass over the images, holding the activity of one level of one batch at a time.

    batches: the model's input, and the class of each patch (B, T). k: patches kept per neuron.
    """
    images, labels, means, active, top = [], [], {}, {}, {}
    n_images = n_patches = n_units = 0
    for level, activity, classes in levels_of(model, batches):
        values = getattr(activity, quantity).clamp(min=0)  # (B, H, T, N)
        units = _units(classes)
        if level == 0:
            first, n_units = n_units, n_units + len(units)
            images += [n_images + image for image, _, _ in units]
            labels += [label for _, label, _ in units]
            n_images, n_patches = n_images + len(classes), n_patches + classes.numel()
        active[level] = active.get(level, 0) + (values > 0).sum((0, 2)).flatten()
        of_units = [values[image][:, patches] for image, _, patches in units]  # (H, T', N) each
        if of_units:
            means.setdefault(level, []).append(torch.stack([each.mean(1).flatten() for each in of_units]).cpu())
            top[level] = _strongest(top.get(level), _peaks(of_units, units, first), k)
    levels = sorted(means)
    return Responses(
        n_heads=values.shape[1],
        images=np.array(images),
        labels=np.array(labels),
        means=[torch.cat(means[level]).numpy() for level in levels],
        active=[active[level].cpu().numpy() / n_patches for level in levels],
        top=[Top(*(each.cpu().numpy() for each in top[level])) for level in levels],
    )


def _units(classes: Tensor) -> list[Unit]:
    """classes: (B, T)."""
    units = []
    for image, of_patches in enumerate(classes):
        found = of_patches.unique().tolist()
        for label in found:
            if label != NO_CLASS:
                units.append((image, label, slice(None) if len(found) == 1 else (of_patches == label).nonzero()[:, 0]))
    return units


def _peaks(of_units: list[Tensor], units: list[Unit], first: int) -> list[Tensor]:
    """Value, unit number and patch of each unit's strongest patch, (U', M) each. first: number of the first unit."""
    values, patches = [], []
    for activity, (_, _, which) in zip(of_units, units, strict=True):
        peak, place = activity.max(1)  # (H, N)
        values.append(peak.flatten())
        patches.append((place if isinstance(which, slice) else which[place]).flatten())
    values = torch.stack(values)
    numbers = torch.arange(first, first + len(values), device=values.device)[:, None].expand_as(values)
    return [values, numbers, torch.stack(patches)]


def _strongest(before: list[Tensor] | None, peaks: list[Tensor], k: int) -> list[Tensor]:
    """The k strongest of both, in order; of equals, the first seen."""
    if before is not None:
        peaks = [torch.cat(pair) for pair in zip(before, peaks, strict=True)]
    order = peaks[0].argsort(dim=0, descending=True, stable=True)[:k]
    return [each.gather(0, order) for each in peaks]


class Measures(NamedTuple):
    """The measures of a level's neurons, (M,) each, or (S, M) with shuffled labels; NaN for neurons never active."""

    best: np.ndarray  # int64, the class with the highest mean activity
    index: np.ndarray
    auroc: np.ndarray
    precision: np.ndarray


class Ranked(NamedTuple):
    """A level's responses, prepared for repeated measuring."""

    means: np.ndarray  # (U, M)
    ranks: np.ndarray  # (U, M), rank of the unit by mean activity, minus the average rank; ties share their average
    top: Top


def ranked(responses: Responses, level: int) -> Ranked:
    means = responses.means[level]
    return Ranked(means, (rankdata(means, axis=0) - (len(means) + 1) / 2).astype(np.float32), responses.top[level])


def measures(data: Ranked, labels: np.ndarray) -> Measures:
    """labels: (U,), at least two classes."""
    present, which, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    members = (which == np.arange(len(present))[:, None]).astype(np.float32)  # (C, U)
    class_means = members @ data.means / sizes[:, None]  # (C, M)
    best, most = class_means.argmax(0), class_means.max(0)
    rest = (class_means.sum(0) - most) / (len(present) - 1)
    active = data.top.values > 0
    with np.errstate(invalid="ignore"):  # neurons never active
        index = (most - rest) / (most + rest)
        # Mann-Whitney U divided by the number of pairs; the half is there because the ranks are centred
        rank_sums = np.take_along_axis(members @ data.ranks, best[None], 0)[0]
        auroc = rank_sums / (sizes * (len(labels) - sizes))[best] + 0.5
        precision = (active & (which[data.top.units] == best)).sum(0) / active.sum(0)
    return Measures(present[best], index, np.where(most > 0, auroc, np.nan), precision)


def shuffled(data: Ranked, labels: np.ndarray, n_shuffles: int, rng: np.random.Generator) -> Measures:
    """The measures with shuffled labels, (S, M) each. The best class is found anew each time."""
    shuffles = [measures(data, rng.permutation(labels)) for _ in range(n_shuffles)]
    return Measures(*(np.stack(each) for each in zip(*shuffles, strict=True)))


def p_values(values: np.ndarray, null: np.ndarray) -> np.ndarray:
    """(M,), from 1 / (S + 1) to 1, or NaN; see above. values: (M,), null: (S, M)."""
    reached = (null >= values - ROUNDING).sum(0)
    return np.where(np.isnan(values), np.nan, (reached + 1) / (len(null) + 1))
