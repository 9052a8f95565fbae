"""How much the activity of single neurons says about the class, and what it would seem to say if it said nothing.

Three measures of each neuron, for its best class, the one that it is most active for on average:

    index      class selectivity index, (m - r) / (m + r): m is the mean activity for the best class, r the mean over
               the other classes of theirs (Morcos et al. 2018, arXiv 1803.06959). 0: the same for all classes; 1:
               active for one class only, be it on a single image.
    auroc      area under the ROC curve of the mean activity, as what tells images of the best class from the rest:
               0.5 is chance, 1 a neuron by which alone they can be told apart. It does not fall where a neuron is
               silent on part of the class only, nor rise where it is active once.
    precision  share of the best class among the patches (of different images) that excite the neuron most.

The same measures with the labels shuffled are what chance gives, for this neuron with its own number of images on which
it is active: a neuron that is active on one image has an index of 1 with any labels. The share of shuffles that reach
the true value (both counted once more: Phipson and Smyth 2010, arXiv 1603.05766) is its p.

What is labelled is a unit: all patches of an image that have one class. That is the image itself, but for segmentation,
where a patch has the class of most of its pixels, and an image is as many units as it has classes; shuffles deal the
labels over the units of all images. There chance comes out too small, so that p is too: units of few patches vary more
than units of many, and a class has its usual place in the image, while shuffled labels have neither size nor place.

Letters in shapes: U units, M = H N neurons of a level, C classes, K patches kept of a neuron.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from interpretability.common.activity import NO_CLASS, levels_of

ROUNDING = 1e-6  # of an index in float32: shuffles that only move labels within a class must count as reaching it


class Top(NamedTuple):
    """The patches that excite each neuron of a level most, strongest first, each of another unit; (K, M) each."""

    values: np.ndarray
    """float32; 0 where fewer patches than K excite the neuron"""
    units: np.ndarray
    """int64, which unit it is in"""
    patches: np.ndarray
    """int64, its place in the image, row by row"""


@dataclass(frozen=True)
class Responses:
    """Of all neurons to all units."""

    n_heads: int
    images: np.ndarray
    """(U,) int64, of each unit: its image, by its place among those that were looked at"""
    labels: np.ndarray
    """(U,) int64, its class"""
    means: list[np.ndarray]
    """by level: (U, M) float32, activity above 0, averaged over the unit's patches"""
    active: list[np.ndarray]
    """by level: (M,) share of the patches, with or without a class, on which the neuron is active"""
    top: list[Top]
    """by level"""


def collect(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], quantity: str, k: int) -> Responses:
    """One pass over the images, in which no more than a batch's activity at one level is held.

    batches: pixels as the model reads them, and (B, T) the class of each patch. k: patches kept of each neuron.
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


def _units(classes: Tensor) -> list[tuple[int, int, slice | Tensor]]:
    """Image, class, and which of its patches have it. classes: (B, T)."""
    units = []
    for image, of_patches in enumerate(classes):
        found = of_patches.unique().tolist()
        for label in found:
            if label != NO_CLASS:
                units.append((image, label, slice(None) if len(found) == 1 else (of_patches == label).nonzero()[:, 0]))
    return units


def _peaks(of_units: list[Tensor], units: list[tuple[int, int, slice | Tensor]], first: int) -> list[Tensor]:
    """Values, units and patches of the strongest patch of each unit, (U', M) each. first: number of the first unit."""
    values, patches = [], []
    for activity, (_, _, which) in zip(of_units, units, strict=True):
        peak, place = activity.max(1)  # (H, N)
        values.append(peak.flatten())
        patches.append((place if isinstance(which, slice) else which[place]).flatten())
    values = torch.stack(values)
    numbers = torch.arange(first, first + len(values), device=values.device)[:, None].expand_as(values)
    return [values, numbers, torch.stack(patches)]


def _strongest(before: list[Tensor] | None, peaks: list[Tensor], k: int) -> list[Tensor]:
    """The k strongest, in order, of those before and the new ones; of equals, the first seen."""
    if before is not None:
        peaks = [torch.cat(pair) for pair in zip(before, peaks, strict=True)]
    order = peaks[0].argsort(dim=0, descending=True, stable=True)[:k]
    return [each.gather(0, order) for each in peaks]


# ---------------------------------------------------------------------------- measures


class Measures(NamedTuple):
    """Of the neurons of a level, (M,) each; NaN for those that are never active. See above."""

    best: np.ndarray
    """int64, the class with the highest mean activity"""
    index: np.ndarray
    auroc: np.ndarray
    precision: np.ndarray


class Ranked(NamedTuple):
    """The responses at one level, as the measures need them."""

    means: np.ndarray
    """(U, M)"""
    ranks: np.ndarray
    """(U, M), of the unit among all by its mean activity, equals sharing theirs; their average taken off"""
    top: Top


def ranked(responses: Responses, level: int) -> Ranked:
    """level: from 0."""
    means = responses.means[level]
    return Ranked(means, (rankdata(means, axis=0) - (len(means) + 1) / 2).astype(np.float32), responses.top[level])


def measures(of: Ranked, labels: np.ndarray) -> Measures:
    """labels: (U,), of two classes at least."""
    present, which, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    members = (which == np.arange(len(present))[:, None]).astype(np.float32)  # (C, U)
    class_means = members @ of.means / sizes[:, None]  # (C, M)
    best = class_means.argmax(0)
    most = class_means.max(0)
    rest = (class_means.sum(0) - most) / (len(present) - 1)
    active = of.top.values > 0
    with np.errstate(invalid="ignore"):  # neurons that are never active
        index = (most - rest) / (most + rest)
        # Mann and Whitney's U over the number of pairs; the ranks have mean 0, hence the half
        rank_sums = np.take_along_axis(members @ of.ranks, best[None], 0)[0]
        auroc = rank_sums / (sizes * (len(labels) - sizes))[best] + 0.5
        precision = (active & (which[of.top.units] == best)).sum(0) / active.sum(0)
    return Measures(present[best], index, np.where(most > 0, auroc, np.nan), precision)


class Null(NamedTuple):
    """What shuffled labels give; S shuffles."""

    index: np.ndarray
    """(S, M)"""
    auroc: np.ndarray
    precision: np.ndarray


def shuffled(of: Ranked, labels: np.ndarray, n_shuffles: int, rng: np.random.Generator) -> Null:
    """The measures with the labels dealt anew, n_shuffles times; the best class is that of the dealt labels."""
    dealt = [measures(of, rng.permutation(labels)) for _ in range(n_shuffles)]
    return Null(*(np.stack([getattr(each, name) for each in dealt]) for name in Null._fields))


def p_values(values: np.ndarray, null: np.ndarray) -> np.ndarray:
    """(M,), the share of values and null that reaches the value; 1 at most, 1 / (S + 1) at least; NaN for NaN.

    values: (M,), null: (S, M).
    """
    reached = (null >= values - ROUNDING).sum(0)
    return np.where(np.isnan(values), np.nan, (reached + 1) / (len(null) + 1))
