"""Text in figures: escaping of names that come from data, and titles above a figure."""

import re
import textwrap

from matplotlib.figure import Figure

from analysis.figures import new_figure

LINE = 0.15  # inches per line of a title
CHARACTERS = 13.3  # average number of characters per inch


def plain_text(text: str) -> str:
    r"""Escapes every $, because matplotlib typesets text between two of them as a formula and fails on many.

    Apply it to all text that comes from data: names of classes, files and runs. Text already escaped stays as it is.
    """
    return re.sub(r"(?<!\\)\$", r"\\$", text)


def titled_figure(width: float, height: float, title: str) -> Figure:
    """An empty figure, height inches below a left-aligned title that is wrapped to its width."""
    lines = [line for part in title.splitlines() for line in textwrap.wrap(part, int(CHARACTERS * width))]
    figure = new_figure(width, height + LINE * len(lines))
    figure.suptitle(plain_text("\n".join(lines)), x=0.01, ha="left")
    return figure
