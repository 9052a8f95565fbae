"""What the recorder has to know of each family of models: where its levels begin and end, and what follows from that.

Letters in shapes: B images, T tokens (class token included, where there is one), D width, H heads, N neurons a head.
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

Keep = Callable[[int, Tensor], None]  # takes a level, counted from 0, and a tensor (B, T, D) of it
ALL = slice(None)


class Adapter(Protocol):
    n_levels: int
    n_heads: int
    class_tokens: int
    """tokens in front of those of the patches"""
    signed: bool
    """whether scores may be negative; if not, each query's scores sum to 1"""
    quantities: tuple[str, ...]
    """what a trace can give of such a model: see `recorder.Trace`"""

    def attach(self, keep_x: Keep | None, keep_state: Keep | None) -> list[RemovableHandle]:
        """Hooks that call these at every level of a forward pass, None being left out, and change nothing.

        x is what the level's attention reads, state the residual stream after the level.
        """

    def scores(self, level: int, x: Tensor, queries: slice = ALL) -> Tensor:
        """(B, H, Q, T): with which factor each query (row) receives each key. x: (B, T, D), what the level reads."""

    def activity(self, level: int, x: Tensor) -> Activity:
        """Of the BDH neurons of a level; there where quantities say so."""

    def logits(self, state: Tensor) -> Tensor:
        """(B, classes), what the model would say were this its last level; there where quantities say so."""


class BDHAdapter:
    """BDH models, whose one step runs n_layer times: the n-th call of `level_input` in a pass is level n."""

    def __init__(self, model: BDHCore | BDHUNet):
        self.model = model = model.encoder if isinstance(model, BDHUNet) else model
        self.class_tokens = 0 if getattr(model, "cls_token", None) is None else 1
        self.grid: Grid | None = None  # of the images last seen
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
            level = 0  # also after a pass that an exception cut short

        def enter(module: nn.Module, args: tuple[Tensor]) -> None:
            nonlocal level
            if keep_x:
                keep_x(level % self.n_levels, args[0])  # modulo: model.tokens(...) passes no hook of the model itself
            level += 1

        def leave(module: nn.Module, args: tuple[Tensor]) -> None:
            keep_state((level - 1) % self.n_levels, args[0])

        def see_grid(module: nn.Module, args: tuple, patches: Tensor) -> None:
            self.grid = tuple(patches.shape[2:])

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
    """Transformers from libraries: x is what the first norm of a block gives, state what the block gives."""

    signed = False
    quantities = ("x", "state", "scores", "logits")

    def __init__(self, model: nn.Module, blocks: Iterable[nn.Module], norm: str, n_heads: int, class_tokens: int):
        """norm: the name of a block's first norm."""
        self.model, self.blocks, self.norm = model, list(blocks), norm
        self.n_levels, self.n_heads, self.class_tokens = len(self.blocks), n_heads, class_tokens

    def attach(self, keep_x: Keep | None, keep_state: Keep | None) -> list[RemovableHandle]:
        handles = []
        for level, block in enumerate(self.blocks):
            for keep, module in ((keep_x, getattr(block, self.norm)), (keep_state, block)):
                if keep:
                    handles.append(module.register_forward_hook(_keep_output(keep, level)))
        return handles


class ViTAdapter(BlocksAdapter):
    """torchvision's VisionTransformer. Asked for weights, its attention takes another path; so they are made here."""

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


def _keep_output(keep: Keep, level: int) -> Callable[[nn.Module, tuple, Tensor], None]:
    return lambda module, args, output: keep(level, output)


# by the family's full name, because importing timm takes seconds and it need not be installed
ADAPTERS: dict[str, Callable[[Any], Adapter]] = {
    "models.bdh.BDHCore": BDHAdapter,
    "models.bdh_unet.BDHUNet": BDHAdapter,
    "torchvision.models.vision_transformer.VisionTransformer": ViTAdapter,
    "timm.models.vision_transformer.VisionTransformer": TimmViTAdapter,
}


def pass_through(model: nn.Module, images: Tensor) -> None:
    """Images through all levels, whatever comes after: of BDH-UNet through the encoder alone.

    A model for masked pretraining, which hides patches from itself, sees whole images. images: (B, C, height, width).
    """
    if isinstance(model, MaskedBDH):
        VisionEncoder.forward(model, images)
    elif isinstance(model, BDHUNet):
        model.encoder(images)
    else:
        model(images)


def adapter_of(model: nn.Module) -> Adapter:
    """That of the model's family. Raises TypeError for an unknown one."""
    for family in type(model).__mro__:
        if adapter := ADAPTERS.get(f"{family.__module__}.{family.__name__}"):
            return adapter(model)
    known = ", ".join(ADAPTERS)
    raise TypeError(f"{type(model).__name__} cannot be looked into, only models of {known} can")
