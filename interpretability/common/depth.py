"""A trained Vision-BDH run with fewer or more levels than it was trained with."""

import contextlib
import dataclasses
from collections.abc import Iterator

from models.vision_bdh import VisionBDH


@contextlib.contextmanager
def run_with_levels(model: VisionBDH, n_layer: int) -> Iterator[None]:
    """Inside, the model is what a configuration of n_layer levels would have built from the same weights.

    Of weights for each level, and of the norms of scaled_pre, the first n_layer (and 1) are used. Raises ValueError
    where the model has no weights for so many, or for none.
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
    """Why it cannot run more levels than it was trained with; None where it can."""
    if not model.config.shared:
        return "each level has weights of its own, and there are none for more"
    if model.config.residual == "scaled_pre":
        return "scaled_pre has a norm of its own for each level, and none for more"
    return None
