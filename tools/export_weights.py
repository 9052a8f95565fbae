"""Exports a run's best weights as a small file to keep beside its results: safetensors, weights in bf16.

Half the size of float32, and no code in the file. Buffers (rotary frequencies, BatchNorm statistics) keep their
precision. With config.json beside it, every script in interpretability/ opens the folder like a run.

    python tools/export_weights.py --run runs/v2_cifar10/seed0 --to results/v2_cifar10/seed0
    python interpretability/visualize_attention.py --run results/v2_cifar10/seed0
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file

from training.config import UserError
from training.runs import EXPORTED, load_model
from training.script import run_script


@dataclass(frozen=True, kw_only=True)
class Options:
    """Source and destination."""

    run: Path
    """folder of a run"""
    to: Path
    """folder for the file; it must hold the run's config.json"""


def main(options: Options) -> None:
    model, _ = load_model(options.run)
    if not (options.to / "config.json").is_file():
        raise UserError(f"{options.to} has no config.json: copy that of {options.run} first")
    weights = {name for name, _ in model.named_parameters()}
    tensors = {
        name: (tensor.to(torch.bfloat16) if name in weights else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, options.to / EXPORTED)
    print(f"written: {options.to / EXPORTED}, {(options.to / EXPORTED).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_script(main, __doc__)
