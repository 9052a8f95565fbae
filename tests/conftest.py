"""What several test files share: made-up images in CIFAR's format, tiny experiments, scripts run as users do."""

import csv
import functools
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from training import ClassificationConfig, Experiment, RunOptions
from models.vision_bdh import v2_config
from training.metrics import METRICS

ROOT = Path(__file__).resolve().parents[1]
TINY_MODEL = dict(patch_size=8, n_layer=1, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4)  # 16 tokens, N = 16


def made_up_cifar(n_train=240, n_test=40, n_classes=10):
    """The arrays of a CIFAR npz: noise around a colour of each class, so that there is something to learn."""
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 216, (n_classes, 3))
    arrays = {"class_names": np.array([f"class {label}" for label in range(n_classes)])}
    for part, n in (("train", n_train), ("test", n_test)):
        labels = rng.permutation(np.arange(n) % n_classes)
        images = colours[labels][:, None, None, :] + rng.integers(-40, 41, (n, 32, 32, 3))
        arrays |= {f"{part}_images": images.astype(np.uint8), f"{part}_labels": labels.astype(np.int64)}
    return arrays


@pytest.fixture(scope="module")
def one_thread():
    """PyTorch computes in one thread, for the tests of a file: threads gain nothing on tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cifar_arrays():
    """Arrays of a made-up CIFAR-10, the test's own to damage."""
    return made_up_cifar()


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder of made-up images, for reading only.

    data_cifar10/cifar10.npz holds 240 + 40 in 10 classes, data_cifar100/cifar100.npz 300 + 100 in 100.
    """
    folder = tmp_path_factory.mktemp("data")
    for name, sizes in (("cifar10", {}), ("cifar100", dict(n_train=300, n_test=100, n_classes=100))):
        (folder / f"data_{name}").mkdir()
        np.savez(folder / f"data_{name}" / f"{name}.npz", **made_up_cifar(**sizes))
    return folder


@pytest.fixture(scope="session")
def experiment_in(data_dir):
    """Makes a tiny Experiment on the made-up images; keywords but model and options are fields of its training."""

    def make(runs_dir, name="trial", model=None, options=None, **train):
        defaults = dict(dataset="cifar10", epochs=2, batch_size=32, learning_rate=1e-2, weight_decay=0.05)
        where = dict(data_dir=data_dir, runs_dir=runs_dir, device="cpu")
        return Experiment(
            name,
            v2_config(**(TINY_MODEL | (model or {}))),
            ClassificationConfig(**(defaults | train)),
            RunOptions(**(where | (options or {}))),
        )

    return make


@pytest.fixture
def experiment(experiment_in, tmp_path):
    """experiment_in with the test's own folder of runs."""
    return functools.partial(experiment_in, tmp_path / "runs")


@pytest.fixture
def call_script(monkeypatch, tmp_path):
    """Runs a script of the repository in this process, from another folder; returns its exit code."""

    def call(script, *args):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *map(str, args)])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            return end.code or 0
        return 0

    return call


@pytest.fixture(scope="session")
def run_script():
    """Runs Python on a script of the repository (or any arguments) from the folder cwd, as a user does."""

    def run(*args, cwd):
        return subprocess.run(
            [sys.executable, *map(str, args)],
            cwd=cwd,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
            capture_output=True,
            text=True,
        )

    return run


# ---------------------------------------------------------------------------- runs without training

RUN_MODEL = dict(n_layer=6, n_embd=192, attention="raw")
RUN_TRAIN = dict(dataset="cifar10", epochs=5, batch_size=32, learning_rate=1e-4)
HARDWARE = {"device": "cuda", "name": "GPU X", "memory_gb": 8.0}


@pytest.fixture
def make_run(tmp_path):
    """Writes a run's folder; returns it and its rows of metrics.csv. Keywords are fields of model or training.

    done: epochs of a run that is not finished; test: its test result, None for data without a test part.
    """

    def make(
        name="v2_cifar10", seed=0, done=None, metric="accuracy", test=0.75, folder=None, hardware=HARDWARE, **changed
    ):
        model = RUN_MODEL | {key: value for key, value in changed.items() if key in RUN_MODEL}
        train = RUN_TRAIN | {key: value for key, value in changed.items() if key in RUN_TRAIN} | {"seed": seed}
        folder = folder or tmp_path / "runs" / name / f"seed{seed}"
        folder.mkdir(parents=True)
        config = {"experiment": name, "config": {"model": model, "train": train}, "model_class": "VisionBDHConfig"}
        config["data"] = {"name": train["dataset"]}
        (folder / "config.json").write_text(json.dumps(config | {"parameters": 3_233_482, "hardware": hardware}))
        rng = np.random.default_rng([seed, len(name), model["n_layer"]])
        rows = [
            {
                "epoch": epoch,
                "train_loss": rng.uniform(0.5, 1.0),
                "val_loss": rng.uniform(0.5, 1.0),
                f"val_{metric}": rng.uniform(0.7, 0.8),
                "learning_rate": 1e-4,
                "epoch_time_sec": rng.uniform(40.0, 60.0),
                "images_per_sec": 800.0,
                "peak_memory_mb": 1200.0,
            }
            for epoch in range(1, (done or train["epochs"]) + 1)
        ]
        with (folder / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        if done is None:
            pick = max if METRICS[metric].higher_is_better else min
            best = pick(rows, key=lambda row: row[f"val_{metric}"])
            best = {key: best[key] for key in ("epoch", "val_loss", f"val_{metric}")}
            tested = None if test is None else {"loss": 0.6, metric: test}
            summary = {"test": tested, "best": best, "epochs": len(rows), "parameters": 3_233_482}
            (folder / "summary.json").write_text(json.dumps(summary))
        return folder, rows

    return make
