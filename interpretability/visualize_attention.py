"""Draws attention maps of a trained model: how much one patch of an image attends to every patch, level by level.

By default these are the scores that multiply x in the model. BDH's are raw and signed: a patch may be subtracted. Each
map has its own scale, because the LN after the product (in v1 and v2) removes the scale of each query in each head. In
the mean over heads, a head with large scores weighs more than in the model. `--show shares` divides each head's
magnitudes by their sum first, which makes them comparable with a ViT's softmax weights. `--show rollout` accumulates
the shares over levels (arXiv 2005.00928). For segmentation models, the classes shown are the patch's, not the image's.

    python interpretability/visualize_attention.py
    python interpretability/visualize_attention.py --run runs/v2_cifar10/seed0 --patch 2 5 --indices 3 17 --per-head
    python interpretability/visualize_attention.py --run runs/v2_cifar10/seed0 --versus runs/vit_tiny_cifar10/seed0
    python interpretability/visualize_attention.py --run runs/bdh_unet/seed0 --patch 30 24 --animate gif
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis.plotting.style import save_figure
from interpretability.common.attention_figures import View, animate, check_writer, draw
from interpretability.common.attention_maps import Patch, Show, look_at
from interpretability.common.trained import PairChoice, TrainedRun, open_runs
from models.vision_bdh import Grid
from training.command_line import run_script
from training.config import ROOT, UserError
from training.data.finding import cut_name

N_IMAGES = 4


@dataclass(frozen=True, kw_only=True)
class Options(PairChoice):
    """What to draw."""

    patch: tuple[int, int] | None = None
    """row and column of the query patch, from 0; default: the centre"""
    levels: tuple[int, ...] | None = None
    """levels to draw, from 1; default: first, middle and last (--animate: all)"""
    all_levels: bool = False
    """draw every level"""
    show: Show = "scores"
    """scores: as the model uses them; shares: |score| / sum of |scores|; rollout: shares accumulated over levels"""
    per_head: bool = False
    """draw every head instead of the mean over heads"""
    images: int | None = None
    """number of test images, evenly spaced; default: 4, halved by --per-head and by --versus"""
    indices: tuple[int, ...] | None = None
    """numbers of the test images to draw instead, from 0"""
    animate: Literal["gif", "mp4"] | None = None
    """also write an animation, one second per level; mp4 needs the program ffmpeg"""
    output_dir: Path = ROOT / "attention_maps"
    """pictures are written to a subfolder named after the run"""


def visualize(run: Path, output: Path) -> Path:
    """Draws the attention of the centre patch in a finished run; returns the picture, written to the folder output.

    Raises UserError if the folder is not a run of a supported model.
    """
    return write_pictures([TrainedRun(run)], Options(), output)[0]


def write_pictures(runs: Sequence[TrainedRun], options: Options, folder: Path) -> list[Path]:
    """Writes the figure of one run or two, and the animation if asked for. Returns the files, the PNG first.

    Raises UserError for a patch, level, image or program that does not exist.
    """
    if options.show == "rollout" and options.per_head:
        raise UserError("rollout uses the mean over heads: leave out --per-head, or use --show shares")
    for run in runs:
        if not run.labels_pixels:
            run.require("logits")  # the predicted class is shown beside the image
    if options.animate:
        check_writer(options.animate)
    patch = chosen_patch(options.patch, runs[0].grid)
    default = N_IMAGES // (1 + options.per_head) // len(runs)  # fits a page
    indices = runs[0].choose_images(default if options.images is None else options.images, options.indices)
    still = [chosen_levels(run.adapter.n_levels, options) for run in runs]
    every = [list(range(run.adapter.n_levels)) for run in runs]
    computed = every if options.animate and not options.levels else still
    views = [
        look(run, name, same_place(patch, runs[0].grid, run.grid), levels, indices, options)
        for run, name, levels in zip(runs, short_names(runs), computed, strict=True)
    ]
    name = runs[0].file_name(f"attention_{options.show}{'_per_head' * options.per_head}_patch{patch[0]}-{patch[1]}")
    for run in runs[1:]:
        name = f"{run.file_name(f'{name}_versus')}_{run.stem}"
    name = cut_name(name)
    path = folder / f"{name}.png"
    paths = [*save_figure(draw([view.of(levels) for view, levels in zip(views, still, strict=True)]), path)]
    if options.animate:
        paths.append(folder / f"{name}.{options.animate}")
        animate(views, paths[-1])
    return paths


def look(
    run: TrainedRun, name: str, patch: Patch, levels: Sequence[int], indices: Sequence[int], options: Options
) -> View:
    """The run's attention in these images. levels: from 0."""
    looks = [look_at(run, index, patch, levels, options.show, options.per_head) for index in indices]
    return View(run, name, patch, options.show, options.per_head, indices, looks)


def short_names(runs: Sequence[TrainedRun]) -> list[str]:
    """Names that tell two runs apart: their experiments, or letters if those are equal. Empty for a single run."""
    if len(runs) == 1:
        return [""]
    names = [run.config["experiment"].partition("+")[0] for run in runs]
    return names if len(set(names)) == len(names) else ["run A", "run B"]


def chosen_patch(patch: Patch | None, grid: Grid) -> Patch:
    """The centre by default. grid: rows and columns. Raises UserError for a patch outside it."""
    if patch is None:
        return grid[0] // 2, grid[1] // 2
    (row, column), (rows, columns) = patch, grid
    if not (0 <= row < rows and 0 <= column < columns):
        limits = f"rows go from 0 to {rows - 1}, columns from 0 to {columns - 1}"
        raise UserError(f"--patch {row} {column} is outside the grid of {rows} x {columns} patches: {limits}")
    return patch


def same_place(patch: Patch, grid: Grid, other: Grid) -> Patch:
    """The patch of another grid that contains the centre of this one."""
    return tuple(int((place + 0.5) / size * sizes) for place, size, sizes in zip(patch, grid, other, strict=True))


def chosen_levels(n_levels: int, options: Options) -> list[int]:
    """From 0, sorted. Raises UserError for a level that does not exist."""
    if options.all_levels and options.levels is not None:
        raise UserError("give --levels or --all-levels, not both")
    if options.all_levels:
        return list(range(n_levels))
    if options.levels is None:
        return sorted({0, n_levels // 2, n_levels - 1})
    if not options.levels:
        raise UserError("no level chosen: give one or more after --levels")
    for level in options.levels:
        if not 1 <= level <= n_levels:
            raise UserError(f"there is no level {level}: the model has {n_levels}, numbered from 1")
    return sorted({level - 1 for level in options.levels})


def main(options: Options) -> None:
    runs = open_runs(options)
    paths = write_pictures(runs, options, options.output_dir / runs[0].stem)
    print(f"{' versus '.join(str(run.checkpoint) for run in runs)}\n-> " + "\n   ".join(map(str, paths)))


if __name__ == "__main__":
    run_script(main, __doc__)
