"""Training speed on this device: v2 in each of its implementations, ViT-Tiny and ResNet-20.

A step is that of fit(): augmentation on the device, forward, loss, backward, clip, AdamW. All sides of a precision are
measured in one process, in turns. TFLOP/s count the products that a model needs, once, without recomputation; "% of
dense" is their share of a large matrix product's rate in the same precision. Seconds an epoch: 40,000 training images,
without validation. Run nothing else on the machine meanwhile.

    python benchmarks/train_speed.py
    python benchmarks/train_speed.py --precisions bf16 --batch-size 256 --models v2
"""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from analysis.plotting.style import COLORS, PAGE, new_figure, style_axes
from benchmarks.measure import (
    Precision,
    TimedOptions,
    changed,
    in_full,
    machine_of,
    measure_steps,
    seconds_of,
    write_results,
)
from benchmarks.training_steps import IMPLEMENTATIONS, made_up_batches, training_step
from models.baselines import ResNet20Config, ViTConfig
from models.flops import flop_per_image
from models.vision_bdh import v2_config
from training.command_line import run_script
from training.device import has_fast_bf16, prepare_device, product_dtype, warn_of_precision

EPOCH = 40_000  # training images of the CIFAR protocol
Name = Literal["v2", "vit_tiny", "resnet20"]


@dataclass(frozen=True, kw_only=True)
class Options(TimedOptions):
    """What to measure."""

    models: tuple[Name, ...] = ("v2", "vit_tiny", "resnet20")
    """models, at the sizes of their CIFAR-10 scripts"""
    precisions: tuple[Precision, ...] | None = None
    """matmul precisions; default: tf32 and bf16 on CUDA, elsewhere float32, and bf16 where that is faster"""
    batch_size: int = 32
    """images a step"""
    compile: bool | None = None
    """also measure torch.compile; default: on CUDA"""
    steps: int | None = None
    """steps of a reading; default: 50 on CUDA, 1 elsewhere"""


@dataclass(frozen=True)
class Side:
    """One way to train one model."""

    model: Name
    name: str
    build: Callable[[], nn.Module]
    compiled: bool = False
    graph: bool = False


def sides_of(models: tuple[Name, ...], compiled: bool, graphs: bool) -> list[Side]:
    """Each model's sides; the others are compared with its first. graphs: also those of fit() as CUDA graphs."""
    everything = [
        *(Side("v2", name, lambda build=build: build(v2_config())) for name, build in IMPLEMENTATIONS.items()),
        Side("v2", "plain, compiled", lambda: v2_config().build(), compiled=True),
        Side("vit_tiny", "eager", lambda: ViTConfig().build()),
        Side("vit_tiny", "compiled", lambda: ViTConfig().build(), compiled=True),
        Side("resnet20", "eager", lambda: ResNet20Config().build()),
        Side("resnet20", "compiled", lambda: ResNet20Config().build(), compiled=True),
    ]
    sides = [side for side in everything if side.model in models and (compiled or not side.compiled)]
    alone = ("reference", "fast, --recompute")
    for side in list(sides) if graphs else ():
        if side.name not in alone:
            graphed = dataclasses.replace(side, name=f"{side.name}, CUDA graph", graph=True)
            sides.insert(sides.index(side) + 1, graphed)
    return sides


def dense_tflops(precision: Precision, device: torch.device) -> float:
    """Rate of a large square matrix product in that precision: the best of ten."""
    size = 8192 if device.type == "cuda" else 2048
    dtype = product_dtype(precision)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = in_full(lambda: left @ right, 1, device)
    return 2 * size**3 / min(seconds_of(product) for _ in range(10)) / 1e12


def measure(options: Options, device: torch.device) -> list[dict]:
    """A row for each side and precision."""
    on_cuda = device.type == "cuda"
    precisions = options.precisions or ("tf32" if on_cuda else "float32", *["bf16"] * has_fast_bf16(device))
    sides = sides_of(options.models, on_cuda if options.compile is None else options.compile, graphs=on_cuda)
    first = {name: next(side for side in sides if side.model == name) for name in options.models}
    flop = {name: flop_per_image(side.build(), img_size=32) for name, side in first.items()}
    n_steps = options.steps or (50 if on_cuda else 1)
    rows = []
    for precision in precisions:
        steps = {}
        for side in sides:
            torch.manual_seed(0)
            batches = made_up_batches(options.batch_size, img_size=32, n_classes=10, device=device)
            steps[side] = training_step(side.build(), batches, precision, device, side.compiled, graph=side.graph)
        measured = measure_steps(steps, device, options.repeats, n_steps)
        dense = dense_tflops(precision, device)
        for side, numbers in measured.items():
            rate = options.batch_size / numbers["seconds"]
            row = {"precision": precision, "model": side.model, "side": side.name, "batch_size": options.batch_size}
            row |= numbers | {"images_per_sec": rate, "seconds_per_epoch": EPOCH / rate}
            row |= {"gflop_per_image": flop[side.model] / 1e9, "tflops": rate * flop[side.model] / 1e12}
            rows.append(row | {"dense_tflops": dense})
    return with_ratios(rows)


def with_ratios(rows: list[dict]) -> list[dict]:
    """Adds the speed and memory relative to the model's first side in the same precision."""
    firsts: dict[tuple, dict] = {}
    for row in rows:
        first = firsts.setdefault((row["model"], row["precision"]), row)
        row["times_faster"] = first["seconds"] / row["seconds"]
        has_memory = first["step_memory_mb"] and row["step_memory_mb"] is not None
        row["memory_share"] = row["step_memory_mb"] / first["step_memory_mb"] if has_memory else None
    return rows


def show(rows: list[dict], title: str) -> None:
    """Prints the table."""
    table = pd.DataFrame(rows)
    shown = table[["model", "side", "precision"]].assign(**{"images/s": table["images_per_sec"]})
    for name, column in {"ms a step": "seconds", "fastest": "fastest", "slowest": "slowest"}.items():
        shown[name] = 1e3 * table[column]
    columns = {"s an epoch": "seconds_per_epoch", "times faster": "times_faster", "TFLOP/s": "tflops"}
    shown = shown.assign(**{name: table[column] for name, column in columns.items()})
    shown["% of dense"] = 100 * table["tflops"] / table["dense_tflops"]
    shown["step MB"] = table["step_memory_mb"]
    print(title, shown.to_string(index=False, na_rep="", float_format="{:,.4g}".format), sep="\n")


def draw(rows: list[dict], title: str) -> Figure:
    """A bar for each side: images a second from slowest to fastest reading, and the ratio to the model's first side."""
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
    ax.set_xlabel("training images a second; in brackets: speed relative to the model's first side in that precision")
    style_axes(ax, "x")
    return figure


def main(options: Options) -> None:
    device = prepare_device(options.device)
    for precision in options.precisions or ():
        warn_of_precision(precision, device)
    rows = measure(options, device)
    place, machine = machine_of(device)
    title = f"Training at batch {options.batch_size}: {machine}"
    show(rows, title)
    table = pd.DataFrame([{"machine": machine} | row for row in rows])
    path = (
        options.output_dir
        / f"train_speed_{place}{changed(options, 'models', 'precisions', 'batch_size', 'compile')}.csv"
    )
    print(*write_results(table, path, draw(rows, title)), sep="\n")


if __name__ == "__main__":
    run_script(main, __doc__)
