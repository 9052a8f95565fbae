"""How alike the representations of an image are after each level, in one model or between two on the same images.

Linear CKA (Kornblith et al. 2019, arXiv 1905.00414), by the unbiased mini-batch estimate of Nguyen et al. 2021 (arXiv
2010.15327), asks whether two levels find the same images alike, the directions of large variance counting most. SVCCA
(Raghu et al. 2017, arXiv 1706.05806) asks how well the directions that explain 99 % of the variance of one can be made
from those of the other, all counting the same. Of unrelated representations CKA is 0 on average; SVCCA is not, so that
it is also computed with the images of one side shuffled. Neither says that a model uses what another holds.

Level 0 is the embedding of the patches, level 1 the stream after the first step; common/features.py says how features
come from it. Writes heat maps (PNG and SVG) and every pair of levels (CSV) into the run's folder in
interpretability_results/.

    python interpretability/compare_representations.py --run runs/v2_cifar10/seed0
    python interpretability/compare_representations.py --run runs/v2_cifar10/seed0 --versus runs/vit_tiny_cifar10/seed0
"""

import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from tqdm import tqdm

from analysis.plotting.style import PAGE, SEQUENTIAL, new_figure, save_figure
from interpretability.common.features import Tokens, images_per_pass, level_features
from interpretability.common.similarity import IMAGES_PER_DIMENSION, MiniBatchCKA, main_directions, svcca
from interpretability.common.trained import RESULTS, RunChoice, TrainedRun, check_same_images, open_run
from training.command_line import run_script
from training.config import UserError

FEWEST_IMAGES = 4  # of a batch, for the unbiased estimate
LARGEST_CELL, LARGEST_PANEL, MARGIN = 0.3, 2.75, 0.65  # inches, of a heat map's cell, side and labels
MOST_VALUES = 15  # levels along a side that leave room for numbers in the cells
TITLE = 96  # characters of a line as wide as the page
TOKENS = {"mean": "the mean over patches", "read": "what the head reads", "all": "all patches side by side"}


@dataclass(frozen=True, kw_only=True)
class Options(RunChoice):
    """Which runs to compare, and how."""

    versus: Path | None = None
    """folder of a second run on the same data (or a checkpoint in one), whose levels are compared with the first's"""
    images: int = 2000
    """images of the test part (validation where there is none), at equal distances"""
    tokens: Tokens = "mean"
    """features of an image: mean over its patches; read: the class token where the model has one, else the mean; all:
    its patches side by side, for which there are too few images for SVCCA"""
    normalise: bool = True
    """bring each token to the same length first, as most of what follows in the model does"""
    batch_size: int = 128
    """images of a mini-batch of CKA; all features of one are held at once, so take fewer for --tokens all of large
    images"""
    output_dir: Path = RESULTS
    """the results go into a folder of the run's name in it"""


@dataclass(frozen=True)
class Similarity:
    """Of every pair among R representations: (R, R) each."""

    cka: np.ndarray
    svcca: np.ndarray | None
    """None where there are too few images"""
    shuffled: np.ndarray | None
    """SVCCA with the images of one side shuffled: what it finds in unrelated features of this kind"""
    n_images: int

    def block(self, rows: slice, columns: slice) -> "Similarity":
        """Of these representations with those."""
        cut = [None if each is None else each[rows, columns] for each in (self.cka, self.svcca, self.shuffled)]
        return Similarity(*cut, self.n_images)


def main(options: Options) -> None:
    runs = [open_run(options)]
    if options.versus:
        runs.append(TrainedRun(options.versus, options.data_dir, options.device))
        check_same_images(*runs)
    indices = draw_images(runs[0], options.images, options.batch_size)
    similarity = measure(runs, indices, options.tokens, options.normalise, options.batch_size, say=print)
    name = runs[0].file_name("representations")
    name = "_".join([name, *options.changed("tokens", "normalise")])
    folder = options.output_dir / runs[0].stem
    if options.versus:
        folder /= runs[1].file_name(f"versus_{runs[1].stem}")
    features = TOKENS[options.tokens] + (", tokens of any length" if not options.normalise else "")
    pictures = save_figure(draw(runs, similarity, features), folder / f"{name}.png")
    table = folder / f"{name}.csv"
    tabulate(runs, similarity).to_csv(table, index=False)
    print(" versus ".join(run.title for run in runs))
    print("->", *pictures, table)


# ---------------------------------------------------------------------------- images


def draw_images(run: TrainedRun, n_images: int, batch_size: int) -> np.ndarray:
    """Numbers of images, in an order drawn once and for all: the data may be sorted by class, and batches must not be.

    Raises UserError where there are fewer than a batch needs.
    """
    if batch_size < FEWEST_IMAGES:
        raise UserError(f"--batch-size {batch_size} is too small: CKA needs {FEWEST_IMAGES} images or more in a batch")
    indices = np.random.default_rng(0).permutation(run.spread(n_images))
    if len(indices) < FEWEST_IMAGES:
        raise UserError(f"{len(indices)} images are too few: CKA needs {FEWEST_IMAGES} or more (--images)")
    return indices


# ---------------------------------------------------------------------------- numbers


def measure(
    runs: Sequence[TrainedRun],
    indices: np.ndarray,
    tokens: Tokens = "mean",
    normalise: bool = True,
    batch_size: int = 128,
    say: Callable[[str], None] = lambda line: None,
) -> Similarity:
    """Between all levels of all runs, those of the first run first, on the images of these numbers, in this order.

    batch_size: of the mini-batches; what is left over is spread over them. say: is told why there is no SVCCA.
    """
    cka, kept, enough = MiniBatchCKA(), [], True
    with tqdm(total=len(indices), unit="img", leave=False, disable=None) as bar:
        for batch in np.array_split(indices, max(1, len(indices) // batch_size)):
            features = [each for run in runs for each in features_of(run, batch, tokens, normalise)]
            cka.add(features)
            largest = max(each.shape[1] for each in features)
            enough = len(indices) >= IMAGES_PER_DIMENSION * largest
            if enough:
                kept.append(features)
            bar.update(len(batch))
    if not enough:
        fewer = ", or fewer features (--tokens mean)" if tokens == "all" else ""
        say(
            f"no SVCCA: in {len(indices)} images of {largest} features it would find likeness whatever they are. "
            f"It takes {IMAGES_PER_DIMENSION * largest} images (--images){fewer}"
        )
        return Similarity(cka.result(), None, None, len(indices))
    return Similarity(cka.result(), *_svcca([np.concatenate(each) for each in zip(*kept, strict=True)]), len(indices))


def features_of(run: TrainedRun, indices: np.ndarray, tokens: Tokens, normalise: bool) -> list[np.ndarray]:
    """(n, F) for each level from 0, of these images."""
    rows, columns = run.grid
    passes = [
        level_features(run.model, pixels, tokens, normalise)
        for pixels, _ in run.batches(indices.tolist(), images_per_pass(rows * columns))
    ]
    return [np.concatenate([each.cpu().numpy() for each in level]) for level in zip(*passes, strict=True)]


def _svcca(features: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(R, R) of R times (n, F), and the same with the images of one side shuffled."""
    directions = [main_directions(each) for each in features]
    order = np.random.default_rng(1).permutation(len(features[0]))
    values = np.array([[svcca(a, b) for b in directions] for a in directions])
    shuffled = np.array([[svcca(a, b[order]) for b in directions] for a in directions])
    return values, shuffled


def tabulate(runs: Sequence[TrainedRun], similarity: Similarity) -> pd.DataFrame:
    """A row for every pair of levels, both ways."""
    places = [(run.title, level) for run in runs for level in range(run.adapter.n_levels + 1)]
    rows = []
    for i, (run_a, level_a) in enumerate(places):
        for j, (run_b, level_b) in enumerate(places):
            row = dict(run_a=run_a, level_a=level_a, run_b=run_b, level_b=level_b, cka=similarity.cka[i, j])
            if similarity.svcca is not None:
                row |= dict(svcca=similarity.svcca[i, j], svcca_shuffled=similarity.shuffled[i, j])
            rows.append(row | dict(images=similarity.n_images))
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------------- figure


def draw(runs: Sequence[TrainedRun], similarity: Similarity, tokens: str) -> Figure:
    """A column each for CKA and SVCCA; a row for the levels of each run, and one for those of the two together."""
    ends = np.cumsum([0] + [run.adapter.n_levels + 1 for run in runs])
    parts = [slice(*each) for each in pairwise(ends)]
    pairs = [(0, 0)] if len(runs) == 1 else [(0, 0), (1, 1), (0, 1)]
    names = ["level"] if len(runs) == 1 else ["level of A", "level of B"]
    measures = ["linear CKA"] + ["SVCCA (mean correlation)"] * (similarity.svcca is not None)
    width = PAGE * (1 if len(measures) == 2 else 0.6)
    lines = _caption(runs, similarity, tokens, columns=int(TITLE * width / PAGE))
    counts = [part.stop - part.start for part in parts]
    heights = [counts[a] * min(LARGEST_CELL, LARGEST_PANEL / max(counts[a], counts[b])) for a, b in pairs]
    figure = new_figure(width, sum(heights) + MARGIN * len(pairs) + 0.15 * len(lines))
    figure.suptitle("\n".join(lines), x=0.01, ha="left")
    axes = figure.subplots(len(pairs), len(measures), squeeze=False, height_ratios=heights)
    for (row, column), line in zip(pairs, axes, strict=True):
        block = similarity.block(parts[row], parts[column])
        for ax, values in zip(line, (block.cka, block.svcca), strict=False):
            picture = draw_matrix(ax, values)
            ax.set(ylabel=names[row], xlabel=names[column])
    for ax, measure_name in zip(axes[0], measures, strict=True):
        ax.set_title(measure_name)
    figure.colorbar(picture, ax=axes, label="similarity", aspect=20 * len(pairs))
    return figure


def draw_matrix(ax: Axes, values: np.ndarray) -> AxesImage:
    """values: (rows, columns), drawn from level 0 at the lower left, with their numbers where they fit."""
    picture = ax.imshow(values, cmap=SEQUENTIAL, vmin=0, vmax=1, origin="lower")
    ax.set_facecolor("0.8")  # shows where there is no value
    step = 1 if max(values.shape) <= MOST_VALUES else 5
    ax.set_xticks(range(0, values.shape[1], step))
    ax.set_yticks(range(0, values.shape[0], step))
    if step == 1:
        for (row, column), value in np.ndenumerate(values):
            color = "white" if value < 0.6 else "black"  # of NaN: black
            ax.text(column, row, number(value), ha="center", va="center", color=color)
    return picture


def number(value: float) -> str:
    """Two digits without the zero in front, as cells are narrow."""
    if np.isnan(value):
        return "\N{EN DASH}"
    return "1" if value >= 0.995 else f"{value:.2f}".replace("0.", ".").replace("-.00", ".00")


def _caption(runs: Sequence[TrainedRun], similarity: Similarity, tokens: str, columns: int) -> list[str]:
    titles = [run.title for run in runs]
    if len(runs) == 2:
        titles = [f"A: {titles[0]}", f"B: {titles[1]}"]
    text = f"{similarity.n_images:,} {runs[0].part_name} images; features are {tokens}."
    text += " Level 0 is the embedding of the patches."
    if similarity.shuffled is not None and not np.isnan(similarity.shuffled).all():
        text += f" With the images of one side shuffled, SVCCA is at most {np.nanmax(similarity.shuffled):.2f}."
    if np.isnan(similarity.cka).any():
        text += " No value: the features are the same for all images."
    return [part for line in (*titles, text) for part in textwrap.wrap(line, columns)]


if __name__ == "__main__":
    run_script(main, __doc__)
