"""The patches that excite neurons most, drawn side by side with what is around them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.plotting.style import new_blocks, outline
from models.vision_bdh import Grid

COLUMNS = 8
ROW = 1.22  # inches: a picture and two lines of text
LONGEST_CLASS = 13  # characters that stand above a picture


@dataclass(frozen=True)
class Excited:
    """A patch that excites a neuron."""

    image: np.ndarray
    """(C, height, width) uint8, the whole of it"""
    patch: int
    """its place in the image, row by row"""
    value: float
    """how active the neuron is on it"""
    class_name: str


def draw_sheet(neurons: Sequence[tuple[str, Sequence[Excited]]], title: str, grid: Grid, around: int) -> Figure:
    """A block a neuron: what is said of it, and its patches, strongest first.

    grid: rows and columns of patches of an image; around: so many patches are shown on each side of the one meant.
    """
    said = [about for about, _ in neurons]
    said[0] = f"{title}\n\n{said[0]}"
    rows = [max(1, -(-len(patches) // COLUMNS)) for _, patches in neurons]
    figure, blocks = new_blocks(said, [ROW * n for n in rows])
    for block, n_rows, (_, patches) in zip(blocks, rows, neurons, strict=True):
        axes = block.subplots(n_rows, COLUMNS, squeeze=False).ravel()
        for ax, excited in zip(axes, patches, strict=False):
            _draw_patch(ax, excited, grid, around)
        for ax in axes[len(patches) :]:
            ax.set_axis_off()
        if not patches:
            axes[0].text(0, 0.5, "no patch excites it", transform=axes[0].transAxes)
    return figure


def _draw_patch(ax: Axes, excited: Excited, grid: Grid, around: int) -> None:
    side = excited.image.shape[1] // grid[0]
    place = divmod(excited.patch, grid[1])
    top, left = (first * side for first, _ in map(window, place, grid, (around, around)))
    bottom, right = (last * side for _, last in map(window, place, grid, (around, around)))
    ax.imshow(excited.image.transpose(1, 2, 0)[top:bottom, left:right], cmap="gray", vmin=0, vmax=255)
    corner = (place[1] * side - left - 0.5, place[0] * side - top - 0.5)
    outline(ax, corner, side, snap=False)  # the two lines would snap to different pixels
    ax.set_title(f"{_cut(excited.class_name)}\n{excited.value:.3g}", pad=3)


def _cut(name: str) -> str:
    return name if len(name) <= LONGEST_CLASS else name[: LONGEST_CLASS - 1] + "…"


def window(place: int, length: int, around: int) -> tuple[int, int]:
    """First patch and the one after the last to show along a side; moved, not cut, where it would leave the image."""
    shown = min(2 * around + 1, length)
    first = min(max(place - around, 0), length - shown)
    return first, first + shown
