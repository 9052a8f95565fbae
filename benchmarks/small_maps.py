"""Training MobileNetV2 and EfficientNet-B0 on a CPU: convolutions of small maps as products, against the library's.

Whole steps as fit() makes them, on images of 32 x 32 pixels; both sides in turns in one process. On a GPU both are the
library's.

    python benchmarks/small_maps.py
    python benchmarks/small_maps.py --batch-size 128
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.measure import Precision, TimedOptions, measure_steps, write_steps
from benchmarks.training_steps import made_up_batches, training_step
from models.baselines import EfficientNetB0Config, MobileNetV2Config, Setting
from models.small_maps import SmallMapConv2d
from training.command_line import run_script
from training.config import require
from training.device import prepare_device, warn_of_precision

MODELS = {"mobilenetv2": MobileNetV2Config, "efficientnet": EfficientNetB0Config}


@dataclass(frozen=True, kw_only=True)
class Options(TimedOptions):
    """Size of the step."""

    batch_size: int = 32
    """images per step"""
    precision: Precision = "float32"
    """matmul precision"""

    def __post_init__(self):
        super().__post_init__()
        require(self.batch_size >= 2, self, "batch_size", "must be at least 2: BatchNorm needs several values")


def model_of(config: MobileNetV2Config | EfficientNetB0Config, side: str) -> nn.Module:
    """The model in training mode. side: "library" or "products"."""
    model = config.build().train()
    for module in model.modules():
        if side == "library" and isinstance(module, SmallMapConv2d):
            module.few_pixels = 0
    return model


def measure(options: Options, device: torch.device) -> pd.DataFrame:
    """Time and memory of a step by model, setting and side, and how many times faster it is than the library's."""
    rows = []
    for name, make_config in MODELS.items():
        for setting in get_args(Setting):
            config = make_config(setting=setting)
            batches = made_up_batches(options.batch_size, config.img_size, config.num_classes, device)
            sides = {
                side: training_step(model_of(config, side), batches, options.precision, device)
                for side in ("library", "products")
            }
            measured = measure_steps(sides, device, options.repeats)
            for side, each in measured.items():
                faster = measured["library"]["seconds"] / each["seconds"]
                rows.append({"model": name, "setting": setting, "convolutions": side, "times_faster": faster} | each)
    return pd.DataFrame(rows)


def main(options: Options) -> None:
    device = prepare_device(options.device)
    warn_of_precision(options.precision, device)
    table = measure(options, device)
    path, words = write_steps("small_maps", table, options, device)
    shown = Table("model", "setting", "times faster", title=f"a training step with products, {words}")
    for row in table[table["convolutions"] == "products"].itertuples():
        shown.add_row(row.model, row.setting, f"{row.times_faster:.2f}")
    Console().print(shown)
    print(path)


if __name__ == "__main__":
    run_script(main, __doc__)
