"""What the benchmarks share: sides measured in turns, the spread of times, the memory of a step."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from analysis.plotting.style import save_figure
from training.device import describe_hardware

Precision = Literal["float32", "tf32", "bf16"]
S, T = TypeVar("S"), TypeVar("T")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes lines of its own at every start and stop


def machine_of(device: torch.device) -> tuple[str, str]:
    """What was measured on, for names of files ("cpu_2threads") and in words; the words name PyTorch's version, too."""
    about = describe_hardware(device)
    words = f"{about['name']}, PyTorch {torch.__version__}"
    if "threads" in about:
        return f"{device.type}_{about['threads']}threads", f"{about['threads']} threads of {words}"
    return "_".join(about["name"].lower().split()), words


def write_results(table: pd.DataFrame, figure: Figure, path: Path) -> tuple[Path, Path, Path]:
    """The table as CSV, and the figure of the same name as PNG and SVG; returns the files. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)
    return path, *save_figure(figure, path.with_suffix(".png"))


def in_turns(sides: dict[str, S], run: Callable[[S], T], repeats: int, warm_up: float = 0.0) -> dict[str, list[T]]:
    """What run gives for each side, repeats times; in turns, so that a machine that slows down slows all sides.

    warm_up: seconds of turns that do not count, before those that do.
    """
    results: dict[str, list[T]] = {name: [] for name in sides}
    started = time.perf_counter()
    while sides and time.perf_counter() - started < warm_up:
        for side in sides.values():
            run(side)
    for _ in range(repeats):
        for name, side in sides.items():
            results[name].append(run(side))
    return results


def seconds_of(step: Callable[[], object]) -> float:
    """How long one step takes."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def spread(times: list[float]) -> dict[str, float]:
    """Median, fastest and slowest of these times, in seconds."""
    return {"seconds": float(np.median(times)), "fastest": min(times), "slowest": max(times)}


def step_memory_mb(step: Callable[[], object], device: torch.device) -> float | None:
    """Most memory that the tensors of one step hold at once, in MB, above what is held before it."""
    step()  # once for what is made at the first step and kept
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    return float(_held_on_cpu(step)[0].max()) / 1e6 if device.type == "cpu" else None


def kept_memory_mb(forward: Callable[[], object], device: torch.device) -> float | None:
    """Memory that forward's result and what it keeps for backward hold when forward is done, in MB."""
    forward()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        result = forward()
        kept = torch.cuda.memory_allocated(device) - before
        del result
        return kept / 1e6
    return float(_held_on_cpu(forward)[0][-1]) / 1e6 if device.type == "cpu" else None


def _held_on_cpu(step: Callable[[], object]) -> tuple[np.ndarray, object]:
    """Bytes held after each allocation and each release while step runs, and its result, which keeps its tensors."""
    with torch.profiler.profile(profile_memory=True) as profile:
        result = step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]), result
