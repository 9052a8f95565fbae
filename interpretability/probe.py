"""How the levels build the answer: what can be read out of the features after each, and what the model itself says.

For each level, test accuracy of

* a linear probe (Alain & Bengio 2016, arXiv 1610.01644): logistic regression on the features of images that the run
  trained on, each feature standardised;
* k nearest neighbours among the same images, weighted by 1 / distance, on the same features;
* the model's own read-out: its norm, pooling and head on the stream after the level, as if it were the last;
* a BDH run with so many levels, fewer or more than it was trained with (up to twice as many): what a model built with
  that depth from the same weights says. With shared weights that is the read-out of the level, but under scaled_pre,
  whose norms count the levels.

A probe finds what is there in a form that a line can part; whether the model uses it, it does not say. Probes are
trained on images that the model has seen and fits better than new ones, which makes them a little worse on test images
than probes of held-out images would be. Level 0 is the embedding of the patches, and a transformer's class token is
there the same for all images; see interpretability/common/features.py.
Intervals are 95 % (Wilson), for the draw of test images alone: the same run, no other seeds. Writes a figure (PNG and
SVG) and a table (CSV) into the run's folder in interpretability_results/.

    python interpretability/probe.py --run runs/v2_cifar10/seed0
    python interpretability/probe.py --run runs/vit_tiny_cifar10/seed0 --tokens mean --train-images 10000
"""

import math
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import binomtest
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from tqdm import tqdm

from analysis.plotting.style import COLORS, PAGE, new_figure, save_figure, style_axes
from interpretability.common.depth import run_with_levels, why_not_deeper
from interpretability.common.features import images_per_pass, stream_features
from interpretability.common.recorder import record
from interpretability.common.trained import RESULTS, RunChoice, TrainedRun, open_run
from models.vision_bdh import VisionBDH
from training.command_line import run_script
from training.config import UserError

SETTINGS = ("tokens", "normalise", "neighbours", "penalty")  # results of others must not replace each other
MAX_ITERATIONS = 2000  # of the probe's optimiser
LOOKS = {  # in the figure: what it is called, colour, marker and line
    "linear_probe": ("linear probe", COLORS[0], "o", "-"),
    "knn": ("nearest neighbours", COLORS[2], "s", "-"),
    "readout": ("the model's own read-out", COLORS[1], "^", "-"),
    "run_with_levels": ("the model run with so many levels", COLORS[1], "^", "--"),
}


@dataclass(frozen=True, kw_only=True)
class Options(RunChoice):
    """Which run to probe, and how."""

    images: int = 2000
    """images that accuracy is measured on: of the test part (validation where there is none), at equal distances"""
    train_images: int = 4000
    """images that probes learn from, of those that the run trained on: every class in proportion, not augmented"""
    max_levels: int | None = None
    """levels that a BDH with shared weights is run with at most; None: twice as many as it was trained with"""
    tokens: Literal["mean", "read"] = "read"
    """features of an image: read, what the model's head reads, which is the class token where there is one, else the
    mean over patches; mean: that always"""
    normalise: bool = True
    """bring each token to the same length first, as most of what follows in the model does"""
    neighbours: int = 20
    """k of the nearest neighbours"""
    penalty: float = 1.0
    """of the linear probe: half the sum of squared weights, times this, is added to the loss summed over images"""
    output_dir: Path = RESULTS
    """the results go into a folder of the run's name in it"""


@dataclass
class Pass:
    """What images leave at each level. n images, L levels run, L0 levels of the trained model."""

    features: list[np.ndarray]
    """L + 1 times (n, F), from level 0 on"""
    labels: np.ndarray
    """(n,) the true classes"""
    readout: np.ndarray
    """(L0, n) classes that the model's own read-out gives"""
    depth: np.ndarray | None
    """(L, n) classes that the model gives when run with 1, 2, ... levels; None for models of fixed depth"""


def main(options: Options) -> None:
    run = open_run(options)
    run.require("logits")
    check_numbers(options)
    n_levels = choose_levels(run.model, run.adapter.n_levels, options.max_levels)
    places, indices = run.training_places(options.train_images), run.spread(options.images)
    rows, columns = run.grid
    size = images_per_pass(rows * columns)
    how = (n_levels, options.tokens, options.normalise)
    with tqdm(total=len(places) + len(indices), unit="img", leave=False, disable=None) as bar:
        train = collect(run.model, counted(run.training_batches(places, size), bar), *how)
        test = collect(run.model, counted(run.batches(indices, size), bar), *how)
    table = accuracies(train, test, options.neighbours, options.penalty)
    folder = options.output_dir / run.stem
    name = "_".join([run.file_name("probe"), *options.changed(*SETTINGS)])
    pictures = save_figure(draw(table, run.adapter.n_levels, chance(test.labels), caption(run, options)), folder / name)
    table.to_csv(folder / f"{name}.csv", index=False)
    print(table.pivot(index="level", columns="method", values="accuracy").to_string(float_format="{:.3f}".format))
    print("->", *pictures, folder / f"{name}.csv")


def check_numbers(options: Options) -> None:
    """Raises UserError where a number is too small."""
    for name in ("images", "train_images", "neighbours"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1")
    if not 0 < options.penalty < math.inf:
        raise UserError(f"--penalty {options.penalty} must be a number above 0")


def choose_levels(model: nn.Module, n_trained: int, max_levels: int | None) -> int:
    """Levels to run at most. Says so in a line where the model cannot run more than it was trained with.

    Raises UserError where more are asked for all the same, or fewer than trained.
    """
    why = why_not_deeper(model) if isinstance(model, VisionBDH) else "its levels have weights of their own"
    if max_levels is not None and (max_levels < n_trained or (why and max_levels > n_trained)):
        reason = why if max_levels > n_trained else "runs with fewer are among the results anyway"
        raise UserError(f"--max-levels {max_levels}: the model has {n_trained} levels, and {reason}")
    if why:
        print(f"the model is run with no more than its {n_trained} levels: {why}")
        return n_trained
    return max_levels or 2 * n_trained


# ---------------------------------------------------------------------------- passes


def counted(batches: Iterable[tuple[Tensor, Tensor]], bar: tqdm) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, each counted when it is done with."""
    for images, labels in batches:
        yield images, labels
        bar.update(len(labels))


@torch.no_grad()
def collect(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    n_levels: int,
    tokens: Literal["mean", "read"] = "mean",
    normalise: bool = True,
) -> Pass:
    """Runs images through the model with n_levels levels, which may be more than it has if its weights are shared.

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
        features = stream_features(trace, tokens, normalise)
        readout = [trace.logits(level).argmax(1) for level in range(trace.adapter.n_levels)]
        depth = []
        for level in range(n_levels if flexible else 0):
            with run_with_levels(model, level + 1):
                depth.append(trace.logits(level).argmax(1))
        parts.append((features, labels, readout, depth))
    features, labels, readout, depth = ([each[k] for each in parts] for k in range(4))
    return Pass(
        features=[_joined(level) for level in zip(*features, strict=True)],
        labels=_joined(labels),
        readout=np.stack([_joined(level) for level in zip(*readout, strict=True)]),
        depth=np.stack([_joined(level) for level in zip(*depth, strict=True)]) if flexible else None,
    )


def _joined(parts: Iterable[Tensor]) -> np.ndarray:
    return np.concatenate([part.cpu().numpy() for part in parts])


# ---------------------------------------------------------------------------- accuracies


def accuracies(train: Pass, test: Pass, neighbours: int = 20, penalty: float = 1.0) -> pd.DataFrame:
    """One row a method and level: method, level, accuracy, low, high (the 95 % interval), images, train_images.

    Warns of probes that have not converged. Raises UserError where there is nothing to learn from.
    """
    if len(np.unique(train.labels)) < 2 or len(train.labels) < neighbours:
        raise UserError(
            f"{len(train.labels)} training images are too few to learn from: give more --train-images "
            f"(or fewer --neighbours than {neighbours})"
        )
    rows, unfinished = [], []
    pairs = list(zip(train.features, test.features, strict=True))
    for level, (of_train, of_test) in enumerate(tqdm(pairs, unit="level", desc="probes", leave=False, disable=None)):
        scaler = StandardScaler().fit(of_train.astype(np.float64))
        known, new = (scaler.transform(each.astype(np.float64)) for each in (of_train, of_test))
        predicted, converged = linear_probe(known, train.labels, new, penalty)
        nearest = KNeighborsClassifier(neighbours, weights="distance").fit(known, train.labels)
        rows += [("linear_probe", level, predicted), ("knn", level, nearest.predict(new))]
        unfinished += [] if converged else [level]
    if unfinished:
        print(f"linear probe: not converged in {MAX_ITERATIONS} steps at level {', '.join(map(str, unfinished))}")
    for method, predictions in (("readout", test.readout), ("run_with_levels", test.depth)):
        if predictions is not None:
            rows += [(method, level, predicted) for level, predicted in enumerate(predictions, start=1)]
    n_train = len(train.labels)
    return pd.DataFrame(
        [dict(method=m, level=k, **_accuracy(p, test.labels), train_images=n_train) for m, k, p in rows]
    )


def linear_probe(known: np.ndarray, labels: np.ndarray, new: np.ndarray, penalty: float) -> tuple[np.ndarray, bool]:
    """Classes of new (m, F) by logistic regression on known (n, F) and labels (n,); whether it converged."""
    probe = LogisticRegression(C=1 / penalty, max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        probe.fit(known, labels)
    converged = True
    for warning in caught:
        if issubclass(warning.category, ConvergenceWarning):
            converged = False
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return probe.predict(new), converged


def _accuracy(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    right, n = int((predicted == labels).sum()), len(labels)
    interval = binomtest(right, n).proportion_ci(method="wilson")
    return dict(accuracy=right / n, low=interval.low, high=interval.high, images=n)


def chance(labels: np.ndarray) -> float:
    """Accuracy of always saying the most frequent class. labels: (n,)."""
    return np.bincount(labels).max() / len(labels)


# ---------------------------------------------------------------------------- figure


def caption(run: TrainedRun, options: Options) -> str:
    """What the figure shows, for its title."""
    n_images = min(options.images, run.n_images)
    settings = "".join(f", {setting}" for setting in options.changed(*SETTINGS))
    return f"{run.title}: {n_images:,} {run.part_name} images{settings}, bands are 95 % intervals"


def draw(table: pd.DataFrame, n_trained: int, by_chance: float, title: str) -> Figure:
    """Accuracy over levels, a line a method with its interval; the trained depth and what guessing gives are marked."""
    lines = textwrap.wrap(title, 72)
    figure = new_figure(0.75 * PAGE, 3.0 + 0.15 * len(lines))
    figure.suptitle("\n".join(lines), x=0.01, ha="left")
    ax = figure.subplots()
    for method, (label, color, marker, line) in LOOKS.items():
        rows = table[table.method == method]
        if len(rows):
            hollow = dict(markerfacecolor="white") if method == "run_with_levels" else {}
            order = dict(zorder=1.9 if method == "run_with_levels" else 2.0)  # below the read-out, which it often is
            ax.plot(
                rows.level,
                100 * rows.accuracy,
                line,
                color=color,
                marker=marker,
                markersize=4,
                label=label,
                **hollow,
                **order,
            )
            ax.fill_between(rows.level, 100 * rows.low, 100 * rows.high, color=color, alpha=0.15, linewidth=0)
    _mark(ax, n_trained, by_chance)
    style_axes(ax, "y")
    ax.set(xlabel="level", ylabel="accuracy (%)")
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _mark(ax: Axes, n_trained: int, by_chance: float) -> None:
    ax.axvline(n_trained, color="0.6", linestyle=":", zorder=1)
    ax.annotate(
        " trained depth", (n_trained, 1), xycoords=("data", "axes fraction"), va="bottom", ha="center", color="0.35"
    )
    ax.axhline(100 * by_chance, color="0.6", zorder=1)
    ax.annotate(
        "always the commonest class",
        (0.99, 100 * by_chance),
        (0, 2),
        ("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color="0.35",
        bbox=dict(facecolor="white", edgecolor="none", pad=1),  # over the line of the trained depth
    )


if __name__ == "__main__":
    run_script(main, __doc__)
