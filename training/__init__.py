"""Training: what a script needs."""

from training.config import Experiment, RunOptions, TrainConfig, UserError
from training.launch import launch
from training.loop import fit

__all__ = ["Experiment", "RunOptions", "TrainConfig", "UserError", "fit", "launch"]
