"""The device: which one, how it computes, what it has used."""

import contextlib
import ctypes
import os
import platform
import resource
import sys
from pathlib import Path

import torch

from training.config import UserError


def pick_device(name: str) -> torch.device:
    """The device called name; "auto" takes CUDA, else Apple's MPS, else the CPU. Raises UserError if there is none."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is no device: use auto, cuda, cuda:1, mps or cpu") from None
    if not available.get(device.type, False):
        raise UserError(
            f"--device {name}: PyTorch {torch.__version__} finds no such device here. "
            "Leave --device out to take the best one there is, or check the driver and the PyTorch build"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, numbered from 0")
    return device


def tune_cpu_allocator() -> bool:
    """Makes glibc keep freed memory for the next large tensor; returns whether it does now.

    As it comes, glibc gives every large tensor back to the system and faults it in anew, page by page, which on a CPU
    costs more than half of a plain training step (benchmarks/step_time.py shows both).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
        ctypes.CDLL(None).gnu_get_libc_version  # noqa: B018 (there only in glibc; the option numbers below are its own)
    except (AttributeError, OSError, TypeError):
        return False
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    settings = ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 2**28))
    return all(mallopt(option, value) for option, value in settings)


def set_precision(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Sets how float32 products are made; returns the autocast context for forward passes, to be entered many times."""
    if device.type == "cuda":
        tf32 = precision != "float32"
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def effective_precision(precision: str, device: torch.device) -> str:
    """What precision comes to on the device: TF32 is there on CUDA only."""
    return "float32" if precision == "tf32" and device.type != "cuda" else precision


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given, so that a clock read next tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def fits_in_memory(n_bytes: int, device: torch.device) -> bool:
    """Whether data of that size take at most half of the memory that is free where they would stay."""
    if device.type == "cuda":
        return n_bytes <= torch.cuda.mem_get_info(device)[0] / 2
    return n_bytes <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2  # of a CPU: half of all there is


def peak_memory_mb(device: torch.device) -> float:
    """Most memory held so far, in MB: tensors on a GPU (since the last reset), the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether it says so: CUDA's has a class of its own, the CPU's and MPS's only their words."""
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(each in str(error) for each in words)


def describe_hardware(device: torch.device) -> dict:
    """What a reader of the results needs to know about the machine."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"device": "cuda", "name": properties.name, "memory_gb": round(properties.total_memory / 1e9, 1)}
    return {"device": device.type, "name": _cpu_name(), "threads": torch.get_num_threads()}


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
