"""Contact sheets: for each neuron, the patches that activate it most, with their surroundings."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.plotting.style import new_blocks, outline, plain_text
from models.vision_bdh import Grid

COLUMNS = 8
ROW = 1.22  # inches: a picture and two lines of text
LONGEST_CLASS = 13  # characters that fit above a picture


@dataclass(frozen=True)
class TopPatch:
    """A patch that strongly activates a neuron."""

    image: np.ndarray  # (C, height, width) uint8, the whole image
    patch: int  # number in the image, in raster order
    value: float  # the neuron's activity
    class_name: str


def draw_sheet(neurons: Sequence[tuple[str, Sequence[TopPatch]]], title: str, grid: Grid, around: int) -> Figure:
    """One block per neuron: a caption and its patches, in the order given.

    grid: rows and columns of patches per image; around: number of patches shown on each side.
    """
    captions = [plain_text(caption) for caption, _ in neurons]
    captions[0] = f"{plain_text(title)}\n\n{captions[0]}"
    rows = [max(1, -(-len(patches) // COLUMNS)) for _, patches in neurons]
    figure, blocks = new_blocks(captions, [ROW * n for n in rows])
    for block, n_rows, (_, patches) in zip(blocks, rows, neurons, strict=True):
        axes = block.subplots(n_rows, COLUMNS, squeeze=False).ravel()
        for ax, patch in zip(axes, patches, strict=False):
            _draw_patch(ax, patch, grid, around)
        for ax in axes[len(patches) :]:
            ax.set_axis_off()
        if not patches:
            axes[0].text(0, 0.5, "no patch activates it", transform=axes[0].transAxes)
    return figure


def _draw_patch(ax: Axes, top: TopPatch, grid: Grid, around: int) -> None:
    side = top.image.shape[1] // grid[0]
    row, column = divmod(top.patch, grid[1])
    (upper, lower), (left, right) = window(row, grid[0], around), window(column, grid[1], around)
    shown = top.image[:, upper * side : lower * side, left * side : right * side]
    ax.imshow(shown.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=255)
    corner = ((column - left) * side - 0.5, (row - upper) * side - 0.5)
    outline(ax, corner, side, snap=False)  # otherwise the two lines snap to different pixels
    name = top.class_name
    name = name if len(name) <= LONGEST_CLASS else name[: LONGEST_CLASS - 1] + "…"
    ax.set_title(f"{plain_text(name)}\n{top.value:.3g}", pad=3)


def window(place: int, length: int, around: int) -> tuple[int, int]:
    """First and last + 1 patch to show along a side of the image; shifted, not cut, at the border."""
    shown = min(2 * around + 1, length)
    first = min(max(place - around, 0), length - shown)
    return first, first + shown
