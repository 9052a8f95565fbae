"""Exports a run's best weights as one small file: safetensors, parameters in bf16.

The file holds no code and half the bytes of float32; buffers (rotary frequencies, BatchNorm statistics) keep their
precision. With config.json beside it, every script of interpretability/ opens its folder like a run, and a training can
start from it.

    python tools/export_weights.py runs/v2_cifar10/seed0                                   # into the run's own folder
    python tools/export_weights.py runs/v2_cifar10/seed0 --to results/v2_cifar10/seed0
    python interpretability/visualize_attention.py --run results/v2_cifar10/seed0
    python train_v2_cifar10.py --start-from results/v2_cifar10/seed0/best_bf16.safetensors
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro
from safetensors.torch import save_file

from training.command_line import run_script
from training.config import UserError
from training.runs import load_model
from training.stored import EXPORTED


@dataclass(frozen=True, kw_only=True)
class Options:
    """Source and target."""

    run: tyro.conf.Positional[Path]
    """folder of a run, or a checkpoint in it"""
    to: Path | None = None
    """folder for the file, which must hold the run's config.json; default: the run's own"""


def main(options: Options) -> None:
    model, _ = load_model(options.run)
    run = options.run.parent if options.run.suffix else options.run
    target = options.to or run
    if not (target / "config.json").is_file():
        raise UserError(f"{target} has no config.json: copy that of {run} there first")
    parameters = {name for name, _ in model.named_parameters()}
    tensors = {
        name: (tensor.to(torch.bfloat16) if name in parameters else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, target / EXPORTED)
    print(f"written: {target / EXPORTED}, {(target / EXPORTED).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_script(main, __doc__)
