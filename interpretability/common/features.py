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

Tokens = Literal["mean", "read", "all"]
TOKENS_PER_PASS = 8192  # keeps the neurons of one level at 200 MB for v2 at its full size


def stream_features(trace: Trace, tokens: Tokens = "mean", normalise: bool = True) -> list[Tensor]:
    """(B, F) float32 for levels 0, 1, ..., from a trace with x and state of all levels.

    tokens: mean over patches; read, the class token if the model has one, the mean weighted as by its pool=seq, else
    the mean; all, patches concatenated (F = T D). normalise: scale each token to length sqrt(D) first. A transformer's
    class token is the same for all images at level 0.
    """
    first, features, model = trace.adapter.class_tokens, [], trace.adapter.model
    weighted = tokens == "read" and getattr(model, "pool_query", None) is not None
    for stream in (trace.x(0), *(trace.state(level) for level in trace.levels)):
        weights = model.pool_weights(stream).float() if weighted else None
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


def images_per_pass(n_tokens: int) -> int:
    """How many images of n_tokens tokens to run through a model at once."""
    return max(1, TOKENS_PER_PASS // n_tokens)
