"""Starting a run: trackers, and mistakes that are one message with nothing written."""

import importlib.machinery
import importlib.util
import math
import signal
import sys
from unittest.mock import Mock, call

import pytest
import torch

from training import UserError, fit, loop
from tests.trials import COLUMNS, read_metrics, snapshot, with_options
from training.launch import train
from training.runs import Run

TINY_FLAGS = "--patch-size 8 --n-layer 1 --n-embd 8 --n-head 2 --mlp-internal-dim-multiplier 4 --epochs 1".split()


# ---------------------------------------------------------------------------- trackers


@pytest.mark.parametrize("package, value", [("tensorboard", True), ("wandb", "project")])
def test_a_missing_tracker_is_named_with_its_pip_line(package, value, experiment, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # what makes `import` fail
    trial = experiment(options={package: value})
    with pytest.raises(UserError, match=f"pip install {package}"):
        fit(trial)
    assert not trial.folder.exists()


@pytest.fixture
def install(monkeypatch):
    """Makes a module that can be found and imported."""

    def make(name, **content):
        module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, None))
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)

    return make


def test_tensorboard_gets_every_row(experiment, install):
    writer = Mock()
    install("tensorboard")
    install("torch.utils.tensorboard", SummaryWriter=writer)
    trial = experiment(options={"tensorboard": True})
    fit(trial)
    assert writer.call_args == call(str(trial.folder), purge_step=1)
    expected = [call(key, row[key], row["epoch"]) for row in read_metrics(trial.folder) for key in COLUMNS[1:]]
    assert writer().add_scalar.call_args_list == expected and writer().close.called


def test_wandb_gets_every_row_and_is_closed_after_a_failure(experiment, install):
    init = Mock()
    init().log.side_effect = [None, KeyboardInterrupt, None]
    install("wandb", init=init)
    trial = experiment(epochs=3, options={"wandb": "project"})
    with pytest.raises(KeyboardInterrupt):
        fit(trial)
    asked, run_id = init.call_args.kwargs, Run(trial.folder).read_config()["run_id"]
    assert asked["project"] == "project" and asked["config"]["n_embd"] == 8 and asked["config"]["epochs"] == 3
    assert (asked["id"], asked["resume"]) == (run_id, "allow") and init().finish.call_count == 1
    fit(with_options(trial, resume=True))
    assert init.call_args.kwargs["id"] == run_id  # the resumed run continues the same W&B run
    rows = [(each.args[0]["val_loss"], each.kwargs["step"]) for each in init().log.call_args_list]
    assert rows == [(row["val_loss"], row["epoch"]) for row in read_metrics(trial.folder)]


def test_a_failed_login_leaves_the_run_that_was_to_be_replaced(experiment, install):
    trial = experiment(epochs=1)
    fit(trial)
    before = snapshot(trial.folder)
    install("wandb", init=Mock(side_effect=RuntimeError("no API key")))
    with pytest.raises(UserError, match=r"no API key.*wandb login"):
        fit(with_options(trial, overwrite=True, wandb="project"))
    assert snapshot(trial.folder) == before


# ---------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--batch-size 0", ["batch_size"]),
        ("--epochs 0", ["epochs"]),
        ("--grad-accum 0", ["grad_accum"]),
        ("--learning-rate nan", ["learning_rate"]),
        ("--crop-scale-min 0", ["crop_scale_min"]),
        ("--val-fraction 1", ["val_fraction"]),
        ("--train-limit 2", ["val_fraction", "--train-limit"]),
        ("--patch-size 5", ["img_size", "patch_size"]),
        ("--n-embd 50 --n-head 6", ["n_embd", "n_head"]),
        ("--dropout 1", ["dropout"]),
        ("--num-classes 7", ["--num-classes 10"]),
        ("--img-size 64", ["--img-size 32"]),
        ("--in-channels 1", ["--in-channels 3"]),
        ("--device cuda", ["cuda"]),
        ("--device nonsense", ["nonsense"]),
        ("--name a/b", ["a/b"]),
        (f"--name {'a' * 300}", ["--name"]),  # as long as a name of many changes can get, which no file system takes
        ("--resume --overwrite", ["resume", "overwrite"]),
        ("--resume", ["nothing to resume"]),
        ("--data-dir /nowhere/at/all", ["cifar10.npz"]),
        ("--runs-dir {file}/runs", ["{file}"]),
    ],
)
def test_a_mistake_is_one_message_and_nothing_written(
    flags, words, call_script, data_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=OSError("no network in tests")))
    file = tmp_path / "file"
    file.touch()
    where = ["--device", "cpu", "--data-dir", data_dir, "--runs-dir", tmp_path / "runs"]
    before = sorted(tmp_path.rglob("*"))
    code = call_script("train_v2_cifar10.py", *TINY_FLAGS, *where, *flags.format(file=file).split())
    assert code in (1, 2)
    captured = capsys.readouterr()
    message = " ".join(captured.err.replace("│", " ").split())
    assert all(word.format(file=file) in message for word in words), message
    assert "Traceback" not in message
    assert sorted(tmp_path.rglob("*")) == before


def test_the_vit_is_not_sent_to_a_flag_it_lacks(call_script, tmp_path, capsys):
    """Its channels are fixed, so grey images cannot be trained on, and the message must not name --in-channels."""
    flags = "--dataset digits --img-size 8 --patch-size 2 --n-layer 1 --n-embd 4 --n-head 1 --mlp-dim 4".split()
    assert call_script("train_vit_tiny_cifar10.py", *flags, "--device", "cpu", "--runs-dir", tmp_path / "r") == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "channels" in message and "--in-channels" not in message


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: tried 9 bytes"), "--batch-size"),
        (loop.TrainingError("the loss at step 3 is not finite"), "step 3"),
        (OSError(28, "No space left on device", "/some/file"), "/some/file: No space left on device"),
        (RuntimeError("a bug"), None),  # keeps its traceback
    ],
)
def test_an_error_in_training_is_one_message(error, words, call_script, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "train_epoch", Mock(side_effect=error))
    where = ["--device", "cpu", "--data-dir", data_dir, "--runs-dir", tmp_path / "runs"]
    if words is None:
        with pytest.raises(RuntimeError, match="a bug"):
            call_script("train_v2_cifar10.py", *TINY_FLAGS, *where)
        return
    assert call_script("train_v2_cifar10.py", *TINY_FLAGS, *where) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and words in message


def test_ctrl_c_with_overwrite_never_leads_back_to_the_run_that_was_to_be_replaced(experiment, monkeypatch, capsys):
    old = experiment(epochs=1)
    fit(old)
    before, handler = snapshot(old.folder), signal.getsignal(signal.SIGINT)
    new = with_options(old, overwrite=True)
    try:
        for place, said in (
            ("build_model", "stopped before the first epoch. Repeat the command"),
            ("train_epoch", "stopped. Give --resume instead of --overwrite to continue from"),
        ):
            monkeypatch.setattr(loop, place, Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(SystemExit) as ended:
                train(new)
            assert ended.value.code == 130 and said in capsys.readouterr().err
            assert (snapshot(old.folder) == before) == (place == "build_model")
            monkeypatch.undo()
    finally:
        signal.signal(signal.SIGINT, handler)


def test_modules_of_unix_are_optional(monkeypatch):
    """As on Windows: without the module resource, peak memory is unknown and nothing fails."""
    monkeypatch.setitem(sys.modules, "resource", None)
    spec = importlib.util.find_spec("training.device")
    device = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(device)
    assert math.isnan(device.peak_memory_mb(torch.device("cpu")))
