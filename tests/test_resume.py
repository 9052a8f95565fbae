"""Runs that were stopped, killed or damaged, and then resumed: they end as an uninterrupted run does, bit for bit."""

import contextlib
import csv
import dataclasses
import functools
import io
import json
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch

from training import UserError, fit, launch, loop
from training.runs import Run, load_file, load_model

TRIAL = dict(epochs=4, crop_scale_min=0.8, horizontal_flip=True)  # 6 steps an epoch; dropout is on
CHECKPOINTS = ("last.pt", "previous.pt", "best.pt")
MEASURED = {"epoch_time_sec", "images_per_sec", "peak_memory_mb"}

# bit for bit holds for equal numbers of threads: in this process and in every child it is one
pytestmark = pytest.mark.usefixtures("one_thread")

# Each child is forked from a process that has imported what takes seconds to import.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch._dynamo", "torchvision", "tyro", "rich.table", "pytest"])


# ---------------------------------------------------------------------------- helpers


@pytest.fixture(scope="module")
def reference(experiment_in, tmp_path_factory):
    """Folder of the run that nothing interrupted."""
    trial = experiment_in(tmp_path_factory.mktemp("reference"), **TRIAL)
    code, output = launch_in_child(trial)
    assert code == 0, output
    return trial.folder


def with_options(trial, **options):
    return dataclasses.replace(trial, options=dataclasses.replace(trial.options, **options))


def resumed(trial):
    return with_options(trial, resume=True)


def launch_in_child(trial, sabotage=None):
    """The trial as a script starts it, in a process of its own after sabotage(); its exit code and what it said."""
    ours, its = PROCESSES.Pipe()
    process = PROCESSES.Process(target=_child, args=(trial, sabotage, its))
    process.start()
    its.close()
    try:
        output = ours.recv()
    except EOFError:  # killed
        output = ""
    process.join()
    return process.exitcode, output


def _child(trial, sabotage, connection):
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    options = trial.options
    sys.argv = ["train.py", f"--data-dir={options.data_dir}", f"--runs-dir={options.runs_dir}", "--device=cpu"]
    sys.argv += [f"--{flag}" for flag in ("resume", "overwrite") if getattr(options, flag)]
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            if sabotage:
                sabotage()
            launch(trial.name, trial.model, trial.train)
    finally:
        connection.send(output.getvalue())


def assert_same_run(folder, reference):
    """Both runs wrote the same: weights, optimiser, metrics but for what is measured, summary, split."""
    for name in CHECKPOINTS:
        assert_same(load_file(folder / name), load_file(reference / name), name)
    assert metrics(folder) == metrics(reference)
    line_ends = [(each / "metrics.csv").read_bytes().count(b"\r") for each in (folder, reference)]
    assert line_ends[0] == line_ends[1], "lines end in two ways"
    assert (folder / "summary.json").read_text() == (reference / "summary.json").read_text()
    for one, other in zip(*(vars(Run(each).read_split()).values() for each in (folder, reference)), strict=True):
        assert one.tolist() == other.tolist()
    files = {path.name for path in folder.iterdir()} - {"damaged.pt"}  # a broken last.pt, set aside
    assert files == {path.name for path in reference.iterdir()}


def assert_same(one, other, where):
    """Nested dicts and lists of tensors and numbers, equal to the last bit."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where} {key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where} {i}")
    else:
        assert one == other, where


def metrics(folder):
    """metrics.csv as text fields, without the columns that are measured."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(row.keys() > MEASURED for row in rows), "the header is missing"
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]


def interrupt(monkeypatch, trial, epoch, part="val"):
    """Ctrl-C in the evaluation of that epoch (from 1), or of the test part; the folder stays as it then was."""
    real = loop.evaluate

    def evaluate(session, wanted):
        if wanted == part and (part == "test" or session.epoch + 1 == epoch):
            raise KeyboardInterrupt
        return real(session, wanted)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "evaluate", evaluate)
        fit(trial)


def snapshot(folder):
    """Content and time of every file below folder."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def truncate(path, keep):
    """Leaves the first bytes of a file: their number, or their share."""
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])


# ---------------------------------------------------------------------------- sabotage, in a child


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def nth(n, action):
    """A function that calls action(*args) in its n-th call, from 1."""
    calls = iter(range(1, 10**9))

    def count(*args, **kwargs):
        if next(calls) == n:
            action(*args, **kwargs)

    return count


def before(owner, name, hook):
    """Calls hook with the arguments of owner.name before each call of it."""
    real = getattr(owner, name)

    @functools.wraps(real)
    def hooked(*args, **kwargs):
        hook(*args, **kwargs)
        return real(*args, **kwargs)

    setattr(owner, name, hooked)


def kill_in_step(n):
    before(loop, "optimizer_step", nth(n, lambda session: kill()))


def kill_in_checkpoint(n):
    """Half of the n-th file that torch.save writes, then the end. The first is the checkpoint before training."""
    real = torch.save

    def half(state, file):
        whole = io.BytesIO()
        real(state, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        kill()

    before(torch, "save", nth(n, half))


def kill_between_renames(n):
    """In the n-th checkpoint's: last.pt has become previous.pt, and nothing has become last.pt."""
    hit = nth(n, kill)
    before(Path, "replace", lambda path, target: hit() if path.name == "last.pt.partial" else None)


def kill_before_checkpoint(n):
    """The line of metrics.csv is written, best.pt too, last.pt not."""
    before(Run, "save_checkpoint", nth(n, lambda run, state: kill()))


def kill_in_metrics(epoch):
    def half(run, row):
        with (run.folder / "metrics.csv").open("a") as file:
            file.write(",".join(map(str, row.values()))[:30])
        kill()

    before(Run, "append_metrics", nth(epoch, half))


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def ctrl_c_in_step(n):
    before(loop, "optimizer_step", nth(n, lambda session: ctrl_c()))


def ctrl_c_in_checkpoint(n, write):
    """While the n-th file that torch.save makes is written, in that call of write."""

    class Slow:
        def __init__(self, file):
            self.file = file
            self.hit = nth(write, ctrl_c)

        def write(self, content):
            self.hit()
            return self.file.write(content)

        def __getattr__(self, name):
            return getattr(self.file, name)

    real, count = torch.save, iter(range(1, 10**9))
    torch.save = lambda state, file: real(state, Slow(file) if next(count) == n else file)


def ctrl_c_between_renames(n):
    hit = nth(n, ctrl_c)
    before(Path, "replace", lambda path, target: hit() if path.name == "last.pt.partial" else None)


def kill_before_test():
    before(loop, "evaluate", lambda session, part: kill() if part == "test" else None)


def disk_full(limit):
    """No file can grow beyond limit bytes from here on: what a full disk does to writes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def disk_full_in(method, n, limit):
    """A full disk from the n-th call of that method of Run on."""
    before(Run, method, nth(n, lambda *_: disk_full(limit)))


def sabotage_id(value):
    """A test's name for a function of these, with its arguments if it is a partial one."""
    if isinstance(value, functools.partial):
        return "-".join([value.func.__name__, *map(str, value.args)])
    return value.__name__ if callable(value) else None


# ---------------------------------------------------------------------------- stopped and killed


@pytest.mark.parametrize("epoch", [1, 3, 4])
def test_resumed_after_an_interrupt_ends_the_same(epoch, experiment, reference, monkeypatch, capsys):
    trial = experiment(**TRIAL)
    interrupt(monkeypatch, trial, epoch)
    assert load_file(trial.folder / "last.pt")["epoch"] == epoch - 1
    summary = fit(resumed(trial))
    assert f"resuming after epoch {epoch - 1} of 4" in capsys.readouterr().out
    assert_same_run(trial.folder, reference)
    assert summary == json.loads((reference / "summary.json").read_text())


def test_resumed_before_the_test_ends_the_same(experiment, reference, monkeypatch):
    trial = experiment(**TRIAL)
    interrupt(monkeypatch, trial, None, part="test")
    fit(resumed(trial))
    assert_same_run(trial.folder, reference)


def test_interrupted_in_every_epoch_ends_the_same(experiment, reference, monkeypatch):
    trial = experiment(**TRIAL)
    for epoch in (1, 2, 3, 4):
        interrupt(monkeypatch, trial, epoch)
        trial = resumed(trial)
    fit(trial)
    assert_same_run(trial.folder, reference)


@pytest.mark.parametrize(
    "sabotage",
    [
        functools.partial(kill_in_step, 3),
        functools.partial(kill_in_step, 16),
        functools.partial(kill_in_checkpoint, 2),  # best.pt of the first epoch
        functools.partial(kill_in_checkpoint, 3),  # last.pt of the first epoch
        functools.partial(kill_in_checkpoint, 5),
        functools.partial(kill_between_renames, 2),
        functools.partial(kill_between_renames, 5),
        functools.partial(kill_before_checkpoint, 2),
        functools.partial(kill_before_checkpoint, 4),
        functools.partial(kill_in_metrics, 3),
        kill_before_test,
    ],
    ids=lambda sabotage: "-".join(
        map(str, [getattr(sabotage, "func", sabotage).__name__, *getattr(sabotage, "args", [])])
    ),
)
def test_resumed_after_a_kill_ends_the_same(sabotage, experiment, reference):
    trial = experiment(**TRIAL)
    code, _ = launch_in_child(trial, sabotage)
    assert code == -signal.SIGKILL
    assert not (trial.folder / "summary.json").exists()
    fit(resumed(trial))
    assert_same_run(trial.folder, reference)


def test_a_run_killed_before_its_first_checkpoint_is_not_a_dead_end(experiment, reference):
    """It can be neither resumed nor started plainly, so what --resume says must name the way out."""
    trial = experiment(**TRIAL)
    assert launch_in_child(trial, functools.partial(kill_in_checkpoint, 1))[0] == -signal.SIGKILL
    with pytest.raises(UserError, match="--overwrite"):
        fit(resumed(trial))
    fit(with_options(trial, overwrite=True))
    assert_same_run(trial.folder, reference)


# ---------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.999, None])
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(keep, experiment, reference, monkeypatch, capsys):
    trial = experiment(**TRIAL)
    interrupt(monkeypatch, trial, 4)
    last = trial.folder / "last.pt"
    last.unlink() if keep is None else truncate(last, keep)
    fit(resumed(trial))
    output = capsys.readouterr().out
    assert "last.pt cannot be read" in output and "previous.pt, epoch 2" in output
    assert_same_run(trial.folder, reference)


def test_a_damaged_checkpoint_never_takes_the_place_of_the_good_one(experiment, reference, monkeypatch):
    """Killed in the first checkpoint after falling back to previous.pt, the run must still have one that loads."""
    trial = experiment(**TRIAL)
    interrupt(monkeypatch, trial, 3)
    truncate(trial.folder / "last.pt", 0.5)
    code, _ = launch_in_child(resumed(trial), functools.partial(kill_between_renames, 1))
    assert code == -signal.SIGKILL
    fit(resumed(trial))
    assert_same_run(trial.folder, reference)


@pytest.mark.parametrize("keep", [0, 0.5])
def test_two_damaged_checkpoints_are_a_clear_error(keep, experiment, monkeypatch):
    trial = experiment(**TRIAL)
    interrupt(monkeypatch, trial, 3)
    for name in ("last.pt", "previous.pt"):
        truncate(trial.folder / name, keep)
    files = snapshot(trial.folder)
    with pytest.raises(UserError, match=r"(?s)no checkpoint.*last\.pt.*previous\.pt.*--overwrite"):
        fit(resumed(trial))
    assert snapshot(trial.folder) == files


@pytest.mark.parametrize("name", ["config.json", "split.npz", "best.pt"])
def test_other_damaged_files_are_a_clear_error(name, experiment, monkeypatch):
    trial = experiment(**TRIAL)
    interrupt(monkeypatch, trial, None, part="test")
    truncate(trial.folder / name, 0.5)
    with pytest.raises(UserError, match=name):
        fit(resumed(trial))


def test_an_empty_metrics_file_gets_its_header(experiment, reference, monkeypatch):
    """What a full disk leaves of the first line: a file of no bytes."""
    trial = experiment(**TRIAL)
    interrupt(monkeypatch, trial, 1)
    (trial.folder / "metrics.csv").touch()
    fit(resumed(trial))
    assert_same_run(trial.folder, reference)


def test_a_file_of_fewer_columns_keeps_them(experiment, monkeypatch):
    """As an earlier version began it: the lines that a resumed run adds must fit its header."""
    trial = experiment(**TRIAL)
    interrupt(monkeypatch, trial, 2)
    path = trial.folder / "metrics.csv"
    lines = [line.rpartition(",")[0] + "\n" for line in path.read_text().splitlines()]
    path.write_text("".join(lines))
    fit(resumed(trial))
    after = path.read_text().splitlines()
    assert len(after) > len(lines) and {line.count(",") for line in after} == {lines[0].count(",")}


@pytest.mark.parametrize("keep", [5, 90])
def test_half_a_header_is_written_anew(keep, experiment, reference, monkeypatch):
    trial = experiment(**TRIAL)
    interrupt(monkeypatch, trial, 1)
    (trial.folder / "metrics.csv").write_bytes((reference / "metrics.csv").read_bytes()[:keep])
    fit(resumed(trial))
    assert_same_run(trial.folder, reference)


# ---------------------------------------------------------------------------- full disk


@pytest.mark.parametrize(
    "sabotage, epoch",
    [
        (functools.partial(disk_full_in, "save_checkpoint", 3, 5000), 1),
        (functools.partial(disk_full_in, "save_checkpoint", 4, 0), 2),
        (functools.partial(disk_full_in, "save_best", 1, 5000), 0),
        (functools.partial(disk_full_in, "append_metrics", 1, 0), 0),
        (functools.partial(disk_full_in, "append_metrics", 1, 20), 0),
        (functools.partial(disk_full_in, "append_metrics", 3, 250), 2),
    ],
    ids=sabotage_id,
)
def test_a_full_disk_is_an_error_and_what_was_written_loads(sabotage, epoch, experiment, reference):
    trial = experiment(**TRIAL)
    code, output = launch_in_child(trial, sabotage)
    assert code == 1
    assert "could not be written (File too large)" in output.splitlines()[-1] and "--resume" in output.splitlines()[-1]
    assert not list(trial.folder.glob("*.partial"))  # it would take up the space that is short
    assert load_file(trial.folder / "last.pt")["epoch"] == epoch
    if epoch:
        load_model(trial.folder)
    fit(resumed(trial))
    assert_same_run(trial.folder, reference)


def test_a_disk_that_is_full_from_the_start_is_an_error(experiment):
    trial = experiment(**TRIAL)
    code, output = launch_in_child(trial, functools.partial(disk_full, 0))
    assert code == 1
    assert "could not be written" in output.splitlines()[-1]


# ---------------------------------------------------------------------------- resume and overwrite


def test_nothing_to_resume_is_refused(experiment):
    trial = resumed(experiment(**TRIAL))
    with pytest.raises(UserError, match="nothing to resume"):
        fit(trial)
    assert not trial.folder.exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"epochs": 6}, ["epochs: 4 -> 6"]),
        ({"learning_rate": 0.5, "model": {"n_layer": 2}}, ["learning_rate: 0.01 -> 0.5", "n_layer: 1 -> 2"]),
        ({"train_limit": 100}, ["train_limit: None -> 100"]),
        ({"model": {"dropout": 0.0, "attention": "softmax"}}, ["dropout: 0.1 -> 0.0", "attention: raw -> softmax"]),
    ],
)
def test_a_resume_with_another_config_names_the_fields(changes, words, experiment, monkeypatch):
    interrupt(monkeypatch, experiment(**TRIAL), 2)
    other = resumed(experiment(**(TRIAL | changes)))
    files = snapshot(other.folder)
    with pytest.raises(UserError) as refused:
        fit(other)
    assert all(word in str(refused.value) for word in words)
    assert str(refused.value).count("->") == len(words)  # and no others
    assert snapshot(other.folder) == files


def test_where_things_are_and_what_is_reported_may_differ_at_resume(experiment, reference, monkeypatch, data_dir):
    trial = experiment(**TRIAL)
    interrupt(monkeypatch, trial, 2)
    moved = trial.options.runs_dir.rename(trial.options.runs_dir.with_name("moved"))
    trial = with_options(resumed(trial), runs_dir=moved, data_dir=data_dir / "data_cifar10", log_every=1, device="auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # so that auto is the CPU, for the bits
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    fit(trial)
    assert_same_run(trial.folder, reference)


@pytest.mark.parametrize("complete", [True, False])
def test_a_folder_that_holds_a_run_is_refused_and_untouched(complete, experiment, monkeypatch):
    trial = experiment(**TRIAL)
    fit(trial) if complete else interrupt(monkeypatch, trial, 1)
    files = snapshot(trial.folder)
    with pytest.raises(UserError, match=r"(?s)--resume.*--overwrite.*--name"):
        fit(trial)
    assert snapshot(trial.folder) == files


def test_overwrite_replaces_a_run(experiment, reference):
    fit(experiment(epochs=5, model={"n_layer": 2}))
    trial = with_options(experiment(**TRIAL), overwrite=True)
    for name in ("events.out.tfevents.1.host", "epoch_002.pt"):
        (trial.folder / name).touch()
    fit(trial)
    assert_same_run(trial.folder, reference)


def test_an_overwrite_that_cannot_start_leaves_the_old_run(experiment, tmp_path):
    old = experiment(epochs=1)
    fit(old)
    files = snapshot(old.folder)
    monday = with_options(old, overwrite=True, data_dir=tmp_path / "no data", device="nonsense")
    with pytest.raises(UserError):
        fit(monday)
    assert snapshot(old.folder) == files


def test_seeds_of_one_experiment_lie_side_by_side(experiment):
    for seed in (0, 3):
        fit(experiment(epochs=1, seed=seed))
    folder = experiment(epochs=1).folder.parent
    assert {path.name for path in folder.iterdir()} == {"seed0", "seed3"}


def test_resuming_a_complete_run_says_so(experiment):
    trial = experiment(epochs=1)
    fit(trial)
    files = snapshot(trial.folder)
    code, output = launch_in_child(resumed(trial))
    assert code == 0
    assert "is complete: nothing to resume" in output and "test accuracy" in output
    assert snapshot(trial.folder) == files


# ---------------------------------------------------------------------------- Ctrl-C


@pytest.mark.parametrize(
    "sabotage",
    [
        functools.partial(ctrl_c_in_step, 8),
        *(functools.partial(ctrl_c_in_checkpoint, 3, write) for write in (1, 40, 100)),
        functools.partial(ctrl_c_between_renames, 3),
    ],
    ids=sabotage_id,
)
def test_ctrl_c_ends_with_130_and_names_resume(sabotage, experiment, reference):
    """Wherever it comes: PyTorch turns an interrupt inside torch.save into a RuntimeError, as it does a full disk."""
    trial = experiment(**TRIAL)
    code, output = launch_in_child(trial, sabotage)
    assert code == 130, output
    assert "--resume" in output.splitlines()[-1] and str(trial.folder) in output.splitlines()[-1]
    fit(resumed(trial))
    assert_same_run(trial.folder, reference)
