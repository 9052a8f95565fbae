"""What each exported form of a model costs and is worth: size of its file, accuracy, latency, memory; on the CPU.

Forms of a run's best weights: PyTorch in float32 and bf16, and in onnxruntime float32, int8, pruned, and pruned with
int8; the same of a second model, such as a ViT-Tiny of equal size (which is not pruned). Exports go into a temporary
folder. Latencies of all forms are measured in turns in this process, with one and two threads; every number is also
given as a ratio to the first model's float32 in onnxruntime. Accuracies are on the run's own test images. Memory is the
peak of a process that opens the file and answers one batch, above what it held before.

    python benchmarks/export_table.py runs/v2_cifar10/seed0 runs/vit_tiny_cifar10/seed0
    python benchmarks/export_table.py runs/v2_cifar10/seed0 runs/vit_tiny_cifar10/seed0 --test-images 2000 --keep 0.25
"""

import contextlib
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
import torch
import tyro
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.measure import changed, in_turns, machine_of, seconds_of, spread, write_results
from interpretability.common.trained import TrainedRun
from tools.exporting.evaluation import Predict, score
from tools.exporting.programs import onnx_answer, write_int8, write_onnx
from tools.exporting.pruned import prune, write_pruned
from tools.exporting.weights import export_weights
from training.command_line import run_script
from training.config import ROOT, UserError, require
from training.device import prepare_device, warn_of_precision
from training.runs import load_model

CALIBRATION_IMAGES = 256
MEASURED = ("file_mb", "seconds_1_image", "seconds_batch", "memory_mb")  # compared by ratios
PROCESSES = multiprocessing.get_context("forkserver")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which models, and how much to measure."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs that classify images, the reference first"""
    keep: float = 0.5
    """share of the neurons of every head that pruning keeps"""
    batch_size: int = 32
    """images in a batch"""
    threads: tuple[int, ...] = (1, 2)
    """numbers of threads"""
    test_images: int | None = None
    """test only this many images; default: all"""
    data_dir: Path | None = None
    """folder that contains data_cifar10 etc.; default: $VISION_BDH_DATA, else the folder of the train scripts"""
    repeats: int = 7
    """timed readings of each side, after the warm-up"""
    output_dir: Path = ROOT / "results" / "benchmarks"
    """folder for the table"""

    def __post_init__(self):
        if not self.runs:
            raise ValueError("there is nothing to measure: name one or more runs")
        require(0 < self.keep <= 1, self, "keep", "must be above 0 and at most 1")
        require(len({*self.threads}) == len(self.threads), self, "threads", "names a number twice")
        require(self.test_images is None or self.test_images >= 1, self, "test_images", "must be at least 1")
        if not self.threads or min(self.batch_size, self.repeats, *self.threads) < 1:
            raise ValueError("batch_size, repeats and threads must be at least 1")


class Form(NamedTuple):
    """One exported form of a model."""

    model: str
    form: str
    engine: str
    file: Path
    open: Callable[[int], Predict]  # takes the number of threads


def forms(run: TrainedRun, keep: float, folder: Path) -> Iterator[Form]:
    """Writes the forms of a run into folder. Raises UserError if a package or the data are missing."""
    name = run.config["experiment"]
    whole = folder / "float32.safetensors"
    save_file({key: value.contiguous() for key, value in run.model.state_dict().items()}, whole)
    export_weights(run.model, run.folder, folder)
    yield Form(name, "float32", "PyTorch", whole, partial(in_pytorch, run.folder, None))
    yield Form(name, "bf16", "PyTorch", folder / "best_bf16.safetensors", partial(in_pytorch, folder, torch.bfloat16))
    models = {"": run.model}
    with contextlib.suppress(UserError):  # a model without neurons to prune
        models["pruned "] = prune(run.model, training_images(run), keep)
    for prefix, model in models.items():
        path = folder / f"{prefix.strip() or 'whole'}.onnx"
        if prefix:
            write_pruned(model, run.config, folder / "pruned")
        write_onnx(model, model.config if prefix else run.sizes, path)
        int8 = path.with_name(f"{path.stem}_int8.onnx")
        write_int8(path, int8, training_images(run))
        kept = f"to {model.config.n_neurons} neurons a head, " if prefix else ""
        yield Form(name, f"{prefix}{kept}float32", "onnxruntime", path, partial(onnx_answer, path))
        yield Form(name, f"{prefix}{kept}int8", "onnxruntime", int8, partial(onnx_answer, int8))


def training_images(run: TrainedRun) -> Iterator[Tensor]:
    return (images for images, _ in run.training_batches(run.choose_training_images(CALIBRATION_IMAGES), 64))


def in_pytorch(folder: Path, dtype: torch.dtype | None, threads: int) -> Predict:
    """The run's model, on that many threads; dtype: of autocast."""
    model = load_model(folder)[0]

    def predict(images: Tensor) -> Tensor:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        with torch.inference_mode(), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            return model(images).float()

    return predict


def time_forms(found: list[Form], run: TrainedRun, options: Options) -> pd.DataFrame:
    """Median seconds by form and number of threads, for one image and a batch."""
    shape = (run.sizes.in_channels, run.sizes.img_size, run.sizes.img_size)
    rows = []
    for threads in options.threads:
        predicts = {place: form.open(threads) for place, form in enumerate(found)}
        for column, n, repeats in (("seconds_1_image", 1, 3), ("seconds_batch", options.batch_size, 1)):
            images = torch.rand(n, *shape) * 2 - 1
            sides = {place: partial(_repeat, predict, images, repeats) for place, predict in predicts.items()}
            readings = in_turns(sides, seconds_of, options.repeats, warm_up=1.0)
            for place, times in readings.items():
                rows.append({"place": place, "threads": threads, "column": column} | spread(times, repeats))
    table = pd.DataFrame(rows).pivot(index=["place", "threads"], columns="column", values="seconds")
    return table.reset_index()


def _repeat(predict: Predict, images: Tensor, repeats: int) -> None:
    for _ in range(repeats):
        predict(images)


def memory_mb(form: Form, shape: tuple[int, ...]) -> float:
    """Peak memory of a process that opens the form and answers one batch, above what it held before."""
    ours, its = PROCESSES.Pipe()
    process = PROCESSES.Process(target=_measure_memory, args=(form.open, shape, its))
    process.start()
    its.close()
    try:
        return ours.recv()
    except EOFError:
        raise UserError(f"the memory of {form.form} could not be measured: its process ended early") from None
    finally:
        process.join()


def _measure_memory(open_form: Callable[[int], Predict], shape: tuple[int, ...], connection: Any) -> None:
    import resource  # not on Windows

    torch.set_num_threads(1)
    images = torch.rand(shape)
    torch.rand(64, 64) @ torch.rand(64, 64)  # what a first product allocates
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    open_form(1)(images)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    connection.send((peak - before) * (1 if sys.platform == "darwin" else 1024) / 1e6)


def measure(options: Options, folder: Path) -> pd.DataFrame:
    """One row for each form and number of threads."""
    runs = [TrainedRun(path, options.data_dir, "cpu", any_model=True) for path in options.runs]
    for run in runs:
        run.require_classifier()
    if len({(run.sizes.in_channels, run.sizes.img_size) for run in runs}) > 1:
        raise UserError("the runs take images of different sizes or channels: compare runs on one data set")
    found, owners = [], []
    for number, run in enumerate(runs):
        (folder / str(number)).mkdir()
        for form in forms(run, options.keep, folder / str(number)):
            found.append(form)
            owners.append(number)
    rows = []
    for form, number in zip(found, owners, strict=True):
        run = runs[number]
        shape = (options.batch_size, run.sizes.in_channels, run.sizes.img_size, run.sizes.img_size)
        result = score(run, form.open(max(options.threads)), options.test_images)
        low, high = result.interval
        worth = {"accuracy": result.value, "low": low, "high": high, "test_images": result.n_images}
        about = {"run": number, "model": form.model, "form": form.form, "engine": form.engine}
        rows.append(about | worth | {"file_mb": form.file.stat().st_size / 1e6, "memory_mb": memory_mb(form, shape)})
    table = pd.DataFrame(rows).rename_axis("place").reset_index()
    table = table.merge(time_forms(found, runs[0], options), on="place").drop(columns="place")
    return with_ratios(table).drop(columns="run")  # two runs may have the same name


def with_ratios(table: pd.DataFrame) -> pd.DataFrame:
    """Adds ratio_<column>: over the first model's float32 in onnxruntime, with as many threads."""
    first = table[(table.run == 0) & (table.form == "float32") & (table.engine == "onnxruntime")]
    reference = table[["threads"]].merge(first, on="threads")
    for column in MEASURED:
        table[f"ratio_{column}"] = (table[column] / reference[column]).astype(float)
    return table


def show(table: pd.DataFrame, words: str) -> Table:
    shown = Table(title=f"ratios to the first model in float32 by onnxruntime; {words}")
    for title in ("model", "form", "engine", "threads", "accuracy (%)", "file", "1 image", "batch", "memory"):
        shown.add_column(title)
    for row in table.itertuples():
        accuracy = f"{100 * row.accuracy:.2f} ({100 * row.low:.2f} to {100 * row.high:.2f})"
        ratios = (getattr(row, f"ratio_{column}") for column in MEASURED)
        shown.add_row(row.model, row.form, row.engine, str(row.threads), accuracy, *(f"{each:.2f}" for each in ratios))
    return shown


def main(options: Options) -> None:
    device = prepare_device("cpu")
    warn_of_precision("bf16", device)
    torch.set_num_threads(max(options.threads))
    with tempfile.TemporaryDirectory() as folder:
        table = measure(options, Path(folder))
    torch.set_num_threads(max(options.threads))
    name, words = machine_of(device)
    path = (
        options.output_dir
        / f"export_table_{name}{changed(options, 'keep', 'batch_size', 'threads', 'test_images')}.csv"
    )
    write_results(table.assign(batch_size=options.batch_size, hardware=words).round(6), path)
    Console(width=160).print(show(table, words))
    print(path)


if __name__ == "__main__":
    run_script(main, __doc__)
