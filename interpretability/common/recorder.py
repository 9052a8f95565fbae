"""Records what happens inside a model during its own forward pass, without changing the result.

    with record(model, "scores", "x_sparse", levels=[0, 5]) as trace:
        logits = model(images)
    trace.scores(5)      # (B, H, T, T), attention of the sixth level, computed by this call
    trace.x_sparse(0)    # (B, H, T, N), neurons that the tokens themselves activate in the first level

Fast paths never hold scores or neurons as tensors, and asking a library's attention for its weights changes what it
computes. So hooks keep only the input of each level (and its output, if needed). The rest is computed from them on
request, one level at a time, with the model's current weights and in their precision.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from interpretability.common.adapters import ALL, Adapter, adapter_of
from models.bdh import Activity


@dataclass
class Trace:
    """The last forward pass at the recorded levels, counted from 0.

    Shapes: B images, T tokens (a class token first, if there is one), D width, H heads, N neurons per head.
    Every method raises LookupError for a quantity or a level that was not recorded.
    """

    adapter: Adapter
    names: tuple[str, ...]
    levels: tuple[int, ...]
    inputs: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)

    def x(self, level: int) -> Tensor:
        """(B, T, D), the level's input, after the norm if the model has one there. Do not modify it."""
        return self._recorded("x", self.inputs, level)

    def state(self, level: int) -> Tensor:
        """(B, T, D), the residual stream after the level. Do not modify it."""
        return self._recorded("state", self.outputs, level)

    @torch.no_grad()
    def scores(self, level: int, queries: slice = ALL, patches_only: bool = False) -> Tensor:
        """(B, H, T, T), attention of a level, query by key; with queries these rows only, (B, H, Q, T).

        BDH: signed raw scores, or softmax weights if the model uses softmax. ViT: softmax weights. patches_only: omit
        the class token (queries count from the first patch), so softmax weights of a query sum to less than 1.
        """
        x = self._recorded("scores", self.inputs, level)
        first = self.adapter.class_tokens if patches_only else 0
        start, stop, _ = queries.indices(x.shape[1] - first)
        with _no_autocast(x):
            return self.adapter.scores(level, x, slice(start + first, stop + first))[..., first:]

    def x_sparse(self, level: int) -> Tensor:
        """(B, H, T, N), neurons activated by the token itself."""
        return self._activity("x_sparse", level).x_sparse

    def y_sparse(self, level: int) -> Tensor:
        """(B, H, T, N), neurons activated by attention."""
        return self._activity("y_sparse", level).y_sparse

    def gated(self, level: int) -> Tensor:
        """(B, H, T, N), the decoder's input: x_sparse * y_sparse with the multiplicative gate."""
        return self._activity("gated", level).gated

    def activity(self, level: int) -> Activity:
        """x_sparse, y_sparse and gated for the cost of one; all three must be recorded."""
        for name in Activity._fields:
            self._recorded(name, self.inputs, level)
        return self._activity("gated", level)

    @torch.no_grad()
    def logits(self, level: int) -> Tensor:
        """(B, classes), the model's own norm, pooling and head applied to `state`.

        For a BDH with shared weights this is the output of the same model with that many levels, except under
        scaled_pre, whose last norm belongs to the trained depth.
        """
        state = self._recorded("logits", self.outputs, level)
        with _no_autocast(state):
            return self.adapter.logits(state)

    @torch.no_grad()
    def _activity(self, name: str, level: int) -> Activity:
        x = self._recorded(name, self.inputs, level)
        with _no_autocast(x):
            return self.adapter.activity(level, x)

    def _recorded(self, name: str, tensors: dict[int, Tensor], level: int) -> Tensor:
        if name not in self.names:
            raise LookupError(f"{name} was not recorded, only {', '.join(self.names)}: name it in record(model, ...)")
        if level not in tensors:
            raise LookupError(f"level {level} was not recorded, only {sorted(tensors)}")
        return tensors[level]

    def keep(self, tensors: dict[int, Tensor], level: int, tensor: Tensor) -> None:
        """Stores a tensor in `inputs` or `outputs`; called by the hooks."""
        if level in self.levels:
            tensors[level] = tensor.detach()


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.autocast(x.device.type, enabled=False)


@contextlib.contextmanager
def record(model: nn.Module, *names: str, levels: Iterable[int] | None = None) -> Iterator[Trace]:
    """Records forward passes inside the `with` block. The outputs are bit-identical to those without it.

    names: methods of `Trace` to be used afterwards; default: all that the model supports. levels: from 0; default: all.
    After several passes the trace holds the last one. The hooks are always removed. For a compiled model, pass the
    module that was compiled and run that. Raises TypeError for an unsupported model, ValueError for a level or a
    quantity that it does not have.
    """
    adapter = adapter_of(model)
    chosen = tuple(range(adapter.n_levels) if levels is None else levels)
    for level in chosen:
        if not 0 <= level < adapter.n_levels:
            raise ValueError(f"level {level} is not between 0 and {adapter.n_levels - 1}")
    for name in names:
        if name not in adapter.quantities:
            raise ValueError(f"{type(model).__name__} has no {name}, only {', '.join(adapter.quantities)}")
    trace = Trace(adapter, names or adapter.quantities, chosen)
    from_state = {"state", "logits"}
    keep_x = partial(trace.keep, trace.inputs) if set(trace.names) - from_state else None
    keep_state = partial(trace.keep, trace.outputs) if set(trace.names) & from_state else None
    handles = adapter.attach(keep_x, keep_state)
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()
