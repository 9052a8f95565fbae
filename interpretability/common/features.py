"""One feature vector per image and level, for comparing levels and for probes.

Features come from the residual stream after a level (`Trace.state`), which is all that the rest of the model receives.
(A level's input, `Trace.x`, is in v2 the same stream one level late, without the last level.) Level 0 is what the first
level reads: the embedding of the patches with their positions, in a hybrid after its `blocks_before`, in a model with
`mixing` or `level_gain`, such as v4, after that level's own convolution and gain.

By default each token is normalised first (LN without affine parameters). In v1, v2 and the transformers everything that
follows reads the stream through an LN, mostly token by token, so a token's length carries little information; but v2
does not normalise its last state, and a few long tokens would dominate the mean over tokens. With the LN, the same
weights give the same features as v1 and as v2, which compute the same function. `--residual none` does use the length,
which is lost here.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from interpretability.common.adapters import pass_through
from interpretability.common.recorder import Trace, record
from models.bdh import layer_norm
from models.masked_bdh import MaskedBDH
from models.vision_bdh import VisionEncoder

Tokens = Literal["mean", "read", "all"]
TOKENS_PER_PASS = 8192  # keeps the neurons of one level at 200 MB for v2 at its full size


def stream_features(trace: Trace, tokens: Tokens = "mean", normalise: bool = True) -> list[Tensor]:
    """(B, F) float32 for levels 0, 1, ..., from a trace with x and state of all levels.

    tokens: mean over patches; read, the class token if the model has one, the mean weighted as its head would weight
    tokens after that level (pool=seq), else the mean; all, patches concatenated (F = T D). normalise: scale each token
    to length sqrt(D) first. A transformer's class token is the same for all images at level 0.
    """
    first, features, model = trace.adapter.class_tokens, [], trace.adapter.model
    weighted = tokens == "read" and getattr(model, "pool_query", None) is not None
    for stream in (trace.x(0), *(trace.state(level) for level in trace.levels)):
        weights = model.pool_weights(model.finished(stream)).float() if weighted else None
        stream = layer_norm(stream.float()) if normalise else stream.float()
        if weighted:
            features.append((weights[:, None] @ stream)[:, 0])
        elif tokens == "read" and first:
            features.append(stream[:, 0])
        else:
            features.append(stream[:, first:].flatten(1) if tokens == "all" else stream[:, first:].mean(1))
    return features


@torch.no_grad()
def level_features(model: nn.Module, images: Tensor, tokens: Tokens = "mean", normalise: bool = True) -> list[Tensor]:
    """`stream_features` of images (B, C, height, width) in [-1, 1]: n_levels + 1 times (B, F)."""
    with record(model, "x", "state") as trace:
        pass_through(model, images)
    return stream_features(trace, tokens, normalise)


@torch.no_grad()
def head_input(model: nn.Module, images: Tensor) -> Tensor:
    """(B, F) float32, what the linear classification head reads, for any classifier.

    A model of `pretrain_bdh.py` has no such head: the mean over patches of its last state, normalised, which is what a
    classifier that starts from it reads. Raises TypeError for a model without a linear head on one vector per image.
    """
    if isinstance(model, MaskedBDH):
        states, _ = VisionEncoder.forward(model, images)
        return model.normalised(states[-1].mean(1)).float()
    kept: list[tuple[Tensor, Tensor]] = []
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [each.register_forward_hook(lambda _, args, output: kept.append((args[0], output))) for each in linear]
    try:
        logits = model(images)
    finally:
        for handle in handles:
            handle.remove()
    if not kept or kept[-1][1] is not logits or kept[-1][0].ndim != 2:
        raise TypeError(f"{type(model).__name__} does not end in a linear layer that reads one vector per image")
    return kept[-1][0].float()


def images_per_pass(n_tokens: int) -> int:
    """How many images of n_tokens tokens to run through a model at once."""
    return max(1, TOKENS_PER_PASS // n_tokens)
