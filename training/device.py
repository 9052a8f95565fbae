"""The device: selection, precision, memory."""

import contextlib
import ctypes
import math
import os
import platform
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch.amp import GradScaler

from training import processes
from training.config import UserError

CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # cgroup 2 and 1

try:
    import resource  # Unix only
except ImportError:
    resource = None


def pick_device(name: str) -> torch.device:
    """The device `name`; "auto" takes CUDA, else Apple's MPS, else the CPU. Raises UserError if it is not available.

    Of several processes, each takes a GPU of its own, or all the CPU.
    """
    if processes.count() > 1:
        return _pick_own(name)
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is not a device: use auto, cuda, cuda:1, mps or cpu") from None
    if not available.get(device.type, False):
        raise UserError(
            f"--device {name}: PyTorch {torch.__version__} finds no such device. "
            "Leave --device out to take the best one available, or check the driver and the PyTorch build"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, numbered from 0")
    return device


def _pick_own(name: str) -> torch.device:
    """The device of one of several processes."""
    n_gpus, n_here = torch.cuda.device_count(), processes.local_count()
    if name == "auto":
        name = "cuda" if n_gpus else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if name != "cuda":
        raise UserError(f"--device {name} is not for several processes: use auto, cuda (a GPU for each process) or cpu")
    if n_gpus < n_here:
        raise UserError(f"{n_here} processes on this machine need as many GPUs, there are {n_gpus}: --nproc-per-node")
    device = torch.device("cuda", processes.local_rank())
    torch.cuda.set_device(device)
    return device


def prepare_device(name: str, say: Callable[[str], None] = lambda line: None) -> torch.device:
    """The device, as `pick_device`; on a CPU with memory allocation for training, which `say` is told of."""
    device = pick_device(name)
    if device.type == "cpu" and tune_cpu_allocator():
        say("CPU: glibc keeps freed memory for the next step (mallopt; see benchmarks/step_time.py)")
    return device


def tune_cpu_allocator() -> bool:
    """Makes glibc keep freed memory for the next large tensor; returns whether that worked.

    By default glibc returns every large tensor to the system and page-faults it in again, which costs much of a
    training step on a CPU (benchmarks/step_time.py measures both).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
        ctypes.CDLL(None).gnu_get_libc_version  # noqa: B018 (glibc only; the option numbers below are its own)
    except (AttributeError, OSError, TypeError):
        return False
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    settings = ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 2**28))
    return all(mallopt(option, value) for option, value in settings)


BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86, x86, ARM
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def product_dtype(precision: str) -> torch.dtype:
    """The type of the factors of matrix products in that precision."""
    return AUTOCAST.get(precision, torch.float32)


def set_precision(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Sets the precision of float32 matmuls; returns the (re-usable) autocast context for forward passes.

    Raises UserError for fp16 on a device where `make_scaler` is not known to work.
    """
    if precision == "fp16" and device.type == "mps":
        raise UserError("--precision fp16 is for CUDA: use bf16 or float32 on mps")
    if device.type == "cuda":
        tf32 = precision != "float32"
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
    return torch.autocast(device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST)


def make_scaler(precision: str, device: torch.device) -> GradScaler:
    """Scales the loss in fp16, so that small gradients do not vanish; in every other precision it does nothing.

    The scale starts at 2^16. Steps whose gradients overflow are skipped and halve it, 2,000 good steps in a row double
    it. Gradients are averaged over processes before they are looked at, so all processes decide alike.
    """
    return GradScaler(device.type, enabled=precision == "fp16")


def effective_precision(precision: str, device: torch.device) -> str:
    """The precision that is really used: TF32 exists on CUDA only."""
    return "float32" if precision == "tf32" and device.type != "cuda" else precision


def has_fast_bf16(device: torch.device) -> bool:
    """Whether matmuls in bf16 are faster than in float32: on CUDA, and on CPUs with bf16 instructions."""
    if device.type == "cpu":
        return bool(_cpu_flags() & BF16_INSTRUCTIONS)
    return device.type == "cuda"


def warn_of_precision(precision: str, device: torch.device, say: Callable[[str], None] = print) -> None:
    """Tells `say` if this CPU can only imitate the precision: a product takes 100 times that of float32."""
    if device.type != "cpu":
        return
    if precision == "fp16":
        say("--precision fp16 is for GPUs: on a CPU it is many times slower than float32")
    elif precision == "bf16" and _cpu_flags() and not has_fast_bf16(device):
        say("this CPU has no bf16 instructions: bf16 takes about 100 times as long as --precision float32")


def synchronize(device: torch.device) -> None:
    """Waits for the device, so that a clock read next is meaningful."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def fits_in_memory(n_bytes: int, device: torch.device) -> bool:
    """Whether data of that size take at most half of the memory: the free memory of a GPU, all memory of a host."""
    if device.type == "cuda":
        return n_bytes <= torch.cuda.mem_get_info(device)[0] / 2
    return n_bytes <= host_memory() / 2 / processes.local_count()


def host_memory() -> float:
    """Bytes of memory that this process may use: the host's, or a container's limit if that is lower."""
    if not hasattr(os, "sysconf"):  # Windows
        return math.inf
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # not in a container; "max" is no limit
            limits.append(int(Path(path).read_text(encoding="ascii")))
    return min(limits)


def cpu_count() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MB: tensors on a GPU (since the last reset), the whole process on a CPU; NaN where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if resource is None:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: Python and CUDA have an exception class for it, PyTorch's CPU and MPS only say so."""
    words = ("out of memory", "can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(each in str(error) for each in words)


def describe_hardware(device: torch.device) -> dict:
    """The hardware as config.json records it."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"device": "cuda", "name": properties.name, "memory_gb": round(properties.total_memory / 1e9, 1)}
    return {"device": device.type, "name": _cpu_name(), "threads": torch.get_num_threads()}


def _cpu_name() -> str:
    return _cpu_info().get("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    """Instruction sets of the CPU; empty where the system does not list them."""
    about = _cpu_info()  # "flags" on x86, "Features" on ARM
    return {flag for key in ("flags", "Features") for flag in about.get(key, "").split()}


@cache
def _cpu_info() -> dict[str, str]:
    """The first processor in Linux's /proc/cpuinfo; empty elsewhere."""
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
        return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    return {}
