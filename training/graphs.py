"""A training step as one CUDA graph: a GPU gets it at once, instead of kernel by kernel from a host that is slower.

At the batch sizes of the CIFAR protocol, a host needs several times as long to launch the kernels of a step as a GPU to
run them (benchmarks/train_speed.py). PyTorch's documentation of `torch.cuda.graph` has the rules: what a captured step
reads and writes stays where it is, nothing waits for the device, random numbers are the device's.
"""

import contextlib
import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from training.config import UserError
from training.device import is_out_of_memory
from training.metrics import Items

WARM_UP = 3  # steps of a shape before it is captured: they make the optimizer's state and PyTorch's own, and compile

Counts = dict[str, Tensor | Items]
Step = Callable[[Tensor, Tensor], tuple[Tensor, Counts]]
"""forward, backward and optimizer step on inputs and targets -> whether all was finite, and what is counted"""


class StepGraphs:
    """Runs training steps: the first of each shape as they are, then from a graph captured of that shape.

    Learning rates lie on the device in both, so that a replay reads the rate of its step and both round alike.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device):
        self.optimizer = optimizer
        self.rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self.stream = torch.cuda.Stream(device)
        self.seen: Counter[Hashable] = Counter()
        self.replays: dict[Hashable, Step] = {}

    def run(self, step: Step, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Counts]:
        """The step's results, which stay as they are in later steps. Raises UserError if it cannot be captured."""
        shape = (inputs.shape, inputs.dtype, targets.shape, targets.dtype)
        self.seen[shape] += 1
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        if self.seen[shape] <= WARM_UP:
            return self._run_as_it_is(step, inputs, targets)
        if shape not in self.replays:
            self.replays[shape] = self._capture(step, inputs, targets)
        return self.replays[shape](inputs, targets)

    def _run_as_it_is(self, step: Step, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Counts]:
        """On the stream of the captures, since autograd remembers where it first met a weight."""
        current = torch.cuda.current_stream(inputs.device)
        self.stream.wait_stream(current)
        self.optimizer.zero_grad()  # a captured step leaves its gradients
        with torch.cuda.stream(self.stream), self._rates_on_device():
            results = step(inputs, targets)
        current.wait_stream(self.stream)
        self.optimizer.zero_grad()
        return results

    def _capture(self, step: Step, inputs: Tensor, targets: Tensor) -> Step:
        """Records the step, which runs nothing, and returns its replay."""
        inputs, targets = inputs.clone(), targets.clone()
        graph, drawn_before = torch.cuda.CUDAGraph(), _random_state_of_host()
        generator = torch.cuda.default_generators[self.stream.device_index]
        state = generator.clone_state()
        self.optimizer.zero_grad()  # the graph makes gradients of its own
        capture = torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local")
        try:
            with torch.cuda.stream(self.stream), self._rates_on_device(), capture:
                results = step(inputs, targets)
        except RuntimeError as error:
            generator.graphsafe_set_state(state)  # its own still takes part in the capture
            first = error.__context__ or error  # the end of a capture that failed is an error, too
            if is_out_of_memory(first):
                raise first from None
            raise UserError(_not_captured(str(first).partition("\n")[0])) from first
        if _random_state_of_host() != drawn_before:
            raise UserError(_not_captured("it draws random numbers on the CPU"))

        def replay(new_inputs: Tensor, new_targets: Tensor) -> tuple[Tensor, Counts]:
            inputs.copy_(new_inputs)
            targets.copy_(new_targets)
            graph.replay()
            finite, counts = results
            return finite.clone(), {name: _copy(count) for name, count in counts.items()}

        return replay

    @contextlib.contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        """Inside, the optimizer reads its learning rates from the device."""
        groups = self.optimizer.param_groups
        before = [{key: group[key] for key in ("lr", "capturable") if key in group} for group in groups]
        for group, rate, kept in zip(groups, self.rates, before, strict=True):
            group.update({"lr": rate} | ({"capturable": True} if "capturable" in kept else {}))
        try:
            yield
        finally:
            for group, kept in zip(groups, before, strict=True):
                group.update(kept)


def _copy(count: Tensor | Items) -> Tensor | Items:
    return Items(count.rows.clone()) if isinstance(count, Items) else count.clone()


def _random_state_of_host() -> tuple[Any, ...]:
    """States of the CPU's generators, to be compared."""
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), str(np.random.get_state())


def _not_captured(reason: str) -> str:
    return (
        f"the training step cannot become a CUDA graph: {reason}. Add --no-cuda-graph, which launches each step kernel "
        "by kernel; docs/extending.md says what a step may do in a graph"
    )
