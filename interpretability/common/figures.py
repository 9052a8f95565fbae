"""Figures with a title on the left."""

import textwrap

from matplotlib.figure import Figure

from analysis.plotting.style import LINE, PAGE, TITLE, new_figure, plain_text


def titled_figure(width: float, height: float, title: str) -> Figure:
    """An empty figure, height inches below a title that is wrapped to its width. title: raw, $ is escaped here."""
    lines = [line for part in title.splitlines() for line in textwrap.wrap(part, int(TITLE * width / PAGE))]
    figure = new_figure(width, height + LINE * len(lines))
    figure.suptitle(plain_text("\n".join(lines)), x=0.01, ha="left")
    return figure
