"""How time and memory of a training step grow with the batch, the tokens, the neurons and the depth of a Vision-BDH.

Each of the four is varied alone, from v2's size on 32 x 32 images. A power law is fitted to each curve (least squares
of the logarithms); its exponent stands above the panel, its standard error in the table. What theory says: time and
memory are linear in the batch, the neurons and the depth; in the tokens, linear plus the quadratic scores, which switch
to the other order of the attention product at T* = 2 N D / (N + D). What is held once, whatever the size (weights, what
one slice of a batch needs), makes exponents of memory smaller. Nothing else should run on the machine meanwhile.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --n-embd 96 --n-head 4 --repeats 3 --precision float32
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.console import Console
from rich.table import Table
from scipy import stats

from analysis.plotting.style import COLORS, PAGE, new_figure, style_axes
from benchmarks.measure import Precision, in_turns, machine_of, seconds_of, spread, step_memory_mb, write_results
from benchmarks.training_steps import IMPLEMENTATIONS, in_full, made_up_batches, training_step
from models.vision_bdh import VisionBDHConfig, v2_config
from training.command_line import run_script
from training.config import ROOT, UserError
from training.device import is_out_of_memory, pick_device, tune_cpu_allocator

VARIED = {"batch_size": "images a batch", "tokens": "tokens T", "neurons": "neurons of all heads", "n_layer": "levels"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The size that everything starts from, and how far each of the four goes."""

    n_embd: int = 192
    """width D of a token"""
    n_head: int = 6
    """heads"""
    batch_sizes: tuple[int, ...] = (8, 16, 32, 64)
    """images a step"""
    img_sizes: tuple[int, ...] = (16, 32, 48, 64)
    """sides of the images, whose patches of 4 x 4 pixels are the tokens"""
    multipliers: tuple[int, ...] = (8, 16, 32, 64)
    """neurons of all heads, as multiples of n-embd"""
    depths: tuple[int, ...] = (2, 4, 6, 8)
    """levels"""
    base: tuple[int, int, int, int] = (16, 32, 16, 4)
    """batch size, side, multiplier and depth that stay while another varies"""
    sides: tuple[str, ...] = tuple(IMPLEMENTATIONS)
    """of these three, what to measure"""
    precision: Precision = "bf16"
    """of the products"""
    repeats: int = 5
    """steps of each side that count, after those that warm up"""
    device: str = "auto"
    """auto, cuda, cuda:1, mps or cpu"""
    output_dir: Path = ROOT / "results" / "benchmarks"
    """folder of the table and the picture"""


def points_of(options: Options) -> Iterator[tuple[str, int, tuple[int, int, int, int]]]:
    """Every measurement: what is varied, its value, and batch size, side, multiplier and depth."""
    lists = (options.batch_sizes, options.img_sizes, options.multipliers, options.depths)
    for place, (varied, values) in enumerate(zip(VARIED, lists, strict=True)):
        for value in values:
            point = tuple(value if each == place else base for each, base in enumerate(options.base))
            sizes = {"tokens": (value // 4) ** 2, "neurons": value * options.n_embd}
            yield varied, sizes.get(varied, value), point


def measure(options: Options, device: torch.device) -> list[dict]:
    """A row for each side of each point; a side that does not fit into memory is left out from there on."""
    rows = []
    for varied, size, (batch_size, img_size, multiplier, n_layer) in points_of(options):
        config = v2_config(
            img_size=img_size,
            n_embd=options.n_embd,
            n_head=options.n_head,
            mlp_internal_dim_multiplier=multiplier,
            n_layer=n_layer,
        )
        steps, memory = {}, {}
        for side in options.sides:
            try:
                steps[side] = _step(side, config, batch_size, options.precision, device)
                memory[side] = step_memory_mb(steps[side], device)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                print(f"{side} at {varied} = {size} is left out: the device's memory is full", file=sys.stderr)
                steps.pop(side, None)
        for side, seconds in in_turns(steps, seconds_of, options.repeats).items():
            point = {"batch_size": batch_size, "img_size": img_size, "multiplier": multiplier, "n_layer": n_layer}
            row = {
                "varied": varied,
                "size": size,
                "side": side,
                "precision": options.precision,
                "n_embd": config.n_embd,
            }
            rows.append(row | point | spread(seconds) | {"step_memory_mb": memory[side]})
    return rows


def _step(side: str, config: VisionBDHConfig, batch_size: int, precision: Precision, device: torch.device):
    torch.manual_seed(0)
    batches = made_up_batches(batch_size, config.img_size, config.num_classes, device)
    return in_full(training_step(IMPLEMENTATIONS[side](config), batches, precision, device), 1, device)


def exponent(sizes: list[float], values: list[float]) -> tuple[float, float, float]:
    """p and its standard error, and c, of values = c sizes^p. Needs two sizes; the error is NaN for just two."""
    fit = stats.linregress(np.log(sizes), np.log(values))
    return fit.slope, fit.stderr if len(sizes) > 2 else math.nan, math.exp(fit.intercept)


def exponents(rows: list[dict]) -> list[dict]:
    """One for each side, what is varied, and time or memory; from fewer than two sizes none."""
    table = pd.DataFrame(rows)
    fits = []
    for (varied, side), group in table.groupby(["varied", "side"], sort=False):
        for column in ("seconds", "step_memory_mb"):
            known = group.dropna(subset=[column])
            if known["size"].nunique() > 1:
                p, error, factor = exponent(known["size"].tolist(), known[column].tolist())
                fit = {"of": column, "exponent": p, "standard_error": error, "factor": factor}
                fits.append({"varied": varied, "side": side} | fit)
    return fits


def draw(rows: list[dict], title: str) -> Figure:
    """Time above, memory below; a column for each of the four. Lines are the fitted powers."""
    figure = new_figure(PAGE, 4.4)
    figure.suptitle(f"{title}\nabove each panel: exponents of the fitted powers, in the order of the legend")
    axes = figure.subplots(2, len(VARIED), sharex="col", sharey="row")
    fits = {(fit["varied"], fit["side"], fit["of"]): fit for fit in exponents(rows)}
    for column, varied in enumerate(VARIED):
        here = [row for row in rows if row["varied"] == varied]
        for ax, of, scale in zip(axes[:, column], ("seconds", "step_memory_mb"), (1e3, 1.0), strict=True):
            for place, side in enumerate(IMPLEMENTATIONS):
                _draw_side(ax, [row for row in here if row["side"] == side], of, scale, place, fits)
            shown = [fits[varied, side, of] for side in IMPLEMENTATIONS if (varied, side, of) in fits]
            ax.set_title(", ".join(f"{fit['exponent']:.2f}" for fit in shown))
            ax.set(xscale="log", yscale="log")
            if here:
                ticks = sorted({row["size"] for row in here})
                ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=90)
            ax.xaxis.set_minor_locator(NullLocator())
            style_axes(ax, "both")
        axes[1, column].set_xlabel(VARIED[varied])
    axes[0, 0].set_ylabel("median time of a step (ms)")
    axes[1, 0].set_ylabel("peak memory of a step (MB)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _draw_side(ax: Axes, rows: list[dict], of: str, scale: float, place: int, fits: dict) -> None:
    rows = [row for row in rows if row[of] is not None]
    if not rows:
        return
    side, color = rows[0]["side"], COLORS[place]
    fit = fits.get((rows[0]["varied"], side, of))
    sizes = np.array([row["size"] for row in rows], float)
    ax.plot(sizes, [scale * row[of] for row in rows], "os^"[place], color=color, markersize=4, label=side)
    if fit is not None:
        ax.plot(sizes, scale * fit["factor"] * sizes ** fit["exponent"], color=color, linewidth=1)


def show(rows: list[dict], title: str) -> None:
    table = Table(title=title)
    for name in ("varied", "side", "of", "exponent", "standard error"):
        table.add_column(name)
    for fit in exponents(rows):
        numbers = f"{fit['exponent']:.3f}", f"{fit['standard_error']:.3f}"
        table.add_row(VARIED[fit["varied"]], fit["side"], fit["of"], *numbers)
    Console(width=120).print(table)


def main(options: Options) -> None:
    device = pick_device(options.device)
    if unknown := set(options.sides) - set(IMPLEMENTATIONS):
        raise UserError(f"--sides: {', '.join(sorted(unknown))} is none of {', '.join(IMPLEMENTATIONS)}")
    if device.type == "cpu":
        tune_cpu_allocator()
    rows = measure(options, device)
    if not rows:
        raise UserError("nothing fits into memory: make --base and the lists smaller")
    place, machine = machine_of(device)
    title = f"{machine}, {options.precision}"
    show(rows, title)
    path = options.output_dir / f"scaling_{place}.csv"
    table = pd.DataFrame([{"machine": machine} | row for row in rows])
    print(*write_results(table, draw(rows, title), path), sep="\n")
    pd.DataFrame(exponents(rows)).to_csv(path.with_name(f"{path.stem}_exponents.csv"), index=False)


if __name__ == "__main__":
    run_script(main, __doc__)
