"""Checks that the fast step trains like the plain one: losses step by step, from the same weights on the same images.

All sides train on the same batches of CIFAR-10, without dropout, whose random draws differ between implementations.
All are compared with the plain step in float32. To judge the fast step, compare it with two others: in float32 with the
plain step from weights that differ in their last bits (rounding alone makes runs diverge), in bf16 with the plain step
in bf16.

    python benchmarks/same_losses.py
    python benchmarks/same_losses.py --n-embd 96 --n-head 4 --mlp-internal-dim-multiplier 16 --steps 100
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from analysis.plotting.style import COLORS, PAGE, add_legend, new_figure, style_axes
from benchmarks.measure import BenchmarkOptions, Precision, changed, machine_of, write_results
from benchmarks.training_steps import Batch, StackedReference, endless_batches, protocol, training_step
from models.vision_bdh import VisionBDH, VisionBDHConfig, v2_config
from training.command_line import run_script
from training.config import ClassificationConfig, require
from training.data import load_dataset, split_train
from training.device import prepare_device, warn_of_precision

SHOWN = 50  # steps averaged in the table
SIZES = ("n_layer", "n_embd", "n_head", "mlp_internal_dim_multiplier")
PLAIN = "plain, float32"  # what all others are compared with
LAST_BITS = 1e-7  # relative change of the initial weights
Build = Callable[[VisionBDHConfig], nn.Module]


@dataclass(frozen=True, kw_only=True)
class Options(BenchmarkOptions):
    """Size of the model, by default v2's, and length of the training."""

    n_layer: int = 6
    """levels"""
    n_embd: int = 192
    """token width D"""
    n_head: int = 6
    """heads"""
    mlp_internal_dim_multiplier: int = 32
    """neurons of all heads / n_embd"""
    steps: int = 200
    """optimiser steps"""
    batch_size: int = 32
    """images a step"""
    seed: int = 0
    """seed of weights, image order, crops and flips"""
    data_dir: Path | None = None
    """folder that holds data_cifar10; default: $VISION_BDH_DATA, else beside the scripts"""

    def __post_init__(self):
        super().__post_init__()
        require(self.seed < 2**63, self, "seed", "must be below 2^63")
        self.model()

    def model(self) -> VisionBDHConfig:
        return v2_config(**{name: getattr(self, name) for name in SIZES}, dropout=0.0)


def real_batches(options: Options, device: torch.device) -> Iterator[Batch]:
    """Training batches of CIFAR-10 by the protocol."""
    data = load_dataset("cifar10", options.data_dir)
    split = split_train(data.train_labels, ClassificationConfig.val_fraction, None, options.seed)
    return endless_batches(data, split, protocol(batch_size=options.batch_size, seed=options.seed), device)


def with_other_last_bits(config: VisionBDHConfig) -> nn.Module:
    """The plain model, each of its weights changed by a random relative 1e-7."""
    model = StackedReference(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + LAST_BITS * torch.randn_like(weight))
    return model


SIDES: dict[str, tuple[Build, Precision]] = {
    PLAIN: (StackedReference, "float32"),
    "plain, other last bits, float32": (with_other_last_bits, "float32"),
    "fast, float32": (VisionBDH, "float32"),
    "plain, bf16": (StackedReference, "bf16"),
    "fast, bf16": (VisionBDH, "bf16"),
}


def train(options: Options, side: str, device: torch.device) -> np.ndarray:
    """(steps,) training losses of one side in nats."""
    build, precision = SIDES[side]
    torch.manual_seed(options.seed)
    step = training_step(build(options.model()), real_batches(options, device), precision, device)
    steps = tqdm(range(options.steps), desc=side, unit="step", leave=False, disable=None)
    return torch.stack([step() for _ in steps]).double().cpu().numpy()


def summarise(losses: dict[str, np.ndarray]) -> pd.DataFrame:
    """For each side the mean loss at the end, and mean and largest difference from PLAIN, in nats."""
    rows = []
    for side, values in losses.items():
        difference = np.abs(values - losses[PLAIN])
        means = {"mean_first": difference[:SHOWN].mean(), "mean_last": difference[-SHOWN:].mean()}
        rows.append({"side": side, "last_loss": values[-SHOWN:].mean(), **means, "largest": difference.max()})
    return pd.DataFrame(rows)


def draw(losses: dict[str, np.ndarray], title: str) -> Figure:
    """Losses above, differences from PLAIN below."""
    figure = new_figure(PAGE, 4.4)
    figure.suptitle(title)
    above, below = figure.subplots(2, 1, sharex=True)
    for place, (side, values) in enumerate(losses.items()):
        steps = np.arange(1, len(values) + 1)
        look = dict(color=COLORS[place], linewidth=1)
        above.plot(steps, values, label=side, **look)
        if side != PLAIN:
            below.plot(steps, np.maximum(np.abs(values - losses[PLAIN]), 1e-8), **look)  # for the logarithmic axis
    above.set_ylabel("training loss (nats)")
    below.set(yscale="log", xlabel="step", ylabel="difference from plain,\nfloat32 (nats)")
    for ax in (above, below):
        style_axes(ax, "y")
    add_legend(figure, above)
    return figure


def main(options: Options) -> None:
    device = prepare_device(options.device)
    warn_of_precision("bf16", device)
    losses = {side: train(options, side, device) for side in SIDES}
    print(summarise(losses).to_string(index=False, float_format="{:.2e}".format))
    place, machine = machine_of(device)
    steps = pd.DataFrame({"step": np.arange(1, options.steps + 1), **losses})
    title = f"v2 of width {options.n_embd} on CIFAR-10, batch {options.batch_size}, no dropout: {machine}"
    path = options.output_dir / f"same_losses_{place}{changed(options, *SIZES, 'steps', 'batch_size', 'seed')}.csv"
    print(*write_results(steps, path, draw(losses, title)), sep="\n")


if __name__ == "__main__":
    run_script(main, __doc__)
