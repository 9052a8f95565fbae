"""Training: what a script needs."""

import training.interrupts  # noqa: F401 (first, so that Ctrl-C during the other imports is one line)
from training.config import (
    ClassificationConfig,
    DetectionConfig,
    PretrainingConfig,
    SegmentationConfig,
    TextConfig,
    UserError,
    VideoConfig,
)
from training.experiment import Experiment, RunOptions
from training.launch import launch
from training.loop import fit

__all__ = [
    "ClassificationConfig",
    "DetectionConfig",
    "Experiment",
    "PretrainingConfig",
    "RunOptions",
    "SegmentationConfig",
    "TextConfig",
    "UserError",
    "VideoConfig",
    "fit",
    "launch",
]
