"""Runs a trained Vision-BDH with fewer or more levels than it was trained with."""

import contextlib
import dataclasses
from collections.abc import Iterator

from models.vision_bdh import VisionBDH


@contextlib.contextmanager
def run_with_levels(model: VisionBDH, n_layer: int) -> Iterator[None]:
    """Inside the `with` block, the model is what its configuration with n_layer levels would build from its weights.

    Raises ValueError if it has too few weights for that, or n_layer is below 1.
    """
    if (why := why_not_deeper(model)) and n_layer > model.config.n_layer:
        raise ValueError(f"n_layer = {n_layer} is above {model.config.n_layer}: {why}")
    before = model.config
    model.config = dataclasses.replace(before, n_layer=n_layer)
    try:
        yield
    finally:
        model.config = before


def why_not_deeper(model: VisionBDH) -> str | None:
    """Why the model cannot run more levels than it was trained with; None if it can."""
    if not model.config.shared:
        return "each level has its own weights"
    if model.config.residual == "scaled_pre":
        return "scaled_pre has its own norm for each level"
    if model.config.level_gain or model.config.update_gain is not None:
        return "each level has its own gains"
    if model.config.depth_mix:
        return "each level has its own weights of the earlier states"
    if model.config.mixing == "conv_per_level":
        return "each level has its own convolution"
    return None
