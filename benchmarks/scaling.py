"""How time and memory of a Vision-BDH training step grow with batch size, tokens, neurons and depth.

Varies one at a time, from a smaller v2 on 32 x 32 images (--base), and fits a power law to each curve (least squares of
the logarithms): exponents stand above the panels, their standard errors in the table. Theory: linear in batch size,
neurons and depth; in the tokens linear plus the quadratic scores, up to T* = 2 N D / (N + D), where the attention
product is computed in the other order. Memory that does not depend on the size (weights, buffers) lowers the exponents.
Run nothing else on the machine meanwhile.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --n-embd 96 --n-head 4 --repeats 3 --precision float32
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from scipy import stats

from analysis.plotting.style import PAGE, add_legend, look_of, new_figure, style_axes
from benchmarks.measure import (
    BenchmarkOptions,
    Precision,
    changed,
    in_full,
    in_turns,
    machine_of,
    seconds_of,
    spread,
    step_memory_mb,
    write_results,
)
from benchmarks.training_steps import IMPLEMENTATIONS, made_up_batches, training_step
from models.vision_bdh import VisionBDHConfig, v2_config
from training.command_line import run_script
from training.config import UserError
from training.device import is_out_of_memory, prepare_device, warn_of_precision

VARIED = {"batch_size": "images a batch", "tokens": "tokens T", "neurons": "neurons of all heads", "n_layer": "levels"}

SIZES = ("n_embd", "n_head", "batch_sizes", "img_sizes", "multipliers", "depths", "base")


@dataclass(frozen=True, kw_only=True)
class Options(BenchmarkOptions):
    """The base size, and the values of each of the four quantities; an empty list skips one."""

    n_embd: int = 192
    """token width D"""
    n_head: int = 6
    """heads"""
    batch_sizes: tuple[int, ...] = (8, 16, 32, 64)
    """images a step"""
    img_sizes: tuple[int, ...] = (16, 32, 48, 64)
    """image sides in pixels; a token is a patch of 4 x 4"""
    multipliers: tuple[int, ...] = (8, 16, 32, 64)
    """neurons of all heads / n_embd"""
    depths: tuple[int, ...] = (2, 4, 6, 8)
    """levels"""
    base: tuple[int, int, int, int] = (16, 32, 16, 4)
    """batch size, image side, multiplier and depth while another one varies"""
    sides: tuple[str, ...] = tuple(IMPLEMENTATIONS)
    """implementations to measure"""
    precision: Precision = "bf16"
    """matmul precision"""
    repeats: int = 5
    """timed steps of each side, after the warm-up"""

    def __post_init__(self):
        super().__post_init__()
        if unknown := set(self.sides) - set(IMPLEMENTATIONS):
            raise ValueError(f"sides: {', '.join(sorted(unknown))} is none of {', '.join(IMPLEMENTATIONS)}")
        if not list(points_of(self)):  # raises ValueError for sizes that do not fit each other
            raise ValueError("there is nothing to measure: every list is empty")


class Point(NamedTuple):
    """One size to measure."""

    varied: str
    """key of VARIED"""
    size: int
    """its value"""
    batch_size: int
    config: VisionBDHConfig


def points_of(options: Options) -> Iterator[Point]:
    """Every size to measure."""
    lists = (options.batch_sizes, options.img_sizes, options.multipliers, options.depths)
    for place, (varied, values) in enumerate(zip(VARIED, lists, strict=True)):
        for value in values:
            batch, side, multiplier, depth = (value if n == place else base for n, base in enumerate(options.base))
            sizes = dict(n_embd=options.n_embd, n_head=options.n_head, mlp_internal_dim_multiplier=multiplier)
            config = v2_config(img_size=side, n_layer=depth, **sizes)
            size = {"tokens": math.prod(config.grid), "neurons": value * options.n_embd}.get(varied, value)
            yield Point(varied, size, batch, config)


def measure(options: Options, device: torch.device) -> list[dict]:
    """A row for each side of each point; sides that run out of memory are named and left out."""
    rows = []
    for point in points_of(options):
        steps, memory = {}, {}
        for side in options.sides:
            try:
                steps[side] = _step(side, point, options.precision, device)
                memory[side] = step_memory_mb(steps[side], device)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                print(f"{side} at {point.varied} = {point.size} is left out: out of memory", file=sys.stderr)
                steps.pop(side, None)
        for side, seconds in in_turns(steps, seconds_of, options.repeats).items():
            row = {"varied": point.varied, "size": point.size, "side": side, "precision": options.precision}
            row |= {"n_embd": options.n_embd, "batch_size": point.batch_size, "img_size": point.config.img_size}
            row |= {"multiplier": point.config.mlp_internal_dim_multiplier, "n_layer": point.config.n_layer}
            rows.append(row | spread(seconds) | {"step_memory_mb": memory[side]})
    return rows


def _step(side: str, point: Point, precision: Precision, device: torch.device) -> Callable[[], None]:
    torch.manual_seed(0)
    batches = made_up_batches(point.batch_size, point.config.img_size, point.config.num_classes, device)
    return in_full(training_step(IMPLEMENTATIONS[side](point.config), batches, precision, device), 1, device)


def exponent(sizes: list[float], values: list[float]) -> tuple[float, float, float]:
    """p, its standard error, and c of values = c sizes^p. Needs two sizes; the error is NaN for just two."""
    fit = stats.linregress(np.log(sizes), np.log(values))
    return fit.slope, fit.stderr if len(sizes) > 2 else math.nan, math.exp(fit.intercept)


def exponents(rows: list[dict]) -> pd.DataFrame:
    """A fit for each varied quantity and side, of time and memory, if there are two sizes or more."""
    fits = []
    for (varied, side), group in pd.DataFrame(rows).groupby(["varied", "side"], sort=False):
        for column in ("seconds", "step_memory_mb"):
            known = group.dropna(subset=[column])
            if known["size"].nunique() > 1:
                p, error, factor = exponent(known["size"].tolist(), known[column].tolist())
                fit = {"of": column, "exponent": p, "standard_error": error, "factor": factor}
                fits.append({"varied": varied, "side": side} | fit)
    return pd.DataFrame(fits, columns=["varied", "side", "of", "exponent", "standard_error", "factor"])


def draw(rows: list[dict], title: str) -> Figure:
    """Time above, memory below, a column for each varied quantity. Lines: the fitted power laws."""
    figure = new_figure(PAGE, 4.4)
    figure.suptitle(f"{title}\nabove each panel: exponents of the fits, in the order of the legend")
    axes = figure.subplots(2, len(VARIED), sharex="col", sharey="row")
    fits = {(fit["varied"], fit["side"], fit["of"]): fit for fit in exponents(rows).to_dict("records")}
    for column, (varied, name) in zip(axes.T, VARIED.items(), strict=True):
        here = [row for row in rows if row["varied"] == varied]
        for ax, of, scale in zip(column, ("seconds", "step_memory_mb"), (1e3, 1.0), strict=True):
            for place, side in enumerate(IMPLEMENTATIONS):
                members = [row for row in here if row["side"] == side and row[of] is not None]
                _draw_side(ax, place, side, members, of, scale, fits.get((varied, side, of)))
            shown = [fits[varied, side, of] for side in IMPLEMENTATIONS if (varied, side, of) in fits]
            ax.set_title(", ".join(f"{fit['exponent']:.2f}" for fit in shown))
            ax.set(xscale="log", yscale="log")
            ticks = sorted({row["size"] for row in here})
            ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=90)
            ax.xaxis.set_minor_locator(NullLocator())
            style_axes(ax, "both")
        column[1].set_xlabel(name)
    axes[0, 0].set_ylabel("median time of a step (ms)")
    axes[1, 0].set_ylabel("peak memory of a step (MB)")
    add_legend(figure, next(ax for ax in axes[0] if ax.lines))
    return figure


def _draw_side(ax: Axes, place: int, side: str, rows: list[dict], of: str, scale: float, fit: dict | None) -> None:
    if not rows:
        return
    sizes = np.array([row["size"] for row in rows], float)
    look = look_of(place)
    ax.plot(sizes, [scale * row[of] for row in rows], linestyle="", markersize=4, label=side, **look)
    if fit is not None:
        ax.plot(sizes, scale * fit["factor"] * sizes ** fit["exponent"], color=look["color"], linewidth=1)


def main(options: Options) -> None:
    device = prepare_device(options.device)
    warn_of_precision(options.precision, device)
    rows = measure(options, device)
    if not rows:
        raise UserError("out of memory at every size: make --base and the lists smaller")
    place, machine = machine_of(device)
    fits = exponents(rows)
    shown = fits.drop(columns="factor").to_string(index=False, float_format="{:.3f}".format)
    print("no exponents: they need two sizes of one quantity" if fits.empty else shown)
    path = options.output_dir / f"scaling_{place}{changed(options, *SIZES, 'sides', 'precision')}.csv"
    table = pd.DataFrame([{"machine": machine} | row for row in rows])
    print(*write_results(table, path, draw(rows, f"{machine}, {options.precision}")), sep="\n")
    write_results(fits, path.with_name(f"{path.stem}_exponents.csv"))


if __name__ == "__main__":
    run_script(main, __doc__)
