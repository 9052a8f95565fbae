"""Attention maps, drawn: images with the patch outlined and the maps beside them, as a figure or as an animation.

Everything is placed in inches, so that a map has the same size in every row and stands still from frame to frame.
"""

import io
import subprocess
import textwrap
from collections.abc import Callable, Iterator, Sequence
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

from analysis.plotting.style import DIVERGING, DPI, HALO, PAGE, SEQUENTIAL, outline
from interpretability.common.attention_maps import Look, Patch, Show
from interpretability.common.trained import TrainedRun
from training.config import UserError

PANELS = 6  # side by side at most, beside the image
SMALLEST_PANEL, LARGEST_PANEL = 0.76, 1.4  # inches, widths of a map: a title needs the smaller
PAGE_HEIGHT = 9.6  # inches; maps are made smaller, down to the smallest, to fit it
LINE, GAP = 0.14, 0.1  # inches, of a line of text and between panels
TEXT, LEVEL_NAME = 1.14, 0.17  # inches: what stands left of an image, and left of a row of heads
BAR_LEFT, BAR_WIDTH, BAR_HEIGHT, BELOW_MAPS = 0.35, 2.2, 0.08, 0.5  # inches, of the colour bars and their place
TEXT_CHARACTERS, CHARACTERS = 16, 15.5  # of a line left of an image; an inch holds of them, on average
SECONDS_A_LEVEL = 1.0


@dataclass(frozen=True)
class View:
    """A run and what it attends to in the chosen images."""

    run: TrainedRun
    name: str
    """short, beside its images; "" where there is one run only"""
    patch: Patch
    show: Show
    per_head: bool
    numbers: Sequence[int]
    """of the images in the run's part of the data"""
    looks: Sequence[Look]
    """for each image; all of the same levels"""

    @property
    def signed(self) -> bool:
        """Whether the maps may be negative: raw scores, neither shares nor softmax weights."""
        return self.run.adapter.signed and self.show == "scores"

    @property
    def levels(self) -> list[int]:
        """From 0."""
        return list(self.looks[0].maps)

    @property
    def values(self) -> str:
        """What the maps hold, for people."""
        if self.show == "scores":
            return "raw score" if self.signed else "softmax weight"
        return "share of attention" if self.show == "shares" else "share in rollout"

    def of(self, levels: Sequence[int]) -> "View":
        """The same of these levels alone."""
        looks = [replace(look, maps={level: look.maps[level] for level in levels}) for look in self.looks]
        return replace(self, looks=looks)


@dataclass
class Panel:
    name: str
    """of its level or head; "" where that stands above the same column already"""
    scale: str
    """what its colours span, in one line or two"""
    values: np.ndarray
    """(rows, columns)"""
    limit: float
    """where the colours end: they begin at 0, or at -limit where values are signed"""

    @property
    def title(self) -> str:
        return f"{self.name}\n{self.scale}".lstrip("\n")


class Block(NamedTuple):
    """One image as one run sees it."""

    view: View
    text: list[str]
    """lines"""
    look: Look
    rows: list[tuple[str, list[Panel]]]
    """each with the name that stands on its left"""


# ---------------------------------------------------------------------------- what is drawn


def blocks_of(view: View) -> list[Block]:
    """The images of a run, each with its panels: one a level, or one a head with each level in rows of its own."""
    blocks = []
    for number, look in zip(view.numbers, view.looks, strict=True):
        said = [view.name, f"{view.run.part} image {number}", f"true: {look.truth}"]
        said.append(f"predicted: {look.predicted} ({look.certainty:.0%})")
        text = [line for part in said for line in textwrap.wrap(part, TEXT_CHARACTERS)]
        panels = {level: _panels(view, level, maps.numpy()) for level, maps in look.maps.items()}
        if view.per_head:
            named = [(f"level {level + 1}", heads) for level, heads in panels.items()]
        else:
            named = [("", [heads[0] for heads in panels.values()])]
        blocks.append(Block(view, text, look, [(name, row) for name, each in named for row in _in_rows(each)]))
    return blocks


def _panels(view: View, level: int, maps: np.ndarray) -> list[Panel]:
    """Of one level. maps: (H, rows, columns), H being 1 where heads are averaged.

    Each has a scale of its own: how large raw scores are says nothing across panels, and the weights of a ViT may lie
    all on one patch in one image and nowhere in the next.
    """
    panels = []
    for head, values in enumerate(maps, start=1):
        name = f"level {level + 1} of {view.run.adapter.n_levels}"
        if view.show == "rollout":  # the patch itself keeps most, and would darken the rest
            others = values.copy()
            others[view.patch] = 0
            name, limit = f"up to level {level + 1}", float(others.max())
            scale = f"0 to {_plain(100 * limit)} %\nitself {_plain(100 * values[view.patch])} %"
        elif view.signed:
            limit = float(np.abs(values).max())
            scale = f"\N{PLUS-MINUS SIGN}{_plain(limit)}"
        else:
            limit = float(values.max())
            scale = f"0 to {_plain(100 * limit)} %"
        panels.append(Panel(f"head {head}" if view.per_head else name, scale, values, limit))
    return panels


def _drop_repeated_names(blocks: Sequence[Block]) -> None:
    """Of panels that have the same names as those of the row above, in blocks that stand one below the other."""
    above = None
    for row in (row for block in blocks for _, row in block.rows):
        names = [panel.name for panel in row]
        if names == above:
            for panel in row:
                panel.name = ""
        above = names


def _plain(value: float) -> str:
    """Two significant digits, no exponent."""
    return np.format_float_positional(float(f"{value:.2g}"), trim="-")


def _in_rows(panels: list[Panel]) -> Iterator[list[Panel]]:
    """As few rows as hold them, as equal as can be."""
    n_rows = -(-len(panels) // PANELS)
    length = -(-len(panels) // n_rows)
    for first in range(0, len(panels), length):
        yield panels[first : first + length]


def caption(views: Sequence[View]) -> list[str]:
    """What is shown, and of which runs."""
    what = "Attention rollout" if views[0].show == "rollout" else "Attention"
    what += " from the outlined patch to all patches"
    ending = "; classes are those of most of the patch's pixels." if views[0].run.labels_pixels else "."
    if len(views) == 1:
        return [f"{what} ({_details(views[0])}){ending}", views[0].run.title]
    runs = (f"{view.name} ({_details(view)}): {view.run.title}" for view in views)
    return [f"{what}, by two runs{ending}", *runs]


def _details(view: View) -> str:
    values = {
        "scores": f"{view.values}s",
        "shares": "|score| / sum of |scores|" if view.run.adapter.signed else "softmax weights",
        "rollout": "half of each level's input kept",
    }[view.show]
    n_heads = view.run.adapter.n_heads
    heads = "each head" if view.per_head else f"mean over {n_heads} head{'s' * (n_heads > 1)}"
    return f"row {view.patch[0]}, column {view.patch[1]}; {values}, {heads}"


# ---------------------------------------------------------------------------- how it is drawn


class Sheet:
    """A figure on which things are placed in inches from its upper left corner."""

    def __init__(self, figure: Figure, width: float, height: float):
        self.figure, self.width, self.height = figure, width, height
        figure.set_size_inches(width, height)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        bottom = self.height - top - height
        box = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(box)

    def text(self, left: float, top: float, lines: Sequence[str]) -> None:
        """Line by line, for within a text matplotlib's lines have unequal distances."""
        for place, line in enumerate(lines):
            self.figure.text(left / self.width, 1 - (top + place * LINE) / self.height, line, va="top")


def draw(views: Sequence[View], figure: Figure | None = None) -> Figure:
    """The images one below the other, those of several runs in turn; two side by side where there is room.

    figure: to draw on, empty; None: a new one. Its size follows from what is drawn.
    """
    blocks = [block for image in zip(*map(blocks_of, views), strict=True) for block in image]
    columns = 1 + max(len(row) for block in blocks for _, row in block.rows)
    abreast = max(1, min(2, len(blocks), (PANELS + 1) // columns))
    for place in range(abreast):
        _drop_repeated_names(blocks[place::abreast])
    lines = [blocks[first : first + abreast] for first in range(0, len(blocks), abreast)]
    beside = TEXT + (LEVEL_NAME if views[0].per_head else 0)
    panel = _fit_page(lines, min(LARGEST_PANEL, (PAGE / abreast - beside) / columns - GAP))
    block_width = beside + columns * (panel + GAP)

    said = [line for part in caption(views) for line in textwrap.wrap(part, int(abreast * block_width * CHARACTERS))]
    tops = [GAP / 2 + LINE * len(said) + GAP]
    for line in lines:
        tops.append(tops[-1] + _height(line, panel))
    sheet = Sheet(figure or Figure(), abreast * block_width, tops[-1] + BELOW_MAPS)
    sheet.text(GAP / 2, GAP / 2, said)
    for line, top in zip(lines, tops, strict=False):
        for place, block in enumerate(line):
            _draw_block(sheet, block, place * block_width, top, panel)
    for place, view in enumerate({view.values: view for view in views}.values()):
        _draw_bar(sheet, view, BAR_LEFT + place * (BAR_WIDTH + 2 * BAR_LEFT), tops[-1])
    return sheet.figure


def _fit_page(lines: Sequence[Sequence[Block]], panel: float) -> float:
    """The width of a map with which the page holds all lines, if that is not too small."""
    while panel > SMALLEST_PANEL and sum(_height(line, panel) for line in lines) > PAGE_HEIGHT - 2 * BELOW_MAPS:
        panel = max(SMALLEST_PANEL, panel - 0.02)
    return panel


def _row_heights(block: Block, panel: float) -> list[tuple[float, float]]:
    """Of each row: its titles and its maps, in inches. panel: width of a map."""
    map_height = panel * block.look.image.shape[1] / block.look.image.shape[2]
    return [(LINE * (1 + max(each.title.count("\n") for each in row)), map_height) for _, row in block.rows]


def _height(line: Sequence[Block], panel: float) -> float:
    """Of blocks side by side, in inches."""
    return max(_block_height(block, panel) for block in line)


def _block_height(block: Block, panel: float) -> float:
    heights = _row_heights(block, panel)
    text = heights[0][0] + LINE * len(block.text)
    return max(text, sum(titles + maps for titles, maps in heights) + GAP * (len(heights) - 1)) + GAP


def _draw_block(sheet: Sheet, block: Block, left: float, top: float, panel: float) -> None:
    first = left + TEXT + panel + GAP + (LEVEL_NAME if block.view.per_head else 0)
    for index, ((name, row), (titles, height)) in enumerate(zip(block.rows, _row_heights(block, panel), strict=True)):
        top += titles
        if index == 0:
            sheet.text(left + GAP / 2, top, block.text)
            _draw_image(sheet.axes(left + TEXT, top, panel, height), block, panel)
        for place, each in enumerate(row):
            ax = sheet.axes(first + place * (panel + GAP), top, panel, height)
            _draw_map(ax, block.view, each, panel)
            if name and place == 0:
                ax.set_ylabel(name, labelpad=3)
        top += height + GAP


def _draw_image(ax: Axes, block: Block, panel: float) -> None:
    pixels = block.look.image.permute(1, 2, 0).squeeze(-1).numpy()  # 1 or 3 channels
    ax.imshow(pixels, cmap="gray", vmin=0, vmax=255)
    _outline(ax, block.view.patch, block.view.run.sizes.patch_size, panel / pixels.shape[1])


def _draw_map(ax: Axes, view: View, panel: Panel, width: float) -> None:
    limit = panel.limit or 1.0  # an empty map has no scale
    ax.imshow(panel.values, cmap=_colours(view), vmin=-limit if view.signed else 0, vmax=limit)
    ax.set_title(panel.title, pad=2, linespacing=1.1)
    _outline(ax, view.patch, 1, width / panel.values.shape[1])


def _colours(view: View) -> str:
    return DIVERGING if view.signed else SEQUENTIAL


def _outline(ax: Axes, patch: Patch, side: int, unit: float) -> None:
    """A frame outside the patch: it hides nothing of one as thin as its lines. unit: inches a pixel."""
    out = HALO / 2 / 72 / unit
    outline(ax, (patch[1] * side - 0.5 - out, patch[0] * side - 0.5 - out), side + 2 * out)


def _draw_bar(sheet: Sheet, view: View, left: float, top: float) -> None:
    """What the colours mean. top: the upper end of its place."""
    ax = sheet.axes(left, top + 0.02, BAR_WIDTH, BAR_HEIGHT)
    ticks = {-1: "\N{MINUS SIGN}limit", 0: "0", 1: "limit"} if view.signed else {0: "0", 1: "limit"}
    colours = ScalarMappable(Normalize(min(ticks), 1), _colours(view))
    sheet.figure.colorbar(colours, cax=ax, orientation="horizontal", ticks=list(ticks))
    ax.set_xticklabels(ticks.values())
    ax.tick_params(length=2, pad=1)
    ax.set_xlabel(f"{view.values}; the limit is above each map", labelpad=0)


# ---------------------------------------------------------------------------- over levels


def check_writer(kind: str) -> None:
    """Raises UserError where animations of this kind, gif or mp4, cannot be written here."""
    if kind == "mp4" and not FFMpegWriter.isAvailable():
        raise UserError("an mp4 needs the program ffmpeg, which is not here: install it, or use --animate gif")


def animate(views: Sequence[View], path: Path) -> None:
    """A frame a level, written to path, .gif or .mp4. Of several runs, those with fewer levels end on their last.

    Raises UserError where ffmpeg is missing or fails.
    """
    check_writer(path.suffix[1:])
    figure = Figure()
    n_frames = max(len(view.levels) for view in views)

    def draw_frame(place: int) -> None:
        figure.clear()
        draw([view.of([view.levels[min(place, len(view.levels) - 1)]]) for view in views], figure)

    draw_frame(0)  # which gives the figure its size
    path.parent.mkdir(parents=True, exist_ok=True)
    (_write_gif if path.suffix == ".gif" else _write_mp4)(path, figure, draw_frame, n_frames)


def _write_gif(path: Path, figure: Figure, draw_frame: Callable[[int], None], n_frames: int) -> None:
    frames = []
    for place in range(n_frames):
        draw_frame(place)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
        frame = Image.open(buffer).convert("RGB")
        palette = frame.quantize(method=Image.Quantize.MAXCOVERAGE)  # the default spends no colours on colour bars
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
        raise UserError(f"ffmpeg could not write {path} ({error}): use --animate gif") from None
