"""Looks inside the very model that was trained: hooks keep what enters each level, attention is computed from it aside.

    with record(model, levels=[0, 5]) as trace:
        logits = model(images)
    trace.inputs[0]    # (B, T, D), what entered the first level
    trace.scores(5)    # (B, H, T, T), attention of the sixth, computed now

A probe says for one family of models where its levels begin and what its attention is; another family is another probe.
Letters in shapes: B images, T tokens (the class token included, where there is one), D width, H heads.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchvision.models import VisionTransformer

from models.bdh import BDHCore
from models.bdh_unet import BDHUNet
from models.vision_bdh import VisionEncoder

Keep = Callable[[int, Tensor], None]  # takes a level, counted from 0, and what enters it, (B, T, D)


class Probe(Protocol):
    n_levels: int
    class_tokens: int
    """tokens in front of those of the patches"""
    signed: bool
    """whether scores may be negative; if not, each query's scores sum to 1"""

    def attach(self, keep: Keep) -> list[RemovableHandle]:
        """Hooks that call keep at every level of a forward pass and change nothing."""

    def scores(self, level: int, x: Tensor) -> Tensor:
        """(B, H, T, T): with which factor each query (row) receives each key. x: (B, T, D), what enters the level."""


class BDHProbe:
    """BDH models, whose one step runs n_layer times: the n-th call of `level_input` in a pass is level n."""

    def __init__(self, model: BDHCore | BDHUNet):
        self.model = model = model.encoder if isinstance(model, BDHUNet) else model
        self.class_tokens = 0 if getattr(model, "cls_token", None) is None else 1
        self.grid: tuple[int, int] | None = None  # of the images last seen
        self.n_levels = model.config.n_layer
        self.signed = not model.attn.softmax

    def attach(self, keep: Keep) -> list[RemovableHandle]:
        level = 0

        def restart(module: nn.Module, args: tuple) -> None:
            nonlocal level
            level = 0  # also after a pass that an exception cut short

        def enter(module: nn.Module, args: tuple[Tensor]) -> None:
            nonlocal level
            keep(level % self.n_levels, args[0])  # modulo: model.tokens(...) does not pass through the model's own hook
            level += 1

        def see_grid(module: nn.Module, args: tuple, patches: Tensor) -> None:
            self.grid = tuple(patches.shape[2:])

        handles = [
            self.model.register_forward_pre_hook(restart),
            self.model.level_input.register_forward_pre_hook(enter),
        ]
        if isinstance(self.model, VisionEncoder):
            handles.append(self.model.patch_embed.register_forward_hook(see_grid))
        return handles

    def scores(self, level: int, x: Tensor) -> Tensor:
        return self.model.attention_weights(x, level, self.grid)


class ViTProbe:
    """torchvision's VisionTransformer: what enters a level is what its attention reads, the output of `ln_1`."""

    class_tokens = 1
    signed = False

    def __init__(self, model: VisionTransformer):
        self.blocks = list(model.encoder.layers)
        self.n_levels = len(self.blocks)

    def attach(self, keep: Keep) -> list[RemovableHandle]:
        return _keep_outputs((block.ln_1 for block in self.blocks), keep)

    def scores(self, level: int, x: Tensor) -> Tensor:
        attention = self.blocks[level].self_attention
        D, H = attention.embed_dim, attention.num_heads
        qk = nn.functional.linear(x, attention.in_proj_weight[: 2 * D], attention.in_proj_bias[: 2 * D])  # (B, T, 2 D)
        q, k = (each.unflatten(-1, (H, D // H)).transpose(1, 2) for each in qk.chunk(2, dim=-1))  # (B, H, T, D / H)
        return (q @ k.mT / math.sqrt(D // H)).softmax(-1)


class TimmViTProbe:
    """timm's VisionTransformer: what enters a level is what its attention reads, the output of `norm1`."""

    signed = False

    def __init__(self, model: nn.Module):
        self.blocks = list(model.blocks)
        self.n_levels = len(self.blocks)
        self.class_tokens = model.num_prefix_tokens

    def attach(self, keep: Keep) -> list[RemovableHandle]:
        return _keep_outputs((block.norm1 for block in self.blocks), keep)

    def scores(self, level: int, x: Tensor) -> Tensor:
        attention = self.blocks[level].attn
        qkv = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1))  # (B, T, 3, H, D / H)
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D / H)
        return (attention.q_norm(q) @ attention.k_norm(k).mT * attention.scale).softmax(-1)


def _keep_outputs(modules: Iterable[nn.Module], keep: Keep) -> list[RemovableHandle]:
    """Hooks that keep what each of the modules gives as that level's input."""

    def at(level: int) -> Callable[[nn.Module, tuple, Tensor], None]:
        return lambda module, args, output: keep(level, output)

    return [module.register_forward_hook(at(level)) for level, module in enumerate(modules)]


# by the family's full name, because importing timm takes seconds and it need not be installed
PROBES: dict[str, Callable[..., Probe]] = {
    "models.bdh.BDHCore": BDHProbe,
    "models.bdh_unet.BDHUNet": BDHProbe,
    "torchvision.models.vision_transformer.VisionTransformer": ViTProbe,
    "timm.models.vision_transformer.VisionTransformer": TimmViTProbe,
}


@dataclass
class Trace:
    """What the last forward pass left at the chosen levels."""

    probe: Probe
    levels: tuple[int, ...]
    inputs: dict[int, Tensor] = field(default_factory=dict)
    """what entered each level: (B, T, D), not to be written to"""

    def keep(self, level: int, x: Tensor) -> None:
        if level in self.levels:
            self.inputs[level] = x.detach()

    @torch.no_grad()
    def scores(self, level: int, patches_only: bool = False) -> Tensor:
        """Attention of a level with the model's own weights, computed at this call: (B, H, T, T), query by key.

        BDH: signed raw scores, or softmax weights where the model has them. ViT: softmax weights, the class token first
        on both axes. patches_only cuts the class token off; the remaining weights of a query then sum to less than 1.
        Raises LookupError for a level that was not recorded.
        """
        if level not in self.inputs:
            raise LookupError(f"level {level} was not recorded: the levels with a record are {sorted(self.inputs)}")
        scores = self.probe.scores(level, self.inputs[level])
        first = self.probe.class_tokens if patches_only else 0
        return scores[..., first:, first:]


def make_probe(model: nn.Module) -> Probe:
    """The probe of the model's family. Raises TypeError for an unknown one."""
    for family in type(model).__mro__:
        if probe := PROBES.get(f"{family.__module__}.{family.__name__}"):
            return probe(model)
    known = ", ".join(PROBES)
    raise TypeError(f"{type(model).__name__} has no probe, only models of {known} have")


@contextlib.contextmanager
def record(model: nn.Module, levels: Iterable[int] | None = None) -> Iterator[Trace]:
    """Keeps what enters the chosen levels (None: all) of forward passes made inside the `with` block.

    levels count from 0. The outputs stay what they are, to the bit; the hooks are gone afterwards, whatever happens.
    After several passes the trace holds the last. For a compiled model, give the module that was compiled and run that.
    Raises TypeError for an unknown model, ValueError for a level that it does not have.
    """
    probe = make_probe(model)
    chosen = tuple(range(probe.n_levels) if levels is None else levels)
    for level in chosen:
        if not 0 <= level < probe.n_levels:
            raise ValueError(f"level {level} is not between 0 and {probe.n_levels - 1}")
    trace = Trace(probe, chosen)
    handles = probe.attach(trace.keep)
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()
