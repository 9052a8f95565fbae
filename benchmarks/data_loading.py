"""Speed and memory of reading images: decoding, random crop of the original, scaling, batches; no model.

Reads JPEGs of 256 pixels that it first makes from CIFAR-10 and CamVid (--images-dir, outside the checkout; about 0.3 GB
for 20,000), as training with --crop-original reads them. CPU time an image says most where other work runs on the
machine: 1000 / it are the images a second of a core. Memory is that of the process and its workers together (shared
pages counted once), after each of ten epochs.

    python benchmarks/data_loading.py --images-dir /tmp/jpegs
"""

import multiprocessing
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from analysis.plotting.style import COLORS, PAGE, new_figure, style_axes
from benchmarks.measure import BenchmarkOptions, changed, machine_of, write_results
from training.command_line import run_script
from training.config import ClassificationConfig, UserError
from training.data import DataSet, ImageBatches, data_folder, load_dataset, split_train
from training.data.masks import find_masks
from training.data.streaming import StreamedPart
from training.device import prepare_device

SIDE, QUALITY = 256, 90
MARK = "made_by_data_loading"  # file in a folder whose images may be replaced
SIZES = ("images", "workers", "batch_size", "img_size", "memory_images")


@dataclass(frozen=True, kw_only=True)
class Options(BenchmarkOptions):
    """What to read, and how often."""

    images_dir: Path
    """folder for the JPEGs, new or from an earlier call; they are made if there are fewer than --images"""
    data_dir: Path | None = None
    """folder that holds data_cifar10 and data_camvid; default: $VISION_BDH_DATA, else beside the scripts"""
    images: int = 20_000
    """JPEGs to make, half from CIFAR-10, half from CamVid"""
    workers: tuple[int, ...] = (1, 2)
    """numbers of worker processes"""
    batch_size: int = 128
    """images a batch"""
    img_size: int = 224
    """side of the crops after scaling"""
    repeats: int = 3
    """passes over --images for each number of workers"""
    memory_images: int = 2_000
    """images in each of the ten epochs over which memory is followed"""


def make_jpegs(options: Options) -> None:
    """Writes images_dir/train/CLASS/NUMBER.jpg: CIFAR-10 images scaled up, and squares of CamVid images, at random.

    Raises UserError for a folder with files of others, or CamVid images too small for the squares.
    """
    rng = np.random.default_rng(0)
    cifar = load_dataset("cifar10", options.data_dir)
    street = [pair.image for pair in find_masks("camvid", data_folder("camvid", options.data_dir)).pairs["train"]]
    _claim(options.images_dir)
    for number in tqdm(range(options.images), desc="making", unit="img", leave=False, disable=None):
        if number % 2:
            index = int(rng.integers(len(cifar.train_images)))
            name = cifar.class_names[cifar.train_labels[index]]
            image = Image.fromarray(cifar.train_images[index].transpose(1, 2, 0)).resize((SIDE, SIDE), Image.BICUBIC)
        else:
            name = "street"
            path = street[int(rng.integers(len(street)))]
            with Image.open(path) as whole:
                if min(whole.size) < SIDE:
                    raise UserError(f"{path} is smaller than {SIDE} pixels: give the original CamVid with --data-dir")
                left, top = (int(rng.integers(side - SIDE + 1)) for side in whole.size)
                image = whole.convert("RGB").crop((left, top, left + SIDE, top + SIDE))
        folder = options.images_dir / "train" / name
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number}.jpg", quality=QUALITY)


def _claim(folder: Path) -> None:
    """Makes the folder and marks it as ours. Raises UserError if it has files of others."""
    if folder.exists() and not (folder / MARK).exists() and any(folder.iterdir()):
        raise UserError(f"{folder} holds other files, and fewer JPEGs than --images: name a new folder to make them in")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()


def reading(data: DataSet, n_images: int, workers: int, options: Options, device: torch.device) -> StreamedPart:
    """The training part of n_images, as --crop-original reads it."""
    fields = dict(crop_original=True, crop_scale_min=0.08, train_limit=n_images, val_fraction=0.02)
    protocol = dict(epochs=1, batch_size=options.batch_size, learning_rate=1e-3, weight_decay=0.0)
    config = ClassificationConfig(dataset="folder", **protocol, **fields)
    split = split_train(data.train_labels, config.val_fraction, config.train_limit, config.seed)
    return ImageBatches(data, split, config, options.batch_size, device, workers).parts["train"]


def read_all(part: StreamedPart, batch_size: int, epoch: int) -> int:
    """Reads every image once; returns their number."""
    draws = torch.Generator().manual_seed(epoch)
    order = torch.stack((torch.randperm(len(part), generator=draws), torch.arange(len(part)) + epoch), dim=1)
    return sum(len(labels) for _, labels in part.batches(order.split(batch_size)))


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def memory_mb() -> float:
    """Memory of this process and its children, in MB; pages that they share are counted once."""
    total = 0
    for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total * 1024 / 1e6


def measure_rates(data: DataSet, options: Options, device: torch.device) -> list[dict]:
    """A row for each number of workers: the fastest pass, and CPU time over all passes."""
    rows = []
    for workers in options.workers:
        part, before, times = reading(data, options.images, workers, options, device), cpu_seconds(), []
        for epoch in range(options.repeats):
            started = time.perf_counter()
            n = read_all(part, options.batch_size, epoch)
            times.append(time.perf_counter() - started)
        part.reader.stop()  # so that the workers' time is counted
        rate = n / min(times)
        row = {"workers": workers, "images": n, "passes": options.repeats, "images_per_sec": rate}
        row |= {"images_per_sec_per_worker": rate / max(1, workers)}
        rows.append(row | {"cpu_ms_per_image": 1e3 * (cpu_seconds() - before) / (n * options.repeats)})
        print(rows[-1], flush=True)
    return rows


def measure_memory(data: DataSet, options: Options, device: torch.device) -> list[dict]:
    """A row for each of ten epochs."""
    part, rows = reading(data, options.memory_images, max(options.workers), options, device), []
    for epoch in range(10):
        read_all(part, options.batch_size, epoch)
        rows.append(
            {"epoch": epoch + 1, "workers": max(options.workers), "images": len(part), "memory_mb": memory_mb()}
        )
    part.reader.stop()
    return rows


def draw(rates: list[dict], memory: list[dict], title: str) -> Figure:
    figure = new_figure(PAGE, 3.2)
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    left.bar([str(row["workers"]) for row in rates], [row["images_per_sec"] for row in rates], color=COLORS[0])
    left.set_xlabel("worker processes")
    left.set_ylabel("images a second")
    style_axes(left, "y")
    right.plot([row["epoch"] for row in memory], [row["memory_mb"] for row in memory], marker="o", color=COLORS[1])
    right.set_ylim(0, 1.1 * max(row["memory_mb"] for row in memory))
    right.set_xlabel(f"epoch of {memory[0]['images']:,} images")
    right.set_ylabel(f"memory with {memory[0]['workers']} workers (MB)")
    style_axes(right, "y")
    return figure


def main(options: Options) -> None:
    device = prepare_device(options.device)
    if sum(1 for _ in options.images_dir.glob("train/*/*.jpg")) < options.images:
        make_jpegs(options)
    data = load_dataset("folder", options.images_dir, options.img_size, 3)
    rates, memory = measure_rates(data, options, device), measure_memory(data, options, device)
    place, machine = machine_of(device)
    path = options.output_dir / f"data_loading_{place}{changed(options, *SIZES)}.csv"
    title = f"JPEGs of {SIDE} pixels, random crops at {options.img_size}: {machine}"
    print(title, pd.DataFrame(rates).to_string(index=False), pd.DataFrame(memory).to_string(index=False), sep="\n")
    tables = [pd.DataFrame([{"machine": machine} | row for row in rows]) for rows in (rates, memory)]
    print(*write_results(tables[0], path, draw(rates, memory, title)), sep="\n")
    write_results(tables[1], path.with_name(f"{path.stem}_memory.csv"))


if __name__ == "__main__":
    run_script(main, __doc__)
