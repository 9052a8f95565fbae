"""What each recipe field costs: time of a training step with the field on, as a ratio to the published protocol's.

Whole steps as fit() makes them: augmentation of the batch, forward, backward, clipping, optimizer, averaging; all sides
in turns in one process. Fields that cost nothing in training (schedule, decay, eval_flip) are not timed.

    python benchmarks/recipe_cost.py
    python benchmarks/recipe_cost.py --precision bf16 --batch-size 128
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Precision, TimedOptions, measure_steps, write_steps
from benchmarks.training_steps import made_up_batches, protocol, training_step
from models.baselines import ViTConfig
from models.vision_bdh import v2_config
from training.command_line import run_script
from training.device import prepare_device, warn_of_precision

BASE = "published protocol"
FIELDS = {
    BASE: {},
    "optimizer=sgd": dict(optimizer="sgd"),
    "optimizer=muon": dict(optimizer="muon"),
    "ema=0.999": dict(ema=0.999),
    "crop_padding=4": dict(crop_scale_min=1.0, crop_padding=4),
    "randaugment=2": dict(randaugment=2),
    "random_erasing=0.25": dict(random_erasing=0.25),
    "mixup=0.8": dict(mixup=0.8),
    "cutmix=1": dict(cutmix=1.0),
    "label_smoothing=0.1": dict(label_smoothing=0.1),
    "repeat_augment=4": dict(repeat_augment=4),
    "drop_path=0.1": dict(drop_path=0.1),
}
EVERYTHING = "all of them"
MODELS = {"v2": v2_config, "vit_tiny": ViTConfig}


@dataclass(frozen=True, kw_only=True)
class Options(TimedOptions):
    """Size of the step."""

    batch_size: int = 32
    """images per step"""
    precision: Precision = "float32"
    """matmul precision"""


def settings() -> dict[str, dict]:
    """Fields by name of the line; the last has all of them, with Muon and without crops by scale."""
    together: dict = {}
    for name, fields in FIELDS.items():
        together |= fields if name != "optimizer=sgd" else {}
    return FIELDS | {EVERYTHING: together}


def measure(options: Options, device: torch.device) -> pd.DataFrame:
    """Time and memory of a step by model and setting, and the ratio of its time to the published protocol's."""
    rows = []
    for model_name, make_config in MODELS.items():
        sides = {}
        for name, fields in settings().items():
            fields = dict(fields)
            config = make_config(drop_path=fields.pop("drop_path", 0.0))
            train = protocol(batch_size=options.batch_size, **fields)
            batches = made_up_batches(options.batch_size, 32, 10, device, train)
            torch.manual_seed(0)
            sides[name] = training_step(config.build().train(), batches, options.precision, device, train=train)
        measured = measure_steps(sides, device, options.repeats)
        rows += [
            {"model": model_name, "setting": name, "ratio": each["seconds"] / measured[BASE]["seconds"]} | each
            for name, each in measured.items()
        ]
    return pd.DataFrame(rows)


def main(options: Options) -> None:
    device = prepare_device(options.device)
    warn_of_precision(options.precision, device)
    table = measure(options, device)
    path, words = write_steps("recipe_cost", table, options, device)
    shown = Table(title=f"time of a step / {BASE}, {words}")
    for title in ("setting", *MODELS):
        shown.add_column(title)
    for setting, ratios in table.pivot(index="setting", columns="model", values="ratio").reindex(settings()).iterrows():
        shown.add_row(str(setting), *(f"{ratios[model]:.2f}" for model in MODELS))
    Console().print(shown)
    print(path)


if __name__ == "__main__":
    run_script(main, __doc__)
