"""Time and memory of BDH's raw attention in both orders of its product, over the number of tokens T.

Raw attention is a = (q q^T) x, which equals q (q^T x). The first order has a T x T matrix of scores in memory, the
second an N x D state; `kernels.scores_are_cheaper` takes the one with fewer operations: the state above
T* = 2 N D / (N + D), which is 410 tokens at the default size, BDH-UNet's. Measured with forward and backward:

attention   the product alone, with gradients of q and x
    plain           always (q q^T) x, by autograd
    reordered       `kernels.raw_attention`: the cheaper order, by autograd
level       a whole training step of the level, without dropout, with gradients of x and all weights
    plain           `BDHCore.plain_update` with attention always by scores
    reordered       `BDHCore.plain_update` as it is; differs from plain in the order only
    fast path       `kernels.fast_update`, which the model runs: reordered, with a hand-written backward pass

All sides run in one process, in turns; on a CPU with memory allocation as in training. Peak memory: tensors of one
forward and backward pass, beside inputs and weights. Kept memory: what a level keeps between the two, once for every
level of a model. Sides that need more than half of the machine's memory are named and left out. Run nothing else on
the machine meanwhile.

    python benchmarks/attention_cost.py
    python benchmarks/attention_cost.py --precision bf16 --tokens 576 2304 --batch-size 4
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor

from analysis.plotting.style import COLORS, PAGE, add_legend, new_figure, style_axes
from benchmarks.measure import (
    BenchmarkOptions,
    Precision,
    changed,
    in_turns,
    kept_memory_mb,
    machine_of,
    spread,
    step_memory_mb,
    write_results,
)
from models.bdh import BDHCore, CoreConfig
from models.kernels import raw_attention, scores_are_cheaper
from models.rotary import RotaryAttention
from training.command_line import run_script
from training.config import UserError
from training.device import (
    effective_precision,
    fits_in_memory,
    prepare_device,
    product_dtype,
    set_precision,
    synchronize,
    warn_of_precision,
)

SIZES = ("tokens", "n_embd", "n_head", "mlp_internal_dim_multiplier")  # in file names where changed
PARTS = {"attention": "attention alone", "level": "one whole level"}
LOOKS = {  # of each side; larger markers first, so that curves that coincide remain visible
    "plain": dict(label="plain: always T x T scores", color=COLORS[1], linestyle="-", marker="s", markersize=6),
    "reordered": dict(
        label="reordered: the cheaper order", color=COLORS[0], linestyle="--", marker="o", markersize=4.5
    ),
    "fast path": dict(label="fast path: what the model runs", color=COLORS[2], linestyle=":", marker="^", markersize=3),
}
# Tensors of one shape that a step holds at its peak, to estimate what fits into memory; tests check the estimate.
SCORES_HELD = 3  # (B, H, T, T)
WIDE_HELD = {"attention": 4, "level": 13}  # (B, H, T, N)


@dataclass(frozen=True, kw_only=True)
class Options(BenchmarkOptions):
    """What to measure; the default size is BDH-UNet's."""

    precision: Precision = "float32"
    """matmul precision"""
    tokens: tuple[int, ...] = (64, 256, 576, 1024, 2304, 4096, 9216)
    """tokens T of an image; 48 x 48 patches are 2304"""
    batch_size: int = 1
    """images a step"""
    n_embd: int = 256
    """token width D"""
    n_head: int = 4
    """heads H, each with its own neurons"""
    mlp_internal_dim_multiplier: int = 16
    """neurons of all heads / n_embd"""
    repeats: int = 21
    """timed steps of each side; above 1024 tokens proportionally fewer, at least 3"""
    warm_up: float = 1.0
    """seconds of untimed steps before"""

    def __post_init__(self):
        super().__post_init__()
        self.core_config()

    def core_config(self) -> CoreConfig:
        """One level of v2."""
        sizes = {name: getattr(self, name) for name in ("n_embd", "n_head", "mlp_internal_dim_multiplier")}
        return CoreConfig(**sizes, n_layer=1, dropout=0.0, residual="pre", init="xavier")

    def repeats_at(self, n_tokens: int) -> int:
        """Timed steps at T = n_tokens."""
        return min(self.repeats, max(3, self.repeats * 1024 // n_tokens))

    def itemsize(self) -> int:
        """Bytes of an element of the products."""
        return product_dtype(self.precision).itemsize


# ---------------------------------------------------------------------------- what is measured


class Side(NamedTuple):
    """One implementation."""

    forward: Callable[[], Tensor]
    inputs: Sequence[Tensor]
    """tensors that backward computes gradients of"""
    d_output: Tensor
    """gradient of forward's result"""


Sides = dict[str, Side]  # by name, plain first


class ScoresAttention(RotaryAttention):
    """Attention by the T x T scores, for any number of tokens."""

    def forward(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        """q, k: (B, H, T, N), x: (B, T, D) -> (B, H, T, D)."""
        return self.weights(q, k) @ x.unsqueeze(1)


def attention_sides(options: Options, n_tokens: int, device: torch.device) -> Sides:
    """The attention product alone, on q: (B, H, T, N) and x: (B, T, D)."""
    config = options.core_config()
    dtype = product_dtype(options.precision)
    torch.manual_seed(0)
    where = dict(device=device, dtype=dtype)
    q = torch.randn(options.batch_size, config.n_head, n_tokens, config.n_neurons, **where) / config.n_neurons**0.5
    x = torch.randn(options.batch_size, n_tokens, config.n_embd, **where)
    d_output = torch.randn(options.batch_size, config.n_head, n_tokens, config.n_embd, **where)
    inputs = (q.requires_grad_(), x.requires_grad_())
    return {
        "plain": Side(lambda: (q @ q.mT) @ x.unsqueeze(1), inputs, d_output),
        "reordered": Side(lambda: raw_attention(q, q, x.unsqueeze(1)), inputs, d_output),
    }


def level_sides(options: Options, n_tokens: int, device: torch.device) -> Sides:
    """One level of the model, on x: (B, T, D), with the same weights on all sides."""
    torch.manual_seed(0)
    x = torch.randn(options.batch_size, n_tokens, options.n_embd, device=device, requires_grad=True)
    d_output = torch.randn_like(x)
    config = options.core_config()
    autocast = set_precision(options.precision, device)

    def side(use_fast_path: bool, only_scores: bool = False) -> Side:
        torch.manual_seed(0)
        core = BDHCore(config, causal=False)
        core.use_fast_path = use_fast_path
        if only_scores:
            core.attn = ScoresAttention(config.n_neurons, softmax=False, causal=False, rotary=config.rotary)
        core.to(device)

        def forward() -> Tensor:
            with autocast:
                return core.levels(x)

        return Side(forward, (x, *core.parameters()), d_output)

    sides = {"plain": side(use_fast_path=False, only_scores=True), "reordered": side(use_fast_path=False)}
    if BDHCore(config, causal=False).has_fast_path(device):
        sides["fast path"] = side(use_fast_path=True)
    return sides


SIDES_OF = {"attention": attention_sides, "level": level_sides}


def run_step(side: Side, device: torch.device) -> tuple[float, float]:
    """Seconds of forward and of backward."""
    started = time.perf_counter()
    output = side.forward()
    synchronize(device)
    between = time.perf_counter()
    torch.autograd.grad(output, side.inputs, side.d_output)
    synchronize(device)
    return between - started, time.perf_counter() - between


def expected_mb(options: Options, part: str, name: str, n_tokens: int) -> float:
    """Estimated peak memory of a step of this side, in MB."""
    wide = WIDE_HELD[part] * n_tokens * options.core_config().n_neurons
    scores = SCORES_HELD * n_tokens**2 if order_of(options, name, n_tokens) == "scores" else 0
    return (wide + scores) * options.batch_size * options.n_head * options.itemsize() / 1e6


def order_of(options: Options, name: str, n_tokens: int) -> str:
    """What this side forms: the T x T "scores" or the N x D "state"."""
    config = options.core_config()
    only_scores = name == "plain" or scores_are_cheaper(n_tokens, config.n_neurons, config.n_embd)
    return "scores" if only_scores else "state"


# ---------------------------------------------------------------------------- measuring


def measure(options: Options, device: torch.device) -> list[dict]:
    """A row for each number of tokens, part and side that fits into memory."""
    rows = []
    set_precision(options.precision, device)
    for n_tokens in options.tokens:
        for part, make_sides in SIDES_OF.items():
            sides = make_sides(options, n_tokens, device)
            for name in list(sides):
                need = expected_mb(options, part, name, n_tokens)
                if not fits_in_memory(int(need * 1e6), device):
                    print(f"left out: {part}, {name}, {n_tokens} tokens: needs about {need / 1e3:.1f} GB of memory")
                    del sides[name]
            rows += measure_sides(options, part, n_tokens, sides, device)
    sizes = {name: getattr(options, name) for name in ("batch_size", "n_embd", "n_head")}
    common = {"machine": machine_of(device)[1], "precision": effective_precision(options.precision, device)}
    common |= sizes | {"n_neurons": options.core_config().n_neurons}
    return [common | row for row in rows]


def measure_sides(options: Options, part: str, n_tokens: int, sides: Sides, device: torch.device) -> list[dict]:
    """A row for each side with time, memory, and plain / side of both: above 1 the side is better."""
    rows = []
    repeats = options.repeats_at(n_tokens)
    for name, side in sides.items():
        row = {"tokens": n_tokens, "part": part, "side": name, "order": order_of(options, name, n_tokens)}
        row["step_memory_mb"] = step_memory_mb(lambda side=side: run_step(side, device), device)
        row["kept_memory_mb"] = kept_memory_mb(side.forward, device)
        row["scores_mb"] = options.batch_size * options.n_head * n_tokens**2 * options.itemsize() / 1e6
        rows.append(row | {"repeats": repeats})
    times = in_turns(sides, lambda side: run_step(side, device), repeats, options.warm_up)
    for row in rows:
        for direction, seconds in zip(("forward", "backward"), zip(*times[row["side"]], strict=True), strict=True):
            row |= {f"{direction}_{key}": value for key, value in spread(list(seconds)).items()}
    plain = rows[0] if rows and rows[0]["side"] == "plain" else None
    numbers = {"forward": "forward_seconds", "backward": "backward_seconds", "memory": "step_memory_mb"}
    for row in rows:
        ratios = {key: plain[name] / row[name] if plain and row[name] else None for key, name in numbers.items()}
        row |= {f"{key}_ratio": ratio for key, ratio in ratios.items()}
    return rows


# ---------------------------------------------------------------------------- table and figure


def title_of(row: dict) -> str:
    """What all rows share."""
    sizes = f"{row['n_head']} heads of N = {row['n_neurons']} neurons, D = {row['n_embd']}, batch {row['batch_size']}"
    return f"BDH's raw attention: {sizes}, {row['precision']}\n{row['machine']}"


def show(rows: list[dict]) -> None:
    """Prints the table. KB a token: peak memory over B T, constant if memory grows linearly in T."""
    table = pd.DataFrame(rows).sort_values(["part", "tokens"], kind="stable")
    shown = table[["part", "tokens", "side", "order"]].copy()
    for direction in ("forward", "backward"):
        shown[f"{direction} ms"] = 1e3 * table[f"{direction}_seconds"]
        shown[f"plain / side, {direction}"] = table[f"{direction}_ratio"]
    shown["peak MB"] = table["step_memory_mb"]
    shown["plain / side, memory"] = table["memory_ratio"]
    shown["KB a token"] = 1e3 * table["step_memory_mb"] / (table["batch_size"] * table["tokens"])
    shown["kept MB"] = table["kept_memory_mb"]
    shown["T x T MB"] = table["scores_mb"]
    print(title_of(rows[0]), shown.to_string(index=False, na_rep="", float_format="{:,.2f}".format), sep="\n")


def draw(rows: list[dict]) -> Figure:
    """For each part a row of panels: forward, backward and memory over T, on logarithmic axes."""
    figure = new_figure(PAGE, 5.6)
    figure.suptitle(title_of(rows[0]))
    panels = {"forward_seconds": "forward", "backward_seconds": "backward", "step_memory_mb": "peak memory"}
    axes = figure.subplots(len(PARTS), 3, sharex=True)
    for line, part in zip(axes, PARTS, strict=True):
        members = [row for row in rows if row["part"] == part]
        for ax, (column, title) in zip(line, panels.items(), strict=True):
            _draw_curves(ax, members, column)
            unit = "forward and backward (MB)" if column == "step_memory_mb" else "median time (ms)"
            ax.set(title=f"{PARTS[part]}: {title}", ylabel=unit)
        scores = {row["tokens"]: row["scores_mb"] for row in members}
        line[2].plot(scores.keys(), scores.values(), color="0.5", linewidth=1, label="one tensor of T x T scores")
    for ax in axes.flat:
        _style(ax, rows)
    for ax in axes[-1]:
        ax.set_xlabel("tokens T")
    add_legend(figure, axes[-1, -1])
    return figure


def _draw_curves(ax: Axes, rows: list[dict], column: str) -> None:
    """A curve for each side; times in ms with a band from fastest to slowest."""
    scale = 1.0 if column == "step_memory_mb" else 1e3
    for name, look in LOOKS.items():
        points = [row for row in rows if row["side"] == name and row[column] is not None]
        tokens = [row["tokens"] for row in points]
        ax.plot(tokens, [scale * row[column] for row in points], linewidth=1.5, **look)
        if column.endswith("seconds"):
            ends = (column.replace("seconds", end) for end in ("fastest", "slowest"))
            low, high = ([scale * row[end] for row in points] for end in ends)
            ax.fill_between(tokens, low, high, color=look["color"], alpha=0.18, linewidth=0)


def _style(ax: Axes, rows: list[dict]) -> None:
    ticks = sorted({row["tokens"] for row in rows})
    ax.set(xscale="log", yscale="log")
    ax.set_xticks(ticks, [str(n) for n in ticks], rotation=90)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter("{x:g}")
    width, neurons = rows[0]["n_embd"], rows[0]["n_neurons"]
    switch = 2 * neurons * width / (neurons + width)  # both orders need equally many operations
    look = dict(color="0.3", linestyle=(0, (1, 2)), linewidth=1)
    ax.axvline(switch, label=f"T* = 2 N D / (N + D) = {switch:.0f}", **look)
    style_axes(ax, "both")


def file_stem(place: str, row: dict, options: Options) -> str:
    """File name with the machine, and precision and sizes unless they are the default."""
    precision = "" if row["precision"] == "float32" else f"_{row['precision']}"
    batch = "" if row["batch_size"] == 1 else f"_batch{row['batch_size']}"
    return f"attention_cost_{place}{precision}{batch}{changed(options, *SIZES)}"


def main(options: Options) -> None:
    device = prepare_device(options.device)
    warn_of_precision(options.precision, device)
    rows = measure(options, device)
    if not rows:
        raise UserError("nothing fits into memory: give fewer --tokens or a smaller --batch-size")
    show(rows)
    path = options.output_dir / f"{file_stem(machine_of(device)[0], rows[0], options)}.csv"
    print(*write_results(pd.DataFrame(rows), path, draw(rows)), sep="\n")


if __name__ == "__main__":
    run_script(main, __doc__)
