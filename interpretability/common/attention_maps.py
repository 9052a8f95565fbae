"""Attention from one patch of an image: recorded scores of one query, their shares, and rollout over levels.

Works on one image at a time and computes the scores of one query, or a block of queries: with 2,304 tokens (384 x 384
pixels in patches of 8), the scores of all heads and levels would take half a gigabyte per image.

Shapes: H heads, T tokens (a class token included), Q query tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from interpretability.common.recorder import Trace, record
from interpretability.common.trained import TrainedRun
from models.vision_bdh import Grid
from training.config import UserError

Show = Literal["scores", "shares", "rollout"]
Patch = tuple[int, int]  # row and column, from 0
SCORES_AT_ONCE = 2**24  # float32 numbers, 64 MB


@dataclass(frozen=True)
class Look:
    """One image, a model's prediction for it, and its attention maps; on the CPU."""

    image: Tensor  # (C, height, width) uint8, at the model's size
    truth: str
    predicted: str
    certainty: float  # probability of the predicted class; in segmentation, its share of the patch's pixels
    maps: dict[int, Tensor]  # by level, from 0: (H, rows, columns), or (1, rows, columns) for the mean over heads


def look_at(run: TrainedRun, index: int, patch: Patch, levels: Iterable[int], show: Show, per_head: bool) -> Look:
    """One test image of a run. levels: from 0. In segmentation, classes are those of most of the patch's pixels.

    The prediction is that of the views that the run was evaluated in, the attention that of the image as it is.
    Raises UserError for an image that does not exist.
    """
    images, labels = run.samples([index])
    pixels = run.pixels(images)
    maps = attention_maps(run.model, pixels, patch, run.grid, levels, show, per_head)
    with torch.no_grad():
        output = run.answer(run.model, pixels)
    if run.labels_pixels:
        side = run.sizes.patch_size
        place = tuple(slice(first * side, (first + 1) * side) for first in patch)
        truth = int(labels[0][place].flatten().bincount().argmax())
        counts = output[0].argmax(0)[place].flatten().bincount()
        probabilities = counts / counts.sum()
    else:
        truth = int(labels[0])
        probabilities = output[0].float().softmax(-1)
    predicted = int(probabilities.argmax())
    names = [*run.class_names, "void"]
    maps = {level: values.float().cpu() for level, values in maps.items()}
    return Look(images[0], names[truth], names[predicted], float(probabilities[predicted]), maps)


@torch.no_grad()
def attention_maps(
    model: nn.Module,
    pixels: Tensor,
    patch: Patch,
    grid: Grid,
    levels: Iterable[int],
    show: Show = "scores",
    per_head: bool = False,
) -> dict[int, Tensor]:
    """Attention from a patch to all patches of one image, by level.

    pixels: (1, C, height, width), the model's input. levels: from 0. Maps are (H, rows, columns), or (1, rows, columns)
    for the mean over heads. show: `scores` as they multiply x in the model (BDH: signed; ViT: softmax weights);
    `shares` per head, averaged afterwards; `rollout`, which has no heads. Attention to a class token is not in the maps
    but counts in the sums, so a map of shares may sum to less than 1. Raises UserError for the rollout of a hybrid
    whose Transformer blocks have mixed the tokens before the first level.
    """
    levels = sorted(set(levels))
    with record(model, "scores", levels=range(levels[-1] + 1) if show == "rollout" else levels) as trace:
        model(pixels)
    if show == "rollout" and len(getattr(trace.adapter.model, "blocks_before", ())):
        raise UserError("rollout would leave out what blocks_before mix before the first level: use --show shares")
    first = trace.adapter.class_tokens
    token = first + patch[0] * grid[1] + patch[1]
    if show == "rollout":
        rows = rollouts(trace, levels, token, first + grid[0] * grid[1])
    else:
        rows = {level: trace.scores(level, slice(token, token + 1))[0, :, 0] for level in levels}  # (H, T)
        if show == "shares":
            rows = {level: shares(row) for level, row in rows.items()}
        if not per_head:
            rows = {level: row.mean(0, keepdim=True) for level, row in rows.items()}
    return {level: row[:, first:].unflatten(-1, grid) for level, row in rows.items()}


def shares(scores: Tensor) -> Tensor:
    """|s| / sum of |s| over keys, (..., T): each key's share of a query's attention, regardless of sign.

    BDH's LN after the product removes the scale of a query's scores in each head, so in shares, unlike in raw scores,
    every head has the same weight. Softmax weights are shares already. All-zero scores give shares of 0.
    """
    magnitude = scores.abs()
    return magnitude / magnitude.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


def rollouts(trace: Trace, levels: Iterable[int], token: int, n_tokens: int) -> dict[int, Tensor]:
    """Attention rollout (Abnar and Zuidema 2020, arXiv 2005.00928) of a token up to each of these levels, (1, T) each.

    The product of A_l / 2 + I / 2 over levels from the first, A_l being the mean over heads of the shares: how much of
    each token is in this one after level l if a level only mixed tokens by these shares and kept half of each. Rows
    sum to 1. Signs are ignored, so a subtracted token counts like an added one and cancellation is not seen; LN and
    neurons are ignored, too (as for a ViT). Paths through a class token count. trace: of one image, with all levels up
    to the last. Memory: three T x T matrices and the scores of a block of queries.
    """
    levels = sorted(set(levels))
    mixed = torch.eye(n_tokens, device=trace.inputs[0].device)  # what each token contains before the first level
    result = {}
    for level in range(levels[-1] + 1):
        if level in levels:
            result[level] = _mix(trace, level, slice(token, token + 1), mixed)
        if level < levels[-1]:
            size = max(1, SCORES_AT_ONCE // (trace.adapter.n_heads * n_tokens))
            blocks = [slice(first, first + size) for first in range(0, n_tokens, size)]
            mixed = torch.cat([_mix(trace, level, block, mixed) for block in blocks])
    return result


def _mix(trace: Trace, level: int, tokens: slice, mixed: Tensor) -> Tensor:
    """Rows `tokens` of (A_l / 2 + I / 2) mixed: (T, T) -> (Q, T)."""
    attention = shares(trace.scores(level, tokens)[0]).mean(0)
    kept = 1 - attention.sum(-1, keepdim=True) / 2  # more than half if a head has no shares, so that rows sum to 1
    return attention / 2 @ mixed + kept * mixed[tokens]
