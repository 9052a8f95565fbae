"""Shared by the benchmarks: checked options, timing in turns, memory of a step, output files."""

import dataclasses
import hashlib
import math
import os
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch._C._profiler import _EventType

from analysis.plotting.style import save_figure
from analysis.tables import write_csv
from training.config import ROOT
from training.device import describe_hardware, synchronize

Precision = Literal["float32", "tf32", "bf16", "fp16"]
S, T = TypeVar("S", bound=Hashable), TypeVar("T")
MAY_BE_0, MAY_BE_EMPTY = ("seed", "warm_up"), ("batch_sizes", "img_sizes", "multipliers", "depths")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keeps the profiler from printing at every start and stop


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Options of every benchmark. Raises ValueError for an empty list, a number below 1 or an infinite one."""

    device: str = "auto"
    """auto, cuda, cuda:1, mps or cpu"""
    output_dir: Path = ROOT / "results" / "benchmarks"
    """folder for the table and the figure"""

    def __post_init__(self):
        for name in (field.name for field in dataclasses.fields(self)):
            value = getattr(self, name)
            if value == () and name not in MAY_BE_EMPTY:
                raise ValueError(f"{name} is empty: give at least one value")
            for number in value if isinstance(value, tuple) else (value,):
                least = 0 if name in MAY_BE_0 else 1
                if isinstance(number, int | float) and not isinstance(number, bool) and not least <= number < math.inf:
                    raise ValueError(f"{name} = {number} must be at least {least}, and finite")


@dataclass(frozen=True, kw_only=True)
class TimedOptions(BenchmarkOptions):
    """Options of a benchmark that times its sides in turns."""

    repeats: int = 7
    """timed readings of each side, after the warm-up"""


def machine_of(device: torch.device) -> tuple[str, str]:
    """The machine in file names, as "cpu_2threads", and in words, with PyTorch's version."""
    about = describe_hardware(device)
    words = f"{about['name']}, PyTorch {torch.__version__}"
    if "threads" in about:
        n = about["threads"]
        return f"{device.type}_{n}threads", f"{n} thread{'s' * (n != 1)} of {words}"
    return "_".join(about["name"].lower().split()), words


def changed(options: Any, *names: str) -> str:
    """For a file name: those of the options that are not the default, as "_batch_size=256"; usually nothing.

    Where that is too long for a name, a hash stands for it.
    """
    values = {name: getattr(options, name) for name in names if getattr(options, name) != getattr(type(options), name)}
    words = {name: ",".join(map(str, value)) if isinstance(value, tuple) else value for name, value in values.items()}
    text = "".join(f"_{name}={value}" for name, value in words.items()).replace(" ", "")
    return text if len(text) <= 140 else f"_{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def write_results(table: pd.DataFrame, path: Path, figure: Figure | None = None) -> tuple[Path, ...]:
    """The table as CSV and a figure, with the same name, as PNG and SVG; returns the files. Makes the folder."""
    return write_csv(path, table), *(save_figure(figure, path.with_suffix(".png")) if figure else ())


def write_steps(name: str, table: pd.DataFrame, options: Any, device: torch.device) -> tuple[Path, str]:
    """Writes a table of training steps, with the machine; returns the file and the machine in words.

    options: with output_dir, and the batch_size and precision that all steps have.
    """
    machine, words = machine_of(device)
    path = options.output_dir / f"{name}_{machine}_{options.precision}{changed(options, 'batch_size')}.csv"
    write_results(table.assign(hardware=words, batch_size=options.batch_size), path)
    return path, words


# ---------------------------------------------------------------------------- time


def in_full(step: Callable[[], object], n_steps: int, device: torch.device) -> Callable[[], None]:
    """Several steps, including the wait until the device has finished them."""

    def steps() -> None:
        for _ in range(n_steps):
            step()
        synchronize(device)

    return steps


def in_turns(sides: dict[S, T], run: Callable[[T], object], repeats: int, warm_up: float = 0.0) -> dict[S, list]:
    """Results of run for each side, repeats times, in turns, so that a machine that slows down slows all sides.

    warm_up: seconds of untimed turns before.
    """
    results: dict[S, list] = {name: [] for name in sides}
    started = time.perf_counter()
    while sides and time.perf_counter() - started < warm_up:
        for side in sides.values():
            run(side)
    for _ in range(repeats):
        for name, side in sides.items():
            results[name].append(run(side))
    return results


def seconds_of(step: Callable[[], object]) -> float:
    """Duration of one step."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def spread(times: list[float], n_steps: int = 1) -> dict[str, float]:
    """Median, fastest and slowest of these times, in seconds a step. n_steps: steps in each time."""
    times = [seconds / n_steps for seconds in times]
    return {"seconds": float(np.median(times)), "fastest": min(times), "slowest": max(times)}


def measure_steps(
    steps: dict[S, Callable[[], object]], device: torch.device, repeats: int, n_steps: int = 1
) -> dict[S, dict[str, float | None]]:
    """Time and memory of each side's step. n_steps: steps in a reading."""
    memory = {side: step_memory_mb(in_full(step, 1, device), device) for side, step in steps.items()}  # warms up, too
    readings = in_turns({side: in_full(step, n_steps, device) for side, step in steps.items()}, seconds_of, repeats)
    return {side: spread(times, n_steps) | {"step_memory_mb": memory[side]} for side, times in readings.items()}


# ---------------------------------------------------------------------------- memory


def step_memory_mb(step: Callable[[], object], device: torch.device) -> float | None:
    """Peak memory of the tensors of one step, in MB, above what is allocated before. None if it cannot be measured."""
    step()  # allocates what later steps keep
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    return float(_held_on_cpu(step)[0].max()) / 1e6 if device.type == "cpu" else None


def kept_memory_mb(forward: Callable[[], object], device: torch.device) -> float | None:
    """Memory of forward's result and of what it keeps for the backward pass, in MB. None if it cannot be measured."""
    forward()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        result = forward()
        kept = torch.cuda.memory_allocated(device) - before
        del result
        return kept / 1e6
    return float(_held_on_cpu(forward)[0][-1]) / 1e6 if device.type == "cpu" else None


def _held_on_cpu(step: Callable[[], object]) -> tuple[np.ndarray, object]:
    """Bytes held after each allocation and release during step, and its result, which keeps its tensors alive.

    Blocks from before the step do not count when they are released: the profiler may report them with the size of
    another block, one that an earlier profile saw at the same address.
    """
    with torch.profiler.profile(profile_memory=True) as profile:
        result = step()
    sizes: dict[int, int] = {}  # by address
    held = [0]
    for address, n_bytes in _memory_events(profile.profiler.kineto_results.experimental_event_tree()):
        if n_bytes > 0:
            sizes[address] = n_bytes
        held.append(held[-1] + (n_bytes if n_bytes > 0 else -sizes.pop(address, 0)))
    return np.array(held), result


def _memory_events(tree: list) -> list[tuple[int, int]]:
    """Address and size of each allocation, negative for a release, in order of time. tree: of profiled events."""
    found, waiting = [], list(tree)
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    return [(address, n_bytes) for _, address, n_bytes in sorted(found)]
