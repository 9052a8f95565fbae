"""Training: what a script needs."""

from training.config import (
    ClassificationConfig,
    Experiment,
    PretrainingConfig,
    RunOptions,
    SegmentationConfig,
    TextConfig,
    UserError,
)
from training.launch import launch
from training.loop import fit

__all__ = [
    "ClassificationConfig",
    "Experiment",
    "PretrainingConfig",
    "RunOptions",
    "SegmentationConfig",
    "TextConfig",
    "UserError",
    "fit",
    "launch",
]
