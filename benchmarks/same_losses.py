"""Does the fast step train as the plain one does? Losses step by step, from the same weights on the same real images.

Every side takes the same batches of CIFAR-10, without dropout, whose draws differ between implementations. All are
compared with the plain step in float32. Two yardsticks stand beside the fast step: in float32 the plain step from
weights that differ in their last bits, since rounding alone drives two runs apart; in bf16 the plain step in bf16,
whose rounding is the noise that the fast one may have, too.

    python benchmarks/same_losses.py
    python benchmarks/same_losses.py --n-embd 96 --n-head 4 --mlp-internal-dim-multiplier 16 --steps 100
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from analysis.plotting.style import COLORS, PAGE, new_figure, style_axes
from benchmarks.measure import Precision, machine_of, write_results
from benchmarks.training_steps import Batch, StackedReference, endless_batches, training_step
from models.vision_bdh import VisionBDH, VisionBDHConfig, v2_config
from training.command_line import run_script
from training.config import ROOT, ClassificationConfig, UserError
from training.data import load_dataset, split_train
from training.device import pick_device, tune_cpu_allocator

SHOWN = 50  # steps of each mean in the table
PLAIN = "plain, float32"  # what all others are compared with
LAST_BITS = 1e-7  # relative size of the difference in the first weights


@dataclass(frozen=True, kw_only=True)
class Options:
    """The model's size, and how long to train; v2 at its full size."""

    n_layer: int = 6
    """levels"""
    n_embd: int = 192
    """width D of a token"""
    n_head: int = 6
    """heads"""
    mlp_internal_dim_multiplier: int = 32
    """neurons over all heads, as a multiple of n-embd"""
    steps: int = 200
    """optimiser steps"""
    batch_size: int = 32
    """images a step"""
    seed: int = 0
    """of the weights, the order, crops and flips"""
    data_dir: Path | None = None
    """folder that holds data_cifar10; default: $VISION_BDH_DATA, else beside the scripts"""
    device: str = "auto"
    """auto, cuda, cuda:1, mps or cpu"""
    output_dir: Path = ROOT / "results" / "benchmarks"
    """folder of the table and the picture"""


def real_batches(options: Options, device: torch.device) -> Iterator[Batch]:
    """Training batches of CIFAR-10 by the protocol, epoch after epoch."""
    data = load_dataset("cifar10", options.data_dir)
    split = split_train(data.train_labels, ClassificationConfig.val_fraction, None, options.seed)
    return endless_batches(data, split, options.batch_size, device, options.seed)


def with_other_last_bits(model: nn.Module) -> nn.Module:
    """The model, each of its weights changed by a relative 1e-7, at random."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + LAST_BITS * torch.randn_like(weight))
    return model


def losses_of(options: Options, config: VisionBDHConfig, device: torch.device) -> dict[str, np.ndarray]:
    """(steps,) training losses in nats of every side."""
    sides: dict[str, tuple] = {
        PLAIN: (StackedReference, "float32"),
        "plain again, other last bits, float32": (
            lambda config: with_other_last_bits(StackedReference(config)),
            "float32",
        ),
        "fast, float32": (VisionBDH, "float32"),
        "plain, bf16": (StackedReference, "bf16"),
        "fast, bf16": (VisionBDH, "bf16"),
    }
    return {side: _train(build, precision, side, options, config, device) for side, (build, precision) in sides.items()}


def _train(
    build, precision: Precision, side: str, options: Options, config: VisionBDHConfig, device: torch.device
) -> np.ndarray:
    torch.manual_seed(options.seed)
    step = training_step(build(config), real_batches(options, device), precision, device)
    steps = tqdm(range(options.steps), desc=side, unit="step", leave=False, disable=None)
    return torch.stack([step() for _ in steps]).double().cpu().numpy()


def summarise(losses: dict[str, np.ndarray]) -> pd.DataFrame:
    """A row a side: its last mean loss, and mean and largest difference from the plain step in float32, in nats."""
    rows = []
    for side, values in losses.items():
        difference = np.abs(values - losses[PLAIN])
        means = {"mean_first": difference[:SHOWN].mean(), "mean_last": difference[-SHOWN:].mean()}
        rows.append({"side": side, "last_loss": values[-SHOWN:].mean(), **means, "largest": difference.max()})
    return pd.DataFrame(rows)


def draw(losses: dict[str, np.ndarray], title: str) -> Figure:
    """Above the losses, below how far each is from the plain step in float32."""
    figure = new_figure(PAGE, 4.4)
    figure.suptitle(title)
    above, below = figure.subplots(2, 1, sharex=True)
    for place, (side, values) in enumerate(losses.items()):
        steps = np.arange(1, len(values) + 1)
        look = dict(color=COLORS[place], linewidth=1)
        above.plot(steps, values, label=side, **look)
        if side != PLAIN:
            below.plot(steps, np.maximum(np.abs(values - losses[PLAIN]), 1e-8), **look)  # 0 has no logarithm
    above.set_ylabel("training loss (nats)")
    below.set(yscale="log", xlabel="step", ylabel="distance from plain,\nfloat32 (nats)")
    for ax in (above, below):
        style_axes(ax, "y")
    figure.legend(*above.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def main(options: Options) -> None:
    device = pick_device(options.device)
    if min(options.steps, options.batch_size) < 1:
        raise UserError("steps and batch-size must be at least 1")
    if device.type == "cpu":
        tune_cpu_allocator()
    sizes = {name: getattr(options, name) for name in ("n_layer", "n_embd", "n_head", "mlp_internal_dim_multiplier")}
    try:
        config = v2_config(**sizes, dropout=0.0)
    except ValueError as error:
        raise UserError(str(error)) from None
    losses = losses_of(options, config, device)
    table = summarise(losses)
    print(table.to_string(index=False, float_format="{:.2e}".format))
    place, machine = machine_of(device)
    width = "" if options.n_embd == Options.n_embd else f"_width{options.n_embd}"
    steps = pd.DataFrame({"step": np.arange(1, options.steps + 1), **losses})
    title = f"v2 of width {options.n_embd} on CIFAR-10, batch {options.batch_size}, no dropout: {machine}"
    path = options.output_dir / f"same_losses_{place}{width}.csv"
    print(*write_results(steps, draw(losses, title), path), sep="\n")


if __name__ == "__main__":
    run_script(main, __doc__)
