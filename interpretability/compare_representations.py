"""Compares representations of the same images between levels, within one model or between two.

Linear CKA (Kornblith et al. 2019, arXiv 1905.00414; unbiased mini-batch estimate of Nguyen et al. 2021, arXiv
2010.15327) measures whether two levels find the same images similar; directions of large variance count most. SVCCA
(Raghu et al. 2017, arXiv 1706.05806) measures how well the directions that explain 99 % of one's variance can be
predicted from the other's; all count the same. Unrelated representations have a CKA of 0 on average. Their SVCCA is
above 0, so it is also computed with the images of one side shuffled. Similarity does not show what a model uses.

Level 0 is what the first level reads, level 1 the residual stream after the first step (features:
interpretability/common/features.py). Writes heat maps (PNG and SVG) and a table of all pairs of levels (CSV).

    python interpretability/compare_representations.py --run runs/v2_cifar10/seed0
    python interpretability/compare_representations.py --run runs/v2_cifar10/seed0 --versus runs/vit_tiny_cifar10/seed0
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from analysis.plotting.style import PAGE, SEQUENTIAL, save_figure, titled_figure
from analysis.tables import write_csv
from interpretability.common.features import Tokens, images_per_pass, level_features
from interpretability.common.similarity import IMAGES_PER_DIMENSION, linear_cka, main_directions, svcca, unbiased_hsic
from interpretability.common.trained import PairChoice, TrainedRun, open_runs, progress
from training.command_line import run_script
from training.config import UserError

FEWEST_IMAGES = 4  # per batch, for the unbiased estimate
LARGEST_CELL, LARGEST_PANEL, MARGIN = 0.3, 2.75, 0.65  # inches: cell and side of a heat map, space for labels
MOST_VALUES = 15  # most levels along a side for which numbers fit into the cells
TOKENS = {"mean": "the mean over patches", "read": "what the head reads", "all": "all patches concatenated"}


@dataclass(frozen=True, kw_only=True)
class Options(PairChoice):
    """Which runs to compare, and how."""

    images: int = 2000
    """number of test images (validation if there is no test part), evenly spaced"""
    tokens: Tokens = "mean"
    """features of an image. mean: over patches; read: the class token or the weighted mean (pool=seq) if the model has
    one, else the mean; all: patches concatenated, usually too many features for SVCCA"""
    normalise: bool = True
    """scale each token to the same length first, as the norms in the model do"""
    batch_size: int = 128
    """images per mini-batch of CKA, whose features are all in memory: reduce it for --tokens all on large images"""


@dataclass(frozen=True)
class Similarity:
    """Similarity of every pair of R representations, (R, R) each."""

    cka: np.ndarray
    svcca: np.ndarray | None  # None if there are too few images
    shuffled: np.ndarray | None  # SVCCA with the images of one side shuffled: its value for unrelated features
    n_images: int


def draw_images(run: TrainedRun, n_images: int, batch_size: int) -> np.ndarray:
    """Numbers of images, in a fixed random order: the data may be sorted by class, and batches must not be.

    Raises UserError if there are too few for a batch.
    """
    if batch_size < FEWEST_IMAGES:
        raise UserError(f"--batch-size {batch_size} is too small: CKA needs {FEWEST_IMAGES} or more images per batch")
    indices = np.random.default_rng(0).permutation(run.choose_images(n_images))
    if len(indices) < FEWEST_IMAGES:
        raise UserError(f"{len(indices)} images are too few: CKA needs {FEWEST_IMAGES} or more (--images)")
    return indices


def measure(
    runs: Sequence[TrainedRun],
    indices: np.ndarray,
    tokens: Tokens = "mean",
    normalise: bool = True,
    batch_size: int = 128,
) -> Similarity:
    """Similarity of all levels of all runs, the first run's first, on these images in this order.

    Images left over from batches of batch_size are spread over the batches. Prints a line if SVCCA is left out.
    """
    hsic, kept = 0.0, []
    for batch in progress(np.array_split(indices, max(1, len(indices) // batch_size)), unit="batch"):
        features = [each for run in runs for each in features_of(run, batch, tokens, normalise)]
        hsic = hsic + unbiased_hsic(features)
        largest = max(each.shape[1] for each in features)
        if len(indices) >= IMAGES_PER_DIMENSION * largest:
            kept.append(features)
    if kept:
        both = _svcca([np.concatenate(each) for each in zip(*kept, strict=True)])
        return Similarity(linear_cka(hsic), *both, len(indices))
    remedy = f"Give {IMAGES_PER_DIMENSION * largest} or more --images{', or --tokens mean' * (tokens == 'all')}"
    print(f"no SVCCA: with {len(indices)} images, even noise of {largest} features would look similar. {remedy}")
    return Similarity(linear_cka(hsic), None, None, len(indices))


def features_of(run: TrainedRun, indices: np.ndarray, tokens: Tokens, normalise: bool) -> list[np.ndarray]:
    """(n, F) for each level from 0."""
    batches = run.batches(indices.tolist(), images_per_pass(run.n_patches))
    passes = [level_features(run.model, pixels, tokens, normalise) for pixels, _ in batches]
    return [np.concatenate([each.cpu().numpy() for each in level]) for level in zip(*passes, strict=True)]


def _svcca(features: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(R, R) for R times (n, F), and the same with the images of one side shuffled."""
    directions = [main_directions(each) for each in features]
    order = np.random.default_rng(1).permutation(len(features[0]))
    values, shuffled = (
        np.array([[svcca(a, b[rows]) for b in directions] for a in directions]) for rows in (slice(None), order)
    )
    return values, shuffled


def tabulate(runs: Sequence[TrainedRun], similarity: Similarity) -> pd.DataFrame:
    """A row for every pair of levels, in both directions."""
    places = [(run.title, level) for run in runs for level in range(run.adapter.n_levels + 1)]
    pairs = [a + b for a in places for b in places]
    table = pd.DataFrame(pairs, columns=["run_a", "level_a", "run_b", "level_b"]).assign(cka=similarity.cka.ravel())
    if similarity.svcca is not None:
        table = table.assign(svcca=similarity.svcca.ravel(), svcca_shuffled=similarity.shuffled.ravel())
    return table.assign(images=similarity.n_images)


def draw(runs: Sequence[TrainedRun], similarity: Similarity, tokens: str) -> Figure:
    """Columns: CKA and SVCCA; rows: the levels of each run, then those of the two runs against each other."""
    ends = np.cumsum([0] + [run.adapter.n_levels + 1 for run in runs])
    parts = [slice(*each) for each in pairwise(ends)]
    pairs = [(0, 0)] if len(runs) == 1 else [(0, 0), (1, 1), (0, 1)]
    names = ["level"] if len(runs) == 1 else ["level of A", "level of B"]
    measures = {"linear CKA": similarity.cka}
    if similarity.svcca is not None:
        measures["SVCCA (mean correlation)"] = similarity.svcca
    counts = [part.stop - part.start for part in parts]
    heights = [counts[a] * min(LARGEST_CELL, LARGEST_PANEL / max(counts[a], counts[b])) for a, b in pairs]
    width = PAGE * (1 if len(measures) == 2 else 0.6)
    figure = titled_figure(width, sum(heights) + MARGIN * len(pairs), caption(runs, similarity, tokens))
    axes = figure.subplots(len(pairs), len(measures), squeeze=False, height_ratios=heights)
    for (row, column), line in zip(pairs, axes, strict=True):
        for ax, values in zip(line, measures.values(), strict=True):
            picture = draw_matrix(ax, values[parts[row], parts[column]])
            ax.set(ylabel=names[row], xlabel=names[column])
    for ax, measure_name in zip(axes[0], measures, strict=True):
        ax.set_title(measure_name)
    figure.colorbar(picture, ax=axes, label="similarity", aspect=20 * len(pairs))
    return figure


def draw_matrix(ax: Axes, values: np.ndarray) -> AxesImage:
    """values: (rows, columns), level 0 at the lower left, with numbers in the cells if they fit."""
    picture = ax.imshow(values, cmap=SEQUENTIAL, vmin=0, vmax=1, origin="lower")
    ax.set_facecolor("0.8")  # visible where there is no value
    step = 1 if max(values.shape) <= MOST_VALUES else 5
    ax.set_xticks(range(0, values.shape[1], step))
    ax.set_yticks(range(0, values.shape[0], step))
    if step == 1:
        for (row, column), value in np.ndenumerate(values):
            color = "white" if value < 0.6 else "black"  # NaN: black
            ax.text(column, row, number(value), ha="center", va="center", color=color)
    return picture


def number(value: float) -> str:
    """Two digits without a leading zero, because cells are narrow."""
    if np.isnan(value):
        return "\N{EN DASH}"
    return "1" if value >= 0.995 else f"{value:.2f}".replace("0.", ".").replace("-.00", ".00")


def caption(runs: Sequence[TrainedRun], similarity: Similarity, tokens: str) -> str:
    titles = [f"{letter}: {run.title}" for letter, run in zip("AB", runs, strict=False)]
    text = f"{similarity.n_images:,} {runs[0].part} images; features: {tokens}. Level 0: what level 1 reads."
    if similarity.shuffled is not None and not np.isnan(similarity.shuffled).all():
        text += f" With the images of one side shuffled, SVCCA is at most {np.nanmax(similarity.shuffled):.2f}."
    if np.isnan(similarity.cka).any():
        text += " No value: the features are the same for all images."
    return "\n".join([*(titles if len(runs) == 2 else [runs[0].title]), text])


def main(options: Options) -> None:
    runs = open_runs(options)
    indices = draw_images(runs[0], options.images, options.batch_size)
    similarity = measure(runs, indices, options.tokens, options.normalise, options.batch_size)
    folder = options.output_dir / runs[0].stem
    if options.versus:
        folder /= runs[1].file_name(f"versus_{runs[1].stem}")
    name = "_".join([runs[0].file_name("representations"), *options.changed("tokens", "normalise")])
    features = TOKENS[options.tokens] + ("" if options.normalise else ", tokens not normalised")
    pictures = save_figure(draw(runs, similarity, features), folder / f"{name}.png")
    table = folder / f"{name}.csv"
    write_csv(table, tabulate(runs, similarity))
    print(" versus ".join(run.title for run in runs))
    print("->", *pictures, table)


if __name__ == "__main__":
    run_script(main, __doc__)
