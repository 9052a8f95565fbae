"""Model families that the recorder supports: their hook points, and how to compute attention and neurons.

Shapes: B images, T tokens (a class token included), D width, H heads, N neurons per head.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchvision.models import VisionTransformer

from models.bdh import Activity, BDHCore
from models.bdh_unet import BDHUNet
from models.masked_bdh import MaskedBDH
from models.vision_bdh import Grid, VisionBDH, VisionEncoder

Keep = Callable[[int, Tensor], None]  # called with a level, from 0, and its tensor (B, T, D)
ALL = slice(None)


class Adapter(Protocol):
    """What the recorder needs from a model family; `recorder.Trace` says what the quantities are."""

    n_levels: int
    n_heads: int
    class_tokens: int  # number of tokens before the patch tokens
    signed: bool  # True for raw scores, which may be negative; False for weights, which sum to 1 for each query
    quantities: tuple[str, ...]  # methods of `Trace` that this family supports

    def attach(self, keep_x: Keep | None, keep_state: Keep | None) -> list[RemovableHandle]:
        """Adds hooks that pass on each level's input (as its attention reads it) and the residual stream after it."""

    def scores(self, level: int, x: Tensor, queries: slice = ALL) -> Tensor:
        """Attention (B, H, Q, T), query by key, from the level's input x (B, T, D)."""

    def activity(self, level: int, x: Tensor) -> Activity:
        """Neurons of a BDH, from the level's input x (B, T, D)."""

    def logits(self, state: Tensor) -> Tensor:
        """(B, classes): the model's final norm, pooling and head on the residual stream state (B, T, D)."""


class BDHAdapter:
    """BDH models. Their one step runs n_layer times, so the n-th call of `level_input` in a pass is level n.

    The Transformer blocks of a hybrid are no levels; those after the last one are part of the read-out, `logits`.
    """

    def __init__(self, model: BDHCore | BDHUNet):
        self.model = model = model.encoder if isinstance(model, BDHUNet) else model
        self.class_tokens = 0 if getattr(model, "cls_token", None) is None else 1
        self.grid: Grid | None = None  # of the images in the last pass
        self.n_heads = model.config.n_head
        self.signed = not model.attn.softmax
        self.quantities = ("x", "state", "scores", "x_sparse", "y_sparse", "gated")
        if isinstance(model, VisionBDH):
            self.quantities += ("logits",)

    @property
    def n_levels(self) -> int:
        return self.model.config.n_layer

    def attach(self, keep_x: Keep | None, keep_state: Keep | None) -> list[RemovableHandle]:
        level = 0

        def restart(module: nn.Module, args: tuple) -> None:
            nonlocal level
            level = 0  # also after a pass that an exception ended early

        def enter(module: nn.Module, args: tuple[Tensor]) -> None:
            nonlocal level
            if keep_x:
                keep_x(level % self.n_levels, args[0])  # modulo: model.tokens(...) does not call the model's own hook
            level += 1

        def leave(module: nn.Module, args: tuple[Tensor]) -> None:
            keep_state((level - 1) % self.n_levels, args[0])

        def see_grid(module: nn.Module, args: tuple, patches: Tensor) -> None:
            frames = getattr(self.model.config, "time_steps", None)  # of a clip
            self.grid = (*(() if frames is None else (frames,)), *patches.shape[2:])

        handles = [
            self.model.register_forward_pre_hook(restart),
            self.model.level_input.register_forward_pre_hook(enter),
        ]
        if keep_state:
            handles.append(self.model.level_output.register_forward_pre_hook(leave))
        if isinstance(self.model, VisionEncoder):
            handles.append(self.model.patch_embed.register_forward_hook(see_grid))
        return handles

    def scores(self, level: int, x: Tensor, queries: slice = ALL) -> Tensor:
        return self.model.attention_weights(x.to(self.model.encoder.dtype), level, self.grid, queries)

    def activity(self, level: int, x: Tensor) -> Activity:
        return self.model.level_activity(x.to(self.model.encoder.dtype), level, self.grid)

    def logits(self, state: Tensor) -> Tensor:
        return self.model.head(self.model.pooled(self.model.finished(state.to(self.model.encoder.dtype))))


class BlocksAdapter:
    """Library transformers: x is the output of a block's first norm, state the output of the block."""

    signed = False
    quantities = ("x", "state", "scores", "logits")

    def __init__(self, model: nn.Module, blocks: Iterable[nn.Module], norm: str, n_heads: int, class_tokens: int):
        """norm: attribute name of a block's first norm."""
        self.model, self.blocks, self.norm = model, list(blocks), norm
        self.n_levels, self.n_heads, self.class_tokens = len(self.blocks), n_heads, class_tokens

    def attach(self, keep_x: Keep | None, keep_state: Keep | None) -> list[RemovableHandle]:
        def keep_output(keep: Keep, level: int) -> Callable[[nn.Module, tuple, Tensor], None]:
            return lambda module, args, output: keep(level, output)

        return [
            module.register_forward_hook(keep_output(keep, level))
            for level, block in enumerate(self.blocks)
            for keep, module in ((keep_x, getattr(block, self.norm)), (keep_state, block))
            if keep
        ]


class ViTAdapter(BlocksAdapter):
    """torchvision's VisionTransformer. Asking its attention for weights would change what it computes."""

    def __init__(self, model: VisionTransformer):
        blocks = list(model.encoder.layers)
        super().__init__(model, blocks, "ln_1", n_heads=blocks[0].self_attention.num_heads, class_tokens=1)

    def scores(self, level: int, x: Tensor, queries: slice = ALL) -> Tensor:
        attention = self.blocks[level].self_attention
        D, H = attention.embed_dim, attention.num_heads
        x = x.to(attention.in_proj_weight.dtype)
        qk = nn.functional.linear(x, attention.in_proj_weight[: 2 * D], attention.in_proj_bias[: 2 * D])  # (B, T, 2 D)
        q, k = (each.unflatten(-1, (H, D // H)).transpose(1, 2) for each in qk.chunk(2, dim=-1))  # (B, H, T, D / H)
        return (q[:, :, queries] @ k.mT / math.sqrt(D // H)).softmax(-1)

    def logits(self, state: Tensor) -> Tensor:
        norm = self.model.encoder.ln
        return self.model.heads(norm(state.to(norm.weight.dtype))[:, 0])


class TimmViTAdapter(BlocksAdapter):
    """timm's VisionTransformer."""

    def __init__(self, model: nn.Module):
        blocks = list(model.blocks)
        n_heads = blocks[0].attn.num_heads
        super().__init__(model, blocks, "norm1", n_heads=n_heads, class_tokens=model.num_prefix_tokens)

    def scores(self, level: int, x: Tensor, queries: slice = ALL) -> Tensor:
        attention = self.blocks[level].attn
        qkv = attention.qkv(x.to(attention.qkv.weight.dtype)).unflatten(-1, (3, attention.num_heads, -1))
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D / H) each
        return (attention.q_norm(q[:, :, queries]) @ attention.k_norm(k).mT * attention.scale).softmax(-1)

    def logits(self, state: Tensor) -> Tensor:
        return self.model.forward_head(self.model.norm(state.to(self.model.head.weight.dtype)))


# keyed by full class name, because importing timm takes seconds and it is optional
ADAPTERS: dict[str, Callable[[Any], Adapter]] = {
    "models.bdh.BDHCore": BDHAdapter,
    "models.bdh_unet.BDHUNet": BDHAdapter,
    "torchvision.models.vision_transformer.VisionTransformer": ViTAdapter,
    "timm.models.vision_transformer.VisionTransformer": TimmViTAdapter,
}


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter for the model's family. Raises TypeError for an unsupported one."""
    for family in type(model).__mro__:
        if adapter := ADAPTERS.get(f"{family.__module__}.{family.__name__}"):
            return adapter(model)
    raise TypeError(f"{type(model).__name__} is not supported, only models of {', '.join(ADAPTERS)}")


def pass_through(model: nn.Module, images: Tensor) -> None:
    """Runs images (B, C, height, width) through all levels: the encoder only of a BDH-UNet, no mask in pretraining."""
    if isinstance(model, MaskedBDH):
        VisionEncoder.forward(model, images)
    elif isinstance(model, BDHUNet):
        model.encoder(images)
    else:
        model(images)
