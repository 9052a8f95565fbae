"""Time and memory of a Vision-BDH training step, compared with the reference implementation.

The reference multiplies x, broadcast over the heads, with the stacked (H, D, N) weights, as the equations are written.
"products alone" does only the matrix products of a step. All sides run in one process, in turns. On a Linux CPU
everything is measured in two processes: with glibc's default memory allocation and with that of training. Run nothing
else on the machine meanwhile.

    python benchmarks/step_time.py
    python benchmarks/step_time.py --batch-size 256 --precisions bf16 --compile --profile
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
import torch
from torch import Tensor

from benchmarks.measure import Precision, TimedOptions, changed, in_full, machine_of, measure_steps, write_results
from benchmarks.training_steps import IMPLEMENTATIONS, Batch, StackedReference, training_step
from models.vision_bdh import VisionBDH, VisionBDHConfig, v2_config
from training.command_line import run_script
from training.device import (
    has_fast_bf16,
    pick_device,
    product_dtype,
    set_precision,
    synchronize,
    tune_cpu_allocator,
    warn_of_precision,
)


@dataclass(frozen=True, kw_only=True)
class Options(TimedOptions):
    """What to measure; the model is v2 at full size."""

    batch_size: int = 32
    """images a step"""
    precisions: tuple[Precision, ...] | None = None
    """matmul precisions; default: float32, and bf16 where that is faster"""
    compile: bool = False
    """also measure the reference and the fast step with torch.compile"""
    profile: bool = False
    """print the time of a fast step by operation"""


def constant_batch(batch_size: int, device: torch.device) -> Iterator[Batch]:
    """The same random images at every step, so that only the model is measured."""
    images = torch.randn(batch_size, 3, 32, 32, device=device)
    return repeat((images, torch.randint(0, 10, (batch_size,), device=device)))


def products_alone(
    config: VisionBDHConfig, batch_size: int, precision: Precision, device: torch.device
) -> Callable[[], None]:
    """The matrix products of a step's levels, forward and backward, on separate tensors for each level."""
    set_precision(precision, device)
    dtype = product_dtype(precision)
    B, T, D, H, N = batch_size, math.prod(config.grid), config.n_embd, config.n_head, config.n_neurons
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


def measure(options: Options, allocation: str) -> list[dict]:
    """A row for each precision and side. allocation: of memory; "training" sets it for this process."""
    device = pick_device(options.device)
    if allocation == "training" and not tune_cpu_allocator():
        return []
    compiled = {"reference, compiled": StackedReference, "fast, compiled": VisionBDH} if options.compile else {}
    rows = []
    for precision in options.precisions or ("float32", *["bf16"] * has_fast_bf16(device)):
        steps = {}
        for side, build in (IMPLEMENTATIONS | compiled).items():
            torch.manual_seed(0)
            batches = constant_batch(options.batch_size, device)
            steps[side] = in_full(
                training_step(build(v2_config()), batches, precision, device, side in compiled), 1, device
            )
        steps["products alone"] = products_alone(v2_config(), options.batch_size, precision, device)
        shared = {"allocation": allocation, "precision": precision, "batch_size": options.batch_size}
        measured = measure_steps(steps, device, options.repeats)
        rows += [shared | {"side": side} | numbers for side, numbers in measured.items()]
        if options.profile:
            _print_profile(steps["fast"], device, f"fast, {precision}, allocation: {allocation}")
    return rows


def _print_profile(step: Callable[[], None], device: torch.device, title: str) -> None:
    with torch.profiler.profile() as profile:
        step()
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(f"\n{title}\n{profile.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=40)}", flush=True)


def measure_allocations(options: Options) -> list[dict]:
    """Rows of both allocations on a CPU, each from its own process, as an allocation cannot be undone."""
    if pick_device(options.device).type != "cpu":
        return measure(options, "PyTorch")
    rows = []
    for allocation in ("default", "training"):
        with get_context("spawn").Pool(1) as pool:
            rows += pool.apply(measure, (options, allocation))
    return rows


def with_ratios(rows: list[dict]) -> pd.DataFrame:
    """Adds how many times faster than two references: of the same process and precision, and of the first row."""
    references = {(row["allocation"], row["precision"]): row["seconds"] for row in rows if row["side"] == "reference"}
    table = pd.DataFrame(rows)
    table["times_faster"] = [references[row["allocation"], row["precision"]] / row["seconds"] for row in rows]
    table["times_faster_than_first"] = rows[0]["seconds"] / table["seconds"]
    return table


def main(options: Options) -> None:
    for precision in options.precisions or ():
        warn_of_precision(precision, pick_device(options.device))
    table = with_ratios(measure_allocations(options))
    place, machine = machine_of(pick_device(options.device))
    print(f"v2 training step: {machine}\n{table.to_string(index=False, float_format='{:.3f}'.format)}")
    path = options.output_dir / f"step_time_{place}{changed(options, 'batch_size', 'compile')}.csv"
    print(*write_results(table.assign(machine=machine), path))


if __name__ == "__main__":
    run_script(main, __doc__)
