"""Where a run comes from: the content of its config.json."""

import platform
import subprocess
import uuid
from typing import Any

import numpy as np
import torch
import torchvision

from training.config import ROOT
from training.experiment import Experiment


def describe_run(experiment: Experiment, data: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """The content of config.json. data: the source's description; facts: origin, parameters, hardware."""
    configuration = experiment.configuration
    return {
        "experiment": experiment.name,
        "config": configuration.fields(),
        "model_class": configuration.model_class,
        "train_class": configuration.train_class,
        "task": experiment.train.task,
        "data": data,
        **facts,
        "versions": _versions(),
        "commit": _commit(),
        "run_id": uuid.uuid4().hex,  # every file of the run carries it, so that files of several runs do not mix
    }


def _versions() -> dict[str, str | None]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda,
    }


def _commit() -> str | None:
    """Commit of this repository, with "+changes" if the working tree differs; None outside git."""

    def git(*args: str) -> str:
        command = ["git", "-c", f"safe.directory={ROOT}", *args]  # also in a checkout of another owner
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
