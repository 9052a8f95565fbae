"""How sparse a BDH is: which share of its neurons is active, by level, head and class, and which neurons never are.

Counts, over every patch of the images, where x_sparse (what the patch itself excites), y_sparse (what attention
excites) and gated (both together, which the decoder reads) lie above 0. Writes tables, and figures of the same names:

    sparsity.csv           share of active neurons by level, head and class, and over all of them
    sparsity_neurons.csv   every neuron: on which share of the patches it is active
    sparsity_dead.csv      neurons active on no patch that was looked at, and on (nearly) all, by level
    sparsity_training.csv  the same from the checkpoints that training with --keep-every left

A neuron that is dead here may be active on an image that was not looked at; the more --images, the fewer are dead.
Of a segmentation model, a patch has the class of most of its pixels.

    python interpretability/sparsity.py
    python interpretability/sparsity.py --run runs/v2_cifar10/seed0 --images 10000 --always-on 0.9
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor, nn

from analysis.plotting.style import COLORS, MARKERS, SEQUENTIAL, label_epochs, new_blocks, save_figure, style_axes
from interpretability.common.activity import (
    GELU_NOTE,
    NO_CLASS,
    QUANTITIES,
    batches_of_patches,
    choose_images,
    core_sizes,
    kept_model,
    levels_of,
    seen_text,
)
from interpretability.common.adapters import adapter_of
from interpretability.common.trained import RESULTS, RunChoice, TrainedRun, open_run, title_of
from training.command_line import run_script
from training.config import UserError
from training.runs import Run

ALL = "all"  # in a table: over all levels, heads or classes
CLASSES_DRAWN = 20


@dataclass(frozen=True, kw_only=True)
class Options(RunChoice):
    """What to count."""

    images: int | None = None
    """number of test images, spread over the test set; default: as many as have 64,000 patches, 1,000 of CIFAR-10"""
    always_on: float = 0.99
    """a neuron counts as always on where it is active on at least this share of the patches"""
    checkpoint_images: int = 100
    """number of test images for each of the checkpoints that training kept; 0 leaves these out"""
    output_dir: Path = RESULTS
    """tables and figures go into a folder of the run's name in it"""


class Counts:
    """On how many patches neurons are active; sums of integers, so that batches may come in any size and order."""

    def __init__(self, n_levels: int, n_heads: int, n_neurons: int, n_classes: int):
        Q = len(QUANTITIES)
        self.by_neuron = torch.zeros(Q, n_levels, n_heads, n_neurons, dtype=torch.int64)
        """(Q, L, H, N): patches on which it is active"""
        self.by_class = torch.zeros(Q, n_levels, n_classes, n_heads, dtype=torch.int64)
        """(Q, L, C, H): pairs of a patch of the class and a neuron active on it"""
        self.patches_by_class = torch.zeros(n_classes, dtype=torch.int64)
        """(C,); patches without a class are not in it"""
        self.patches = 0

    def add(self, level: int, activity: Sequence[Tensor], classes: Tensor) -> None:
        """activity: (B, H, T, N) for each quantity; classes: (B, T), NO_CLASS where a patch has none."""
        n_classes = len(self.patches_by_class)
        bins = classes.where(classes != NO_CLASS, n_classes).flatten()
        for quantity, values in enumerate(activity):
            active = values > 0
            self.by_neuron[quantity, level] += active.sum((0, 2)).cpu()
            of_patches = active.sum(3, dtype=torch.int64).transpose(1, 2).flatten(0, 1)  # (B T, H)
            sums = of_patches.new_zeros(n_classes + 1, of_patches.shape[1]).index_add_(0, bins, of_patches)
            self.by_class[quantity, level] += sums[:n_classes].cpu()
        if level == 0:
            self.patches += classes.numel()
            self.patches_by_class += bins.bincount(minlength=n_classes + 1)[:n_classes].cpu()

    @property
    def shares(self) -> np.ndarray:
        """(Q, L, H, N), of the patches on which a neuron is active."""
        return self.by_neuron.numpy() / self.patches

    @property
    def overall_shares(self) -> np.ndarray:
        """(Q, H, N), of the patches at all levels together."""
        return self.by_neuron.sum(1).numpy() / (self.patches * self.by_neuron.shape[1])


def count(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], n_classes: int) -> Counts:
    """One pass over the images. batches: pixels as the model reads them, and (B, T) the class of each patch."""
    counts = None
    for level, activity, classes in levels_of(model, batches):
        if counts is None:
            _, H, _, N = activity.gated.shape
            counts = Counts(adapter_of(model).n_levels, H, N, n_classes)
        counts.add(level, activity, classes)
    return counts


# ---------------------------------------------------------------------------- tables


def share_table(counts: Counts, class_names: Sequence[str]) -> pd.DataFrame:
    """A row for each level, head, class and quantity, and over all heads and classes; without classes never seen."""
    n_neurons, n_heads = counts.by_neuron.shape[-1], counts.by_neuron.shape[-2]
    by_class = counts.by_class.numpy().transpose(0, 1, 3, 2)  # (Q, L, H, C)
    active = np.concatenate((by_class, counts.by_neuron.sum(-1, keepdim=True).numpy()), -1)
    active = np.concatenate((active, active.sum(2, keepdims=True)), 2)  # (Q, L, H + 1, C + 1)
    heads = {**dict.fromkeys(range(1, n_heads + 1), n_neurons), ALL: n_heads * n_neurons}
    patches = [*counts.patches_by_class.tolist(), counts.patches]
    rows = []
    for (quantity, level, head, label), number in np.ndenumerate(active):
        if patches[label]:
            name, neurons = list(heads.items())[head]
            rows.append(
                {
                    "level": level + 1,
                    "head": name,
                    "class": [*class_names, ALL][label],
                    "quantity": QUANTITIES[quantity],
                    "share": number / (patches[label] * neurons),
                }
            )
    return pd.DataFrame(rows)


def neuron_table(counts: Counts) -> pd.DataFrame:
    """A row for each level, head and neuron; a column for each quantity: the share of patches on which it is active."""
    _, L, H, N = counts.by_neuron.shape
    places = pd.MultiIndex.from_product([range(1, L + 1), range(1, H + 1), range(N)], names=["level", "head", "neuron"])
    return pd.DataFrame(counts.shares.reshape(len(QUANTITIES), -1).T, places, QUANTITIES).reset_index()


def dead_table(counts: Counts, always_on: float, shared: bool) -> pd.DataFrame:
    """Dead and always-on neurons of each level and quantity; over all levels, too, where these share their neurons."""
    shares = [(level + 1, counts.shares[:, level]) for level in range(counts.by_neuron.shape[1])]
    if shared:
        shares.append((ALL, counts.overall_shares))
    rows = [
        {
            "level": level,
            "quantity": quantity,
            "neurons": of.size,
            "dead": int((of == 0).sum()),
            "always_on": int((of >= always_on).sum()),
            "share": of.mean(),
        }
        for level, by_quantity in shares
        for quantity, of in zip(QUANTITIES, by_quantity, strict=True)
    ]
    return pd.DataFrame(rows)


def training_table(epochs: Mapping[int, Counts], always_on: float, shared: bool) -> pd.DataFrame:
    """`dead_table` of every epoch, one below the other."""
    tables = [dead_table(counts, always_on, shared).assign(epoch=epoch) for epoch, counts in sorted(epochs.items())]
    table = pd.concat(tables, ignore_index=True)
    return table[["epoch", *table.columns.drop("epoch")]]


# ---------------------------------------------------------------------------- figures


def draw_shares(table: pd.DataFrame, title: str) -> Figure:
    """By level, for every head; below it by class and level. table: of `share_table`."""
    over_classes, over_heads = table[table["class"] == ALL], table[(table["head"] == ALL) & (table["class"] != ALL)]
    classes = _most_unlike(over_heads)
    below = f"by class: share of active neurons (%){_left_out(over_heads, classes)}"
    figure, blocks = new_blocks((title, below), (2.3, 0.9 + 0.16 * len(classes)))
    for ax, quantity in _panels(blocks[0]):
        of = over_classes[over_classes["quantity"] == quantity]
        by_head = of.pivot(index="level", columns="head", values="share") * 100
        for place, head in enumerate(by_head.columns.drop(ALL)):
            look = dict(color=COLORS[place % len(COLORS)], marker=MARKERS[place % len(MARKERS)])
            ax.plot(by_head[head], linewidth=0.8, markersize=3, label=f"head {head}", **look)
        ax.plot(by_head[ALL], color="black", linewidth=2, label="all heads")
        style_axes(ax, "y")
        ax.set_xlabel("level")
        ax.set_xticks(by_head.index)
    _start_at_zero(blocks[0], "active neurons (%)")
    _add_legend(blocks[0])
    for place, (ax, quantity) in enumerate(_panels(blocks[1], sharey=False)):
        of = over_heads[over_heads["quantity"] == quantity]
        values = of.pivot(index="class", columns="level", values="share").loc[classes] * 100
        picture = ax.imshow(values, cmap=SEQUENTIAL, aspect="auto")
        ax.set_xticks(range(len(values.columns)), values.columns)
        ax.set_yticks(*((range(len(classes)), classes) if place == 0 else ([],)))
        ax.set_xlabel("level")
        blocks[1].colorbar(picture, ax=ax)
    return figure


def draw_neurons(counts: Counts, dead: pd.DataFrame, always_on: float, title: str) -> Figure:
    """The neurons of each level in order of how often they are active; below it how many never or always are."""
    below = f"dead: never active; always on: active on {100 * always_on:.4g} % of the patches or more"
    figure, blocks = new_blocks((title, below), (2.4, 1.7))
    colors = _level_colors(counts.by_neuron.shape[1])
    for (ax, _), levels in zip(_panels(blocks[0]), counts.shares, strict=True):
        for level, (color, shares) in enumerate(zip(colors, levels, strict=True), start=1):
            falling = np.sort(shares.ravel())[::-1] * 100
            ax.plot(np.linspace(0, 100, falling.size), falling, color=color, linewidth=1.2, label=f"level {level}")
        style_axes(ax, "both")
        ax.set_xlabel("neurons, most active first (%)")
    blocks[0].axes[0].set_ylabel("active on patches (%)")
    _add_legend(blocks[0])
    for ax, quantity in _panels(blocks[1]):
        of = dead[dead["quantity"] == quantity]
        for shift, (column, color) in enumerate((("dead", COLORS[6]), ("always_on", COLORS[4]))):
            bars = np.arange(len(of)) + (shift - 0.5) * 0.4
            ax.bar(bars, of[column] / of["neurons"] * 100, 0.4, color=color, label=column.replace("_", " "))
        style_axes(ax, "y")
        ax.set_xticks(range(len(of)), of["level"])
        ax.set_xlabel("level")
    _start_at_zero(blocks[1], "neurons (%)")
    _add_legend(blocks[1])
    return figure


def draw_training(table: pd.DataFrame, title: str) -> Figure:
    """Active and dead neurons of each level over training. table: of `training_table`."""
    table = table[table["level"] != ALL]
    table = table.assign(active=table["share"] * 100, dead=table["dead"] / table["neurons"] * 100)
    levels = table["level"].unique()
    figure, blocks = new_blocks((title, ""), (2.1, 2.1))
    for block, column in zip(blocks, ("active", "dead"), strict=True):
        for ax, quantity in _panels(block):
            for level, color in zip(levels, _level_colors(len(levels)), strict=True):
                of = table[(table["quantity"] == quantity) & (table["level"] == level)]
                ax.plot(of["epoch"], of[column], ".-", color=color, linewidth=1, label=f"level {level}")
            label_epochs(ax, "")
        _start_at_zero(block, f"{column} neurons (%)")
        _add_legend(block)
    return figure


def _panels(block: SubFigure, sharey: bool = True) -> list[tuple[Axes, str]]:
    """A row of axes, one for each quantity, whose name stands above."""
    pairs = list(zip(block.subplots(1, len(QUANTITIES), sharey=sharey), QUANTITIES, strict=True))
    for ax, quantity in pairs:
        ax.set_title(quantity)
    return pairs


def _add_legend(block: SubFigure) -> None:
    """One for the row, on its right; all of its panels show the same things."""
    block.legend(*block.axes[-1].get_legend_handles_labels(), loc="outside right center", frameon=False)


def _level_colors(n_levels: int) -> np.ndarray:
    """(L, 4), dark to light, the lightest of the map left out: it cannot be seen on white."""
    return matplotlib.colormaps[SEQUENTIAL](np.linspace(0, 0.9, n_levels))


def _start_at_zero(block: SubFigure, name: str) -> None:
    """The axis that a row's panels share, called name, shows 0, and 1 % at least; a panel of nothing but 0 says so."""
    first, *_ = axes = block.axes
    first.set_ylabel(name)
    first.set_ylim(0, max(1.0, first.get_ylim()[1]))
    for ax in axes:
        if ax.dataLim.y1 <= 0:
            ax.text(0.5, 0.5, "none", transform=ax.transAxes, ha="center")


def _most_unlike(over_heads: pd.DataFrame) -> list[str]:
    """Classes to draw, in order: all, or those that the fewest and the most gated neurons are active for."""
    of = over_heads[over_heads["quantity"] == "gated"]
    names = list(of["class"].unique())
    if len(names) <= CLASSES_DRAWN:
        return names
    falling = list(of.groupby("class")["share"].mean().sort_values(ascending=False).index)
    return falling[: CLASSES_DRAWN // 2] + falling[-CLASSES_DRAWN // 2 :]


def _left_out(over_heads: pd.DataFrame, classes: Sequence[str]) -> str:
    n_classes = over_heads["class"].nunique()
    return "" if len(classes) == n_classes else f"; of {n_classes} classes those with the most and the fewest"


# ---------------------------------------------------------------------------- the script


def over_training(run: TrainedRun, n_images: int) -> dict[int, Counts]:
    """By epoch, from the checkpoints that training kept, on the same images; one that cannot be read is left out."""
    indices, epochs = run.spread(n_images), {}
    for epoch in Run(run.folder).kept_weights():
        if model := kept_model(run, epoch):
            batches = batches_of_patches(run, indices, f"epoch {epoch}")
            epochs[epoch] = count(model, batches, len(run.class_names))
    return epochs


def main(options: Options) -> None:
    if not 0 < options.always_on <= 1:
        raise UserError(f"--always-on {options.always_on} is a share: give a number above 0, at most 1")
    if options.checkpoint_images < 0:
        raise UserError("--checkpoint-images is a number of images: give 0 or more")
    run = open_run(options)
    core = core_sizes(run)
    indices = choose_images(run, options.images)
    output = options.output_dir / run.stem
    output.mkdir(parents=True, exist_ok=True)
    name = run.file_name("sparsity")
    title = f"{run.title}: {seen_text(run, len(indices))}"
    if core.activation == "gelu":
        title += f"; {GELU_NOTE}"

    counts = count(run.model, batches_of_patches(run, indices, "images"), len(run.class_names))
    dead = dead_table(counts, options.always_on, core.shared)
    shares = share_table(counts, run.class_names)
    shares.to_csv(output / f"{name}.csv", index=False)
    neuron_table(counts).to_csv(output / f"{name}_neurons.csv", index=False)
    dead.to_csv(output / f"{name}_dead.csv", index=False)
    save_figure(draw_shares(shares, title), output / f"{name}.png")
    save_figure(draw_neurons(counts, dead, options.always_on, title), output / f"{name}_neurons.png")
    print(f"{title}\n{dead.to_string(index=False, formatters={'share': '{:.1%}'.format})}\n-> {output}")
    if options.checkpoint_images and (epochs := over_training(run, options.checkpoint_images)):
        series = training_table(epochs, options.always_on, core.shared)
        series.to_csv(output / "sparsity_training.csv", index=False)
        title = f"{title_of(run.config)}: {seen_text(run, min(options.checkpoint_images, run.n_images))}"
        save_figure(draw_training(series, title), output / "sparsity_training.png")
        print(f"over {len(epochs)} epochs kept in training -> {output / 'sparsity_training.csv'}")


if __name__ == "__main__":
    run_script(main, __doc__)
