"""Runs that were stopped, killed or damaged, and then resumed: they end as an uninterrupted run does, bit for bit."""

import dataclasses
import io
import json
import os
import resource
import signal
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from training import ClassificationConfig, UserError, fit, loop
from analysis.reading import read_runs
from tests.children import before, kill, launch_in_child, nth
from tests.trials import MEASURED, interrupt, read_rows, resumed, snapshot, with_options
from training.launch import train
from training.progress import Progress
from training.runs import Run, load_model
from training.session import Session
from training.stored import EXPORTED, load_checkpoint

TRIAL = dict(epochs=4, crop_scale_min=0.8, horizontal_flip=True)  # 6 steps an epoch; dropout is on
CHECKPOINTS = ("last.pt", "previous.pt", "best.pt")

# bit for bit holds for equal numbers of threads: in this process and in every child it is one
# ---------------------------------------------------------------------------- helpers


@pytest.fixture(scope="module")
def reference(experiment_in, tmp_path_factory):
    """Folder of the run that nothing interrupted."""
    trial = experiment_in(tmp_path_factory.mktemp("reference"), **TRIAL)
    code, output = launch_in_child(trial)
    assert code == 0, output
    return trial.folder


def assert_same_run(folder, reference):
    """Both runs wrote the same: weights, optimizer, metrics but for what is measured, summary, split."""
    for name in CHECKPOINTS:
        assert_same(*(load_checkpoint(each / name) for each in (folder, reference)), name)
    assert read_rows(folder, measured=False) == read_rows(reference, measured=False)
    assert b"\r" not in (folder / "metrics.csv").read_bytes()
    assert (folder / "summary.json").read_text() == (reference / "summary.json").read_text()
    for one, other in zip(*(vars(Run(each).read_split()).values() for each in (folder, reference)), strict=True):
        assert one.tolist() == other.tolist()
    files = {path.name for path in folder.iterdir()} - {"damaged.pt"}  # a broken last.pt, set aside
    assert files == {path.name for path in reference.iterdir()}


def assert_same(one, other, where):
    """Nested dicts and lists of tensors and numbers, equal to the last bit but for a run's identity and its times."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one.keys() - MEASURED - {"run_id"}:
            assert_same(one[key], other[key], f"{where} {key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where} {i}")
    else:
        assert one == other, where


# ---------------------------------------------------------------------------- sabotage, in a child


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def in_step(stop, n):
    before(loop, "optimizer_step", nth(n, lambda session: stop()))


def between_renames(stop, n):
    """In the n-th checkpoint's: last.pt has become previous.pt, and nothing has become last.pt."""
    hit = nth(n, stop)
    before(Path, "replace", lambda path, target: hit() if path.name == "last.pt.partial" else None)


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


def kill_before_checkpoint(n):
    """The line of metrics.csv is written, last.pt not."""
    before(Run, "save_checkpoint", nth(n, lambda run, state: kill()))


def kill_before_best(n):
    """last.pt is written, best.pt not, though the epoch was the best."""
    before(Run, "save_best", nth(n, lambda run, state: kill()))


def kill_in_metrics(epoch):
    def half(run, row):
        with (run.folder / "metrics.csv").open("a") as file:
            file.write(",".join(map(str, row.values()))[:30])
        kill()

    before(Run, "append_metrics", nth(epoch, half))


def kill_before_test():
    before(loop, "evaluate", lambda session, part: kill() if part == "test" else None)


def ctrl_c_in_checkpoint(n, at):
    """While the n-th file that torch.save makes is written, in that call of write()."""

    class Slow(io.FileIO):
        hit = staticmethod(nth(at, ctrl_c))

        def write(self, content):
            self.hit()
            return super().write(content)

    real, count = torch.save, iter(range(1, 10**9))
    torch.save = lambda state, file: real(state, Slow(file.name, "w") if next(count) == n else file)


def disk_full(limit):
    """No file can grow beyond limit bytes from here on: what a full disk does to writes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def disk_full_in(method, n, limit):
    """A full disk from the n-th call of that method of Run on."""
    before(Run, method, nth(n, lambda *_: disk_full(limit)))


def sabotage_id(value):
    """A test's name for a function of these, with its arguments if it is a partial one."""
    if isinstance(value, partial):
        return "-".join([value.func.__name__, *(getattr(each, "__name__", str(each)) for each in value.args)])
    return value.__name__ if callable(value) else None


# ---------------------------------------------------------------------------- stopped and killed


@pytest.mark.parametrize("stops", [[1], [3], [1, 2, 3, 4], ["test"]])
def test_resumed_after_interrupts_ends_the_same(stops, experiment, reference, capsys):
    trial = experiment(**TRIAL)
    for stop in stops:
        interrupt(trial, part="test") if stop == "test" else interrupt(trial, stop)
        trial = resumed(trial)
    summary = fit(trial)
    done = 4 if stops == ["test"] else stops[-1] - 1
    assert f"resuming after epoch {done} of 4" in capsys.readouterr().out
    assert_same_run(trial.folder, reference)
    assert summary == json.loads((reference / "summary.json").read_text())


@pytest.mark.parametrize(
    "sabotage",
    [
        partial(in_step, kill, 16),
        partial(kill_in_checkpoint, 2),  # last.pt of the first epoch
        partial(kill_in_checkpoint, 3),  # best.pt of the first epoch
        partial(between_renames, kill, 2),
        partial(kill_before_checkpoint, 4),
        partial(kill_before_best, 1),
        partial(kill_in_metrics, 3),
        kill_before_test,
    ],
    ids=sabotage_id,
)
def test_resumed_after_a_kill_ends_the_same(sabotage, experiment, reference):
    trial = experiment(**TRIAL)
    code, _ = launch_in_child(trial, sabotage)
    assert code == -signal.SIGKILL
    assert not (trial.folder / "summary.json").exists()
    fit(resumed(trial))
    assert_same_run(trial.folder, reference)


@pytest.mark.parametrize(
    "sabotage", [partial(in_step, ctrl_c, 8), partial(ctrl_c_in_checkpoint, 3, 40), partial(between_renames, ctrl_c, 3)]
)
def test_ctrl_c_ends_with_130_and_names_resume(sabotage, experiment, reference):
    """Wherever it comes: PyTorch turns an interrupt inside torch.save into a RuntimeError, as it does a full disk."""
    trial = experiment(**TRIAL)
    code, output = launch_in_child(trial, sabotage)
    assert code == 130, output
    assert "--resume" in output.splitlines()[-1] and str(trial.folder) in output.splitlines()[-1]
    fit(resumed(trial))
    assert_same_run(trial.folder, reference)


@pytest.mark.parametrize("damage", ["cut", "missing", "not text"])
def test_metrics_of_a_complete_run_are_restored(damage, experiment, capsys):
    trial = experiment()
    summary = fit(trial)
    path = trial.folder / "metrics.csv"
    whole = path.read_bytes()
    path.unlink() if damage == "missing" else path.write_bytes(whole[:-9] if damage == "cut" else b"\xff" + whole)
    (trial.folder / "last.pt").rename(aside := trial.folder / "aside.pt")
    with pytest.raises(UserError, match=r"metrics\.csv is damaged, and no checkpoint holds a copy: put it back, or"):
        fit(resumed(trial))  # previous.pt has one row less
    aside.rename(trial.folder / "last.pt")
    assert fit(resumed(trial)) == summary and path.read_bytes() == whole
    assert "metrics.csv was damaged: restored from last.pt" in capsys.readouterr().out
    files = snapshot(trial.folder)
    assert fit(resumed(trial)) == summary and snapshot(trial.folder) == files


def kill_before_keeping(n):
    before(Run, "keep_weights", nth(n, kill))


def test_first_weights_are_kept_after_a_kill_before_they_were_written(experiment):
    trial = experiment(options=dict(keep_every=2))
    assert launch_in_child(trial, partial(kill_before_keeping, 1), "--keep-every=2")[0] == -signal.SIGKILL
    first = load_checkpoint(trial.folder / "last.pt")["model"]
    assert not Run(trial.folder).kept_weights()
    fit(resumed(trial))
    assert list(Run(trial.folder).kept_weights()) == [0, 2]
    assert_same(load_checkpoint(trial.folder / "epoch_000.pt")["model"], first, "epoch 0")


@pytest.mark.parametrize("changed", ["train_images", "train_labels", "test_images", "test_labels"])
def test_other_arrays_of_the_same_form_are_refused(changed, experiment, cifar_arrays, tmp_path):
    (tmp_path / "data_cifar10").mkdir()
    path = tmp_path / "data_cifar10" / "cifar10.npz"
    np.savez(path, **cifar_arrays)
    trial = experiment(options=dict(data_dir=tmp_path))
    interrupt(trial, 2)
    config = trial.folder / "config.json"
    array = cifar_arrays[changed]
    array[[3, 5]] = array[[5, 3]]
    assert (array[3] != array[5]).any()
    np.savez(path, **cifar_arrays)
    with pytest.raises(UserError, match=r"was started on other data \(sha256: .*\): restore them, or start another"):
        fit(resumed(trial))
    older = json.loads(config.read_text())
    del older["data"]["sha256"]
    config.write_text(json.dumps(older))
    assert fit(resumed(trial))["test"]


def ctrl_c_before_training(n):
    before(Run, "start", nth(n, lambda *_: ctrl_c()))


def test_ctrl_c_before_the_first_checkpoint_does_not_advise_resume(experiment):
    code, output = launch_in_child(experiment(**TRIAL), partial(ctrl_c_before_training, 1))
    assert code == 130 and "Repeat the command" in output and "--resume" not in output


@pytest.mark.parametrize(
    ("sabotage", "remedy", "options"),
    [
        (partial(kill_in_checkpoint, 1), "leave out --resume", {}),
        (partial(between_renames, kill, 1), "--overwrite", {"overwrite": True}),
    ],
    ids=sabotage_id,
)
def test_a_run_killed_before_its_first_checkpoint_is_not_a_dead_end(sabotage, remedy, options, experiment, reference):
    trial = experiment(**TRIAL)
    assert launch_in_child(trial, sabotage)[0] == -signal.SIGKILL
    with pytest.raises(UserError, match=remedy):
        fit(resumed(trial))
    fit(with_options(trial, **options))
    assert_same_run(trial.folder, reference)


def test_killed_after_a_fallback_a_run_still_has_a_checkpoint(experiment, reference):
    """The damaged last.pt must not become previous.pt."""
    trial = experiment(**TRIAL)
    interrupt(trial, 3)
    (trial.folder / "last.pt").write_bytes((trial.folder / "last.pt").read_bytes()[:5000])
    code, _ = launch_in_child(resumed(trial), partial(between_renames, kill, 1))
    assert code == -signal.SIGKILL
    fit(resumed(trial))
    assert_same_run(trial.folder, reference)


@pytest.mark.parametrize("content", [None, b"no checkpoint"])
def test_lost_weights_of_the_best_epoch_are_noticed_before_training_goes_on(content, experiment):
    trial = experiment(**(TRIAL | dict(learning_rate=1e-12)))  # so that the first epoch stays the best
    interrupt(trial, 3)
    assert load_checkpoint(trial.folder / "last.pt")["best"]["epoch"] == 1
    (trial.folder / "best.pt").unlink() if content is None else (trial.folder / "best.pt").write_bytes(content)
    before = snapshot(trial.folder)
    with pytest.raises(UserError, match=r"best\.pt cannot be read .*: put it back, or start with --overwrite"):
        fit(resumed(trial))
    assert snapshot(trial.folder) == before


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoRates(ClassificationConfig):
    """A train config with an optimizer of its own: the head learns at a tenth of the rate."""

    def make_optimizer(self, model):
        head, rest = list(model.head.parameters()), [p for name, p in model.named_parameters() if "head" not in name]
        groups = [{"params": rest, "lr": self.learning_rate}, {"params": head, "lr": self.learning_rate / 10}]
        return torch.optim.AdamW(groups)


def test_parameter_groups_with_their_own_rates_resume(experiment):
    whole, cut = (experiment(name, epochs=3) for name in ("whole", "cut"))
    whole, cut = (dataclasses.replace(each, train=TwoRates(**vars(each.train))) for each in (whole, cut))
    fit(whole)
    interrupt(cut, 2)
    fit(resumed(cut))
    assert_same_run(cut.folder, whole.folder)
    rates = [group["initial_lr"] for group in load_checkpoint(cut.folder / "last.pt")["optimizer"]["param_groups"]]
    assert rates == [1e-2, 1e-3]


def test_the_time_before_a_stop_counts():
    progress = Progress.start(torch.device("cpu"))
    progress.started -= 1000
    again = Progress.load(progress.state(torch.device("cpu")), torch.device("cpu"))
    assert again.started == pytest.approx(progress.started, abs=100)


@pytest.mark.parametrize(("minutes_ago", "due"), [(0.5, False), (1.5, True)])
def test_a_checkpoint_inside_an_epoch_is_due_after_that_many_minutes(minutes_ago, due):
    session = mock.Mock(saved=time.monotonic() - 60 * minutes_ago)
    session.experiment.options.checkpoint_minutes = 1
    Session.save_if_due(session)
    assert session.save.called == due


# ---------------------------------------------------------------------------- full disk


@pytest.mark.parametrize(
    "sabotage, epoch",
    [
        (partial(disk_full_in, "save_checkpoint", 2, 5000), 1),
        (partial(disk_full_in, "save_best", 1, 0), 1),
        (partial(disk_full_in, "append_metrics", 1, 20), 0),
        (partial(disk_full_in, "append_metrics", 3, 250), 2),
    ],
    ids=sabotage_id,
)
def test_a_full_disk_is_an_error_and_what_was_written_loads(sabotage, epoch, experiment, reference):
    trial = experiment(**TRIAL)
    code, output = launch_in_child(trial, sabotage)
    assert code == 1
    assert "could not be written (File too large)" in output.splitlines()[-1] and "--resume" in output.splitlines()[-1]
    assert not list(trial.folder.glob("*.partial"))  # it would take up the space that is short
    assert load_checkpoint(trial.folder / "last.pt")["epoch"] == epoch
    if epoch and sabotage.args[0] != "save_best":  # that of the first epoch
        load_model(trial.folder)
    fit(resumed(trial))
    assert_same_run(trial.folder, reference)


@pytest.mark.parametrize("sabotage", [partial(disk_full, 0), partial(disk_full, 5000)])
def test_an_overwrite_that_cannot_write_leaves_the_old_run(sabotage, experiment):
    """The disk is full before the first file, or in the first checkpoint."""
    trial = experiment(epochs=1)
    fit(trial)
    files = snapshot(trial.folder)
    code, output = launch_in_child(with_options(trial, overwrite=True), sabotage)
    assert code == 1 and "could not be written" in output.splitlines()[-1]
    assert snapshot(trial.folder) == files


# ---------------------------------------------------------------------------- resume and overwrite


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"epochs": 6}, ["epochs: 4 -> 6"]),
        ({"learning_rate": 0.5, "model": {"n_layer": 2}}, ["learning_rate: 0.01 -> 0.5", "n_layer: 1 -> 2"]),
        ({"train_limit": 100}, ["train_limit: None -> 100"]),
        ({"model": {"dropout": 0.0, "attention": "softmax"}}, ["dropout: 0.1 -> 0.0", "attention: raw -> softmax"]),
    ],
)
def test_a_resume_with_another_config_names_the_fields(changes, words, experiment):
    interrupt(experiment(**TRIAL), 2)
    other = resumed(experiment(**(TRIAL | changes)))
    files = snapshot(other.folder)
    with pytest.raises(UserError) as refused:
        fit(other)
    assert all(word in str(refused.value) for word in words)
    assert str(refused.value).count("->") == len(words)  # and no others
    assert snapshot(other.folder) == files


def test_where_things_are_and_what_is_reported_may_differ_at_resume(experiment, reference, monkeypatch, data_dir):
    trial = experiment(**TRIAL)
    interrupt(trial, 2)
    moved = trial.options.runs_dir.rename(trial.options.runs_dir.with_name("moved"))
    trial = with_options(resumed(trial), runs_dir=moved, data_dir=data_dir / "data_cifar10", log_every=1, device="auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # so that auto is the CPU, for the bits
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    fit(trial)
    assert_same_run(trial.folder, reference)


def test_hardware_on_which_a_run_goes_on_is_noted(experiment, reference, monkeypatch):
    trial = experiment(**TRIAL)
    interrupt(trial, 2)
    first = json.loads((trial.folder / "config.json").read_text())["hardware"]
    later = {"device": "cpu", "name": "another CPU", "threads": 3}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "describe_hardware", lambda device: dict(later))
        interrupt(resumed(trial), 3)
        interrupt(resumed(trial), 4)
    fit(resumed(trial))
    config = json.loads((trial.folder / "config.json").read_text())
    assert (config["hardware"], config["resumed_on"]) == (first, [later])
    (run,) = read_runs([trial.folder])
    assert run.hardware == f"{first['name']}, 1 thread, then another CPU, 3 threads"
    assert "resumed_on" not in json.loads((reference / "config.json").read_text())


@pytest.mark.parametrize("complete", [True, False])
def test_a_folder_that_holds_a_run_is_refused_and_untouched(complete, experiment):
    trial = experiment(**TRIAL)
    fit(trial) if complete else interrupt(trial, 1)
    files = snapshot(trial.folder)
    with pytest.raises(UserError, match=r"(?s)--resume.*--overwrite.*--name"):
        fit(trial)
    assert snapshot(trial.folder) == files


def test_overwrite_replaces_a_run(experiment, reference):
    fit(experiment(epochs=5, model={"n_layer": 2}))
    trial = with_options(experiment(**TRIAL), overwrite=True)
    for name in ("events.out.tfevents.1.host", "epoch_002.pt", EXPORTED, "README.md"):
        (trial.folder / name).touch()
    fit(trial)
    assert_same_run(trial.folder, reference)


def test_an_overwrite_that_cannot_start_leaves_the_old_run(experiment, tmp_path):
    trial = experiment(epochs=1)
    fit(trial)
    files = snapshot(trial.folder)
    for changes in ({"device": "nonsense"}, {"data_dir": tmp_path / "no data"}):
        with pytest.raises(UserError):
            fit(with_options(trial, overwrite=True, **changes))
    assert snapshot(trial.folder) == files


def test_resuming_a_complete_run_says_so(experiment, capsys):
    trial = experiment(epochs=1)
    fit(trial)
    files = snapshot(trial.folder)
    assert train(resumed(trial)) == trial.folder
    output = capsys.readouterr().out
    assert "is complete: nothing to resume" in output and "test accuracy" in output
    assert snapshot(trial.folder) == files
