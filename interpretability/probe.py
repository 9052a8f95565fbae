"""Measures what can be decoded from the features after each level, and what the model itself would answer there.

For each level, the test accuracy of

* a linear probe (Alain & Bengio 2016, arXiv 1610.01644): logistic regression on standardised features of images that
  the run was trained on;
* k nearest neighbours on the same features and images, weighted by 1 / distance;
* the model's own read-out: its norm, pooling and head applied after this level as if it were the last;
* a BDH run with this many levels, up to twice as many as it was trained with: a model of that depth built from the same
  weights. With shared weights this equals the read-out, except under scaled_pre, whose norms depend on the depth.

A probe shows what is linearly decodable, not what the model uses. Probes learn from images that the model was trained
on and fits better than new ones, which lowers their scores a little. Level 0 is what the first level reads, where a
transformer's class token is the same for all images (features: interpretability/common/features.py). Intervals are 95 %
(Wilson) over the choice of test images, not over seeds; the table also has what each level gains over the one below it
with the same method, paired by image: two levels can differ clearly though their intervals overlap. Writes a figure
(PNG and SVG) and a table (CSV).

    python interpretability/probe.py --run runs/v2_cifar10/seed0
    python interpretability/probe.py --run runs/vit_tiny_cifar10/seed0 --tokens mean --train-images 10000
"""

import math
import sys
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from analysis.plotting.style import COLORS, PAGE, save_figure, style_axes, titled_figure
from analysis.tables import accuracy_interval, mean_interval, write_csv
from interpretability.common.depth import run_with_levels, why_not_deeper
from interpretability.common.features import images_per_pass, stream_features
from interpretability.common.recorder import record
from interpretability.common.trained import RunChoice, open_run, progress
from models.vision_bdh import VisionBDH
from training.command_line import run_script
from training.config import UserError, require

SETTINGS = ("tokens", "normalise", "neighbours", "penalty")  # named in the output files
MAX_ITERATIONS = 2000  # of the linear probe's optimiser
STYLES = {  # label, colour, marker, line
    "linear_probe": ("linear probe", COLORS[0], "o", "-"),
    "knn": ("nearest neighbours", COLORS[2], "s", "-"),
    "readout": ("the model's own read-out", COLORS[1], "^", "-"),
    "run_with_levels": ("the model run with this many levels", COLORS[1], "^", "--"),
}


@dataclass(frozen=True, kw_only=True)
class Options(RunChoice):
    """Which run to probe, and how."""

    images: int = 2000
    """number of test images (validation if there is no test part), evenly spaced"""
    train_images: int = 4000
    """number of training images for the probes, every class in proportion, not augmented"""
    max_levels: int | None = None
    """run a BDH with shared weights with up to this many levels; default: twice as many as it was trained with"""
    tokens: Literal["mean", "read"] = "read"
    """features of an image. read: what the model's head reads, i.e. the class token or the weighted mean (pool=seq) if
    there is one, else the mean over patches; mean: always the mean"""
    normalise: bool = True
    """scale each token to the same length first, as the norms in the model do"""
    neighbours: int = 20
    """number of nearest neighbours"""
    penalty: float = 1.0
    """L2 penalty of the linear probe: the loss is summed over images, plus penalty / 2 * sum of squared weights"""

    def __post_init__(self):
        for name in ("images", "train_images", "neighbours"):
            require(getattr(self, name) >= 1, self, name, "must be at least 1")
        require(0 < self.penalty < math.inf, self, "penalty", "must be a number above 0")


@dataclass
class Pass:
    """What n images leave at each level; L levels run, L0 levels in the trained model."""

    features: list[np.ndarray]  # L + 1 times (n, F), from level 0
    labels: np.ndarray  # (n,) true classes
    readout: np.ndarray  # (L0, n) classes predicted by the model's own read-out
    depth: np.ndarray | None  # (L, n) classes predicted with 1, 2, ... levels; None for models of fixed depth


def choose_levels(model: nn.Module, n_trained: int, max_levels: int | None) -> int:
    """How many levels to run. Prints a line if the model cannot run more than it was trained with.

    Raises UserError if max_levels is too many, or fewer than trained.
    """
    why = why_not_deeper(model) if isinstance(model, VisionBDH) else "each level has its own weights"
    if max_levels is not None and (max_levels < n_trained or (why and max_levels > n_trained)):
        reason = why if max_levels > n_trained else "runs with fewer are always included"
        raise UserError(f"--max-levels {max_levels}: the model has {n_trained} levels, and {reason}")
    if why:
        print(f"the model runs with at most its {n_trained} levels: {why}")
        return n_trained
    return max_levels or 2 * n_trained


@torch.no_grad()
def collect(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    n_levels: int,
    tokens: Literal["mean", "read"] = "mean",
    normalise: bool = True,
) -> Pass:
    """Runs images through n_levels levels, which may be more than a model with shared weights was trained with.

    batches: images (B, C, height, width) in [-1, 1] and labels (B,).
    """
    flexible = isinstance(model, VisionBDH)
    parts = []
    for images, labels in batches:
        with (
            run_with_levels(model, n_levels) if flexible else nullcontext(),
            record(model, "x", "state", "logits") as trace,
        ):
            model(images)
        readout = [trace.logits(level).argmax(1) for level in range(trace.adapter.n_levels)]
        depth = []
        for level in range(n_levels if flexible else 0):
            with run_with_levels(model, level + 1):
                depth.append(trace.logits(level).argmax(1))
        parts.append((stream_features(trace, tokens, normalise), [labels], readout, depth))
    features, labels, readout, depth = (
        [torch.cat(level).cpu().numpy() for level in zip(*kind, strict=True)] for kind in zip(*parts, strict=True)
    )
    return Pass(features, labels[0], np.stack(readout), np.stack(depth) if flexible else None)


def accuracies(train: Pass, test: Pass, neighbours: int = 20, penalty: float = 1.0) -> pd.DataFrame:
    """A row per method and level: method, level, accuracy, low, high (95 % interval), gain, gain_low, gain_high (over
    the level below, paired by image; NaN for a method's first level), images, train_images.

    Prints the levels at which the linear probe did not converge. Raises UserError if there is too little to learn from.
    """
    if len(np.unique(train.labels)) < 2 or len(train.labels) < neighbours:
        remedy = f"give more --train-images, or fewer --neighbours than {neighbours}"
        raise UserError(f"{len(train.labels)} training images are too few: {remedy}")
    predictions, unfinished = [], []
    pairs = list(zip(train.features, test.features, strict=True))
    for level, (known, new) in enumerate(progress(pairs, unit="level", desc="probes")):
        scaler = StandardScaler().fit(known.astype(np.float64))
        known, new = (scaler.transform(each.astype(np.float64)) for each in (known, new))
        linear = LogisticRegression(C=1 / penalty, max_iter=MAX_ITERATIONS)
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # reported below, in one line
            linear.fit(known, train.labels)
        unfinished += [str(level)] if linear.n_iter_.max() >= MAX_ITERATIONS else []
        nearest = KNeighborsClassifier(neighbours, weights="distance").fit(known, train.labels)
        predictions += [("linear_probe", level, linear.predict(new)), ("knn", level, nearest.predict(new))]
    if unfinished:
        print(f"linear probe: not converged in {MAX_ITERATIONS} steps at level {', '.join(unfinished)}")
    for method, by_level in (("readout", test.readout), ("run_with_levels", test.depth)):
        if by_level is not None:
            predictions += [(method, level, predicted) for level, predicted in enumerate(by_level, start=1)]
    rows, n, before = [], len(test.labels), {}
    for method, level, predicted in predictions:
        right = predicted == test.labels
        low, high = accuracy_interval(int(right.sum()), n)
        row = dict(method=method, level=level, accuracy=right.mean(), low=low, high=high)
        row |= paired_gain(before.get(method), right)
        before[method] = right
        rows.append(row | dict(images=n, train_images=len(train.labels)))
    return pd.DataFrame(rows)


def paired_gain(before: np.ndarray | None, after: np.ndarray) -> dict[str, float]:
    """Difference of two accuracies on the same images, with its 95 % interval by Student's t.

    before, after: (n,) whether each image was classified correctly; NaN for all without before.
    """
    names = ("gain", "gain_low", "gain_high")
    if before is None:
        return dict.fromkeys(names, math.nan)
    return dict(zip(names, mean_interval(after.astype(float) - before), strict=True))


def chance(labels: np.ndarray) -> float:
    """Accuracy of always predicting the most frequent class. labels: (n,)."""
    return np.bincount(labels).max() / len(labels)


def draw(table: pd.DataFrame, n_trained: int, by_chance: float, title: str) -> Figure:
    """Accuracy over levels, a line per method with its interval; marks the trained depth and chance."""
    figure = titled_figure(0.75 * PAGE, 3.0, title)
    ax = figure.subplots()
    readout = table[table.method == "readout"]
    for method, (label, color, marker, line) in STYLES.items():
        rows = table[table.method == method]
        if method == "run_with_levels" and rows.accuracy.tolist() == readout.accuracy.tolist():
            continue  # the same line
        if len(rows):
            style = dict(color=color, marker=marker, markersize=4, label=label)
            if method == "run_with_levels":  # hollow and below the read-out, with which it often coincides
                style |= dict(markerfacecolor="white", zorder=1.9)
            ax.plot(rows.level, 100 * rows.accuracy, line, **style)
            ax.fill_between(rows.level, 100 * rows.low, 100 * rows.high, color=color, alpha=0.15, linewidth=0)
    ax.axvline(n_trained, color="0.6", linestyle=":", zorder=1)
    at_top = dict(xycoords=("data", "axes fraction"), va="bottom", ha="center", color="0.35")
    ax.annotate(" trained depth", (n_trained, 1), **at_top)
    ax.axhline(100 * by_chance, color="0.6", zorder=1)
    at_right = dict(
        xycoords=("axes fraction", "data"), textcoords="offset points", va="bottom", ha="right", color="0.35"
    )
    box = dict(facecolor="white", edgecolor="none", pad=1)  # over the line of the trained depth
    ax.annotate("always the most frequent class", (0.99, 100 * by_chance), (0, 2), bbox=box, **at_right)
    style_axes(ax, "y")
    ax.set(xlabel="level", ylabel="accuracy (%)")
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def main(options: Options) -> None:
    run = open_run(options)
    run.require("logits")
    n_levels = choose_levels(run.model, run.adapter.n_levels, options.max_levels)
    training, indices = run.choose_training_images(options.train_images), run.choose_images(options.images)
    size = images_per_pass(run.n_patches)
    train, test = (
        collect(run.model, batches, n_levels, options.tokens, options.normalise)
        for batches in (
            run.training_batches(training, size, "training images"),
            run.batches(indices, size, "test images"),
        )
    )
    table = accuracies(train, test, options.neighbours, options.penalty)
    settings = options.changed(*SETTINGS)
    path = options.output_dir / run.stem / "_".join([run.file_name("probe"), *settings])
    of_what = f"{run.title}: {len(indices):,} {run.part} images"
    title = ", ".join([of_what, *settings, *run.views_note, "bands are 95 % intervals"])
    pictures = save_figure(draw(table, run.adapter.n_levels, chance(test.labels), title), path)
    write_csv(path.with_name(f"{path.name}.csv"), table)
    print(table.pivot(index="level", columns="method", values="accuracy").to_string(float_format="{:.3f}".format))
    print("->", *pictures, f"{path}.csv")


if __name__ == "__main__":
    run_script(main, __doc__)
