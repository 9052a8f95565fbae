"""Measures attention in numbers, level by level: how concentrated, how local, how much on the patch itself.

Attention maps of a few images invite stories; these are statistics over many images, all query patches and all heads.
A head's scores become shares that sum to 1 over the patches: |score| / sum of |scores|, as in visualize_attention.py
(--show shares). A BDH's raw scores may be negative, because rotary positions turn neurons that are not; the LN after
the product removes their scale. For a ViT, these are its softmax weights. A class token is left out of the shares,
which then sum to 1 over the patches again.

    entropy           of the shares, divided by that of equal shares: 0 one patch, 1 all patches alike
    entropy_others    the same without the patch itself
    self_share        share of the patch itself, which Q = K favours: its score is the squared length of its neurons
    distance          mean distance between a patch and what it attends to, in patches (arXiv 2010.11929, figure 7)
    same_for_queries  how much of the map does not depend on the query: 1 - total variation to the mean over queries
    same_for_heads    how alike heads are: 1 - total variation, mean over pairs of heads
    same_for_images   how much does not depend on the image: 1 - total variation between two images, in random pairs
    negative          part of the |scores| that is subtracted; 0 with softmax
    to_class_token    a ViT's weight on its class token, before that is left out
    class_entropy     entropy of the class token's own shares of the patches
    row_share         share of the other patches in the same row; in the table only, as are the next and the two above
    column_share      share of the other patches in the same column

Each run is also measured before training (--no-untrained: not): what is the same there was not learnt. Intervals are
95 % over images, not over seeds of training. In the last level of a ViT that reads its class token, what the patches
attend to has no effect on the answer. Shares say what enters a sum, not what the model relies on. Writes a table
(CSV: each head, and their mean; Markdown: means) and a figure (PNG and SVG).

    python interpretability/attention_statistics.py --run runs/v2_cifar10/seed0 runs/vit_tiny_cifar10/seed0
    python interpretability/attention_statistics.py --run runs/bdh_unet/seed0 --images 20 --no-untrained
"""

import math
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from analysis.plotting.style import COLORS, MARKERS, PAGE, plain_text, save_figure, style_axes, titled_figure
from analysis.tables import markdown_table, mean_interval, write_tables
from interpretability.common.adapters import pass_through
from interpretability.common.attention_maps import SCORES_AT_ONCE, shares
from interpretability.common.recorder import Trace, record
from interpretability.common.trained import SeveralChoice, TrainedRun, open_several, several_folder
from models.vision_bdh import Grid
from training.command_line import run_script
from training.config import UserError, require

STATISTICS = {  # axis labels
    "entropy": "entropy (1: equal shares)",
    "entropy_others": "entropy without itself",
    "self_share": "share of the patch itself",
    "distance": "distance (patches)",
    "same_for_queries": "same for all queries",
    "same_for_heads": "same for all heads",
    "same_for_images": "same for other images",
    "negative": "negative part",
    "to_class_token": "weight on the class token",
    "class_entropy": "entropy of the class token",
    "row_share": "share of its row",
    "column_share": "share of its column",
}
PANELS = tuple(STATISTICS)[:8]
FROM_0 = ("self_share", "negative")
TRAINED, UNTRAINED = "trained", "untrained"
ALL = "all"  # heads, in tables
DIGITS = 5  # decimals in tables


@dataclass(frozen=True, kw_only=True)
class Options(SeveralChoice):
    """Which runs to measure, on how many images."""

    images: int = 200
    """number of test images (validation if there is no test part), evenly spaced"""

    def __post_init__(self):
        require(self.images >= 2, self, "images", "must be at least 2")


# ---------------------------------------------------------------------------- statistics of shares


def relative_entropy(p: Tensor) -> Tensor:
    """(...): entropy over the last dimension divided by its largest value, log n. p: (..., n), sums to 1."""
    return torch.special.entr(p).sum(-1) / math.log(p.shape[-1])


def without_self(p: Tensor) -> Tensor:
    """Shares of the other patches, which sum to 1; equal ones if a patch attends to itself only.

    p: (..., T, T), query by key -> (..., T, T - 1).
    """
    T = p.shape[-1]
    others = p.flatten(-2)[..., 1:].unflatten(-1, (T - 1, T + 1))[..., :-1].flatten(-2).unflatten(-1, (T, T - 1))
    total = others.sum(-1, keepdim=True)
    return torch.where(total == 0, 1 / (T - 1), others / total.clamp(min=torch.finfo(p.dtype).tiny))


def without_silent(p: Tensor) -> Tensor:
    """The shares, NaN for a query that attends to nothing: all its scores are 0. p: (..., T)."""
    return p.masked_fill(p.sum(-1, keepdim=True) == 0, torch.nan)


def overlap(p: Tensor, q: Tensor) -> Tensor:
    """(...): 1 - total variation distance of two distributions, the sum of the smaller shares. p, q: (..., n)."""
    return torch.minimum(p, q).sum(-1)


def distances(grid: Grid, device: torch.device | str = "cpu") -> Tensor:
    """(T, T) Euclidean distances of the patches of a grid, in patches."""
    rows, columns = grid
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()  # (T, 2)
    return torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist").to(device)


def lines_of(grid: Grid, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(T, T) bool each: whether two different patches of a grid share a row, and a column."""
    rows, columns = grid
    place = torch.arange(rows * columns, device=device)
    row, column = place // columns, place % columns
    same_row, same_column = (each[:, None] == each for each in (row, column))
    return same_row & ~same_column, same_column & ~same_row


def statistics_of(p: Tensor, before: Tensor, grid: Grid) -> dict[str, Tensor]:
    """(B, H) each, means over the queries that attend to something, NaN if none does.

    p: (B, H, T, T) shares, query by key; before: the same of other images.
    """
    p, before = without_silent(p), without_silent(before)
    heads = p.shape[1]
    alike = torch.full((*p.shape[:2], heads), torch.nan, device=p.device)  # a head with itself: none
    for one, other in combinations(range(heads), 2):
        alike[:, one, other] = alike[:, other, one] = overlap(p[:, one], p[:, other]).nanmean(-1)
    by_query = {
        "entropy": relative_entropy(p),
        "entropy_others": relative_entropy(without_self(p)),
        "self_share": p.diagonal(dim1=-2, dim2=-1),
        "distance": (p * distances(grid, p.device)).sum(-1),
        "same_for_queries": overlap(p, p.nanmean(-2, keepdim=True)),
        "same_for_images": overlap(p, before),
    }
    for name, line in zip(("row_share", "column_share"), lines_of(grid, p.device), strict=True):
        by_query[name] = (p * line).sum(-1)
    return {name: values.nanmean(-1) for name, values in by_query.items()} | {"same_for_heads": alike.nanmean(-1)}


# ---------------------------------------------------------------------------- a model on images


@torch.no_grad()
def measure(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], grid: Grid) -> dict[str, np.ndarray]:
    """By statistic, (images, levels, heads); NaN where there is none. batches: the model's input, and labels."""
    found: dict[str, list[Tensor]] = {name: [] for name in STATISTICS}
    last: dict[int, Tensor] = {}  # by level, the shares of the last image of the batch before
    with record(model, "scores") as trace:
        for images, _ in batches:
            pass_through(model, images)
            by_level = [_level(trace, level, last, grid) for level in trace.levels]
            for name, kept in found.items():
                kept.append(torch.stack([each[name] for each in by_level], 1).cpu())
    return {name: torch.cat(kept).double().numpy() for name, kept in found.items()}


def _level(trace: Trace, level: int, last: dict[int, Tensor], grid: Grid) -> dict[str, Tensor]:
    """(B, H) of every statistic at a level; keeps the shares of the batch's last image."""
    scores = trace.scores(level, patches_only=True).float()
    p = shares(scores)
    first = last.get(level, torch.full_like(p[:1], torch.nan))  # nothing comes before the first image
    values = statistics_of(p, torch.cat((first, p[:-1])), grid)
    last[level] = p[-1:].clone()
    nothing = torch.full(p.shape[:2], torch.nan, device=p.device)
    values["negative"] = (scores.clamp(max=0).abs().sum(-1) / scores.abs().sum(-1)).nanmean(-1)  # 0 / 0: silent
    values |= dict.fromkeys(("to_class_token", "class_entropy"), nothing)
    if tokens := trace.adapter.class_tokens:
        whole = without_silent(shares(trace.scores(level).float()))  # (B, H, 1 + T, 1 + T)
        values["to_class_token"] = whole[:, :, tokens:, :tokens].sum(-1).nanmean(-1)
        values["class_entropy"] = relative_entropy(without_silent(shares(whole[:, :, 0, tokens:])))
    return values


def measure_run(run: TrainedRun, model: nn.Module, indices: list[int], text: str) -> dict[str, np.ndarray]:
    """`measure` on test images of the run, in this order."""
    size = max(1, SCORES_AT_ONCE // (run.adapter.n_heads * (run.adapter.class_tokens + run.n_patches) ** 2))
    return measure(model, run.batches(indices, min(size, 64), text), run.grid)


# ---------------------------------------------------------------------------- tables and figure


def tabulate(measured: dict[tuple[str, str], dict[str, np.ndarray]]) -> pd.DataFrame:
    """A row per run, weights, level, head (and their mean) and statistic, with its 95 % interval over images.

    measured: by name of the run and weights, what `measure` returns. Statistics that a model lacks are left out.
    """
    rows = []
    for (name, weights), by_statistic in measured.items():
        for statistic, values in by_statistic.items():  # (images, levels, heads)
            there = values[~np.isnan(values).all((1, 2))]
            if statistic == "same_for_images":
                there = there[::2]  # pairs of images that share none
            if len(there) < 2:
                continue
            with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # all heads silent
                every = np.concatenate((np.nanmean(there, 2, keepdims=True), there), 2)
            mean, low, high = mean_interval(every)  # (levels, 1 + heads)
            for level, head in np.ndindex(mean.shape):
                row = dict(run=name, weights=weights, level=level + 1, head=head or ALL, statistic=statistic)
                ends = (each[level, head] for each in (mean, low, high))
                rows.append(row | dict(zip(("mean", "low", "high"), ends, strict=True), images=len(there)))
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame, title: str) -> list[str]:
    """Means over heads and images by level."""
    table = table[table["head"] == ALL]
    wide = table.pivot_table(index=["run", "weights", "level"], columns="statistic", values="mean", sort=False)
    wide = wide[[name for name in STATISTICS if name in wide]]
    cells = [
        [run, weights, str(level), *("" if np.isnan(value) else f"{value:.2f}" for value in row)]
        for (run, weights, level), row in zip(wide.index, wide.to_numpy(), strict=True)
    ]
    half = (table["high"] - table["low"]).groupby(table["statistic"]).max() / 2
    lines = ["# Attention in numbers", "", title, ""]
    lines += markdown_table(["run", "weights", "level", *wide.columns], cells, left=("run", "weights"))
    note = f"at most ± {half.drop('distance').max():.3f}, of the distance ± {half['distance']:.3f} patches"
    return [*lines, "", f"Means over heads and images; 95 % intervals over images: {note}."]


def draw(table: pd.DataFrame, grids: set[Grid], title: str) -> Figure:
    """A panel per statistic: its mean over heads by level, a line per run, dashed before training, with intervals.

    grids: of the runs; dotted lines show what equal shares would give.
    """
    table = table[table["head"] == ALL]
    figure = titled_figure(PAGE, 3.9, title)
    axes = figure.subplots(2, len(PANELS) // 2)
    names = list(table["run"].unique())
    equal = {
        "self_share": {1 / math.prod(grid) for grid in grids},
        "distance": {float(distances(grid).mean()) for grid in grids},
    }
    for ax, statistic in zip(axes.flat, PANELS, strict=True):
        of_panel = table[table["statistic"] == statistic]
        for (run, weights), rows in of_panel.groupby(["run", "weights"], sort=False):
            place = names.index(run)
            look = dict(color=COLORS[place % len(COLORS)], marker=MARKERS[place % len(MARKERS)], markersize=3)
            trained = weights == TRAINED
            look |= dict(label=plain_text(run)) if trained else dict(markerfacecolor="white", zorder=1.9)
            ax.plot(rows["level"], rows["mean"], "-" if trained else "--", linewidth=1 if trained else 0.7, **look)
            ax.fill_between(rows["level"], rows["low"], rows["high"], color=look["color"], alpha=0.15, linewidth=0)
        for value in equal.get(statistic, ()):
            ax.axhline(value, color="0.6", linestyle=":", zorder=1)
        ax.set_title(STATISTICS[statistic])
        style_axes(ax, "y")
        if statistic in FROM_0:
            ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    for ax in axes[-1]:
        ax.set_xlabel("level")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def main(options: Options) -> None:
    runs = open_several(options)
    measured, counts = {}, set()
    for name, run in runs.items():
        run.require("scores")
        if run.n_patches < 3:
            raise UserError(f"{run.checkpoint} has {run.n_patches} patches an image: give a run with 3 or more")
        indices = np.random.default_rng(0).permutation(run.choose_images(options.images)).tolist()
        counts.add(f"{len(indices):,} {run.part} images")
        measured[name, TRAINED] = measure_run(run, run.model, indices, name)
        if options.untrained:
            measured[name, UNTRAINED] = measure_run(run, run.untrained_model(), indices, f"{name}, {UNTRAINED}")
    table = tabulate(measured).round(DIGITS)
    title = f"{' or '.join(sorted(counts))}; shares of the patches"
    path = several_folder(options, runs) / "attention_statistics"
    lines = markdown(table, title)
    dashed = "; dashed: before training" if options.untrained else ""
    figure = draw(table, {run.grid for run in runs.values()}, f"{title}{dashed}; dotted: equal shares")
    pictures = save_figure(figure, path)
    print(*lines, "", "->", *pictures, *write_tables(path, table, lines), sep="\n")


if __name__ == "__main__":
    run_script(main, __doc__)
