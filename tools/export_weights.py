"""Writes a run's best weights in a form small enough to be kept beside its results: safetensors, weights in bf16.

The file holds no code and half the bytes of float32; buffers (rotary frequencies, statistics of BatchNorm) keep their
precision. With config.json beside it, every script of interpretability/ opens the folder as it opens a run.

    python tools/export_weights.py --run runs/v2_cifar10/seed0 --to results/v2_cifar10/seed0
    python interpretability/visualize_attention.py --run results/v2_cifar10/seed0
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file

from training.command_line import run_script
from training.config import UserError
from training.runs import load_model
from training.stored import EXPORTED


@dataclass(frozen=True, kw_only=True)
class Options:
    """From where, and to where."""

    run: Path
    """folder of a run"""
    to: Path
    """folder for the file; it needs the run's config.json, too"""


def main(options: Options) -> None:
    model, _ = load_model(options.run)
    if not (options.to / "config.json").is_file():
        raise UserError(f"{options.to} has no config.json: copy that of {options.run} there first")
    weights = {name for name, _ in model.named_parameters()}
    tensors = {
        name: (tensor.to(torch.bfloat16) if name in weights else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, options.to / EXPORTED)
    print(f"written: {options.to / EXPORTED}, {(options.to / EXPORTED).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_script(main, __doc__)
