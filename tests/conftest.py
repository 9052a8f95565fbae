"""What several test files share: made-up images in CIFAR's format, tiny experiments, scripts run as users do."""

import functools
import os
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from training import ClassificationConfig, Experiment, RunOptions, fit
from models.vision_bdh import v2_config
from training.config import ROOT

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TINY_MODEL = dict(patch_size=8, n_layer=1, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4)  # 16 tokens, N = 16


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="device of the tests that need a device")


@pytest.fixture(scope="session")
def device(request):
    """The device of --device; without a GPU, tests on it are skipped."""
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")
    return torch.device(name)


@pytest.fixture
def gpu(device):
    """The device of --device, for tests that make sense on a GPU only."""
    if device.type != "cuda":
        pytest.skip("runs with --device cuda only")
    return device


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


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """PyTorch computes in one thread: more gain nothing on tensors this small."""
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


@pytest.fixture(scope="session")
def trained_run(experiment_in, tmp_path_factory):
    """Folder of a tiny finished run, for reading only."""
    trial = experiment_in(tmp_path_factory.mktemp("runs"), epochs=1)
    fit(trial)
    return trial.folder


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


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window. Where it is missing, tests are skipped, but fail in CI, which has to install it."""
    from playwright.sync_api import expect, sync_playwright

    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("there is no Chromium: apt-get install chromium")
    expect.set_options(timeout=60_000)  # ms; a busy machine is slow, not wrong
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


# ---------------------------------------------------------------------------- runs without training


@pytest.fixture
def make_run(tmp_path):
    """Writes a run of five epochs with random numbers; returns its folder and its rows of metrics.csv.

    done: epochs of a run that is not finished; test: its test result, None for data without a test part. Other keywords
    are those of claimed_runs.write_run, fields of model or training among them.
    """
    from tests.claimed_runs import write_run

    def make(name="v2_cifar10", seed=0, done=None, metric="accuracy", test=0.75, folder=None, columns=None, **changed):
        folder = folder or tmp_path / "runs" / name / f"seed{seed}"
        rng, n = np.random.default_rng([seed, len(name), changed.get("n_layer", 6)]), done or changed.get("epochs", 5)
        ranges = {"train_loss": (0.5, 1), "val_loss": (0.5, 1), f"val_{metric}": (0.7, 0.8), "epoch_time_sec": (40, 60)}
        numbers = {key: [rng.uniform(*ends) for _ in range(n)] for key, ends in ranges.items()} | (columns or {})
        fields = {"finished": done is None, "parameters": 3_233_482} | changed
        images = (40_000, 10_000, 10_000 if test is not None else 0)
        flags = f"--epochs {changed.get('epochs', 5)}"
        script = "train_bdh_unet.py" if metric == "miou" else "train_v2_cifar10.py"
        write_run(folder, script, flags, seed, test, metric, name, columns=numbers, images=images, **fields)
        return folder, pd.DataFrame({"epoch": range(1, n + 1)} | numbers).to_dict("records")

    return make
