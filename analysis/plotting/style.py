"""Style and layout of every figure: one font size, one page width, one palette, legends below the panels.

A figure is at most as wide as the text of a page, so that its fonts keep their size in print.
"""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase, SubFigure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from training.files import written_whole

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")  # Okabe and Ito; grey for yellow
MARKERS = "os^DvP*X"  # 8 and 7 have no common factor: 56 combinations of marker and colour
SEQUENTIAL, DIVERGING = "viridis", "RdBu_r"  # colour-blind safe: from 0 up, and around 0
FONT = 8  # points, for all text
PAGE = 7.2  # inches, width of a page's text
DPI = 200
HALO, FRAME = 2.4, 1.0  # points, line widths of `outline`
LINE = 0.15  # inches, height of a line of text
CHARACTERS = 14.3  # average characters an inch
TITLE = 98  # characters in a line of a title as wide as the page
LEGEND = 66  # characters in a line of a legend entry

matplotlib.rcParams.update(
    {
        **{f"{part}.labelsize": FONT for part in ("axes", "xtick", "ytick")},
        **{f"{part}.titlesize": FONT for part in ("axes", "figure")},
        "font.size": FONT,
        "legend.fontsize": FONT,
        "legend.title_fontsize": FONT,
        "svg.hashsalt": "vision-bdh",  # makes SVG files reproducible
    }
)


def plain_text(text: str) -> str:
    r"""Text from data (names of classes, runs, folders) for a figure, shown as it is.

    Matplotlib reads text between two dollar signs as a formula, and leaves names that begin with _ out of legends.
    """
    text = text.replace("$", r"\$")
    return f"\N{ZERO WIDTH SPACE}{text}" if text.startswith("_") else text


def look_of(place: int) -> dict[str, str]:
    """Colour and marker of the experiment at this place in its table."""
    return dict(color=COLORS[place % len(COLORS)], marker=MARKERS[place % len(MARKERS)])


# ---------------------------------------------------------------------------- figures


def new_figure(width: float, height: float) -> Figure:
    """An empty figure with automatic layout. width, height: inches."""
    return Figure((width, height), layout="constrained")


def new_blocks(titles: Sequence[str], inches: Sequence[float]) -> tuple[Figure, list[SubFigure]]:
    """A page-wide figure with one block below the other. inches: height of each block without its title."""
    titles = ["\n".join(textwrap.fill(line, TITLE) for line in title.splitlines()) for title in titles]
    heights = [height + LINE * len(title.splitlines()) for height, title in zip(inches, titles, strict=True)]
    figure = new_figure(PAGE, sum(heights))
    blocks = figure.subfigures(len(titles), 1, height_ratios=heights, squeeze=False)[:, 0]
    for block, title in zip(blocks, titles, strict=True):
        block.suptitle(title)
    return figure, list(blocks)


def titled_figure(width: float, height: float, title: str) -> Figure:
    """An empty figure, height inches below a title that is wrapped to its width. title: raw, $ is escaped here."""
    lines = [line for part in title.splitlines() for line in textwrap.wrap(part, int(TITLE * width / PAGE))]
    figure = new_figure(width, height + LINE * len(lines))
    figure.suptitle(plain_text("\n".join(lines)), x=0.01, ha="left")
    return figure


def save_figure(figure: Figure, path: Path) -> tuple[Path, Path]:
    """Writes path with the suffix .png (200 dpi) and .svg; returns both. Makes the folder."""
    png, svg = _files_of(path)
    save_png(figure, png)
    with written_whole(svg) as partial:
        figure.savefig(partial, dpi=DPI, metadata={"Date": None})
    return png, svg


def save_png(figure: Figure, path: Path) -> None:
    """Writes a picture of 200 dpi, without an SVG. Makes the folder."""
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=DPI)


def remove_figure(path: Path) -> None:
    """Removes what `save_figure` wrote before, where there is nothing to draw now."""
    for file in _files_of(path):
        file.unlink(missing_ok=True)


def _files_of(path: Path) -> tuple[Path, Path]:
    png, svg = (path.with_name(path.name.removesuffix(".png") + suffix) for suffix in (".png", ".svg"))
    return png, svg


# ---------------------------------------------------------------------------- axes


def style_axes(ax: Axes, grid: str) -> None:
    """Removes the frame at the top and right, adds light grid lines. grid: "x", "y" or "both"."""
    ax.grid(axis=grid, color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def label_epochs(ax: Axes, name: str) -> None:
    """Epochs on the x axis, name on the y axis."""
    style_axes(ax, "y")
    ax.set(xlabel="epoch", ylabel=name)
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))


def choose_scale(ax: Axes, name: str, values: Sequence[float]) -> None:
    """Makes the axis "x" or "y" logarithmic if the values, all above 0, span a factor of 8 or more."""
    axis = getattr(ax, f"{name}axis")
    if max(values) < 8 * min(values):
        axis.set_major_locator(MaxNLocator(5))
        return
    ax.set(**{f"{name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1,) if max(values) > 300 * min(values) else (1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def outline(ax: Axes, corner: tuple[float, float], side: float, **look: object) -> None:
    """Frames a square of a picture in black on white, visible on any background, and removes the ticks.

    corner: x and y of the upper left corner, side: length, in pixels. look: options of matplotlib's Rectangle.
    """
    for color, width in (("white", HALO), ("black", FRAME)):
        ax.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=color, linewidth=width, clip_on=False, **look))
    ax.set_xticks([])
    ax.set_yticks([])


# ---------------------------------------------------------------------------- legends


def legend_inches(texts: Sequence[str]) -> float:
    """Height that a legend with a title takes below the panels."""
    return LINE * (_legend_shape(texts)[1] + 1)


def add_legend(figure: FigureBase, ax: Axes, title: str | None = None) -> None:
    """The legend of ax, below all panels of the figure."""
    handles, texts = ax.get_legend_handles_labels()
    columns, _ = _legend_shape(texts)
    figure.legend(handles, texts, loc="outside lower center", title=title, frameon=False, ncols=columns)


def _legend_shape(texts: Sequence[str]) -> tuple[int, int]:
    """Columns that fit on a page, and the lines of text in each."""
    longest = max(len(line) for text in texts for line in text.splitlines())
    columns = max(1, min(len(texts), int(PAGE * CHARACTERS) // (longest + 9)))
    return columns, math.ceil(len(texts) / columns) * max(len(text.splitlines()) for text in texts)
