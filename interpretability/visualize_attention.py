"""Where a patch looks: attention from one patch to all others, at the first, middle and last level of a trained model.

Draws test images, one a row, with the mean over heads of the attention that the patch's query gives to every patch.
BDH's raw scores are signed, and the LN after the product (in v1 and v2) divides each query's scale out, so that how
large they are says nothing across panels: each has a colour scale of its own, centred on 0. That LN acts in each head,
so a head with large scores weighs more in the mean drawn than in the model. Softmax weights of a query sum to 1, so the
panels of a level share a scale.

    python interpretability/visualize_attention.py
    python interpretability/visualize_attention.py --run runs/v2_cifar10/seed0 --patch 2 5 --indices 3 17
"""

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from interpretability.adapters import adapter_of
from interpretability.recorder import record
from interpretability.trained import latest_run
from models import build_config
from training.augment import normalise
from training.config import ROOT, UserError
from training.data import DataSet, load_dataset
from training.folder import read_images
from training.masks import CLASSES
from training.runs import load_model
from training.script import run_script

PANEL_INCHES = 1.9
DPI = 200


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to draw."""

    run: Path | None = None
    """folder of one run, such as runs/v2_cifar10/seed0; default: the most recent finished run in runs/"""
    patch: tuple[int, int] | None = None
    """row and column of the patch that looks, from 0; default: the centre"""
    images: int = 4
    """number of test images, from the first on"""
    indices: tuple[int, ...] | None = None
    """these test images instead, by their place in the test set, from 0"""
    output_dir: Path = ROOT / "attention_maps"
    """folder of the picture"""
    data_dir: Path | None = None
    """folder that holds data_cifar10 and the like; default: $VISION_BDH_DATA, else beside the scripts"""


@dataclass(frozen=True)
class Maps:
    """What is drawn of one model. B images, G patches along a side."""

    probabilities: Tensor
    """(B, classes), what the model predicts"""
    attention: dict[int, Tensor]
    """by level, from 0: (B, G, G), mean over heads of what the patch's query gives to each patch"""
    n_levels: int
    n_heads: int
    signed: bool
    """whether attention may be negative: raw scores instead of softmax weights"""


def visualize(
    run: Path,
    output: Path,
    patch: tuple[int, int] | None = None,
    images: int = 4,
    indices: Sequence[int] | None = None,
    data_dir: Path | None = None,
) -> Path:
    """Draws the attention maps of a run into the folder output; returns the picture.

    patch: row and column, None for the centre. images: so many of the first test images, unless indices names others.
    data_dir: as in training. Raises UserError for a folder that is no run, a patch or an image that is not there.
    """
    model, config = load_model(run)
    sizes, train = build_config(config["model_class"], config["config"]["model"]), config["config"]["train"]
    try:
        adapter_of(model)
    except TypeError as error:
        raise UserError(f"the attention of {run} cannot be shown: {error}") from None
    if not hasattr(sizes, "patch_size"):
        raise UserError(f"the attention of {run} cannot be shown: its model reads no images")
    if train["dataset"] in CLASSES:
        raise UserError(f"{run} labels pixels, and this draws images with one class: see interpretability/predict.py")
    grid = sizes.img_size // sizes.patch_size
    patch = _check_patch(patch, grid)
    dataset = load_dataset(train["dataset"], data_dir, sizes.img_size, sizes.in_channels)
    chosen = _check_indices(range(images) if indices is None else indices, len(dataset.test_labels))

    maps = attention_maps(model, torch.from_numpy(read_images(dataset.test_images[chosen])), patch, grid)
    title = f"{config['experiment'].replace('+', ', ')}, seed {train['seed']}"
    figure = draw(maps, dataset, chosen, patch, sizes.patch_size, title)
    experiment = config["experiment"][:200]  # file systems allow names of 255 bytes
    path = output / f"attention_{experiment}_seed{train['seed']}_patch{patch[0]}-{patch[1]}.png"
    output.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path


@torch.no_grad()
def attention_maps(model: nn.Module, images: Tensor, patch: tuple[int, int], grid: int) -> Maps:
    """One forward pass, looked into. images: (B, C, img_size, img_size) uint8; patch: row and column."""
    probe = adapter_of(model)
    levels = show_levels(probe.n_levels)
    with record(model, levels=levels) as trace:
        probabilities = model(normalise(images)).softmax(-1)
    query = patch[0] * grid + patch[1]
    attention = {}
    for level in levels:
        scores = trace.scores(level, patches_only=True)  # (B, H, T, T)
        attention[level] = scores[:, :, query].mean(1).unflatten(-1, (grid, grid))
        n_heads = scores.shape[1]
    return Maps(probabilities, attention, probe.n_levels, n_heads, probe.signed)


def show_levels(n_levels: int) -> list[int]:
    """First, middle and last, from 0, without repeats where there are fewer than three."""
    return sorted({0, n_levels // 2, n_levels - 1})


def draw(
    maps: Maps, dataset: DataSet, chosen: list[int], patch: tuple[int, int], patch_size: int, title: str
) -> Figure:
    """One row an image: the image with the patch outlined, then a panel a level. Shared scales stand in a last row."""
    rows, columns = len(chosen), 1 + len(maps.attention)
    width = PANEL_INCHES * columns + (0.55 * (columns - 1) if maps.signed else 0.3)
    lines = _caption(maps, patch, title, columns=int(width * 14))
    height = rows * (PANEL_INCHES + 0.35) + 0.16 * len(lines) + (0.2 if maps.signed else 0.6)
    figure = Figure((width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.05)
    figure.suptitle("\n".join(lines), fontsize=8.5, x=0.01, ha="left")
    shared = [] if maps.signed else [0.06]
    axes = figure.subplots(rows + len(shared), columns, squeeze=False, height_ratios=[1] * rows + shared)
    for row, index in enumerate(chosen):
        _draw_image(axes[row, 0], dataset.test_images[index], patch, patch_size)
        axes[row, 0].set_title(_classes(dataset, index, maps.probabilities[row]), fontsize=8)
    for column, (level, attention) in enumerate(maps.attention.items(), start=1):
        axes[0, column].set_title(_level_name(level, maps.n_levels), fontsize=8)
        if maps.signed:
            _draw_signed(axes[:, column], attention.numpy(), patch)
        else:
            _draw_weights(axes[:, column], attention.numpy(), patch)
    if shared:
        axes[-1, 0].set_axis_off()
    return figure


def _draw_image(ax: Axes, image: np.ndarray, patch: tuple[int, int], patch_size: int) -> None:
    """image: (C, H, W) uint8 with 1 or 3 channels."""
    ax.imshow(image.transpose(1, 2, 0).squeeze(), cmap="gray", vmin=0, vmax=255)
    _outline(ax, patch, patch_size)


def _draw_signed(column: Sequence[Axes], attention: np.ndarray, patch: tuple[int, int]) -> None:
    """Raw scores of one level, each panel with its scale beside it. attention: (B, G, G); column: B axes."""
    for ax, values in zip(column, attention, strict=True):
        limit = np.abs(values).max() or 1.0
        picture = ax.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit)
        _outline(ax, patch, 1)
        bar = ax.figure.colorbar(picture, ax=ax, fraction=0.05, pad=0.03, ticks=[-limit, 0, limit], format="{x:.2g}")
        bar.ax.tick_params(labelsize=7)


def _draw_weights(column: Sequence[Axes], attention: np.ndarray, patch: tuple[int, int]) -> None:
    """Softmax weights of one level on one scale. attention: (B, G, G); column: B axes and that of the scale."""
    limit = attention.max()
    for ax, values in zip(column[:-1], attention, strict=True):
        picture = ax.imshow(values, cmap="viridis", vmin=0, vmax=limit)
        _outline(ax, patch, 1)
    bar = column[0].figure.colorbar(picture, cax=column[-1], location="bottom", ticks=[0, limit / 2, limit])
    bar.ax.set_xticklabels(["0", f"{limit / 2:.2g}", f"{limit:.2g}"])
    bar.ax.tick_params(labelsize=7)
    bar.set_label("attention weight", fontsize=7)


def _outline(ax: Axes, patch: tuple[int, int], side: int) -> None:
    """A frame around the patch, dark in light so that it shows on any ground, and no ticks."""
    corner = (patch[1] * side - 0.5, patch[0] * side - 0.5)
    for color, width in (("white", 2.6), ("black", 1.1)):
        ax.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=color, linewidth=width, clip_on=False))
    ax.set_xticks([])
    ax.set_yticks([])


def _caption(maps: Maps, patch: tuple[int, int], title: str, columns: int) -> list[str]:
    heads = "1 head" if maps.n_heads == 1 else f"mean over {maps.n_heads} heads"
    if maps.signed:
        scale = "Raw scores, which may be negative; each panel has its own scale, centred on 0."
    else:
        scale = "Softmax weights; the panels of a level share one scale, from 0."
    said = f"Attention from the outlined patch (row {patch[0]}, column {patch[1]}) to all patches, {heads}."
    return [line for text in (title, f"{said} {scale}") for line in textwrap.wrap(text, columns)]


def _classes(dataset: DataSet, index: int, probabilities: Tensor) -> str:
    probability, predicted = probabilities.max(-1)
    names = dataset.class_names
    return f"true: {names[dataset.test_labels[index]]}\npredicted: {names[predicted]} ({probability:.0%})"


def _level_name(level: int, n_levels: int) -> str:
    place = {0: "first", n_levels - 1: "last"}.get(level, "middle")
    return f"level {level + 1} of {n_levels}" + (f" ({place})" if n_levels > 1 else "")


def _check_patch(patch: tuple[int, int] | None, grid: int) -> tuple[int, int]:
    if patch is None:
        return grid // 2, grid // 2
    if not all(0 <= place < grid for place in patch):
        raise UserError(
            f"--patch {patch[0]} {patch[1]} is outside the grid of {grid} x {grid} patches: "
            f"give a row and a column from 0 to {grid - 1}"
        )
    return patch


def _check_indices(indices: Sequence[int], n_images: int) -> list[int]:
    if not indices:
        raise UserError("there is no image to draw: give --images 1 or more, or --indices")
    for index in indices:
        if not 0 <= index < n_images:
            raise UserError(f"there is no test image {index}: the test set has {n_images}, numbered from 0")
    return list(indices)


def main(options: Options) -> None:
    run = options.run or latest_run(ROOT / "runs")
    path = visualize(
        run,
        options.output_dir,
        patch=options.patch,
        images=options.images,
        indices=options.indices,
        data_dir=options.data_dir,
    )
    print(f"{run}\n-> {path}")


if __name__ == "__main__":
    run_script(main, __doc__)
