"""Takes a trained model away: writes a run's best weights in the forms that other tools read.

weights: best_bf16.safetensors and a model card, beside config.json; scripts open that folder like a run.

    python tools/export.py runs/v2_cifar10/seed0                                   # weights, into the run's own folder
    python tools/export.py runs/v2_cifar10/seed0 --output results/v2_cifar10/seed0
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro
from torch import nn

from tools.exporting.weights import export_weights
from training.command_line import run_script
from training.runs import load_model


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to export, and in which forms."""

    run: tyro.conf.Positional[Path]
    """folder of a run, or a checkpoint in it"""
    to: tuple[Literal["weights"], ...] = ("weights",)
    """one or more forms"""
    output: Path | None = None
    """folder for the files; default: the run's own"""


def main(options: Options) -> None:
    model, _ = load_model(options.run)
    folder = options.run.parent if options.run.suffix in (".pt", ".safetensors") else options.run
    for form in options.to:
        path = FORMS[form](model, folder, options.output or folder, options)
        print(f"{form}: {path}, {path.stat().st_size / 1e6:.1f} MB")


def to_weights(model: nn.Module, folder: Path, target: Path, options: Options) -> Path:
    return export_weights(model, folder, target)


FORMS = {"weights": to_weights}

if __name__ == "__main__":
    run_script(main, __doc__)
