"""What several test files share: made-up images in CIFAR-10's format, tiny experiments, scripts run as users do."""

import functools
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from models.vision_bdh import v2_config
from training import ClassificationConfig, Experiment, RunOptions

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
    """PyTorch computes in one thread, for the tests of a file."""
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
    """A folder that holds data_cifar10/cifar10.npz: 240 + 40 made-up images, 10 classes. For reading only."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "data_cifar10").mkdir()
    np.savez(folder / "data_cifar10" / "cifar10.npz", **made_up_cifar())
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
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
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
