"""What a patch attends to, computed: recorded attention of one query, its shares, and rollout over levels.

Works on one image at a time, and asks for the scores of one query or of a block of them: at 2,304 tokens (384 x 384
pixels in patches of 8), attention of all heads and levels would fill half a gigabyte an image.

Letters in shapes: H heads, T tokens (class token included, where there is one), Q of them as queries.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from interpretability.common.recorder import Trace, record
from interpretability.common.trained import TrainedRun
from models.vision_bdh import Grid

Show = Literal["scores", "shares", "rollout"]
Patch = tuple[int, int]  # row and column, from 0
SCORES_AT_ONCE = 2**24  # float32 numbers, 64 MB


@dataclass(frozen=True)
class Look:
    """What a run's model attends to in one image, and what it takes the image for; on the CPU."""

    image: Tensor
    """(C, height, width) uint8, as the model reads it"""
    truth: str
    predicted: str
    certainty: float
    """probability of the predicted class; of segmentation, its share of the patch's pixels"""
    maps: dict[int, Tensor]
    """by level, from 0: (H, rows, columns), or (1, rows, columns) where heads are averaged"""


def look_at(run: TrainedRun, index: int, patch: Patch, levels: Iterable[int], show: Show, per_head: bool) -> Look:
    """One image of the run's test part, looked into. levels: from 0. Raises UserError for an image that is not there.

    A segmentation model's classes are those of most of the patch's pixels.
    """
    images, labels = run.samples([index])
    maps, output = attention_maps(run.model, run.pixels(images), patch, run.grid, levels, show, per_head)
    if run.labels_pixels:
        side = run.sizes.patch_size
        place = tuple(slice(first * side, (first + 1) * side) for first in patch)
        truth, _ = most_common(labels[0][place])
        predicted, certainty = most_common(output[0].argmax(0)[place])
    else:
        truth = int(labels[0])
        probabilities = output[0].float().softmax(-1)
        predicted = int(probabilities.argmax())
        certainty = float(probabilities[predicted])
    names = [*run.class_names, "void"]
    maps = {level: values.float().cpu() for level, values in maps.items()}
    return Look(images[0], names[truth], names[predicted], certainty, maps)


def most_common(labels: Tensor) -> tuple[int, float]:
    """The label that most of them are, the lowest of several, and the share that it has."""
    counts = labels.flatten().bincount()
    return int(counts.argmax()), float(counts.max() / labels.numel())


@torch.no_grad()
def attention_maps(
    model: nn.Module,
    pixels: Tensor,
    patch: Patch,
    grid: Grid,
    levels: Iterable[int],
    show: Show = "scores",
    per_head: bool = False,
) -> tuple[dict[int, Tensor], Tensor]:
    """Attention from a patch to all patches in one image, by level, and what the model says of the image.

    pixels: (1, C, height, width), what the model reads. levels: from 0. Maps are (H, rows, columns), or
    (1, rows, columns) where heads are averaged. `scores` are what multiplies x in the model: BDH's are signed, ViT's
    softmax weights. `shares` are `shares` of them, in each head before heads are averaged. `rollout` is `rollouts`,
    which has no heads. What goes to a class token is left out of the maps but not of the sums that shares divide by, so
    that a map may sum to less than 1.
    """
    levels = sorted(set(levels))
    rollout = show == "rollout"
    with record(model, "scores", levels=range(levels[-1] + 1) if rollout else levels) as trace:
        output = model(pixels)
    first = trace.adapter.class_tokens
    token = first + patch[0] * grid[1] + patch[1]
    if rollout:
        rows = rollouts(trace, levels, token, first + grid[0] * grid[1])
    else:
        rows = {level: trace.scores(level, slice(token, token + 1))[0, :, 0] for level in levels}  # (H, T)
        if show == "shares":
            rows = {level: shares(row) for level, row in rows.items()}
        if not per_head:
            rows = {level: row.mean(0, keepdim=True) for level, row in rows.items()}
    return {level: row[:, first:].unflatten(-1, grid) for level, row in rows.items()}, output


def shares(scores: Tensor) -> Tensor:
    """|s| / sum |s| over the keys: the part that each key has in a query's attention, whatever its sign. (..., T).

    BDH's LN after the product divides the scale of a query's scores out, in each head; so in the shares, unlike in raw
    scores, every head counts alike. Softmax weights are shares already. A query whose scores are all 0 has shares of 0.
    """
    magnitude = scores.abs()
    return magnitude / magnitude.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


def rollouts(trace: Trace, levels: Iterable[int], token: int, n_tokens: int) -> dict[int, Tensor]:
    """Attention rollout of a token up to each of these levels, (1, T) each: Abnar and Zuidema 2020, arXiv 2005.00928.

    The product, over levels from the first on, of A_l / 2 + I / 2, where A_l is the mean over heads of the shares: how
    much of each patch is in the token after level l if a level mixed tokens by these shares and kept half of each.
    Rows sum to 1. BDH's signed scores enter by their magnitude: a token that is subtracted counts as one that is
    added, and what opposite signs cancel is not seen. Nor is what LN and the neurons do to the mixture, here as in
    ViT. A class token is one of the tokens, and what reaches the patch by way of it counts. trace: of one image, with
    all levels up to the last of these.

    Memory: two T x T matrices, and the scores of a block of queries.
    """
    levels = sorted(set(levels))
    mixed = torch.eye(n_tokens, device=trace.inputs[0].device)  # what is in each token before the first level
    result = {}
    for level in range(levels[-1] + 1):
        if level in levels:
            result[level] = _mix(trace, level, slice(token, token + 1), mixed)
        if level < levels[-1]:
            mixed = _mix_all(trace, level, mixed)
    return result


def _mix(trace: Trace, level: int, tokens: slice, mixed: Tensor) -> Tensor:
    """These tokens' rows of (A_l / 2 + I / 2) times the product before it, which is mixed: (T, T) -> (Q, T)."""
    attention = shares(trace.scores(level, tokens)[0]).mean(0)
    kept = 1 - attention.sum(-1, keepdim=True) / 2  # more than half where a head has no shares, so that rows sum to 1
    return attention / 2 @ mixed + kept * mixed[tokens]


def _mix_all(trace: Trace, level: int, mixed: Tensor) -> Tensor:
    """All rows, a block of queries after the other. mixed: (T, T) -> (T, T)."""
    n_tokens = len(mixed)
    after = torch.empty_like(mixed)
    n_queries = max(1, SCORES_AT_ONCE // (trace.adapter.n_heads * n_tokens))
    for first in range(0, n_tokens, n_queries):
        tokens = slice(first, first + n_queries)
        after[tokens] = _mix(trace, level, tokens, mixed)
    return after
