"""Looks inside the very model that was trained: hooks keep what enters and leaves each level, the rest is made aside.

    with record(model, "scores", "x_sparse", levels=[0, 5]) as trace:
        logits = model(images)
    trace.scores(5)      # (B, H, T, T), attention of the sixth level, computed now
    trace.x_sparse(0)    # (B, H, T, N), what its own tokens excite in the first

Fast paths never hold scores or neurons as tensors, and asking a library's attention for its weights changes what it
computes. So only the input of each level, and its output where asked for, are kept during the pass; what is computed
from them later is computed with the model's own weights (as they are then), one level at a time, in their precision.
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
    """What the last forward pass left at the chosen levels, counted from 0.

    Letters in shapes: B images, T tokens, the class token first where there is one, D width, H heads, N neurons a head.
    Each method raises LookupError for a quantity or a level that was not recorded.
    """

    adapter: Adapter
    names: tuple[str, ...]
    levels: tuple[int, ...]
    inputs: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)

    def x(self, level: int) -> Tensor:
        """(B, T, D), what the level reads, normalised where the model does that first; not to be written to."""
        return self._kept("x", self.inputs, level)

    def state(self, level: int) -> Tensor:
        """(B, T, D), the residual stream after the level; not to be written to."""
        return self._kept("state", self.outputs, level)

    @torch.no_grad()
    def scores(self, level: int, queries: slice = ALL, patches_only: bool = False) -> Tensor:
        """(B, H, T, T), attention of a level, query by key; computed at this call.

        BDH: signed raw scores, or softmax weights where the model has them. ViT: softmax weights. queries: of these
        tokens only, (B, H, Q, T), which is all that is computed. patches_only cuts the class token off (and queries
        count from the first patch); the remaining weights of a query then sum to less than 1.
        """
        x = self._kept("scores", self.inputs, level)
        first = self.adapter.class_tokens if patches_only else 0
        start, stop, _ = queries.indices(x.shape[1] - first)
        with _full_precision(x):
            return self.adapter.scores(level, x, slice(start + first, stop + first))[..., first:]

    def x_sparse(self, level: int) -> Tensor:
        """(B, H, T, N), the neurons that the token itself excites; computed at this call."""
        return self._activity("x_sparse", level).x_sparse

    def y_sparse(self, level: int) -> Tensor:
        """(B, H, T, N), the neurons that attention excites; computed at this call."""
        return self._activity("y_sparse", level).y_sparse

    def gated(self, level: int) -> Tensor:
        """(B, H, T, N), what the decoder reads: x_sparse * y_sparse under the multiplicative gate; computed now."""
        return self._activity("gated", level).gated

    def activity(self, level: int) -> Activity:
        """x_sparse, y_sparse and gated at the price of one of them; all three have to be recorded."""
        for name in Activity._fields:
            self._kept(name, self.inputs, level)
        return self._activity("gated", level)

    @torch.no_grad()
    def logits(self, level: int) -> Tensor:
        """(B, classes), what the model would say were this its last level: its own norm, pooling and head on `state`.

        For a BDH with shared weights that is the very output of the model with so many levels, but under scaled_pre,
        whose last norm belongs to the trained depth.
        """
        state = self._kept("logits", self.outputs, level)
        with _full_precision(state):
            return self.adapter.logits(state)

    @torch.no_grad()
    def _activity(self, name: str, level: int) -> Activity:
        x = self._kept(name, self.inputs, level)
        with _full_precision(x):
            return self.adapter.activity(level, x)

    def _kept(self, name: str, of: dict[int, Tensor], level: int) -> Tensor:
        if name not in self.names:
            raise LookupError(f"{name} was not recorded, only {', '.join(self.names)}: name it in record(model, ...)")
        if level not in of:
            raise LookupError(f"level {level} was not recorded: the levels with a record are {sorted(of)}")
        return of[level]

    def keep(self, among: dict[int, Tensor], level: int, tensor: Tensor) -> None:
        """What hooks call, with inputs or outputs to keep the tensor among."""
        if level in self.levels:
            among[level] = tensor.detach()


def _full_precision(x: Tensor) -> contextlib.AbstractContextManager:
    """No autocast, even inside one."""
    return torch.autocast(x.device.type, enabled=False)


@contextlib.contextmanager
def record(model: nn.Module, *names: str, levels: Iterable[int] | None = None) -> Iterator[Trace]:
    """Records these quantities (methods of `Trace`; none: all that the model has) in passes inside the `with` block.

    levels: count from 0; None: all. The outputs stay what they are, to the bit; the hooks are gone afterwards, whatever
    happens. After several passes the trace holds the last. For a compiled model, give the module that was compiled and
    run that. Raises TypeError for an unknown model, ValueError for a level or a quantity that it does not have.
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
