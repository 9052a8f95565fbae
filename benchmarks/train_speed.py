"""How fast models train on this device: v2 in each of its implementations, ViT-Tiny and ResNet-20, in one process.

A step is what fit() makes: a batch cropped and flipped on the device, forward, loss, backward, clip, AdamW. All sides
of a precision are measured in turns. TFLOP/s counts the products that a model needs, once, whatever a side computes
again; its share is of a large product's rate in the same precision, measured here too. Seconds an epoch are those of
40,000 training images at that rate, without validation. Nothing else should run on the machine meanwhile.

    python benchmarks/train_speed.py
    python benchmarks/train_speed.py --precisions bf16 --batch-size 256 --models v2
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import nn

from analysis.plotting.style import COLORS, PAGE, new_figure, style_axes
from benchmarks.measure import Precision, in_turns, machine_of, seconds_of, spread, step_memory_mb, write_results
from benchmarks.training_steps import IMPLEMENTATIONS, flop_per_image, in_full, made_up_batches, training_step
from models.baselines import ResNet20Config, ViTConfig
from models.vision_bdh import v2_config
from training.command_line import run_script
from training.config import ROOT, UserError
from training.device import pick_device, tune_cpu_allocator

EPOCH = 40_000  # training images of the CIFAR protocol
Name = Literal["v2", "vit_tiny", "resnet20"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    models: tuple[Name, ...] = ("v2", "vit_tiny", "resnet20")
    """models, at the sizes of their CIFAR-10 scripts"""
    precisions: tuple[Precision, ...] | None = None
    """of the products; default: tf32 and bf16 on CUDA, float32 and bf16 elsewhere"""
    batch_size: int = 32
    """images a step"""
    compile: bool | None = None
    """measure torch.compile, too; default: on CUDA"""
    steps: int | None = None
    """steps of a reading; default: 50 on CUDA, 1 elsewhere"""
    repeats: int = 7
    """readings of each side that count, after the steps that warm up"""
    device: str = "auto"
    """auto, cuda, cuda:1, mps or cpu"""
    output_dir: Path = ROOT / "results" / "benchmarks"
    """folder of the table and the chart"""


@dataclass(frozen=True)
class Side:
    """One way to train one model."""

    model: Name
    name: str
    build: Callable[[], nn.Module]
    compiled: bool = False


def sides_of(models: tuple[Name, ...], compiled: bool) -> list[Side]:
    """Each model's sides; its first is what its others are compared with."""
    everything = [
        *(Side("v2", name, lambda build=build: build(v2_config())) for name, build in IMPLEMENTATIONS.items()),
        Side("v2", "plain, compiled", lambda: v2_config().build(), compiled=True),
        Side("vit_tiny", "eager", lambda: ViTConfig().build()),
        Side("vit_tiny", "compiled", lambda: ViTConfig().build(), compiled=True),
        Side("resnet20", "eager", lambda: ResNet20Config().build()),
        Side("resnet20", "compiled", lambda: ResNet20Config().build(), compiled=True),
    ]
    return [side for side in everything if side.model in models and (compiled or not side.compiled)]


def dense_tflops(precision: Precision, device: torch.device) -> float:
    """Rate of a large square product in that precision: the best of ten."""
    size = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = in_full(lambda: left @ right, 1, device)
    return 2 * size**3 / min(seconds_of(product) for _ in range(10)) / 1e12


def measure(options: Options, device: torch.device) -> list[dict]:
    """A row for each side and precision."""
    on_cuda = device.type == "cuda"
    precisions = options.precisions or (("tf32", "bf16") if on_cuda else ("float32", "bf16"))
    sides = sides_of(options.models, on_cuda if options.compile is None else options.compile)
    flop = {name: flop_per_image(sides_of((name,), compiled=False)[0].build(), img_size=32) for name in options.models}
    n_steps = options.steps or (50 if on_cuda else 1)
    rows = []
    for precision in precisions:
        steps = {}
        for side in sides:
            torch.manual_seed(0)
            batches = made_up_batches(options.batch_size, img_size=32, n_classes=10, device=device)
            steps[side] = training_step(side.build(), batches, precision, device, side.compiled)
        memory = {side: step_memory_mb(in_full(step, 1, device), device) for side, step in steps.items()}
        readings = {side: in_full(step, n_steps, device) for side, step in steps.items()}
        dense = dense_tflops(precision, device)
        for side, seconds in in_turns(readings, seconds_of, options.repeats).items():
            times = {key: value / n_steps for key, value in spread(seconds).items()}
            rate = options.batch_size / times["seconds"]
            rows.append(
                {
                    "precision": precision,
                    "model": side.model,
                    "side": side.name,
                    "batch_size": options.batch_size,
                    **times,
                    "images_per_sec": rate,
                    "seconds_per_epoch": EPOCH / rate,
                    "gflop_per_image": flop[side.model] / 1e9,
                    "tflops": rate * flop[side.model] / 1e12,
                    "dense_tflops": dense,
                    "step_memory_mb": memory[side],
                }
            )
    return with_ratios(rows)


def with_ratios(rows: list[dict]) -> list[dict]:
    """Adds how many times faster each is than its model's first side in its precision, and the share of memory."""
    firsts: dict[tuple, dict] = {}
    for row in rows:
        first = firsts.setdefault((row["model"], row["precision"]), row)
        row["times_faster"] = first["seconds"] / row["seconds"]
        has_memory = first["step_memory_mb"] and row["step_memory_mb"] is not None
        row["memory_share"] = row["step_memory_mb"] / first["step_memory_mb"] if has_memory else None
    return rows


def show(rows: list[dict], title: str) -> None:
    table = Table(title=title)
    columns = {
        "images/s": lambda row: f"{row['images_per_sec']:,.0f}",
        "ms a step": lambda row: f"{1e3 * row['seconds']:.3g}",
        "from": lambda row: f"{1e3 * row['fastest']:.3g}",
        "to": lambda row: f"{1e3 * row['slowest']:.3g}",
        "s an epoch": lambda row: f"{row['seconds_per_epoch']:,.1f}",
        "times faster": lambda row: f"{row['times_faster']:.2f}",
        "TFLOP/s": lambda row: f"{row['tflops']:.3g}",
        "of dense": lambda row: f"{row['tflops'] / row['dense_tflops']:.0%}",
        "step MB": lambda row: "" if row["step_memory_mb"] is None else f"{row['step_memory_mb']:,.0f}",
    }
    for name in ("model", "side", "precision"):
        table.add_column(name)
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row["model"], row["side"], row["precision"], *(cell(row) for cell in columns.values()))
    Console(width=150).print(table)


def draw(rows: list[dict], title: str) -> Figure:
    """A bar a side: images a second, from slowest to fastest reading, with the ratio to the model's first side."""
    figure = new_figure(PAGE, 0.9 + 0.24 * len(rows))
    figure.suptitle(title)
    ax = figure.subplots()
    models = list(dict.fromkeys(row["model"] for row in rows))
    ordered = sorted(rows, key=lambda row: models.index(row["model"]))
    for place, row in enumerate(ordered):
        rate, ends = row["images_per_sec"], [row["batch_size"] / row[end] for end in ("slowest", "fastest")]
        ax.barh(place, rate, height=0.7, color=COLORS[models.index(row["model"])])
        ax.errorbar(rate, place, xerr=[[rate - ends[0]], [ends[1] - rate]], color="black", capsize=3, linewidth=1)
        ax.text(ends[1], place, f"  {rate:,.0f}  ({row['times_faster']:.2f} x)", va="center")
    ax.set_yticks(range(len(ordered)), [f"{row['model']}, {row['side']}, {row['precision']}" for row in ordered])
    ax.invert_yaxis()
    ax.set_xlim(0, 1.3 * max(row["batch_size"] / row["fastest"] for row in rows))
    ax.set_xlabel("training images a second; in brackets: times as fast as the model's first side in that precision")
    style_axes(ax, "x")
    return figure


def main(options: Options) -> None:
    device = pick_device(options.device)
    if min(options.batch_size, options.repeats, options.steps or 1) < 1 or not options.models:
        raise UserError("batch-size, repeats and steps must be at least 1, and there must be a model to measure")
    if device.type == "cpu":
        tune_cpu_allocator()
    rows = measure(options, device)
    place, machine = machine_of(device)
    kept = ", memory kept by glibc as in training" if device.type == "cpu" else ""
    title = f"Training at batch {options.batch_size}: {machine}{kept}"
    show(rows, title)
    batch = "" if options.batch_size == 32 else f"_batch{options.batch_size}"
    table = pd.DataFrame([{"machine": machine} | row for row in rows])
    path = options.output_dir / f"train_speed_{place}{batch}.csv"
    print(*write_results(table, draw(rows, title), path), sep="\n")


if __name__ == "__main__":
    run_script(main, __doc__)
