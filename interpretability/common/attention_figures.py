"""Figures and animations of attention maps: images with the patch outlined, and their maps beside them.

Everything is placed in inches, so that maps have the same size in every row and do not move between frames.
"""

import io
import itertools
import math
import subprocess
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.animation import FFMpegWriter
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

from analysis.plotting.style import DIVERGING, DPI, HALO, PAGE, SEQUENTIAL, outline, plain_text
from interpretability.common.attention_maps import Look, Patch, Show
from interpretability.common.trained import TrainedRun
from training.config import UserError
from training.files import written_whole

PANELS = 6  # maps side by side at most, beside the image
SMALLEST_PANEL, LARGEST_PANEL = 0.76, 1.4  # inches, width of a map; its title needs the smaller
PAGE_HEIGHT = 9.6  # inches; maps shrink, down to the smallest, to fit it
LINE, GAP = 0.14, 0.1  # inches, a line of text and the space between panels
TEXT, LEVEL_NAME = 1.14, 0.17  # inches, text left of an image and level name left of a row of heads
BAR_LEFT, BAR_WIDTH, BAR_HEIGHT, BELOW_MAPS = 0.35, 2.2, 0.08, 0.5  # inches, colour bars and the space for them
TEXT_CHARACTERS, CHARACTERS = 16, 15.5  # characters per line left of an image; average number per inch
SECONDS_A_LEVEL = 1.0


@dataclass(frozen=True)
class View:
    """A run and its attention in the chosen images."""

    run: TrainedRun
    name: str  # short name shown beside its images; "" if there is one run only
    patch: Patch
    show: Show
    per_head: bool
    numbers: Sequence[int]  # of the images in the run's part of the data
    looks: Sequence[Look]  # one per image, all with the same levels

    @property
    def signed(self) -> bool:
        """Whether values may be negative: raw scores, neither shares nor softmax weights."""
        return self.run.adapter.signed and self.show == "scores"

    @property
    def colors(self) -> str:
        return DIVERGING if self.signed else SEQUENTIAL

    @property
    def quantity(self) -> str:
        scores = "raw score" if self.signed else "softmax weight"
        return {"scores": scores, "shares": "share of attention", "rollout": "share in rollout"}[self.show]

    @property
    def title_height(self) -> float:
        """Of a map's title, in inches."""
        return LINE * (3 if self.show == "rollout" else 2)

    @property
    def levels(self) -> list[int]:
        return list(self.looks[0].maps)

    @property
    def rows(self) -> list[list[tuple[int, int]]]:
        """Level and head of each map, row by row: as few rows as possible, about equally long."""
        groups = [[(level, head) for head in range(len(maps))] for level, maps in self.looks[0].maps.items()]
        rows = []
        for group in groups if self.per_head else [list(itertools.chain(*groups))]:
            length = math.ceil(len(group) / math.ceil(len(group) / PANELS))
            rows += [group[first : first + length] for first in range(0, len(group), length)]
        return rows

    def of(self, levels: Sequence[int]) -> "View":
        """The same view with these levels only."""
        looks = [replace(look, maps={level: look.maps[level] for level in levels}) for look in self.looks]
        return replace(self, looks=looks)


class Block(NamedTuple):
    """One image and its maps in one run."""

    view: View
    look: Look
    text: list[str]  # lines left of the image

    def height(self, panel: float) -> float:
        maps = self.view.title_height + panel * self.look.image.shape[1] / self.look.image.shape[2] + GAP
        return max(self.view.title_height + LINE * len(self.text) + GAP, len(self.view.rows) * maps)


def blocks_of(view: View) -> list[Block]:
    blocks = []
    for number, look in zip(view.numbers, view.looks, strict=True):
        predicted = f"predicted: {look.predicted} ({look.certainty:.0%})"
        image = f"{view.run.part} image {number}".replace("validation", "val")
        parts = (view.name, image, f"true: {look.truth}", predicted)
        blocks.append(Block(view, look, _wrapped(parts, TEXT_CHARACTERS)))
    return blocks


def caption(views: Sequence[View]) -> list[str]:
    """The figure's title: what is shown, and for which runs."""
    what = f"Attention{' rollout' * (views[0].show == 'rollout')} from the outlined patch to all patches"
    ending = "; classes are those of most of the patch's pixels." if views[0].run.labels_pixels else "."
    if len(views) == 1:
        return [f"{what} ({_details(views[0])}){ending}", views[0].run.title]
    runs = (f"{view.name} ({_details(view)}): {view.run.title}" for view in views)
    return [f"{what}, two runs{ending}", *runs]


def _details(view: View) -> str:
    values = {
        "scores": f"{view.quantity}s",
        "shares": "|score| / sum of |scores|" if view.run.adapter.signed else "softmax weights",
        "rollout": "half of each level's input kept",
    }[view.show]
    n_heads = view.run.adapter.n_heads
    heads = "each head" if view.per_head else f"mean over {n_heads} head{'s' * (n_heads > 1)}"
    return f"row {view.patch[0]}, column {view.patch[1]}; {values}, {heads}"


def _wrapped(parts: Sequence[str], characters: int) -> list[str]:
    return [line for part in parts for line in textwrap.wrap(part, characters)]


def _plain(value: float) -> str:
    """Two significant digits, no exponent."""
    return np.format_float_positional(float(f"{value:.2g}"), trim="-")


def _add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes placed in inches from the figure's upper left corner."""
    w, h = figure.get_size_inches()
    return figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))


def _add_text(figure: Figure, left: float, top: float, lines: Sequence[str]) -> None:
    """Line by line, because matplotlib spaces the lines of one text unevenly. left, top: inches."""
    w, h = figure.get_size_inches()
    for place, line in enumerate(lines):
        figure.text(left / w, 1 - (top + place * LINE) / h, plain_text(line), va="top")


def draw(views: Sequence[View], figure: Figure | None = None) -> Figure:
    """Images one below the other, alternating between runs; two side by side if they fit.

    figure: an empty one to draw on; default: a new one. Its size is set here.
    """
    blocks = [block for image in zip(*map(blocks_of, views), strict=True) for block in image]
    columns = 1 + max(len(row) for view in views for row in view.rows)
    abreast = max(1, min(2, len(blocks), (PANELS + 1) // columns))
    lines = [blocks[first : first + abreast] for first in range(0, len(blocks), abreast)]
    beside = TEXT + LEVEL_NAME * views[0].per_head
    largest = min(LARGEST_PANEL, (PAGE / abreast - beside) / columns - GAP)
    smallest, room = min(largest, SMALLEST_PANEL), PAGE_HEIGHT - 2 * BELOW_MAPS

    def heights(panel: float) -> list[float]:
        return [max(block.height(panel) for block in line) for line in lines]

    panel = next((width for width in np.linspace(largest, smallest, 40) if sum(heights(width)) <= room), smallest)
    block_width = beside + columns * (panel + GAP)
    title = _wrapped(caption(views), int(abreast * block_width * CHARACTERS))
    tops = 1.5 * GAP + LINE * len(title) + np.cumsum([0, *heights(panel)])
    figure = figure or Figure()
    figure.set_size_inches(abreast * block_width, tops[-1] + BELOW_MAPS)
    _add_text(figure, GAP / 2, GAP / 2, title)
    for line, top in zip(lines, tops, strict=False):
        for place, block in enumerate(line):
            _draw_block(figure, block, place * block_width, top, panel)
    for place, view in enumerate({view.quantity: view for view in views}.values()):
        _draw_bar(figure, view, BAR_LEFT + place * (BAR_WIDTH + 2 * BAR_LEFT), tops[-1])
    return figure


def _draw_block(figure: Figure, block: Block, left: float, top: float, panel: float) -> None:
    view, image = block.view, block.look.image.permute(1, 2, 0).squeeze(-1).numpy()  # 1 or 3 channels
    first, height = left + TEXT + panel + GAP + LEVEL_NAME * view.per_head, panel * image.shape[0] / image.shape[1]
    top += view.title_height
    _add_text(figure, left + GAP / 2, top, block.text)
    ax = _add_axes(figure, left + TEXT, top, panel, height)
    ax.imshow(image, cmap="gray", vmin=0, vmax=255)
    _outline(ax, view.patch, view.run.sizes.patch_size, panel / image.shape[1])
    for row in view.rows:
        for place, (level, head) in enumerate(row):
            ax = _add_axes(figure, first + place * (panel + GAP), top, panel, height)
            _draw_map(ax, view, level, head, block.look.maps[level][head].numpy())
            _outline(ax, view.patch, 1, panel / view.run.grid[1])
            if view.per_head and place == 0:
                ax.set_ylabel(f"level {level + 1}", labelpad=3)
        top += height + GAP + view.title_height


def _draw_map(ax: Axes, view: View, level: int, head: int, values: np.ndarray) -> None:
    """values: (rows, columns).

    Each map has its own scale: magnitudes of raw scores are not comparable across maps, and a ViT's weights may
    concentrate on one patch in one image and spread in the next.
    """
    name, limit = f"level {level + 1} of {view.run.adapter.n_levels}", float(np.abs(values).max())
    scale = f"\N{PLUS-MINUS SIGN}{_plain(limit)}" if view.signed else f"0 to {_plain(100 * limit)} %"
    if view.show == "rollout":  # the patch itself keeps most and would darken the rest
        others = values.copy()
        others[view.patch] = 0
        name, limit = f"up to level {level + 1}", float(others.max())
        scale = f"0 to {_plain(100 * limit)} %\nitself {_plain(100 * values[view.patch])} %"
    end = limit or 1.0  # 1 if all values are 0
    ax.imshow(values, cmap=view.colors, vmin=-end if view.signed else 0, vmax=end)
    ax.set_title(f"{f'head {head + 1}' if view.per_head else name}\n{scale}", pad=2, linespacing=1.1)


def _outline(ax: Axes, patch: Patch, side: int, unit: float) -> None:
    """A frame around the patch, outside it so that it hides nothing. unit: inches per pixel."""
    out = HALO / 2 / 72 / unit
    outline(ax, (patch[1] * side - 0.5 - out, patch[0] * side - 0.5 - out), side + 2 * out)


def _draw_bar(figure: Figure, view: View, left: float, top: float) -> None:
    """Colour bar below the maps."""
    ax = _add_axes(figure, left, top + 0.02, BAR_WIDTH, BAR_HEIGHT)
    ticks = {-1: "\N{MINUS SIGN}limit", 0: "0", 1: "limit"} if view.signed else {0: "0", 1: "limit"}
    colors = ScalarMappable(Normalize(min(ticks), 1), view.colors)
    figure.colorbar(colors, cax=ax, orientation="horizontal", ticks=list(ticks))
    ax.set_xticklabels(ticks.values())
    ax.tick_params(length=2, pad=1)
    ax.set_xlabel(f"{view.quantity}; the limit is above each map", labelpad=0)


def check_writer(kind: str) -> None:
    """Raises UserError if animations of this kind, gif or mp4, cannot be written."""
    if kind == "mp4" and not FFMpegWriter.isAvailable():
        raise UserError("mp4 needs the program ffmpeg, which is not installed: install it, or use --animate gif")


def animate(views: Sequence[View], path: Path) -> None:
    """Writes one frame per level to path (.gif or .mp4). A run with fewer levels than the other stops at its last.

    Raises UserError if ffmpeg fails; see `check_writer`.
    """
    figure = Figure()

    def draw_frame(place: int) -> None:
        figure.clear()
        draw([view.of([view.levels[min(place, len(view.levels) - 1)]]) for view in views], figure)

    draw_frame(0)  # sets the figure's size
    write = _write_gif if path.suffix == ".gif" else _write_mp4
    with written_whole(path) as partial:
        write(partial, figure, draw_frame, max(len(v.levels) for v in views))


def _write_gif(path: Path, figure: Figure, draw_frame: Callable[[int], None], n_frames: int) -> None:
    frames = []
    for place in range(n_frames):
        draw_frame(place)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
        frame = Image.open(buffer).convert("RGB")
        palette = frame.quantize(method=Image.Quantize.MAXCOVERAGE)  # the default drops colours of the colour bars
        frames.append(frame.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=int(1000 * SECONDS_A_LEVEL), loop=0)


def _write_mp4(path: Path, figure: Figure, draw_frame: Callable[[int], None], n_frames: int) -> None:
    writer = FFMpegWriter(fps=1 / SECONDS_A_LEVEL)
    try:
        with writer.saving(figure, path, dpi=DPI):
            for place in range(n_frames):
                draw_frame(place)
                writer.grab_frame()
    except (subprocess.CalledProcessError, BrokenPipeError) as error:
        raise UserError(f"ffmpeg failed ({error}): use --animate gif") from None
