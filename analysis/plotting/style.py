"""How every figure of this repository looks, and how it is written: one font size, one width, one palette.

A figure is at most as wide as the text of a page, so that its fonts keep their size in print.
"""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")  # Okabe and Ito; grey for yellow
MARKERS = "os^DvP*X"  # no common factor with the 7 colours: 56 looks before one comes again
SEQUENTIAL, DIVERGING = "viridis", "RdBu_r"  # colour maps that the colour-blind can read, from 0 up and around 0
FONT = 8  # points, of all text
PAGE = 7.2  # inches, of the text of a page
DPI = 200
HALO, FRAME = 2.4, 1.0  # points, widths of the lines around a square: white, and black on it

matplotlib.rcParams.update(
    {
        **{f"{part}.labelsize": FONT for part in ("axes", "xtick", "ytick")},
        **{f"{part}.titlesize": FONT for part in ("axes", "figure")},
        "font.size": FONT,
        "legend.fontsize": FONT,
        "legend.title_fontsize": FONT,
        "svg.hashsalt": "vision-bdh",  # else every SVG of the same figure is another file
    }
)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure whose parts find their places by themselves. width, height: inches."""
    return Figure((width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> tuple[Path, Path]:
    """Writes path with .png (200 dpi) and with .svg in place of its suffix; returns both. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    png, svg = (path.with_name(path.name.removesuffix(".png") + suffix) for suffix in (".png", ".svg"))
    figure.savefig(png, dpi=DPI)
    figure.savefig(svg, dpi=DPI, metadata={"Date": None})
    return png, svg


def style_axes(ax: Axes, grid: str) -> None:
    """No frame above and on the right; light lines across. grid: "x", "y" or "both"."""
    ax.grid(axis=grid, color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def outline(ax: Axes, corner: tuple[float, float], side: float, **look: object) -> None:
    """A frame around a square of a picture, black in white so that it shows on any ground; takes the ticks away.

    corner: x and y of the upper left one, in pixels as `side` is. look: of matplotlib's Rectangle.
    """
    for color, width in (("white", HALO), ("black", FRAME)):
        ax.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=color, linewidth=width, clip_on=False, **look))
    ax.set_xticks([])
    ax.set_yticks([])
