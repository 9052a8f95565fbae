"""What the page of explore.py holds, as text small enough: numbers as zlib streams in base64, pictures as data URLs.

explore_page/decode.js reads it back. Letters in shapes: L levels, H heads, T tokens (class token first, where there is
one), Q quantities of neurons, K neurons of a token.
"""

import base64
import io
import zlib
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from PIL import Image
from torch import Tensor

N_CLASSES = 3  # that are told of each level
FULL = 2**16 - 1  # of uint16


class Strongest(NamedTuple):
    """The most active neurons of every token. L levels, Q quantities, T tokens, K neurons, the most active first."""

    numbers: np.ndarray
    """(L, Q, T, K), counted over all heads: head * N + place in the head"""
    values: np.ndarray
    """(L, Q, T, K) float32, 0 where fewer are active"""
    active: np.ndarray
    """(L, Q, T), how many of all neurons are active: above 0"""


def pack(array: np.ndarray) -> str:
    """Its numbers, little-endian, as a zlib stream in base64: what the page's `inflate` reads."""
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return base64.b64encode(zlib.compress(little.tobytes())).decode()


def quantise(scores: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores in whole steps, of which there are so many up to a query's largest |score|: off by half a step at most.

    scores: (..., T, T), query by key. Returns codes int8 and limits (..., T) float32, each query's largest |score|.
    Codes are (..., T, T), a score being code * limit of its query / steps. Where all maps are symmetric, as those of a
    BDH with Q = K and raw scores are, codes are the lower triangles alone, row by row, (..., T (T + 1) / 2), with the
    smaller limit of query and key in place of the query's: a token's limit bounds its row and its column.
    """
    limits = np.abs(scores).max(-1)
    mirrored = scores.swapaxes(-1, -2)
    smaller = np.minimum(limits[..., :, None], limits[..., None, :])
    symmetric = (np.abs(scores - mirrored) <= 1e-5 * smaller).all()  # on a GPU they may differ by rounding
    scale = smaller if symmetric else limits[..., None]
    codes = np.rint(scores / np.where(scale > 0, scale, 1) * steps).astype(np.int8)
    if symmetric:
        codes = codes[..., *np.tril_indices(scores.shape[-1])]
    return codes, limits.astype(np.float32)


def encode_neurons(strongest: Strongest, n_neurons: int) -> dict[str, Any]:
    """For the page; values as whole numbers up to FULL, which is the largest of their level and quantity.

    n_neurons: over all heads.
    """
    scales = strongest.values.max((-1, -2), keepdims=True)  # (L, Q, 1, 1)
    parts = np.rint(strongest.values / np.where(scales > 0, scales, 1) * FULL)
    return {
        "numbers": pack(strongest.numbers.astype(np.uint16 if n_neurons <= FULL else np.uint32)),
        "values": pack(parts.astype(np.uint16)),
        "scales": scales[..., 0, 0].tolist(),
        "active": pack(strongest.active.astype(np.uint32)),
    }


def encode_levels(probabilities: np.ndarray, label: int) -> list[dict[str, Any]]:
    """The most probable classes of each level and the probability of the true one. probabilities: (L, classes)."""
    levels = []
    for each in probabilities:
        best = each.argsort(kind="stable")[::-1][:N_CLASSES]
        top = [{"class": int(k), "probability": round(float(each[k]), 4)} for k in best]
        levels.append({"top": top, "truth": round(float(each[label]), 4)})
    return levels


def encode_image(image: Tensor) -> str:
    """A PNG as a data URL. image: (C, height, width) uint8 of one channel or three."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def encode_colors(name: str) -> str:
    """matplotlib's colour map as base64 of (256, 3) bytes."""
    colors = matplotlib.colormaps[name](np.arange(256), bytes=True)[:, :3]
    return base64.b64encode(np.ascontiguousarray(colors).tobytes()).decode()
