"""Measures how sparse a BDH is: the share of active neurons by level, head and class, and the neurons never active.

Counts on how many patches x_sparse (activated by the patch itself), y_sparse (activated by attention) and gated (both
combined, the decoder's input) are above 0. Writes tables, and figures of the same names:

    sparsity.csv           share of active neurons by level, head and class, and over all of them
    sparsity_neurons.csv   for every neuron, the share of patches on which it is active
    sparsity_dead.csv      by level, neurons active on no patch (dead) and on nearly all (always on)
    sparsity_training.csv  the same for the checkpoints of a run trained with --keep-every

A dead neuron may be active on other images: more --images give fewer dead neurons. In segmentation, a patch has the
class of most of its pixels.

    python interpretability/sparsity.py
    python interpretability/sparsity.py --run runs/v2_cifar10/seed0 --images 10000 --always-on 0.9
"""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor, nn

from analysis.plotting.style import (
    COLORS,
    MARKERS,
    SEQUENTIAL,
    label_epochs,
    new_blocks,
    plain_text,
    remove_figure,
    save_figure,
    style_axes,
)
from analysis.tables import write_csv
from interpretability.common.activity import (
    NO_CLASS,
    QUANTITIES,
    batches_of_patches,
    choose_images,
    kept_model,
    levels_of,
    measured_on,
)
from interpretability.common.trained import RunChoice, TrainedRun, open_run
from training.command_line import run_script
from training.config import require
from training.runs import Run

ALL, ALL_CLASSES = "all", "all classes"  # in tables; ALL: over all levels or heads; a class may have that name
CLASSES_DRAWN = 20


@dataclass(frozen=True, kw_only=True)
class Options(RunChoice):
    """What to count."""

    images: int | None = None
    """number of test images, evenly spaced; default: 64,000 patches in total, 1,000 images of CIFAR-10"""
    always_on: float = 0.99
    """a neuron is always on if it is active on at least this share of the patches"""
    checkpoint_images: int = 100
    """number of test images for each checkpoint kept in training; 0: leave these out"""

    def __post_init__(self):
        require(0 < self.always_on <= 1, self, "always_on", "must be above 0 and at most 1")
        require(self.checkpoint_images >= 0, self, "checkpoint_images", "must be at least 0")


@dataclass(frozen=True)
class Counts:
    """On how many patches neurons are active. Q quantities, L levels, H heads, N neurons per head, C classes."""

    by_neuron: np.ndarray  # (L, Q, H, N), patches on which the neuron is active
    by_class: np.ndarray  # (L, Q, H, C), pairs of a patch of the class and a neuron active on it
    patches_by_class: np.ndarray  # (C,)
    patches: int  # including those without a class

    @property
    def shares(self) -> np.ndarray:
        """(L, Q, H, N), share of the patches on which a neuron is active."""
        return self.by_neuron / self.patches


def count(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], n_classes: int) -> Counts:
    """One pass over the images. batches: the model's input, and the class of each patch (B, T)."""
    by_neuron, by_class, patches = Counter(), Counter(), 0
    for level, activity, classes in levels_of(model, batches):
        active = torch.stack([values > 0 for values in activity])  # (Q, B, H, T, N)
        members = F.one_hot(classes.cpu() - NO_CLASS, n_classes + 1).double()  # (B, T, 1 + C), first: no class
        pairs = torch.einsum("qbht,btc->qhc", active.sum(-1).cpu().double(), members)  # exact, being integers
        by_neuron[level] += active.sum((1, 3)).cpu().numpy()
        by_class[level] += pairs[..., 1:].numpy()
        if level == 0:
            patches += members.sum((0, 1)).numpy()
    by_neuron, by_class = (np.stack([counts[level] for level in sorted(counts)]) for counts in (by_neuron, by_class))
    return Counts(by_neuron, by_class, patches[1:], int(patches.sum()))


def over_training(run: TrainedRun, n_images: int) -> dict[int, Counts]:
    """By epoch, for the checkpoints kept in training, on the same images; skips those that cannot be read."""
    indices, epochs = run.choose_images(n_images), {}
    for epoch in Run(run.folder).kept_weights():
        if model := kept_model(run, epoch):
            batches = batches_of_patches(run, indices, f"epoch {epoch}")
            epochs[epoch] = count(model, batches, len(run.class_names))
    return epochs


# ---------------------------------------------------------------------------- tables


def share_table(counts: Counts, class_names: Sequence[str]) -> pd.DataFrame:
    """Share of active neurons: a row per quantity, level, head and class, and over all; without classes never seen."""
    L, _, H, N = counts.by_neuron.shape
    active = np.concatenate((counts.by_class, counts.by_neuron.sum(-1, keepdims=True)), -1)
    active = np.concatenate((active, active.sum(2, keepdims=True)), 2)  # (L, Q, H + 1, C + 1)
    neurons = np.array([N] * H + [H * N])[:, None]
    with np.errstate(invalid="ignore"):  # classes never seen
        shares = active / (neurons * np.append(counts.patches_by_class, counts.patches))
    levels, heads = range(1, L + 1), [*range(1, H + 1), ALL]
    axes = {"quantity": QUANTITIES, "level": levels, "head": heads, "class": [*class_names, ALL_CLASSES]}
    places = pd.MultiIndex.from_product(axes.values(), names=axes)
    table = pd.DataFrame({"share": shares.swapaxes(0, 1).ravel()}, places).dropna().reset_index()
    return table[["level", "head", "class", "quantity", "share"]]


def neuron_table(counts: Counts) -> pd.DataFrame:
    """A row per level, head and neuron; a column per quantity with the share of patches on which it is active."""
    L, Q, H, N = counts.by_neuron.shape
    places = pd.MultiIndex.from_product([range(1, L + 1), range(1, H + 1), range(N)], names=["level", "head", "neuron"])
    return pd.DataFrame(counts.shares.swapaxes(0, 1).reshape(Q, -1).T, places, QUANTITIES).reset_index()


def dead_table(counts: Counts, always_on: float, shared: bool) -> pd.DataFrame:
    """Dead and always-on neurons per level and quantity; also over all levels if these share their weights."""
    levels = dict(enumerate(counts.shares, start=1))
    if shared:
        levels[ALL] = counts.by_neuron.sum(0) / (counts.patches * len(levels))
    rows = []
    for level, by_quantity in levels.items():
        for quantity, shares in zip(QUANTITIES, by_quantity, strict=True):
            row = {"level": level, "quantity": quantity, "neurons": shares.size, "dead": (shares == 0).sum()}
            rows.append(row | {"always_on": (shares >= always_on).sum(), "share": shares.mean()})
    return pd.DataFrame(rows)


def training_table(epochs: Mapping[int, Counts], always_on: float, shared: bool) -> pd.DataFrame:
    """`dead_table` of every epoch, one below the other."""
    tables = {epoch: dead_table(epochs[epoch], always_on, shared) for epoch in sorted(epochs)}
    return pd.concat(tables, names=["epoch"]).reset_index("epoch")


# ---------------------------------------------------------------------------- figures


def draw_shares(table: pd.DataFrame, title: str) -> Figure:
    """Share of active neurons by level, a line per head; below it by class and level. table: `share_table`."""
    of_all = table["class"] == ALL_CLASSES
    over_classes, by_class = table[of_all], table[(table["head"] == ALL) & ~of_all]
    classes = list(by_class["class"].unique())
    below = "share of active neurons (%) by class"
    if len(classes) > CLASSES_DRAWN:
        below += f"; the highest and lowest {CLASSES_DRAWN // 2} of {len(classes)} classes by gated"
        of_gated = by_class[by_class["quantity"] == "gated"].groupby("class")["share"].mean()
        falling = list(of_gated.sort_values(ascending=False).index)
        classes = falling[: CLASSES_DRAWN // 2] + falling[-CLASSES_DRAWN // 2 :]
    figure, blocks = new_blocks((plain_text(title), below), (2.3, 0.9 + 0.16 * len(classes)))
    for ax, quantity in _panels(blocks[0]):
        rows = over_classes[over_classes["quantity"] == quantity]
        by_head = rows.pivot(index="level", columns="head", values="share") * 100
        for place, head in enumerate(by_head.columns.drop(ALL)):
            look = dict(color=COLORS[place % len(COLORS)], marker=MARKERS[place % len(MARKERS)])
            ax.plot(by_head[head], linewidth=0.8, markersize=3, label=f"head {head}", **look)
        ax.plot(by_head[ALL], color="black", linewidth=2, label="all heads")
        style_axes(ax, "y")
        ax.set_xlabel("level")
        ax.set_xticks(by_head.index)
    _finish_row(blocks[0], "active neurons (%)")
    for place, (ax, quantity) in enumerate(_panels(blocks[1], sharey=False)):
        rows = by_class[by_class["quantity"] == quantity]
        values = rows.pivot(index="class", columns="level", values="share").loc[classes] * 100
        picture = ax.imshow(values, cmap=SEQUENTIAL, aspect="auto")
        ax.set_xticks(range(len(values.columns)), values.columns)
        ax.set_yticks(*((range(len(classes)), map(plain_text, classes)) if place == 0 else ([],)))
        ax.set_xlabel("level")
        blocks[1].colorbar(picture, ax=ax)
    return figure


def draw_neurons(counts: Counts, dead: pd.DataFrame, always_on: float, title: str) -> Figure:
    """Each level's neurons sorted by activity; below it the shares of dead and always-on neurons."""
    below = f"dead: never active; always on: active on {100 * always_on:.4g} % of the patches or more"
    figure, blocks = new_blocks((plain_text(title), below), (2.4, 1.7))
    colors = _level_colors(len(counts.by_neuron))
    for (ax, _), levels in zip(_panels(blocks[0]), counts.shares.swapaxes(0, 1), strict=True):
        for level, (color, shares) in enumerate(zip(colors, levels, strict=True), start=1):
            falling = np.sort(shares.ravel())[::-1] * 100
            ax.plot(np.linspace(0, 100, falling.size), falling, color=color, linewidth=1.2, label=f"level {level}")
        style_axes(ax, "both")
        ax.set_xlabel("neurons, most active first (%)")
    _finish_row(blocks[0], "active on patches (%)")
    for ax, quantity in _panels(blocks[1]):
        rows = dead[dead["quantity"] == quantity]
        for shift, (column, color) in enumerate((("dead", COLORS[6]), ("always_on", COLORS[4]))):
            bars = np.arange(len(rows)) + (shift - 0.5) * 0.4
            ax.bar(bars, rows[column] / rows["neurons"] * 100, 0.4, color=color, label=column.replace("_", " "))
        style_axes(ax, "y")
        ax.set_xticks(range(len(rows)), rows["level"])
        ax.set_xlabel("level")
    _finish_row(blocks[1], "neurons (%)")
    return figure


def draw_training(table: pd.DataFrame, title: str) -> Figure:
    """Active and dead neurons of each level over epochs. table: `training_table`."""
    table = table[table["level"] != ALL]
    table = table.assign(active=table["share"] * 100, dead=table["dead"] / table["neurons"] * 100)
    levels = table["level"].unique()
    figure, blocks = new_blocks((plain_text(title), ""), (2.1, 2.1))
    for block, column in zip(blocks, ("active", "dead"), strict=True):
        for ax, quantity in _panels(block):
            for level, color in zip(levels, _level_colors(len(levels)), strict=True):
                rows = table[(table["quantity"] == quantity) & (table["level"] == level)]
                ax.plot(rows["epoch"], rows[column], ".-", color=color, linewidth=1, label=f"level {level}")
            label_epochs(ax, "")
        _finish_row(block, f"{column} neurons (%)")
    return figure


def _panels(block: SubFigure, sharey: bool = True) -> list[tuple[Axes, str]]:
    """A row of axes, one per quantity, titled with its name."""
    pairs = list(zip(block.subplots(1, len(QUANTITIES), sharey=sharey), QUANTITIES, strict=True))
    for ax, quantity in pairs:
        ax.set_title(quantity)
    return pairs


def _finish_row(block: SubFigure, name: str) -> None:
    """Labels the shared y axis, which includes 0 and 1 %, marks panels without data, adds a legend on the right."""
    first, *_ = axes = block.axes
    first.set_ylabel(name)
    first.set_ylim(0, max(1.0, first.get_ylim()[1]))
    for ax in axes:
        if ax.dataLim.y1 <= 0:
            ax.text(0.5, 0.5, "none", transform=ax.transAxes, ha="center")
    block.legend(*axes[-1].get_legend_handles_labels(), loc="outside right center", frameon=False)


def _level_colors(n_levels: int) -> np.ndarray:
    """(L, 4), dark to light, without the lightest, which cannot be seen on white."""
    return matplotlib.colormaps[SEQUENTIAL](np.linspace(0, 0.9, n_levels))


# ---------------------------------------------------------------------------- script


def main(options: Options) -> None:
    run = open_run(options)
    indices = choose_images(run, options.images)
    shared = run.sizes.shared
    output = options.output_dir / run.stem
    name = run.file_name("sparsity")
    title = f"{run.title}: {measured_on(run, len(indices))}"

    counts = count(run.model, batches_of_patches(run, indices, "images"), len(run.class_names))
    shares, dead = share_table(counts, run.class_names), dead_table(counts, options.always_on, shared)
    for ending, table in (("", shares), ("_neurons", neuron_table(counts)), ("_dead", dead)):
        write_csv(output / f"{name}{ending}.csv", table)
    save_figure(draw_shares(shares, title), output / f"{name}.png")
    save_figure(draw_neurons(counts, dead, options.always_on, title), output / f"{name}_neurons.png")
    print(f"{title}\n{dead.to_string(index=False, formatters={'share': '{:.1%}'.format})}\n-> {output}")
    if not options.checkpoint_images:
        return
    figure, table = output / "sparsity_training.png", output / "sparsity_training.csv"
    if epochs := over_training(run, options.checkpoint_images):
        series = training_table(epochs, options.always_on, shared)
        write_csv(table, series)
        title = f"{run.experiment_title}: {measured_on(run, min(options.checkpoint_images, run.n_images))}"
        save_figure(draw_training(series, title), figure)
        print(f"{len(epochs)} epochs kept in training -> {table}")
    else:
        remove_figure(figure)
        table.unlink(missing_ok=True)


if __name__ == "__main__":
    run_script(main, __doc__)
