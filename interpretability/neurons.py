"""What single neurons of a BDH stand for: the patches that excite them most, and how selective they are for a class.

The question of the BDH paper (arXiv 2509.26507), whether neurons are monosemantic, put to images. Every neuron has the
class selectivity index of Morcos et al. 2018 (arXiv 1803.06959), the AUROC of its activity for its best class, and the
share of that class among the patches that excite it most; each beside what shuffled labels give. Against those almost
any neuron stands out that sees colour: so, where training kept the weights from before it (--keep-every), the same is
drawn for them. interpretability/common/selectivity.py has the formulas. Writes

    neurons_<quantity>.csv             every neuron: how often it is active, best class, measures and their p
    neurons_<quantity>_levels.csv      by level: how many neurons beat chance, and what chance gives
    neurons_<quantity>.png             how the measures are distributed; of shuffled labels, and before training
    neurons_<quantity>_by_index_*.png  patches that excite the neurons most selective for each class, or for one
    neurons_<quantity>_by_auroc_*.png  the same, selective by AUROC
    neurons_<quantity>_3-2-17.png      patches that excite the neurons that --neuron names

Selective are neurons that beat chance (--chance), once in the order of their index, once in that of their AUROC. The
index alone finds neurons that are hardly ever active: among thousands, a few of these are active for one class by luck.
Of segmentation models p is too small, since shuffled labels lose a class's size and place (selectivity.py).
Of a patch's activity only what lies above 0 counts. Patches are looked for in the images looked at, one of each image.

    python interpretability/neurons.py
    python interpretability/neurons.py --run runs/v2_cifar10/seed0 --neuron 3 2 17 --neuron 6 1 40 --images 10000
    python interpretability/neurons.py --run runs/v2_cifar10/seed0 --selective-for truck --quantity x_sparse
"""

import difflib
import sys
import textwrap
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
from tqdm import tqdm

from analysis.plotting.style import COLORS, PAGE, TITLE, new_figure, save_figure, style_axes
from interpretability.common.activity import (
    GELU_NOTE,
    batches_of_patches,
    choose_images,
    core_sizes,
    kept_model,
    seen_text,
)
from interpretability.common.contact_sheet import Excited, draw_sheet
from interpretability.common.selectivity import Measures, Null, Responses, collect, measures, p_values, ranked, shuffled
from interpretability.common.trained import RESULTS, RunChoice, TrainedRun, open_run
from models.bdh import CoreConfig
from training.command_line import run_script
from training.config import UserError

SHEET_NOTE = (
    "the patch that excites a neuron, outlined; above it its class and the activity; of a neuron: best class, how many "
    "top patches are of it, share of all patches on which it is active"
)
LONGEST_NAME = 100  # characters, of neurons in a file's name
Neuron = tuple[int, int, int]  # level and head, from 1, and its number in the head, from 0
MEASURES = {
    "index": "class selectivity index",
    "auroc": "AUROC for the best class",
    "precision": "share of the top patches",
}


@dataclass(frozen=True, kw_only=True)
class Options(RunChoice):
    """Which neurons, on which images."""

    quantity: Literal["x_sparse", "y_sparse", "gated"] = "gated"
    """the activity: what the patch itself excites, what attention excites, or both together, which the decoder reads"""
    neuron: Annotated[tuple[Neuron, ...], tyro.conf.UseAppendAction] = ()
    """level and head, from 1, and number in the head, from 0, of a neuron to draw; may be given several times"""
    selective_for: str | None = None
    """draw the most selective neurons of this class; default: the most selective one of every class, in order"""
    rows: int = 10
    """so many selective neurons are drawn, at most"""
    top: int = 8
    """so many patches are drawn of each neuron, and count for its precision"""
    around: int = 3
    """so many patches are shown on each side of the patch meant"""
    images: int | None = None
    """number of test images, spread over the test set; default: as many as have 64,000 patches, 1,000 of CIFAR-10"""
    shuffles: int = 200
    """how often the labels are shuffled"""
    chance: float = 0.01
    """a neuron beats chance where its p is at most this"""
    seed: int = 0
    """of the shuffles"""
    output_dir: Path = RESULTS
    """tables and figures go into a folder of the run's name in it"""


def check(options: Options) -> None:
    """Raises UserError for numbers that make no sense."""
    for name, least in (("rows", 1), ("top", 1), ("around", 0), ("shuffles", 1), ("seed", 0)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} {getattr(options, name)} must be {least} or more")
    least = 1 / (options.shuffles + 1)
    if not least <= options.chance < 1:
        raise UserError(
            f"--chance {options.chance} has to lie between {least:.2g}, the smallest p that {options.shuffles} "
            "shuffles give, and 1: give another, or more --shuffles"
        )


# ---------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Found:
    """What was found of one model."""

    responses: Responses
    by_level: list[tuple[Measures, Null]]

    @classmethod
    def of(cls, responses: Responses, n_shuffles: int, seed: int) -> "Found":
        """Raises UserError where the images are of one class: selective for it would be every neuron."""
        if len(np.unique(responses.labels)) < 2:
            raise UserError("the images are all of one class, and selectivity compares classes: give more --images")
        rng, by_level = np.random.default_rng(seed), []
        for level in tqdm(range(len(responses.means)), desc="shuffles", unit="level", leave=False, disable=None):
            of = ranked(responses, level)
            by_level.append((measures(of, responses.labels), shuffled(of, responses.labels, n_shuffles, rng)))
        return cls(responses, by_level)


def neuron_table(found: Found, class_names: Sequence[str]) -> pd.DataFrame:
    """A row for each level, head and neuron; what the columns hold is said in `selectivity`.

    active: share of the patches. top_patches: how many were kept of it, fewer than asked for where fewer excite it.
    """
    tables = []
    for level, (of, null) in enumerate(found.by_level):
        M, H = len(of.best), found.responses.n_heads
        never = np.isnan(of.index)
        table = {
            "level": level + 1,
            "head": np.arange(M) // (M // H) + 1,
            "neuron": np.arange(M) % (M // H),
            "active": found.responses.active[level],
            "best_class": np.where(never, None, np.array(class_names, dtype=object)[of.best]),
            "index": of.index,
            "index_p": p_values(of.index, null.index),
            "auroc": of.auroc,
            "auroc_p": p_values(of.auroc, null.auroc),
            "precision": of.precision,
            "top_patches": (found.responses.top[level].values > 0).sum(0),
        }
        tables.append(pd.DataFrame(table))
    return pd.concat(tables, ignore_index=True)


def level_table(found: Found, chance: float) -> pd.DataFrame:
    """By level: for how many neurons a measure beats chance, and would by luck; medians, also over shuffles.

    one_class: neurons whose top patches are as many as are kept, and all of the best class; one_class_shuffled: of
    shuffled labels, on average.
    """
    rows = []
    for level, ((of, null), top) in enumerate(zip(found.by_level, found.responses.top, strict=True), start=1):
        full = (top.values > 0).all(0)
        rows.append(
            {
                "level": level,
                "neurons": of.index.size,
                "never_active": np.isnan(of.index).sum(),
                "index_beats": (p_values(of.index, null.index) <= chance).sum(),
                "auroc_beats": (p_values(of.auroc, null.auroc) <= chance).sum(),
                "by_luck": chance * (~np.isnan(of.index)).sum(),
                "index": pd.Series(of.index).median(),
                "index_shuffled": pd.Series(null.index.ravel()).median(),
                "auroc": pd.Series(of.auroc).median(),
                "auroc_shuffled": pd.Series(null.auroc.ravel()).median(),
                "one_class": (full & (of.precision == 1)).sum(),
                "one_class_shuffled": (full & (null.precision == 1)).sum(1).mean(),
            }
        )
    return pd.DataFrame(rows)


def most_selective(
    table: pd.DataFrame, by: str, chance: float, n: int, class_names: Sequence[str], wanted: str | None = None
) -> pd.DataFrame:
    """n rows of the neuron table, of neurons that beat chance: of the class wanted, or the first of every class.

    by: the measure that orders them and that has to beat chance, index or auroc.
    """
    falling = table[table[f"{by}_p"] <= chance].sort_values(by, ascending=False, kind="stable")
    if wanted is not None:
        return falling[falling["best_class"] == wanted].head(n)
    first = falling.drop_duplicates("best_class")
    return first.sort_values("best_class", key=lambda names: names.map(list(class_names).index)).head(n)


# ---------------------------------------------------------------------------- figures


def draw_measures(found: dict[str, Found], top: int, title: str) -> Figure:
    """Distributions over neurons, a row a level. found: by name; of the first, shuffled labels are shown, too."""
    first = next(iter(found.values()))
    n_levels = len(first.by_level)
    figure = new_figure(PAGE, 1.2 + 0.75 * n_levels)
    figure.suptitle(textwrap.fill(title, TITLE))
    axes = figure.subplots(n_levels, len(MEASURES), squeeze=False, sharex="col")
    step = 1 / top  # of the precision, where all top patches excite the neuron
    bins = [np.linspace(0, 1, 41), np.linspace(0, 1, 41), np.linspace(-step / 2, 1 + step / 2, top + 2)]
    for level, row in enumerate(axes):
        for ax, (name, says), edges in zip(row, MEASURES.items(), bins, strict=True):
            null = getattr(first.by_level[level][1], name)
            ax.stairs(_percent(null, edges), edges, fill=True, color="0.8", label="labels shuffled")
            for place, (who, each) in enumerate(found.items()):
                values = getattr(each.by_level[level][0], name)
                look = dict(color=COLORS[place], linewidth=1.2, linestyle="-" if place == 0 else "--")
                ax.stairs(_percent(values, edges), edges, label=who, **look)
            style_axes(ax, "x")
            if level == n_levels - 1:
                ax.set_xlabel(says)
        row[0].set_ylabel(f"level {level + 1}\nneurons (%)")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _percent(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """How many of the values that are there lie in each bin, as a percentage."""
    counts = np.histogram(values, edges)[0]  # NaN falls into none
    return 100 * counts / max(counts.sum(), 1)


def describe(neuron: pd.Series) -> str:
    """What the table says of a neuron, for people."""
    name = f"level {neuron['level']}, head {neuron['head']}, neuron {neuron['neuron']}"
    active = f"active {100 * neuron['active']:.3g}\N{NO-BREAK SPACE}%"
    if pd.isna(neuron["index"]):
        return f"{name}: {active}"
    right = round(neuron["precision"] * neuron["top_patches"])
    return (
        f"{name}, {neuron['best_class']}: index {neuron['index']:.2f} (p {neuron['index_p']:.1g}), AUROC "
        f"{neuron['auroc']:.2f}, {right} of {neuron['top_patches']}, {active}"
    )


def excited(run: TrainedRun, indices: Sequence[int], responses: Responses, neuron: pd.Series) -> list[Excited]:
    """The patches that excite a neuron most. indices: of the images looked at; neuron: its row of the table."""
    top = responses.top[neuron["level"] - 1]
    N = top.values.shape[1] // responses.n_heads
    column = (neuron["head"] - 1) * N + neuron["neuron"]
    patches = []
    for value, unit, patch in zip(*(each[:, column] for each in top), strict=True):
        if value > 0:
            image = run.samples([indices[responses.images[unit]]]).images[0].numpy()
            patches.append(Excited(image, int(patch), float(value), run.class_names[responses.labels[unit]]))
    return patches


# ---------------------------------------------------------------------------- the script


def chosen(table: pd.DataFrame, class_names: Sequence[str], options: Options) -> dict[str, pd.DataFrame]:
    """Rows of the neuron table to draw, by what their figure is called."""
    sheets = {
        f"by_{by}_{options.selective_for or 'each_class'}": most_selective(
            table, by, options.chance, options.rows, class_names, options.selective_for
        )
        for by in ("index", "auroc")
    }
    if options.neuron:
        name = "_".join("-".join(map(str, neuron)) for neuron in options.neuron)
        by_place = table.set_index(["level", "head", "neuron"], drop=False)
        sheets[name[:LONGEST_NAME]] = by_place.loc[list(options.neuron)]
    return sheets


def summary(levels: pd.DataFrame, chance: float) -> str:
    """What the level table says, for people."""
    lines = [f"neurons whose measure beats chance (p at most {chance:g}), and how many would by luck:"]
    for who, table in levels.groupby("weights", sort=False):
        table = table.drop(columns=["weights", "one_class_shuffled"])
        lines += [f"{who}:", table.to_string(index=False, float_format="{:.3g}".format)]
    return "\n".join(lines)


def look(run: TrainedRun, model: nn.Module, indices: Sequence[int], options: Options, text: str) -> Found:
    """A model of the run on these images. text: beside the bar on the screen."""
    batches = batches_of_patches(run, indices, text)
    return Found.of(collect(model, batches, options.quantity, options.top), options.shuffles, options.seed)


def check_neurons(neurons: Sequence[Neuron], core: CoreConfig) -> None:
    """Raises UserError for a neuron that is not there."""
    for level, head, number in neurons:
        if not (1 <= level <= core.n_layer and 1 <= head <= core.n_head and 0 <= number < core.n_neurons):
            raise UserError(
                f"--neuron {level} {head} {number} is not there: levels go from 1 to {core.n_layer}, heads from 1 to "
                f"{core.n_head}, neurons from 0 to {core.n_neurons - 1}"
            )


def check_class(name: str | None, class_names: Sequence[str]) -> None:
    """Raises UserError for the name of no class."""
    if name is not None and name not in class_names:
        near = difflib.get_close_matches(name, class_names, n=1)
        guess = f"did you mean {near[0]}?" if near else f"there are {', '.join(class_names)}"
        raise UserError(f"--selective-for {name}: there is no such class; {guess}")


def main(options: Options) -> None:
    check(options)
    run = open_run(options)
    core = core_sizes(run)
    check_class(options.selective_for, run.class_names)
    check_neurons(options.neuron, core)
    indices = choose_images(run, options.images)
    title = f"{run.title}: {options.quantity}, {seen_text(run, len(indices))}"
    if core.activation == "gelu":
        title += f"; {GELU_NOTE}"
    if run.labels_pixels:
        title += "; of pixels' classes, shuffled labels make chance too small"
    output = options.output_dir / run.stem
    output.mkdir(parents=True, exist_ok=True)
    name = f"{run.file_name('neurons')}_{options.quantity}"

    found = look(run, run.model, indices, options, "images")
    table = neuron_table(found, run.class_names)
    table.to_csv(output / f"{name}.csv", index=False)
    for which, neurons in chosen(table, run.class_names, options).items():
        if neurons.empty:
            print(f"no neuron to draw {which.replace('_', ' ')}: none is better than chance")
            continue
        shown = [(describe(row), excited(run, indices, found.responses, row)) for _, row in neurons.iterrows()]
        sheet = draw_sheet(shown, f"{title}\n{SHEET_NOTE}", run.grid, options.around)
        save_figure(sheet, output / f"{name}_{which}.png")

    both = {run.checkpoint_name or "as trained": found}
    if run.checkpoint_name != "epoch_000" and (untrained := kept_model(run, 0)):
        both["before training"] = look(run, untrained, indices, options, "before training")
    levels = pd.concat([level_table(each, options.chance).assign(weights=who) for who, each in both.items()])
    levels.to_csv(output / f"{name}_levels.csv", index=False)
    save_figure(draw_measures(both, options.top, title), output / f"{name}.png")
    print(f"{title}\n{summary(levels, options.chance)}\n-> {output}")


if __name__ == "__main__":
    run_script(main, __doc__)
