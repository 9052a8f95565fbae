"""Sizes of Vision-BDH for ImageNet beside ViT-Small and ViT-Base, at 224 pixels and patch 16.

Parameters; multiply-adds of a forward pass, as papers on ViT count them; operations of a training step (forward and
backward, two for each multiply-add); and what a forward pass keeps for the backward pass, an image: the difference
between two images and one. Memory is measured on the device, without and with --recompute.

    python benchmarks/model_sizes.py
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import BenchmarkOptions, Precision, changed, kept_memory_mb, machine_of, write_results
from models.baselines import ViTConfig
from models.bdh import BDHCore
from models.flops import flop_of
from training.command_line import experiment_of, run_script
from training.device import prepare_device, set_precision, warn_of_precision
from training.session import count_parameters

SCRIPT, BASE = "train_v2_imagenet.py", "--n-embd 768 --n-head 8"
VIT = dict(img_size=224, patch_size=16, num_classes=1000)


@dataclass(frozen=True, kw_only=True)
class Options(BenchmarkOptions):
    """What to measure."""

    precision: Precision = "bf16"
    """matmul precision in which memory is measured"""


def configs() -> dict[str, Any]:
    """Name -> config."""
    flags = {"small": "", "small, shared": "--shared", "base": BASE, "base, shared": f"{BASE} --shared"}
    ours = {f"v2 {name}": experiment_of(SCRIPT, of).model for name, of in flags.items()}
    small, base = (dict(n_embd=width, n_head=width // 64, mlp_dim=4 * width) for width in (384, 768))
    return ours | {"ViT-Small": ViTConfig(**VIT, **small), "ViT-Base": ViTConfig(**VIT, **base)}


def cost(config: Any) -> dict[str, float]:
    """Parameters and work; nothing is computed."""
    with torch.device("meta"):
        model = config.build()
        images = torch.zeros(1, 3, config.img_size, config.img_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return {
        "parameters": count_parameters(model),
        "forward_gmac": counter.get_total_flops() / 2e9,
        "training_gflop": flop_of(config) / 1e9,
    }


def kept_mb(config: Any, options: Options, device: torch.device, recompute: bool) -> float | None:
    """Memory kept for the backward pass, in MB an image; None for --recompute of a model that is no BDH, and on mps."""
    model = config.build().to(device)
    if recompute and not isinstance(model, BDHCore):
        return None
    model.recompute, autocast = recompute, set_precision(options.precision, device)

    def kept(n_images: int) -> float | None:
        images = torch.randn(n_images, 3, config.img_size, config.img_size, device=device)

        def forward() -> torch.Tensor:
            with autocast:
                return model(images)

        return kept_memory_mb(forward, device)

    two, one = kept(2), kept(1)
    return None if two is None or one is None else two - one


def main(options: Options) -> None:
    device = prepare_device(options.device)
    warn_of_precision(options.precision, device)
    rows = []
    for name, config in configs().items():
        memory = {f"kept_mb{ending}": kept_mb(config, options, device, bool(ending)) for ending in ("", "_recompute")}
        rows.append({"model": name} | cost(config) | memory | {"precision": options.precision})
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, na_rep="", float_format="{:,.1f}".format))
    path = options.output_dir / f"model_sizes_{machine_of(device)[0]}{changed(options, 'precision')}.csv"
    print(*write_results(table.assign(machine=machine_of(device)[1]), path))


if __name__ == "__main__":
    run_script(main, __doc__)
