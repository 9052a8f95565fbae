"""What a model holds of an image after each level, as one vector: the features that levels are compared and probed by.

They come from the residual stream after the level (`Trace.state`), because that is all that the rest of the model gets
from it. What a level reads (`Trace.x`) is, of v2, the same stream one level late, and the last level's would be
missing. Level 0 is the embedding of the patches with their positions, as the first level reads it.

Each token is normalised first, by LN without affine parameters. In v1, v2 and the transformers all that follows reads
the stream through a LN, most of it token by token, so that how long a token is says little; but v2's stream is not
normalised at its end, and without this a few long tokens would rule the mean over tokens. With it, the same weights
have the same features as v1 and as v2, which compute the same. With `--residual none` the length is read, and is lost
here.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from interpretability.common.adapters import pass_through
from interpretability.common.recorder import Trace, record
from models.bdh import layer_norm

Tokens = Literal["mean", "read", "all"]
TOKENS_PER_PASS = 8192  # keeps the neurons of one level below 100 MB at the usual sizes


def stream_features(trace: Trace, tokens: Tokens = "mean", normalise: bool = True) -> list[Tensor]:
    """(B, F) float32 for level 0, 1, ... of a trace of all levels that has x and state.

    tokens: mean over patches; read, the class token where the model has one, else the mean over patches; all, the
    patches side by side, F = T D. normalise: each token to length sqrt(D) first. The class token of a transformer is
    the same for all images at level 0.
    """
    streams = [trace.x(0), *(trace.state(level) for level in trace.levels)]
    return [_pool(stream.float(), trace.adapter.class_tokens, tokens, normalise) for stream in streams]


def _pool(stream: Tensor, class_tokens: int, tokens: Tokens, normalise: bool) -> Tensor:
    """(B, F) of a stream (B, T, D)."""
    if normalise:
        stream = layer_norm(stream)
    if tokens == "read" and class_tokens:
        return stream[:, 0]
    patches = stream[:, class_tokens:]
    return patches.flatten(1) if tokens == "all" else patches.mean(1)


@torch.no_grad()
def level_features(model: nn.Module, images: Tensor, tokens: Tokens = "mean", normalise: bool = True) -> list[Tensor]:
    """n_levels + 1 times (B, F), as `stream_features`. images: (B, C, height, width) in [-1, 1].

    A model for masked pretraining sees whole images; of BDH-UNet the encoder runs alone.
    """
    with record(model, "x", "state") as trace:
        pass_through(model, images)
    return stream_features(trace, tokens, normalise)


def images_per_pass(n_tokens: int) -> int:
    """How many images with so many tokens to pass through a model at once."""
    return max(1, TOKENS_PER_PASS // n_tokens)
