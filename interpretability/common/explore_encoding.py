"""Encodes the data of explore.py's page compactly: numbers as zlib streams in base64, images as data URLs.

explore_page/decode.js decodes them. Shapes: L levels, H heads, T tokens (class token first, if there is one), Q
quantities, K neurons listed per token.
"""

import base64
import io
import zlib
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from PIL import Image
from torch import Tensor

N_CLASSES = 3  # listed per level
FULL = 2**16 - 1  # largest uint16


class Strongest(NamedTuple):
    """The most active neurons of every token, most active first."""

    numbers: np.ndarray  # (L, Q, T, K), counted over all heads: head * N + number in the head
    values: np.ndarray  # (L, Q, T, K) float32, 0 if fewer are active
    active: np.ndarray  # (L, Q, T), how many of all neurons are active (above 0)


def pack(array: np.ndarray) -> str:
    """The numbers, little-endian, as a zlib stream in base64."""
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return base64.b64encode(zlib.compress(little.tobytes())).decode()


def quantise(scores: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores (..., T, T), query by key, as multiples of 1 / steps of each query's largest |score|.

    Returns codes int8 and limits (..., T) float32, each query's largest |score|. Codes are (..., T, T); a score is
    code * limit / steps, with an error of at most half a step. If all maps are symmetric (BDH with Q = K and raw
    scores), codes are the lower triangles only, row by row, (..., T (T + 1) / 2), and the limit is the smaller one of
    query and key, because a token's limit bounds both its row and its column.
    """
    limits = np.abs(scores).max(-1)
    mirrored = scores.swapaxes(-1, -2)
    smaller = np.minimum(limits[..., :, None], limits[..., None, :])
    symmetric = (np.abs(scores - mirrored) <= 1e-5 * smaller).all()  # a GPU may round them differently
    scale = smaller if symmetric else limits[..., None]
    codes = np.rint(scores / np.where(scale > 0, scale, 1) * steps).astype(np.int8)
    if symmetric:
        codes = codes[..., *np.tril_indices(scores.shape[-1])]
    return codes, limits.astype(np.float32)


def encode_neurons(strongest: Strongest, n_neurons: int) -> dict[str, Any]:
    """Values become integers up to FULL, the largest of their level and quantity. n_neurons: over all heads."""
    scales = strongest.values.max((-1, -2), keepdims=True)  # (L, Q, 1, 1)
    parts = np.rint(strongest.values / np.where(scales > 0, scales, 1) * FULL)
    return {
        "numbers": pack(strongest.numbers.astype(np.uint16 if n_neurons <= FULL else np.uint32)),
        "values": pack(parts.astype(np.uint16)),
        "scales": scales[..., 0, 0].tolist(),
        "active": pack(strongest.active.astype(np.uint32)),
    }


def encode_levels(probabilities: np.ndarray, label: int) -> list[dict[str, Any]]:
    """The most probable classes per level and the probability of the true one. probabilities: (L, classes)."""
    levels = []
    for each in probabilities:
        best = each.argsort(kind="stable")[::-1][:N_CLASSES]
        top = [{"class": int(k), "probability": round(float(each[k]), 4)} for k in best]
        levels.append({"top": top, "truth": round(float(each[label]), 4)})
    return levels


def encode_image(image: Tensor) -> str:
    """A PNG as a data URL. image: (C, height, width) uint8 with one channel or three."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def encode_colors(name: str) -> str:
    """A matplotlib colour map as base64 of (256, 3) bytes."""
    colors = matplotlib.colormaps[name](np.arange(256), bytes=True)[:, :3]
    return base64.b64encode(np.ascontiguousarray(colors).tobytes()).decode()
