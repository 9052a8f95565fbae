"""Several processes that train one run, as torchrun starts them: rank, shares of a batch, sums, the one that writes.

Every process holds the whole model and takes its share of each batch; DistributedDataParallel averages the gradients.
The main process (rank 0) alone prints and writes. Without torchrun's environment variables there is one process, and
nothing here costs anything.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from training.config import UserError
from training.ending import Watch

FROM_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = timedelta(hours=2)  # of one wait: the main process may download data meanwhile

_watch: Watch | None = None  # as PyTorch's process group, one a process


def count() -> int:
    """Number of processes that train together."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in FROM_TORCHRUN) else 1


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def local_rank() -> int:
    """Number of this process among those of its machine, from 0: the GPU it takes."""
    return int(os.environ["LOCAL_RANK"]) if count() > 1 else 0


def local_count() -> int:
    """Number of processes on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if count() > 1 else 1


def is_main() -> bool:
    """Whether this process prints and writes."""
    return rank() == 0


# ---------------------------------------------------------------------------- together, from the start to the end


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Inside, the processes train together: collectives work, and an early end of one ends all with its exit code.

    An error that leaves this context ends the process. Only the main process has a stdout. Nothing happens for a single
    process, or inside another such context.
    """
    global _watch
    if count() == 1 or dist.is_initialized():
        yield
        return
    store = _start_group()
    _watch = Watch(store, rank(), count())
    try:
        with quiet():
            yield
            barrier()
    except BaseException as error:  # SystemExit and KeyboardInterrupt too
        _watch.end(error)
    _watch.stop()
    dist.destroy_process_group()


def _start_group() -> dist.Store:
    """Returns when all processes have come. GPUs use NCCL, CPUs gloo."""
    store, *_ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank(), world_size=count(), timeout=TIMEOUT)
    return store


def leave() -> None:
    """Makes the main process a single one, when the others have ended."""
    for name in FROM_TORCHRUN:
        os.environ.pop(name, None)


def may_report(code: int) -> bool:
    """Announces the end of this process with that exit code; whether it is the first to end, and so says why."""
    return _watch is None or _watch.announce(code)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, only the main process has a stdout."""
    if is_main():
        yield
        return
    with Path(os.devnull).open("w", encoding="utf-8") as null, contextlib.redirect_stdout(null):
        yield


def no_bar() -> bool | None:
    """tqdm's `disable`: only the main process shows a bar, and only on a terminal."""
    return None if is_main() else True


def check_batch_size(batch_size: int) -> None:
    """Raises UserError if the processes cannot share a batch equally."""
    if batch_size % count():
        raise UserError(
            f"--batch-size {batch_size} is the batch of all processes together, and {count()} processes do not divide "
            f"it: choose a multiple of {count()}, or another --nproc-per-node"
        )


def refusal(what: str) -> str | None:
    """The message for a command that starts processes itself, if torchrun has started several of it."""
    if count() == 1:
        return None
    return (
        f"{what} starts its runs itself: start it with python, and add --nproc-per-node {count()} for that many "
        "processes in each run"
    )


# ---------------------------------------------------------------------------- shares of a batch


def share(n: int) -> slice:
    """This process's part of a batch of n samples; where n does not divide, the first processes take one more."""
    return shares(n)[rank()]


def shares(n: int) -> list[slice]:
    """The parts of all processes, in order; the last ones are empty if n is below their number."""
    each, more = divmod(n, count())
    ends = [k * each + min(k, more) for k in range(count() + 1)]
    return [slice(*part) for part in pairwise(ends)]


def share_with_partners(n: int) -> tuple[list[slice], slice]:
    """Rows of a batch of n that hold this process's share and its mirror image, and where in them the share lies.

    For augmentations that mix a sample with the one at the mirrored place of its batch: the rows reversed are again
    each one's partner.
    """
    mine = share(n)
    if mine.start == mine.stop:
        return [mine], slice(0, 0)
    mirrored = slice(n - mine.stop, n - mine.start)
    low, high = sorted((mine, mirrored), key=lambda part: part.start)
    length = mine.stop - mine.start
    if high.start > low.stop:
        first = 0 if mine.start == low.start else length
        return [low, high], slice(first, first + length)
    first = mine.start - low.start
    return [slice(low.start, high.stop)], slice(first, first + length)


# ---------------------------------------------------------------------------- sums and messages


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        return _all_reduced(value)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _all_reduced(gradient)


def total(value: Tensor) -> Tensor:
    """The sum over all processes, on each of them, on the device. Differentiable: each value's gradient is that of the
    sum of all processes' results."""
    return value if count() == 1 else _Total.apply(value)


def once(value: Tensor) -> Tensor:
    """The value in the main process, 0 in the others: counted once when summed over processes."""
    return value if is_main() else torch.zeros_like(value)


def smallest(value: Tensor) -> Tensor:
    """The smallest value of all processes, on each of them."""
    return value if count() == 1 else _all_reduced(value, dist.ReduceOp.MIN)


def _all_reduced(value: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    result = value.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, operation)
    return result


def barrier() -> None:
    """Waits for all processes."""
    total(torch.zeros(()))


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank, on each of them. value: anything that pickles, tensors on the CPU."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def from_main(call: Callable[[], Any]) -> Any:
    """What the call returns in the main process, which alone makes it."""
    if count() == 1:
        return call()
    box = [call() if is_main() else None]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The main process runs the block before the others: it downloads what they then find."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def copy_buffers(module: torch.nn.Module) -> None:
    """Gives every process the main process's buffers, such as BatchNorm's running statistics."""
    if count() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)
