"""Training-step time and memory of Vision-BDH against the plain stacked-weight implementation.

All sides run in one process, in turns, and every row states its ratio; on a Linux CPU everything is measured in two
processes, once with glibc's allocation as it comes and once as training sets it. The reference multiplies x, broadcast
over the heads, with the stacked (H, D, N) weights, the way the equations are first written down. --recompute keeps
little of a level for the backward pass and computes it again. "products alone" makes the matrix products of a step and
nothing else. Nothing else should run on the machine meanwhile.

    python benchmarks/step_time.py
    python benchmarks/step_time.py --batch-size 256 --precisions bf16 --compile --profile
"""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.measure import Precision, in_turns, seconds_of, spread, step_memory_mb
from benchmarks.training_steps import IMPLEMENTATIONS, Batch, StackedReference, in_full, training_step
from models.vision_bdh import VisionBDH, VisionBDHConfig, v2_config
from training.device import (
    describe_hardware,
    pick_device,
    set_precision,
    synchronize,
    tune_cpu_allocator,
)


@dataclass
class Options:
    """What to measure; the model is v2 at its full size."""

    device: str = "auto"
    """auto, cuda, mps or cpu"""
    batch_size: int = 32
    """images a step"""
    precisions: tuple[Precision, ...] = ("float32", "bf16")
    """of the products"""
    compile: bool = False
    """measure torch.compile of both sides too"""
    repeats: int = 7
    """steps of each side that count, after two that do not"""
    profile: bool = False
    """print where the time of a fast step goes, by operation"""
    allocation: Literal["both", "as-it-comes", "tuned"] = "both"
    """glibc's, on a Linux CPU; both: each in a process of its own"""
    output: Path | None = None
    """write the rows to this JSON file too"""
    table: bool = True
    """print the table"""


def constant_batch(options: Options, device: torch.device) -> Iterator[Batch]:
    """The same random images at every step: this benchmark is about the model."""
    images = torch.randn(options.batch_size, 3, 32, 32, device=device)
    return repeat((images, torch.randint(0, 10, (options.batch_size,), device=device)))


def products_alone(config: VisionBDHConfig, options: Options, precision: Precision) -> Callable[[], None]:
    """The matrix products of a step's levels, forward and backward, on tensors of their own for each level."""
    device = pick_device(options.device)
    set_precision(precision, device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    B, T, D, H, N = options.batch_size, math.prod(config.grid), config.n_embd, config.n_head, config.n_neurons
    weight = torch.randn(H, D, N, device=device, dtype=dtype)  # stands for encoder, encoder_v and decoder^T
    narrow = [torch.randn(1, B * T, D, device=device, dtype=dtype).expand(H, -1, -1) for _ in range(config.n_layer)]
    wide = [torch.randn(H, B * T, N, device=device, dtype=dtype) for _ in range(config.n_layer)]

    def forward(x: Tensor, h: Tensor) -> Tensor:
        q = h.view(H, B, T, N)
        torch.bmm(x, weight)  # encoder
        scores = q @ q.mT
        a = scores @ x[0].view(B, T, D)
        torch.bmm(a.view(H, B * T, D), weight)  # encoder_v
        torch.bmm(h, weight.mT)  # decoder
        return scores

    def backward(x: Tensor, h: Tensor, scores: Tensor) -> None:
        torch.bmm(h.mT, x)  # decoder's gradient
        torch.bmm(x, weight)
        da = torch.bmm(h, weight.mT)
        torch.bmm(da.mT, h)  # encoder_v's gradient
        da = da.view(H, B, T, D)
        (da @ x[0].view(B, T, D).mT) @ h.view(H, B, T, N)
        scores @ da
        torch.bmm(x.mT, h)  # encoder's gradient
        torch.bmm(h, weight.mT)

    def step() -> None:
        levels = [(x, h, forward(x, h)) for x, h in zip(narrow, wide, strict=True)]
        for level in reversed(levels):
            backward(*level)
        synchronize(device)

    return step


def measure(options: Options, tuned: bool) -> list[dict]:
    """Rows of one process: seconds of each side (median over steps made in turns) and the memory of a step."""
    device = pick_device(options.device)
    allocation = {True: "tuned", False: "as it comes"}[tuned] if device.type == "cpu" else "PyTorch's"
    rows = []
    for precision in options.precisions:
        compiled = {"reference, compiled": StackedReference, "plain, compiled": VisionBDH} if options.compile else {}
        sides = {}
        for side, build in (IMPLEMENTATIONS | compiled).items():
            torch.manual_seed(0)
            step = training_step(
                build(v2_config()), constant_batch(options, device), precision, device, compiled=side in compiled
            )
            sides[side] = in_full(step, 1, device)
        sides["products alone"] = products_alone(v2_config(), options, precision)
        memory = {side: step_memory_mb(step, device) for side, step in sides.items()}  # these steps warm up, too
        for side, times in in_turns(sides, seconds_of, options.repeats).items():
            row = {"device": device.type, "allocation": allocation, "precision": precision, "side": side}
            rows.append(row | spread(times) | {"step_memory_mb": memory[side]})
        if options.profile:
            _print_profile(sides["fast"], device, f"fast, {precision}, allocation {allocation}")
    return rows


def _print_profile(step: Callable[[], None], device: torch.device, title: str) -> None:
    with torch.profiler.profile() as profile:
        step()
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(f"\n{title}\n{profile.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=40)}")


def measure_allocations(options: Options) -> list[dict]:
    """Rows of both allocations on a Linux CPU, each from a process of its own: mallopt cannot be taken back."""
    if options.allocation != "both":
        return measure(options, tuned=options.allocation == "tuned" and tune_cpu_allocator())
    if pick_device(options.device).type != "cpu" or not sys.platform.startswith("linux"):
        return measure(options, tuned=False)
    rows = []
    for allocation in ("as-it-comes", "tuned"):
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "rows.json"
            own = ["--allocation", allocation, "--output", str(output), "--no-table"]
            subprocess.run([sys.executable, __file__, *sys.argv[1:], *own], check=True)
            rows += json.loads(output.read_text())["rows"]
    return rows


def show(rows: list[dict]) -> None:
    """The table. Speed-ups are against the reference of the same process and precision, and against the slowest start:
    the float32 reference of the first process, which is what a user without any of this would have.
    """
    reference = {(row["allocation"], row["precision"]): row["seconds"] for row in rows if row["side"] == "reference"}
    table = Table(title=f"v2 training step, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    for title in ("allocation", "precision", "side", "median s", "fastest to slowest", "step memory MB"):
        table.add_column(title, justify="left" if title in ("allocation", "precision", "side") else "right")
    table.add_column("times faster than\nreference beside it", justify="right")
    table.add_column(f"times faster than\n{rows[0]['precision']} reference,\n{rows[0]['allocation']}", justify="right")
    for row in rows:
        table.add_row(
            row["allocation"],
            row["precision"],
            row["side"],
            f"{row['seconds']:.3f}",
            f"{row['fastest']:.3f} to {row['slowest']:.3f}",
            "" if row["step_memory_mb"] is None else f"{row['step_memory_mb']:,.0f}",
            f"{reference[row['allocation'], row['precision']] / row['seconds']:.2f}",
            f"{rows[0]['seconds'] / row['seconds']:.2f}",
        )
    Console(width=160).print(table)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    rows = measure_allocations(options)
    if options.output:
        content = {"hardware": describe_hardware(pick_device(options.device)), "torch": torch.__version__, "rows": rows}
        options.output.write_text(json.dumps(content | {"batch_size": options.batch_size}, indent=2) + "\n")
    if options.table:
        show(rows)


if __name__ == "__main__":
    main()
