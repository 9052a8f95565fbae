"""Tiny runs: stopped, resumed, read, compared; and the tables that scripts write."""

import csv
import dataclasses
import time

import pytest
import torch

from training import ClassificationConfig, fit, loop
from training.stored import load_checkpoint

MEASURED = {"epoch_time_sec", "images_per_sec", "peak_memory_mb"}  # columns that differ between equal runs

# of metrics.csv when images are classified
COLUMNS = (
    "epoch train_loss val_loss val_accuracy learning_rate epoch_time_sec images_per_sec peak_memory_mb train_accuracy"
).split()


def make_train(**fields):
    defaults = dict(dataset="cifar10", epochs=1, batch_size=8, learning_rate=0.02, weight_decay=0.1)
    return ClassificationConfig(**(defaults | fields))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def with_options(trial, **options):
    return dataclasses.replace(trial, options=dataclasses.replace(trial.options, **options))


def resumed(trial):
    return with_options(trial, resume=True)


def interrupt(trial, epoch=None, part="val"):
    """Ctrl-C in the validation of that epoch (from 1), or in the test; the folder stays as it then was."""
    real = loop.evaluate

    def evaluate(session, wanted):
        if wanted == part and epoch in (None, session.epoch + 1):
            raise KeyboardInterrupt
        return real(session, wanted)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "evaluate", evaluate)
        fit(trial)


def read_table(path):
    """The rows of a CSV file as text."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def markdown_rows(path):
    """Cells of every line of the tables in a Markdown file, titles and rules left out."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [each for each in cells if each[0] not in ("folder", "experiment", "---")]


def read_rows(folder, measured=True):
    """The rows of metrics.csv as text, on request without the columns that are measured."""
    rows = read_table(folder / "metrics.csv")
    assert all(row.keys() > MEASURED for row in rows), "the header is missing"
    return [{key: value for key, value in row.items() if measured or key not in MEASURED} for row in rows]


def read_metrics(folder):
    """The rows of metrics.csv, numbers."""
    return [{key: float(value) for key, value in row.items()} for row in read_rows(folder)]


def weights(folder, name="last.pt"):
    """The model's weights in a checkpoint of a run."""
    return load_checkpoint(folder / name)["model"]


def same_weights(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def snapshot(folder):
    """Content and time of every file below folder but the lock, which each process that looks writes anew."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def wait_for(condition, seconds=300):
    """Of another process."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)
