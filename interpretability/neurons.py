"""Shows what single neurons of a BDH respond to: their most activating patches and their selectivity for classes.

Asks of images whether neurons are monosemantic (arXiv 2509.26507). For every neuron: the class selectivity index, the
AUROC of its activity for its best class, and the share of that class among the patches that activate it most, each
compared with shuffled labels (formulas: interpretability/common/selectivity.py). Almost any colour-selective neuron
beats shuffled labels, so the untrained model is a second control, if training kept its weights (--keep-every). Writes

    neurons_<quantity>.csv             every neuron: share of patches it is active on, best class, measures, p values
    neurons_<quantity>_levels.csv      by level: how many neurons beat chance, and what chance gives
    neurons_<quantity>.png             distributions of the measures: trained, shuffled labels, untrained
    neurons_<quantity>_by_index_*.png  top patches of the neurons with the highest index, for each class or for one
    neurons_<quantity>_by_auroc_*.png  the same by AUROC
    neurons_<quantity>_3-2-17.png      top patches of the neurons given with --neuron

Only neurons that beat chance (--chance) are drawn. The index favours neurons that are hardly ever active: among
thousands, a few are active for one class by luck. In segmentation p is too small, because shuffled labels lose a
class's size and place. Only activity above 0 counts. Top patches come from different images, or in segmentation from
different classes of one.

    python interpretability/neurons.py
    python interpretability/neurons.py --run runs/v2_cifar10/seed0 --neuron 3 2 17 --neuron 6 1 40 --images 10000
    python interpretability/neurons.py --run runs/v2_cifar10/seed0 --selective-for truck --quantity x_sparse
"""

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure
from torch import nn

from analysis.plotting.style import COLORS, PAGE, plain_text, remove_figure, save_figure, style_axes, titled_figure
from analysis.tables import write_csv
from interpretability.common.activity import batches_of_patches, choose_images, kept_model, measured_on
from interpretability.common.contact_sheet import TopPatch, draw_sheet
from interpretability.common.selectivity import Measures, Responses, collect, measures, p_values, ranked, shuffled
from interpretability.common.trained import RunChoice, TrainedRun, open_run, progress
from training.command_line import run_script
from training.config import UserError, require
from training.data.finding import cut_name

SHEET_NOTE = (  # explains the contact sheets
    "above each outlined patch: its class and the neuron's activity\n"
    "for each neuron: best class, how many top patches belong to it, share of patches it is active on"
)
LONGEST_NAME = 150  # bytes, of the class or the neurons in a file name
Neuron = tuple[int, int, int]  # level and head, from 1, and number in the head, from 0
MEASURES = {
    "index": "class selectivity index",
    "auroc": "AUROC for the best class",
    "precision": "best class among the top patches",
}


@dataclass(frozen=True, kw_only=True)
class Options(RunChoice):
    """Which neurons to draw, and on which images."""

    quantity: Literal["x_sparse", "y_sparse", "gated"] = "gated"
    """x_sparse: activated by the patch itself; y_sparse: by attention; gated: both combined, the decoder's input"""
    neuron: Annotated[tuple[Neuron, ...], tyro.conf.UseAppendAction] = ()
    """draw this neuron: level and head (from 1), number in the head (from 0); repeatable"""
    selective_for: str | None = None
    """draw the neurons most selective for this class; default: the most selective one for each class"""
    rows: int = 10
    """draw at most this many selective neurons"""
    top: int = 8
    """patches drawn per neuron, which also determine its precision"""
    around: int = 3
    """patches shown on each side of a top patch"""
    images: int | None = None
    """number of test images, evenly spaced; default: 64,000 patches in total, 1,000 images of CIFAR-10"""
    shuffles: int = 200
    """number of label shuffles"""
    chance: float = 0.01
    """a neuron beats chance if its p value is at most this"""
    seed: int = 0
    """seed of the shuffles"""

    def __post_init__(self):
        for name, least in (("rows", 1), ("top", 1), ("around", 0), ("shuffles", 1), ("seed", 0)):
            require(getattr(self, name) >= least, self, name, f"must be at least {least}")
        least = 1 / (self.shuffles + 1)
        limits = f"must be below 1 and at least {least:.2g}, the smallest p value of {self.shuffles} shuffles"
        require(least <= self.chance < 1, self, "chance", f"{limits}: change it, or give more --shuffles")


def check(options: Options, run: TrainedRun) -> None:
    """Raises UserError for neurons or classes that do not exist."""
    sizes, wanted = run.sizes, options.selective_for
    for level, head, number in options.neuron:
        if not (1 <= level <= sizes.n_layer and 1 <= head <= sizes.n_head and 0 <= number < sizes.n_neurons):
            limits = f"1 to {sizes.n_layer}, heads from 1 to {sizes.n_head}, neurons from 0 to {sizes.n_neurons - 1}"
            raise UserError(f"--neuron {level} {head} {number} does not exist: levels go from {limits}")
    if wanted is not None and wanted not in run.class_names:
        near = difflib.get_close_matches(wanted, run.class_names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"classes are {', '.join(run.class_names)}"
        raise UserError(f"--selective-for {wanted}: there is no such class; {hint}")


# ---------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Found:
    """A model's responses and, for each level, the measures with the true labels and with shuffled ones."""

    responses: Responses
    by_level: list[tuple[Measures, Measures]]

    @classmethod
    def of(cls, responses: Responses, n_shuffles: int, seed: int) -> "Found":
        """Raises UserError if the images are all of one class."""
        if len(np.unique(responses.labels)) < 2:
            raise UserError("the images are all of one class, but selectivity compares classes: give more --images")
        rng, by_level = np.random.default_rng(seed), []
        for level in progress(range(len(responses.means)), desc="shuffles", unit="level"):
            data = ranked(responses, level)
            by_level.append((measures(data, responses.labels), shuffled(data, responses.labels, n_shuffles, rng)))
        return cls(responses, by_level)


def look(run: TrainedRun, model: nn.Module, indices: Sequence[int], options: Options, text: str) -> Found:
    """Measures a model of the run on these images. text: label of the progress bar."""
    batches = batches_of_patches(run, indices, text)
    return Found.of(collect(model, batches, options.quantity, options.top), options.shuffles, options.seed)


def neuron_table(found: Found, class_names: Sequence[str]) -> pd.DataFrame:
    """A row per level, head and neuron; `selectivity` explains the measures.

    active: share of the patches. top_patches: how many were found, fewer than asked for if fewer activate the neuron.
    """
    tables, H = [], found.responses.n_heads
    for level, (found_here, null) in enumerate(found.by_level):
        M = len(found_here.best)
        never = np.isnan(found_here.index)
        table = {
            "level": level + 1,
            "head": np.arange(M) // (M // H) + 1,
            "neuron": np.arange(M) % (M // H),
            "active": found.responses.active[level],
            "best_class": np.where(never, None, np.array(class_names, dtype=object)[found_here.best]),
            "index": found_here.index,
            "index_p": p_values(found_here.index, null.index),
            "auroc": found_here.auroc,
            "auroc_p": p_values(found_here.auroc, null.auroc),
            "precision": found_here.precision,
            "top_patches": (found.responses.top[level].values > 0).sum(0),
        }
        tables.append(pd.DataFrame(table))
    return pd.concat(tables, ignore_index=True)


def level_table(found: Found, chance: float) -> pd.DataFrame:
    """By level: numbers of neurons that beat chance, and that would by luck; medians, also with shuffled labels.

    one_class: neurons with all top patches found, all of the best class; one_class_shuffled: mean over shuffles.
    """
    rows = []
    for level, ((found_here, null), top) in enumerate(zip(found.by_level, found.responses.top, strict=True), start=1):
        full, never = (top.values > 0).all(0), np.isnan(found_here.index)
        row = {"level": level, "neurons": never.size, "never_active": never.sum()}
        for name in ("index", "auroc"):
            row[f"{name}_beats"] = (p_values(getattr(found_here, name), getattr(null, name)) <= chance).sum()
        row["by_luck"] = chance * (~never).sum()
        for name in ("index", "auroc"):
            row[name] = pd.Series(getattr(found_here, name)).median()
            row[f"{name}_shuffled"] = pd.Series(getattr(null, name).ravel()).median()
        row["one_class"] = (full & (found_here.precision == 1)).sum()
        row["one_class_shuffled"] = (full & (null.precision == 1)).sum(1).mean()
        rows.append(row)
    return pd.DataFrame(rows)


def most_selective(
    table: pd.DataFrame, by: str, chance: float, n: int, class_names: Sequence[str], wanted: str | None = None
) -> pd.DataFrame:
    """n rows of the neuron table that beat chance: the best for the wanted class, or the best one for each class.

    by: the measure to rank by and to beat chance with, index or auroc.
    """
    falling = table[table[f"{by}_p"] <= chance].sort_values(by, ascending=False, kind="stable")
    if wanted is not None:
        return falling[falling["best_class"] == wanted].head(n)
    best = falling.drop_duplicates("best_class")
    return best.sort_values("best_class", key=lambda names: names.map(list(class_names).index)).head(n)


# ---------------------------------------------------------------------------- figures


def draw_measures(found: dict[str, Found], top: int, title: str) -> Figure:
    """Distributions over neurons, a row per level. found: by name; shuffled labels are shown for the first."""
    first = next(iter(found.values()))
    n_levels = len(first.by_level)
    figure = titled_figure(PAGE, 1.05 + 0.75 * n_levels, title)
    axes = figure.subplots(n_levels, len(MEASURES), squeeze=False, sharex="col")
    step = 1 / top  # of the precision, if all top patches were found
    bins = [np.linspace(0, 1, 41), np.linspace(0, 1, 41), np.linspace(-step / 2, 1 + step / 2, top + 2)]
    for level, row in enumerate(axes):
        for ax, (name, label), edges in zip(row, MEASURES.items(), bins, strict=True):
            null = getattr(first.by_level[level][1], name)
            ax.stairs(_percent(null, edges), edges, fill=True, color="0.8", label="labels shuffled")
            for place, (who, each) in enumerate(found.items()):
                values = getattr(each.by_level[level][0], name)
                style = dict(color=COLORS[place], linewidth=1.2, linestyle="-" if place == 0 else "--")
                ax.stairs(_percent(values, edges), edges, label=plain_text(who), **style)
            style_axes(ax, "x")
            ax.set_xlabel(label if level == n_levels - 1 else "")
        row[0].set_ylabel(f"level {level + 1}\nneurons (%)")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _percent(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Share of the values in each bin, in percent, without NaN."""
    counts = np.histogram(values, edges)[0]
    return 100 * counts / max(counts.sum(), 1)


def describe(neuron: pd.Series) -> str:
    """A neuron's row of the table as a caption."""
    name = f"level {neuron['level']}, head {neuron['head']}, neuron {neuron['neuron']}"
    active = f"{100 * neuron['active']:.3g}\N{NO-BREAK SPACE}%"
    if pd.isna(neuron["index"]):
        return f"{name}: active {active}"
    right = round(neuron["precision"] * neuron["top_patches"])
    return (
        f"{name}, {neuron['best_class']}: index {neuron['index']:.2f} (p {neuron['index_p']:.1g}), AUROC "
        f"{neuron['auroc']:.2f} (p {neuron['auroc_p']:.1g}), {right} of {neuron['top_patches']}, {active}"
    )


def top_patches(run: TrainedRun, indices: Sequence[int], responses: Responses, neuron: pd.Series) -> list[TopPatch]:
    """The patches that activate a neuron most. indices: images measured; neuron: its row in the table."""
    top = responses.top[neuron["level"] - 1]
    N = top.values.shape[1] // responses.n_heads
    column = (neuron["head"] - 1) * N + neuron["neuron"]
    patches = []
    for value, unit, patch in zip(*(each[:, column] for each in top), strict=True):
        if value > 0:
            image = run.samples([indices[responses.images[unit]]]).images[0].numpy()
            patches.append(TopPatch(image, int(patch), float(value), run.class_names[responses.labels[unit]]))
    return patches


# ---------------------------------------------------------------------------- script


def chosen(table: pd.DataFrame, class_names: Sequence[str], options: Options) -> dict[str, pd.DataFrame]:
    """Rows of the neuron table to draw, by the ending of their figure's name."""
    wanted = options.selective_for
    ending = "each_class" if wanted is None else wanted.replace("/", "-")
    sheets = {
        f"by_{by}_{ending}": most_selective(table, by, options.chance, options.rows, class_names, wanted)
        for by in ("index", "auroc")
    }
    if options.neuron:
        name = "_".join("-".join(map(str, neuron)) for neuron in options.neuron)
        by_place = table.set_index(["level", "head", "neuron"], drop=False)
        sheets[name] = by_place.loc[list(options.neuron)]
    return sheets


def main(options: Options) -> None:
    run = open_run(options)
    indices = choose_images(run, options.images)
    check(options, run)
    title = f"{run.title}: {options.quantity}, {measured_on(run, len(indices))}"
    if run.labels_pixels:
        title += "; p is too small: shuffling ignores class size and place"
    output = options.output_dir / run.stem
    name = f"{run.file_name('neurons')}_{options.quantity}"

    found = look(run, run.model, indices, options, "images")
    table = neuron_table(found, run.class_names)
    write_csv(output / f"{name}.csv", table)
    for ending, neurons in chosen(table, run.class_names, options).items():
        picture = output / f"{name}_{cut_name(ending, LONGEST_NAME)}.png"
        if neurons.empty:
            print(f"no neuron to draw {ending.replace('_', ' ')}: none beats chance")
            remove_figure(picture)
            continue
        shown = [(describe(row), top_patches(run, indices, found.responses, row)) for _, row in neurons.iterrows()]
        sheet = draw_sheet(shown, f"{title}\n{SHEET_NOTE}", run.grid, options.around)
        save_figure(sheet, picture)

    both = {run.checkpoint_name or "as trained": found}
    if run.checkpoint_name != "epoch_000" and (untrained := kept_model(run, 0)):
        both["before training"] = look(run, untrained, indices, options, "before training")
    levels = pd.concat([level_table(each, options.chance).assign(weights=who) for who, each in both.items()])
    write_csv(output / f"{name}_levels.csv", levels)
    save_figure(draw_measures(both, options.top, title), output / f"{name}.png")
    print(f"{title}\nneurons that beat chance (p at most {options.chance:g}), and how many would by luck:")
    for who, rows in levels.groupby("weights", sort=False):
        print(f"{who}:")
        print(rows.drop(columns=["weights", "one_class_shuffled"]).to_string(index=False, float_format="{:.3g}".format))
    print(f"-> {output}")


if __name__ == "__main__":
    run_script(main, __doc__)
