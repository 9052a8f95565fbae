"""Accuracy against the number of neurons that pruning keeps, without further training.

Three orders of the neurons: by need (gated activity times the length of the decoder row), by gated activity alone, and
at random, the control. All are read from the run's training images; accuracies are on its test images. Writes a table
(CSV) and a figure (PNG and SVG). Its twin in depth, the accuracy after every level, is interpretability/probe.py.

    python benchmarks/pruning_curve.py --run runs/v2_cifar10/seed0
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from analysis.plotting.style import COLORS, MARKERS, PAGE, style_axes, titled_figure
from benchmarks.measure import changed, write_results
from interpretability.common.trained import TrainedRun, progress
from models.pruning import core_of, kept_neurons, neuron_counts, pruned
from tools.exporting.evaluation import score
from tools.exporting.pruned import importance
from training.command_line import run_script
from training.config import ROOT, UserError, require

ORDERS = {"use": "most needed", "activity": "most active", "random": "at random"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which run, and how many points."""

    run: Path
    """folder of a BDH run"""
    points: int = 8
    """numbers of neurons to try, evenly spaced"""
    calibration_images: int = 256
    """training images from which activity is read"""
    test_images: int | None = None
    """test only this many images; default: all"""
    seed: int = 0
    """of the random order"""
    data_dir: Path | None = None
    """folder that contains data_cifar10 etc.; default: $VISION_BDH_DATA, else the folder of the train scripts"""
    output_dir: Path = ROOT / "results" / "benchmarks"
    """folder for the table and the figure"""

    def __post_init__(self):
        for name in ("points", "calibration_images"):
            require(getattr(self, name) >= 1, self, name, "must be at least 1")
        require(0 <= self.seed < 2**63, self, "seed", "must be at least 0 and below 2^63")
        require(self.test_images is None or self.test_images >= 1, self, "test_images", "must be at least 1")


def orders(run: TrainedRun, options: Options) -> dict[str, Tensor]:
    """How much each neuron counts, (H, N), in each order."""
    numbers = run.choose_training_images(options.calibration_images)
    needed = {
        order: importance(run.model, (images for images, _ in run.training_batches(numbers, 64)), order)
        for order in ("use", "activity")
    }
    return needed | {"random": torch.rand(needed["use"].shape, generator=torch.Generator().manual_seed(options.seed))}


def measure(run: TrainedRun, options: Options) -> pd.DataFrame:
    """One row for each order and number of neurons. Raises UserError for a model that cannot be pruned."""
    try:
        config = core_of(run.model).config
    except ValueError as error:
        raise UserError(str(error)) from None
    counts = neuron_counts(config)
    places = np.linspace(0, len(counts) - 1, min(options.points, len(counts))).round().astype(int)
    rows = []
    for order, needed in progress(orders(run, options).items()):
        for n in (counts[place] for place in places):
            smaller = pruned(run.model, kept_neurons(needed, n, config.rotary_parts)).to(run.device)
            result = score(run, smaller, options.test_images)
            low, high = result.interval
            about = {"order": order, "neurons_per_head": n, "of": config.n_neurons}
            rows.append(about | {"accuracy": result.value, "low": low, "high": high, "test_images": result.n_images})
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, title: str) -> Figure:
    figure = titled_figure(PAGE / 2, 2.6, title)
    ax = figure.subplots()
    for place, (order, label) in enumerate(ORDERS.items()):
        part = table[table.order == order]
        look = dict(color=COLORS[place], marker=MARKERS[place], markersize=3, linewidth=1)
        ax.plot(part.neurons_per_head, 100 * part.accuracy, label=label, **look)
        ax.fill_between(part.neurons_per_head, 100 * part.low, 100 * part.high, color=COLORS[place], alpha=0.15, lw=0)
    ax.set_xlabel("neurons kept per head")
    ax.set_ylabel("test accuracy (%)")
    ax.legend(frameon=False)
    style_axes(ax, "both")
    return figure


def main(options: Options) -> None:
    run = TrainedRun(options.run, options.data_dir, "auto", any_model=True)
    run.require_classifier()
    table = measure(run, options)
    sizes = changed(options, "points", "calibration_images", "test_images", "seed")
    path = options.output_dir / f"{run.file_name(f'pruning_curve_{run.stem}')}{sizes}.csv"
    figure = draw(table, f"Pruned without further training: {run.title}")
    path, *pictures = write_results(table.assign(run=run.title), path, figure)
    print(
        table.pivot(index="neurons_per_head", columns="order", values="accuracy").to_string(
            float_format="{:.3f}".format
        )
    )
    print("->", *pictures, path)


if __name__ == "__main__":
    run_script(main, __doc__)
