"""Where a patch looks: attention from one patch of an image to all patches, level by level, of a trained model.

By default the scores as they multiply x in the model: BDH's are raw and signed, so that a patch may be subtracted; each
map has its own scale, centred on 0, for the LN after the product (in v1 and v2) divides each query's scale out, in
each head. A head with large scores weighs more in their mean than in the model: `--show shares` divides each head's
magnitudes by their sum first, which makes them comparable with the softmax weights of a ViT, shares from the start.
And `--show rollout` follows the shares through the levels (arXiv 2005.00928). Of segmentation models it shows the
classes of the patch, not of the image.

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
from interpretability.common.trained import RunChoice, TrainedRun, check_same_images, open_run
from models.vision_bdh import Grid
from training.command_line import run_script
from training.config import ROOT, UserError

N_IMAGES = 4
LONGEST_NAME = 240  # characters: file systems allow names of 255 bytes


@dataclass(frozen=True, kw_only=True)
class Options(RunChoice):
    """What to draw."""

    versus: Path | None = None
    """another run on the same data set, whose attention is drawn beside it"""
    patch: tuple[int, int] | None = None
    """row and column of the patch that looks, from 0; default: the centre"""
    levels: tuple[int, ...] | None = None
    """of these levels, counted from 1; default: the first, the middle and the last, all with --animate"""
    all_levels: bool = False
    """of all levels"""
    show: Show = "scores"
    """scores as they enter the model; shares of their absolute sum; or rollout of these over the levels"""
    per_head: bool = False
    """each head by itself, instead of the mean over heads"""
    images: int | None = None
    """number of test images, at equal distances over the test set; default: 4; half with --per-head or --versus"""
    indices: tuple[int, ...] | None = None
    """these test images instead, by their place in the test set, from 0"""
    animate: Literal["gif", "mp4"] | None = None
    """also an animation, a second a level; mp4 needs the program ffmpeg"""
    output_dir: Path = ROOT / "attention_maps"
    """the pictures go into a folder of the run's name in it"""


def visualize(run: Path, output: Path) -> Path:
    """Draws what the centre patch attends to in a finished run into the folder output; returns the picture.

    Raises UserError for a folder that is no run of a model whose attention can be shown.
    """
    return write_pictures([TrainedRun(run)], Options(), output)[0]


def write_pictures(runs: Sequence[TrainedRun], options: Options, folder: Path) -> list[Path]:
    """The figure of one run or of two, and the animation where asked for. Returns the files, the PNG first.

    Raises UserError for what is not there: a patch, a level, an image, a program.
    """
    if options.show == "rollout" and options.per_head:
        raise UserError("a rollout is made of the mean over heads: leave out --per-head, or use --show shares")
    for run in runs:
        if not run.labels_pixels:
            run.require("logits")  # the predicted class stands beside the image
    if options.animate:
        check_writer(options.animate)
    patch = chosen_patch(options.patch, runs[0].grid)
    indices = chosen_images(runs[0], options)
    still = [chosen_levels(run.adapter.n_levels, options) for run in runs]
    moving = still if options.levels else [list(range(run.adapter.n_levels)) for run in runs]
    views = [
        look(run, name, same_place(patch, runs[0].grid, run.grid), levels, indices, options)
        for run, name, levels in zip(runs, short_names(runs), moving if options.animate else still, strict=True)
    ]
    name = f"attention_{options.show}{'_per_head' * options.per_head}_patch{patch[0]}-{patch[1]}"
    name = runs[0].file_name(name)
    for run in runs[1:]:  # the checkpoint before the stem, whose end may be cut off
        name = f"{run.file_name(f'{name}_versus')}_{run.stem}"
    name = name[:LONGEST_NAME]
    figure = draw([view.of(levels) for view, levels in zip(views, still, strict=True)])
    paths = [*save_figure(figure, folder / f"{name}.png")]
    if options.animate:
        paths.append(folder / f"{name}.{options.animate}")
        animate(views, paths[-1])
    return paths


def look(
    run: TrainedRun, name: str, patch: Patch, levels: Sequence[int], indices: Sequence[int], options: Options
) -> View:
    """What a run attends to in these images. levels: from 0."""
    looks = [look_at(run, index, patch, levels, options.show, options.per_head) for index in indices]
    return View(run, name, patch, options.show, options.per_head, indices, looks)


# ---------------------------------------------------------------------------- what was asked for


def open_runs(options: Options) -> list[TrainedRun]:
    """One, or two that were tested with the same images. Raises UserError where they were not."""
    runs = [open_run(options)]
    if options.versus:
        runs.append(TrainedRun(options.versus, options.data_dir, options.device))
        check_same_images(*runs)
    return runs


def short_names(runs: Sequence[TrainedRun]) -> list[str]:
    """What tells several runs apart: their experiments, or letters. None for one alone."""
    if len(runs) == 1:
        return [""]
    names = [run.config["experiment"].partition("+")[0] for run in runs]
    return names if len(set(names)) == len(names) else [f"run {letter}" for letter in "AB"]


def chosen_patch(patch: Patch | None, grid: Grid) -> Patch:
    """The centre by default. grid: rows and columns."""
    if patch is None:
        return grid[0] // 2, grid[1] // 2
    if not all(0 <= place < size for place, size in zip(patch, grid, strict=True)):
        raise UserError(
            f"--patch {patch[0]} {patch[1]} is outside the grid of {grid[0]} x {grid[1]} patches: "
            f"give a row from 0 to {grid[0] - 1} and a column from 0 to {grid[1] - 1}"
        )
    return patch


def same_place(patch: Patch, grid: Grid, other: Grid) -> Patch:
    """The patch of another grid in which the centre of the patch lies."""
    return tuple(int((place + 0.5) / size * sizes) for place, size, sizes in zip(patch, grid, other, strict=True))


def chosen_levels(n_levels: int, options: Options) -> list[int]:
    """From 0, in order."""
    if options.all_levels and options.levels is not None:
        raise UserError("give --levels or --all-levels, not both")
    if options.all_levels:
        return list(range(n_levels))
    if options.levels is None:
        return sorted({0, n_levels // 2, n_levels - 1})
    for level in options.levels:
        if not 1 <= level <= n_levels:
            raise UserError(f"there is no level {level}: the model has {n_levels}, numbered from 1")
    if not options.levels:
        raise UserError("there is no level to draw: name some after --levels")
    return sorted({level - 1 for level in options.levels})


def chosen_images(run: TrainedRun, options: Options) -> list[int]:
    if options.indices is None:
        default = N_IMAGES // (1 + options.per_head) // (2 if options.versus else 1)  # what fits a page
        return run.spread(default if options.images is None else options.images)
    if not options.indices:
        raise UserError("there is no image to look at: name some after --indices")
    return list(options.indices)


def main(options: Options) -> None:
    runs = open_runs(options)
    paths = write_pictures(runs, options, options.output_dir / runs[0].stem)
    print(f"{' versus '.join(str(run.checkpoint) for run in runs)}\n-> " + "\n   ".join(map(str, paths)))


if __name__ == "__main__":
    run_script(main, __doc__)
