"""Time and memory of BDH's raw attention in both orders of its product, over the number of tokens.

Raw attention is a = (q q^T) x, which is q (q^T x) exactly. The first order forms T x T scores, the second an N x D
state, and `kernels.scores_are_cheaper` takes whichever needs fewer operations. At the size of BDH-UNet, the default
here, that is the state above T* = 2 N D / (N + D) = 410 tokens; below, "reordered" forms the scores, too. Two parts:

attention   the product alone, q and x given; backward gives their gradients
    plain           always (q q^T) x, by autograd
    reordered       `kernels.raw_attention`: the cheaper order, by autograd
level       one whole step in training, from LN to the residual sum, without dropout; backward gives the gradients of x
            and of all weights
    plain           `BDHCore.plain_update`, its attention always by the scores
    reordered       `BDHCore.plain_update` as it is: it differs from plain in the order only
    fast path       `kernels.fast_update`, what the model runs: reordered, with a backward pass written by hand

All sides run in one process, in turns; on a CPU glibc's allocation is set as training sets it. Peak memory is the most
that the tensors of one forward and backward hold at once, beside inputs and weights; kept memory, what is there between
the two, is what every level of a model adds. A side that would need more than half of the machine's memory is left out,
with a line that says so. Nothing else should run on the machine meanwhile.

    python benchmarks/attention_cost.py
    python benchmarks/attention_cost.py --precision bf16 --tokens 576 2304 --batch-size 4
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.console import Console
from rich.table import Table
from torch import Tensor

from analysis.plotting.style import COLORS, PAGE, new_figure, style_axes
from benchmarks.measure import Precision, in_turns, kept_memory_mb, spread, step_memory_mb, write_results
from models.bdh import BDHCore, CoreConfig
from models.kernels import raw_attention, scores_are_cheaper
from models.rotary import RotaryAttention
from training.command_line import run_script
from training.config import ROOT, UserError
from training.device import (
    describe_hardware,
    effective_precision,
    fits_in_memory,
    pick_device,
    set_precision,
    synchronize,
    tune_cpu_allocator,
)

PARTS = {"attention": "attention alone", "level": "one whole level"}
# How a side is drawn. The first has the largest marker, so that curves that coincide can still be told apart.
LOOKS = {
    "plain": dict(label="plain: always T x T scores", color=COLORS[1], linestyle="-", marker="s", markersize=6),
    "reordered": dict(
        label="reordered: the cheaper order", color=COLORS[0], linestyle="--", marker="o", markersize=4.5
    ),
    "fast path": dict(label="fast path: what the model runs", color=COLORS[2], linestyle=":", marker="^", markersize=3),
}
# Most tensors of one shape that a step holds at once, for the estimate of what fits; tests hold it against measurements
SCORES_HELD = 3  # (B, H, T, T): the scores, their gradient, one more
WIDE_HELD = {"attention": 4, "level": 13}  # (B, H, T, N)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure; the sizes are those of BDH-UNet."""

    device: str = "auto"
    """auto, cuda, mps or cpu"""
    precision: Precision = "float32"
    """of the products"""
    tokens: tuple[int, ...] = (64, 256, 576, 1024, 2304, 4096, 9216)
    """tokens T of an image; 2304 are those of 48 x 48 patches"""
    batch_size: int = 1
    """images a step"""
    n_embd: int = 256
    """width D of a token"""
    n_head: int = 4
    """heads H; each has its own neurons"""
    mlp_internal_dim_multiplier: int = 16
    """neurons over all heads, as a multiple of n_embd"""
    repeats: int = 21
    """steps of each side that count; above 1024 tokens fewer in proportion, but 3"""
    warm_up: float = 1.0
    """seconds of steps that do not count, before those that do: a profiled process takes as long to settle"""
    output_dir: Path = ROOT / "results" / "benchmarks"
    """folder of the table and the plot"""

    def __post_init__(self):
        if not self.tokens or min(*self.tokens, self.batch_size, self.repeats) < 1:
            raise ValueError("tokens, batch_size and repeats must be at least 1")
        self.core_config()

    def core_config(self) -> CoreConfig:
        """One level, as v2 has it."""
        sizes = {name: getattr(self, name) for name in ("n_embd", "n_head", "mlp_internal_dim_multiplier")}
        return CoreConfig(**sizes, n_layer=1, dropout=0.0, residual="pre", init="xavier")

    def repeats_at(self, n_tokens: int) -> int:
        """Steps that count at T = n_tokens."""
        return min(self.repeats, max(3, self.repeats * 1024 // n_tokens))

    def itemsize(self) -> int:
        """Bytes of an element of what the products make."""
        return 2 if self.precision == "bf16" else 4


# ---------------------------------------------------------------------------- what is measured


class Side(NamedTuple):
    """One way to compute the same thing."""

    forward: Callable[[], Tensor]
    inputs: Sequence[Tensor]
    """of which backward gives the gradients"""
    d_output: Tensor
    """gradient of forward's result, from which backward starts"""


Sides = dict[str, Side]  # by name, plain first


class ScoresAttention(RotaryAttention):
    """Attention that forms the T x T scores, however many tokens there are."""

    def forward(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        """q, k: (B, H, T, N), x: (B, T, D) -> (B, H, T, D)."""
        return self.weights(q, k) @ x.unsqueeze(1)


def attention_sides(options: Options, n_tokens: int, device: torch.device) -> Sides:
    """The attention product alone, on q: (B, H, T, N) and x: (B, T, D)."""
    config = options.core_config()
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
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
    """One whole step of the model, on x: (B, T, D), with equal weights on all sides."""
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
    """About the most memory that a step of the side called name takes, in MB."""
    wide = WIDE_HELD[part] * n_tokens * options.core_config().n_neurons
    scores = SCORES_HELD * n_tokens**2 if order_of(options, name, n_tokens) == "scores" else 0
    return (wide + scores) * options.batch_size * options.n_head * options.itemsize() / 1e6


def order_of(options: Options, name: str, n_tokens: int) -> str:
    """What the side called name forms: the T x T scores, or the N x D state."""
    config = options.core_config()
    only_scores = name == "plain" or scores_are_cheaper(n_tokens, config.n_neurons, config.n_embd)
    return "scores" if only_scores else "state"


# ---------------------------------------------------------------------------- measuring


def measure(options: Options, device: torch.device, allocation: str) -> list[dict]:
    """A row for each number of tokens, part and side that fits into memory. allocation: says how memory is allotted."""
    rows = []
    set_precision(options.precision, device)
    for n_tokens in options.tokens:
        for part, make_sides in SIDES_OF.items():
            sides = make_sides(options, n_tokens, device)
            for name in [name for name in sides if not _fits(options, part, name, n_tokens, device)]:
                del sides[name]
            rows += measure_sides(options, part, n_tokens, sides, device)
    return [_circumstances(options, device, allocation) | row for row in rows]


def _fits(options: Options, part: str, name: str, n_tokens: int, device: torch.device) -> bool:
    need = expected_mb(options, part, name, n_tokens)
    fits = fits_in_memory(int(need * 1e6), device)
    if not fits:
        print(
            f"left out: {part}, {name}, {n_tokens} tokens: needs about {need / 1e3:.1f} GB, too much for this machine"
        )
    return fits


def measure_sides(options: Options, part: str, n_tokens: int, sides: Sides, device: torch.device) -> list[dict]:
    """One row a side, with seconds, memory, and how many times plain's that is better."""
    rows = []
    for name, side in sides.items():
        row = {"tokens": n_tokens, "part": part, "side": name, "order": order_of(options, name, n_tokens)}
        row["step_memory_mb"] = step_memory_mb(lambda side=side: run_step(side, device), device)
        row["kept_memory_mb"] = kept_memory_mb(side.forward, device)
        row["scores_mb"] = options.batch_size * options.n_head * n_tokens**2 * options.itemsize() / 1e6
        rows.append(row)
    repeats = options.repeats_at(n_tokens)
    times = in_turns(sides, lambda side: run_step(side, device), repeats, options.warm_up)
    for row in rows:
        row["repeats"] = repeats
        for direction, seconds in zip(("forward", "backward"), zip(*times[row["side"]], strict=True), strict=True):
            row |= {f"{direction}_{key}": value for key, value in spread(seconds).items()}
    plain = rows[0] if rows and rows[0]["side"] == "plain" else None
    return [row | _ratios(plain, row) for row in rows]


def _ratios(plain: dict | None, row: dict) -> dict[str, float | None]:
    """plain / side of seconds and memory: above 1, the side is better. None without plain or its number."""
    numbers = {"forward": "forward_seconds", "backward": "backward_seconds", "memory": "step_memory_mb"}
    return {f"{key}_ratio": plain[name] / row[name] if plain and row[name] else None for key, name in numbers.items()}


def _circumstances(options: Options, device: torch.device, allocation: str) -> dict:
    hardware = describe_hardware(device)
    return {
        "device": device.type,
        "hardware": hardware["name"],
        "threads": hardware.get("threads"),
        "torch": torch.__version__,
        "allocation": allocation,
        "precision": effective_precision(options.precision, device),
        **{name: getattr(options, name) for name in ("batch_size", "n_embd", "n_head")},
        "n_neurons": options.core_config().n_neurons,
    }


# ---------------------------------------------------------------------------- table and plot


def title_of(row: dict) -> str:
    """What all rows share, in words."""
    threads = "" if row["threads"] is None else f", {row['threads']} threads"
    sizes = f"{row['n_head']} heads of N = {row['n_neurons']} neurons, D = {row['n_embd']}, batch {row['batch_size']}"
    return f"BDH's raw attention: {sizes}, {row['precision']}\n{row['hardware']}{threads}, PyTorch {row['torch']}"


def show(rows: list[dict]) -> None:
    """The table on the terminal. KB a token is peak memory over B T: constant where memory grows linearly in T."""
    table = Table(title=title_of(rows[0]))
    titles = ["part", "T", "side", "forms"]
    for direction in ("forward", "backward"):
        titles += [f"{direction} ms\nmedian", "fastest to\nslowest", "plain /\nside"]
    for title in (*titles, "peak\nMB", "plain /\nside", "KB a\ntoken", "kept\nMB", "T x T\nMB"):
        table.add_column(title, justify="left" if title in ("part", "side", "forms") else "right")
    by_part = sorted(rows, key=lambda row: row["part"])
    for _, group in groupby(by_part, key=lambda row: (row["part"], row["tokens"])):
        for row in group:
            table.add_row(*_cells(row))
        table.add_section()
    Console(width=170).print(table)


def _cells(row: dict) -> list[str]:
    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:,.{digits}f}"

    cells = [row["part"], str(row["tokens"]), row["side"], row["order"]]
    for direction in ("forward", "backward"):
        median, fastest, slowest = (
            number(1e3 * row[f"{direction}_{key}"], 2) for key in ("seconds", "fastest", "slowest")
        )
        cells += [median, f"{fastest} to {slowest}", number(row[f"{direction}_ratio"], 2)]
    peak, tokens = row["step_memory_mb"], row["batch_size"] * row["tokens"]
    rest = (1e3 * peak / tokens if peak else None, row["kept_memory_mb"], row["scores_mb"])
    return [*cells, number(peak, 1), number(row["memory_ratio"], 2), *(number(value, 1) for value in rest)]


def draw(rows: list[dict]) -> Figure:
    """One line of panels a part: forward, backward and memory over T, on logarithmic axes."""
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
    handles = axes[-1, -1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _draw_curves(ax: Axes, rows: list[dict], column: str) -> None:
    """A curve a side; for times, in ms with a band from fastest to slowest."""
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


def file_stem(row: dict) -> str:
    """attention_cost_<device>, and what is not the default of precision and batch size."""
    stem = f"attention_cost_{row['device']}" + (f"_{row['threads']}threads" if row["device"] == "cpu" else "")
    stem += "" if row["precision"] == "float32" else f"_{row['precision']}"
    return stem + ("" if row["batch_size"] == 1 else f"_batch{row['batch_size']}")


def write(rows: list[dict], folder: Path) -> tuple[Path, ...]:
    """The CSV, the PNG and the SVG; returns them."""
    return write_results(pd.DataFrame(rows), draw(rows), folder / f"{file_stem(rows[0])}.csv")


def main(options: Options) -> None:
    device = pick_device(options.device)
    allocation = "PyTorch's"
    if device.type == "cpu":
        allocation = "tuned" if tune_cpu_allocator() else "as it comes"
        print(f"CPU: memory allocation is {allocation}, as in training (training.device.tune_cpu_allocator)")
    rows = measure(options, device, allocation)
    if not rows:
        raise UserError("nothing fits into memory: give fewer --tokens or a smaller --batch-size")
    show(rows)
    print(*write(rows, options.output_dir), sep="\n")


if __name__ == "__main__":
    run_script(main, __doc__)
