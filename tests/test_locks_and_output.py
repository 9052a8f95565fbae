"""Several processes on one run, and output that cannot be written. A killed sweep: test_sweep.py."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest

from training import UserError, fit, loop
from tests.children import before, kill, launch_in_child
from tests.trials import interrupt, read_metrics, resumed, snapshot, wait_for, with_options
from training.command_line import experiment_of
from training.config import ROOT
from training.console import prepare_streams
from training.runs import Run

SCRIPT = "train_v2_cifar10.py"
ENDLESS = "--patch-size 8 --n-layer 1 --n-embd 8 --n-head 2 --mlp-internal-dim-multiplier 4 --epochs 1000000".split()


def test_a_run_in_work_is_refused_and_untouched(experiment):
    trial = experiment(epochs=2)
    interrupt(trial, 2)
    run, files = Run(trial.folder), snapshot(trial.folder)
    with run.locked():
        assert run.is_locked()
        for again in (trial, resumed(trial), with_options(trial, overwrite=True)):
            with pytest.raises(UserError, match=rf"trained by another process \(process {os.getpid()} on .* since "):
                fit(again)
    assert not run.is_locked() and snapshot(trial.folder) == files
    fit(resumed(trial))


def test_a_lock_leaves_no_empty_folders_and_no_folder_is_no_lock(experiment):
    trial = experiment()
    run = Run(trial.folder)
    assert not run.is_locked()
    with run.locked(), pytest.raises(UserError), run.locked():
        pass
    assert not trial.options.runs_dir.exists()


def test_of_two_processes_on_one_run_one_is_refused(data_dir, tmp_path):
    """Started at the same moment; after kill -9 of the other, the run is free and whole."""
    flags = [*ENDLESS, "--data-dir", str(data_dir), "--runs-dir", str(tmp_path / "runs"), "--device", "cpu"]
    folder = experiment_of(SCRIPT, " ".join(flags)).folder
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    streams = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    command = [sys.executable, str(ROOT / SCRIPT), *flags]
    processes = [subprocess.Popen(command, cwd=tmp_path, env=environment, **streams) for _ in range(2)]
    try:
        wait_for(lambda: any(each.poll() is not None for each in processes))
        (refused,) = (each for each in processes if each.poll() is not None)
        said = refused.stderr.read()
        assert refused.returncode == 1 and len(said.splitlines()) == 1
        assert said.startswith("error: ") and "is being trained by another process" in said
        wait_for((folder / "metrics.csv").exists)
        assert Run(folder).is_locked()
    finally:
        for each in processes:
            each.kill()
            each.wait()
    assert not Run(folder).is_locked()
    assert [row["epoch"] for row in read_metrics(folder)] == list(range(1, len(read_metrics(folder)) + 1))


def no_locks(*_):
    """In place of fcntl.flock: as on a file system without it."""
    raise OSError(errno.ENOSYS, "Function not implemented")


def killed_without_locks():
    fcntl.flock = no_locks
    before(loop, "evaluate", kill)


def test_without_locks_of_the_file_system_a_dead_process_holds_nothing(experiment, monkeypatch):
    trial = experiment(epochs=1)
    code, output = launch_in_child(trial, killed_without_locks)
    assert code == -signal.SIGKILL and (trial.folder / "lock").exists(), output
    monkeypatch.setattr(fcntl, "flock", no_locks)
    run = Run(trial.folder)
    with run.locked():
        assert run.is_locked()
        with pytest.raises(UserError, match=rf"another process \(process {os.getpid()} on {socket.gethostname()}\): "):
            fit(resumed(trial))
    assert not run.is_locked()
    assert fit(resumed(trial))["test"]


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("target", ["a closed pipe", "a full disk"])
def test_output_that_cannot_be_written_does_not_stop_training(target, buffered, experiment, monkeypatch):
    """`... | head -1` and `... > /dev/full`; test_scripts.py has a script's whole process."""
    if target == "a closed pipe":
        reading, writing = os.pipe()
        os.close(reading)
    else:
        writing = os.open("/dev/full", os.O_WRONLY)
    stream = os.fdopen(writing, "w", buffering=-1 if buffered else 1)
    monkeypatch.setattr(sys, "stdout", stream)
    prepare_streams()
    assert fit(experiment(epochs=1))["test"]
    print("the end", flush=True)
    stream.close()  # what is buffered must not fail now


def test_a_process_without_stdout_trains(experiment, monkeypatch):
    """As under pythonw, or with `>&-`."""
    monkeypatch.setattr(sys, "stdout", None)
    prepare_streams()
    assert fit(experiment(epochs=1))["test"]
