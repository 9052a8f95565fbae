"""The loop: schedule, accumulation, best epoch, what is written, and how it stops."""

import csv
import importlib.machinery
import importlib.util
import json
import math
import sys

import pytest
import torch

from training import UserError, fit, loop, seeds
from training.data import load_dataset
from training.runs import Run, load_file, load_model

TINY_FLAGS = "--patch-size 8 --n-layer 1 --n-embd 8 --n-head 2 --mlp-internal-dim-multiplier 4 --epochs 1".split()
COLUMNS = (
    "epoch train_loss val_loss val_accuracy learning_rate epoch_time_sec images_per_sec peak_memory_mb train_accuracy"
).split()


pytestmark = pytest.mark.usefixtures("one_thread")  # the fastest for tensors this small


def read_metrics(folder):
    """The rows of metrics.csv, numbers."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


# ---------------------------------------------------------------------------- schedule


@pytest.mark.parametrize(
    "step, factor",
    [
        (0, 0.0),
        (1, 1 / 500),
        (499, 499 / 500),
        (500, 1.0),
        (31_500, 0.5),  # half of the way down
        (62_499, (1 - math.cos(math.pi / 62_000)) / 2),
    ],
)
def test_rate_factor_of_the_published_protocol(step, factor):
    assert loop.rate_factor(step, 62_500, 500) == pytest.approx(factor, rel=1e-6, abs=1e-15)


@pytest.mark.parametrize("total, peak", [(1000, 100), (55, 5), (9, 0), (1, 0)])
def test_warmup_is_capped_at_a_tenth(total, peak):
    factors = [loop.rate_factor(step, total, 500) for step in range(total)]
    assert factors.index(max(factors)) == peak and factors[peak] == 1
    assert factors[:peak] == pytest.approx([step / peak for step in range(peak)])
    assert factors[peak:] == sorted(factors[peak:], reverse=True) and factors[-1] > 0


@pytest.fixture
def steps(monkeypatch):
    """Every optimiser step of fit() as (gradients before clipping, rate)."""
    seen, real = [], loop.optimizer_step

    def spy(session):
        gradients = {name: p.grad.clone() for name, p in session.model.named_parameters()}
        norm = real(session)
        seen.append((gradients, session.optimizer.param_groups[0]["lr"]))
        return norm

    monkeypatch.setattr(loop, "optimizer_step", spy)
    return seen


def test_every_step_has_the_schedules_rate(experiment, steps):
    trial = experiment(epochs=3, grad_accum=2, learning_rate=1e-3)  # 192 images: 3 steps an epoch
    fit(trial)
    assert [rate for _, rate in steps] == [1e-3 * loop.rate_factor(step, 9, 500) for step in range(9)]
    assert [row["learning_rate"] for row in read_metrics(trial.folder)] == [rate for _, rate in steps[2::3]]


# ---------------------------------------------------------------------------- accumulation


@pytest.mark.parametrize("limit, n_train", [(120, 96), (100, 80), (110, 88), (95, 76)])
def test_two_batches_of_16_make_the_step_of_one_of_32(limit, n_train, experiment, steps):
    """Also where the last group is smaller: 16 = 16, 24 = 16 + 8, 12 = 12 images."""
    # so small a rate that the weights stay as they are: then all steps can be compared
    fields = dict(train_limit=limit, epochs=1, learning_rate=1e-20, weight_decay=0.0, model={"dropout": 0.0})
    one, two = experiment("one", batch_size=32, **fields), experiment("two", batch_size=16, grad_accum=2, **fields)
    assert fit(one)["images"]["train"] == n_train
    fit(two)
    assert len(steps) == 2 * math.ceil(n_train / 32)
    for (gradients, _), (accumulated, _) in zip(steps[: len(steps) // 2], steps[len(steps) // 2 :], strict=True):
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                accumulated[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
    expected, found = read_metrics(one.folder)[0], read_metrics(two.folder)[0]
    for key in ("train_loss", "val_loss", "val_accuracy"):
        assert found[key] == pytest.approx(expected[key], rel=1e-5)


def test_a_step_follows_the_mean_gradient_of_its_own_images(experiment, monkeypatch):
    """Against gradients taken anew: of the step's 32 images, drawn from two batches, and of none before."""
    real, checked = loop.optimizer_step, []

    def optimizer_step(session):
        step = session.step % 6
        batches = list(session.data.train_batches(session.epoch))[2 * step : 2 * step + 2]
        images, labels = map(torch.cat, zip(*batches, strict=True))
        weights = dict(session.model.named_parameters())
        loss = torch.nn.functional.cross_entropy(session.model(images), labels)
        expected = torch.autograd.grad(loss, weights.values())
        for (name, weight), gradient in zip(weights.items(), expected, strict=True):
            torch.testing.assert_close(weight.grad, gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        checked.append(session.step)
        return real(session)

    monkeypatch.setattr(loop, "optimizer_step", optimizer_step)
    fit(experiment(epochs=2, batch_size=16, grad_accum=2, model={"dropout": 0.0}))
    assert checked == list(range(12))


def test_gradients_are_clipped_to_the_norm(experiment, monkeypatch):
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def spy(parameters, *args, **kwargs):
        parameters = list(parameters)
        before = clip(parameters, *args, **kwargs)
        norms.append((float(before), math.sqrt(sum(float(p.grad.square().sum()) for p in parameters))))
        return before

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    fit(experiment(epochs=1, max_grad_norm=0.01))
    assert norms and all(before > 0.01 and after == pytest.approx(0.01, rel=1e-3) for before, after in norms)


# ---------------------------------------------------------------------------- the best epoch


@pytest.fixture
def scripted_validation(monkeypatch):
    """Sets what validation finds in each epoch; returns the list of (part, weights) of all evaluations."""
    seen, real = [], loop.evaluate

    def script(results):
        waiting = iter(results)

        def evaluate(session, part):
            seen.append((part, {name: value.clone() for name, value in session.model.state_dict().items()}))
            if part == "test":
                return real(session, part)
            accuracy, loss = next(waiting)
            return {"loss": loss, "accuracy": accuracy}

        monkeypatch.setattr(loop, "evaluate", evaluate)
        return seen

    return script


@pytest.mark.parametrize(
    "results, best",
    [
        ([(0.1, 2.0), (0.5, 1.0), (0.3, 0.5)], 2),  # accuracy counts, not loss
        ([(0.5, 1.0), (0.5, 0.8), (0.5, 0.9)], 2),  # among equals the lower loss
        ([(0.5, 1.0), (0.5, 1.0), (0.5, 1.0)], 1),  # among twins the first
        ([(0.0, 3.0), (0.0, 4.0), (0.0, 5.0)], 1),
        ([(0.1, 2.0), (0.2, 2.0), (0.3, 2.0)], 3),
    ],
)
def test_the_best_epoch_is_tested_once(results, best, experiment, scripted_validation):
    evaluations = scripted_validation(results)
    trial = experiment(epochs=3)
    summary = fit(trial)
    accuracy, loss = results[best - 1]
    assert summary["best"] == {"epoch": best, "val_loss": loss, "val_accuracy": accuracy}
    assert [part for part, _ in evaluations] == ["val", "val", "val", "test"]
    kept = load_file(trial.folder / "best.pt")
    assert {key: kept[key] for key in summary["best"]} == summary["best"]
    for name, value in evaluations[best - 1][1].items():
        assert torch.equal(kept["model"][name], value)
        assert torch.equal(evaluations[3][1][name], value), "tested with the weights of another epoch"
    model, _ = load_model(trial.folder)
    assert not model.training
    assert all(torch.equal(value, kept["model"][name]) for name, value in model.state_dict().items())


# ---------------------------------------------------------------------------- what is written


@pytest.fixture(scope="module")
def finished(experiment_in, tmp_path_factory):
    """A finished run of three epochs: the experiment, and what fit() returned."""
    trial = experiment_in(tmp_path_factory.mktemp("finished"), epochs=3, crop_scale_min=0.8, horizontal_flip=True)
    return trial, fit(trial)


def test_a_run_has_its_files_and_columns(finished):
    trial, summary = finished
    names = {path.name for path in trial.folder.iterdir()}
    assert names == {f"{name}.pt" for name in ("last", "previous", "best")} | {
        "config.json",
        "metrics.csv",
        "split.npz",
        "summary.json",
    }
    assert trial.folder == trial.options.runs_dir / "trial" / "seed0"
    rows = read_metrics(trial.folder)
    assert list(rows[0]) == COLUMNS
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(row["images_per_sec"] > 0 and row["peak_memory_mb"] > 0 for row in rows)
    assert rows[-1]["val_accuracy"] > 0.3, "the made-up classes have colours of their own, and were not learned"

    assert json.loads((trial.folder / "summary.json").read_text()) == summary
    best = max(rows, key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    assert summary["best"] == {key: best[key] for key in ("epoch", "val_loss", "val_accuracy")}
    assert summary["images"] == {"train": 192, "val": 48, "test": 40}
    assert summary["epochs"] == 3
    assert set(summary["test"]) == {"loss", "accuracy"} and 0 <= summary["test"]["accuracy"] <= 1

    config = json.loads((trial.folder / "config.json").read_text())
    assert config["config"] == trial.fields() and config["model_class"] == "VisionBDHConfig"
    assert config["parameters"] == summary["parameters"] == sum(p.numel() for p in trial.model.build().parameters())
    assert config["versions"]["torch"] == torch.__version__
    assert config["hardware"]["device"] == "cpu" and "commit" in config


def test_losses_and_accuracies_are_means_over_images(finished):
    """What validation and test found, counted again one image at a time; 48 and 40 do not fill batches of 256."""
    trial, summary = finished
    dataset, val = load_dataset("cifar10", trial.options.data_dir), Run(trial.folder).read_split().val
    model, _ = load_model(trial.folder)
    for found, prefix, images, labels in (
        (summary["test"], "", dataset.test_images, dataset.test_labels),
        (summary["best"], "val_", dataset.train_images[val], dataset.train_labels[val]),
    ):
        with torch.no_grad():
            logits = torch.cat([model(torch.from_numpy(image)[None].float() / 127.5 - 1) for image in images])
        labels = torch.from_numpy(labels)
        assert found[f"{prefix}accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
        losses = -logits.log_softmax(1)[torch.arange(len(labels)), labels]
        assert found[f"{prefix}loss"] == pytest.approx(losses.mean().item(), rel=1e-4)


def test_uneven_evaluation_batches_change_nothing(experiment):
    one = fit(experiment("one", epochs=1))
    other = fit(experiment("other", epochs=1, options={"eval_batch_size": 9}))
    for part, key in (("test", "loss"), ("test", "accuracy"), ("best", "val_loss"), ("best", "val_accuracy")):
        assert one[part][key] == pytest.approx(other[part][key], rel=1e-5)


def test_the_same_seed_repeats_a_run_and_another_does_not(experiment):
    def weights(name, seed):
        trial = experiment(name, epochs=1, seed=seed)
        torch.rand(3)  # the global generator's state before the run has no part in it
        fit(trial)
        return load_file(trial.folder / "last.pt")["model"]

    one, again, other = weights("one", 1), weights("again", 1), weights("one", 2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in ("encoder", "decoder", "head.weight"))


def test_dropout_is_drawn_anew_each_epoch_and_seed(experiment, monkeypatch):
    """Its generator is PyTorch's own, seeded at the start of each epoch."""
    seen, real = [], loop.optimizer_step
    monkeypatch.setattr(loop, "optimizer_step", lambda session: seen.append(torch.initial_seed()) or real(session))
    for seed in (0, 1):
        fit(experiment(seed=seed))
    assert [len(set(seen[first : first + 6])) for first in range(0, 24, 6)] == [1, 1, 1, 1]
    assert len(set(seen)) == 4


def test_checkpoints_hold_what_resuming_needs(finished):
    trial, _ = finished
    for name, epoch in (("last.pt", 3), ("previous.pt", 2)):
        state = torch.load(trial.folder / name, weights_only=True)
        assert state["epoch"] == epoch and state["step"] == 6 * epoch
        assert state["config"] == trial.fields()
        assert set(state["model"]) == set(trial.model.build().state_dict())
        assert state["optimizer"]["state"][0]["step"] == 6 * epoch


def test_a_cpu_does_not_compile_what_has_a_step_of_its_own(experiment, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda *args: pytest.fail("compiled"))
    fit(experiment("plain", epochs=1)), fit(experiment("compiled", epochs=1, compile=True))
    plain, compiled = (load_file(experiment(name).folder / "last.pt")["model"] for name in ("plain", "compiled"))
    assert all(torch.equal(value, compiled[name]) for name, value in plain.items())
    assert "--compile" in capsys.readouterr().out


class Compiled(torch.nn.Module):
    """What torch.compile returns, without the making of kernels: a module that holds the model as _orig_mod."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        return self._orig_mod(images)


def test_a_compiled_run_writes_plain_keys(experiment, monkeypatch):
    made = []
    monkeypatch.setattr(torch, "compile", lambda model, *args, **kwargs: made.append(Compiled(model)) or made[-1])
    gated = dict(gate="sigmoid")  # has no fast path
    plain, trial = experiment("plain", gated, epochs=1), experiment("compiled", gated, epochs=1, compile=True)
    fit(plain)
    assert not made
    fit(trial)
    assert len(made) == 1 and made[0].calls == 6 + 1 + 1  # training, validation, test
    expected = load_file(plain.folder / "last.pt")["model"]
    for name in ("last.pt", "previous.pt", "best.pt"):
        assert load_file(trial.folder / name)["model"].keys() == expected.keys()
    assert all(
        torch.equal(value, expected[name]) for name, value in load_file(trial.folder / "last.pt")["model"].items()
    )
    load_model(trial.folder)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_precisions_train(precision, experiment):
    trial = experiment(epochs=1, precision=precision)
    fit(trial)
    state = load_file(trial.folder / "last.pt")
    assert {value.dtype for value in state["model"].values()} == {torch.float32}
    assert math.isfinite(read_metrics(trial.folder)[0]["val_loss"])


# ---------------------------------------------------------------------------- a loss that is not finite


def test_weights_kept_on_the_way(experiment):
    """Those before training, those after every second epoch, and the same result as without."""
    plain, trial = experiment("plain", epochs=5), experiment(epochs=5, options={"keep_every": 2})
    assert fit(plain)["test"] == fit(trial)["test"]
    kept = Run(trial.folder).kept_weights()
    assert {epoch: path.name for epoch, path in kept.items()} == {epoch: f"epoch_{epoch:03d}.pt" for epoch in (0, 2, 4)}
    weights = {epoch: load_model(path)[0].encoder.detach() for epoch, path in kept.items()}
    assert not any(torch.equal(weights[epoch], weights[epoch + 2]) for epoch in (0, 2))
    assert torch.equal(weights[4], load_file(trial.folder / "previous.pt")["model"]["encoder"])
    torch.manual_seed(seeds.derive("weights", trial.train.seed))
    assert torch.equal(weights[0], trial.model.build().encoder)
    assert not Run(plain.folder).kept_weights()


@pytest.mark.parametrize("log_every", [1, 50])
def test_training_stops_at_a_loss_that_is_not_finite(log_every, experiment):
    """The step is named at which it happened, not the one at which it was read."""
    trial = experiment(learning_rate=1e30, options={"log_every": log_every})  # 12 steps: one of warm-up, at rate 0
    with pytest.raises(loop.TrainingError, match=r"step 2 .*not finite.*--learning-rate"):
        fit(trial)
    good = load_file(trial.folder / "last.pt")
    assert good["epoch"] == 0
    assert all(value.isfinite().all() for value in good["model"].values())
    assert not (trial.folder / "metrics.csv").exists() and not (trial.folder / "summary.json").exists()


def test_the_last_good_checkpoint_survives_a_later_epochs_failure(experiment, monkeypatch):
    """An infinite gradient in the second epoch, whose loss was finite."""
    real = loop.optimizer_step

    def optimizer_step(session):
        if session.step == 9:
            session.model.head.weight.grad[0, 0] = math.inf
        return real(session)

    monkeypatch.setattr(loop, "optimizer_step", optimizer_step)
    trial = experiment(epochs=3)
    with pytest.raises(loop.TrainingError, match="step 9 "):
        fit(trial)
    state = load_file(trial.folder / "last.pt")
    assert state["epoch"] == 1 and all(value.isfinite().all() for value in state["model"].values())
    assert [row["epoch"] for row in read_metrics(trial.folder)] == [1]


def test_a_validation_loss_that_is_not_finite_stops_too(experiment, scripted_validation):
    scripted_validation([(0.5, 1.0), (0.6, math.nan)])
    trial = experiment(epochs=3)
    with pytest.raises(loop.TrainingError, match="validation loss after epoch 2"):
        fit(trial)
    assert load_file(trial.folder / "last.pt")["epoch"] == load_file(trial.folder / "best.pt")["epoch"] == 1


def test_a_script_ends_with_exit_code_1_where_the_loss_is_not_finite(call_script, data_dir, tmp_path, capsys):
    flags = [*TINY_FLAGS, "--learning-rate", "1e30", "--data-dir", data_dir, "--runs-dir", tmp_path, "--device", "cpu"]
    assert call_script("train_v2_cifar10.py", *flags, "--name", "diverged") == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and "step 1 " in message
    load_file(tmp_path / "diverged" / "seed0" / "last.pt")


# ---------------------------------------------------------------------------- trackers


@pytest.mark.parametrize("package, value", [("tensorboard", True), ("wandb", "project")])
def test_a_missing_tracker_is_named_with_its_pip_line_before_anything_is_touched(
    package, value, experiment, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)  # what makes `import` fail
    trial = experiment(options={package: value})
    with pytest.raises(UserError, match=f"pip install {package}"):
        fit(trial)
    assert not trial.folder.exists()


def fake_module(monkeypatch, name, **content):
    """A module that can be found and imported."""
    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, None))
    module.__dict__.update(content)
    monkeypatch.setitem(sys.modules, name, module)


def test_tensorboard_gets_every_row(experiment, monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            calls.append((folder, purge_step))

        def add_scalar(self, key, value, epoch):
            calls.append((key, value, epoch))

        def flush(self): ...

        def close(self):
            calls.append("closed")

    fake_module(monkeypatch, "tensorboard")
    fake_module(monkeypatch, "torch.utils.tensorboard", SummaryWriter=SummaryWriter)
    trial = experiment(options={"tensorboard": True})
    fit(trial)
    assert calls[0] == (str(trial.folder), 1) and calls[-1] == "closed"
    expected = [(key, row[key], row["epoch"]) for row in read_metrics(trial.folder) for key in COLUMNS[1:]]
    assert calls[1:-1] == expected


def test_wandb_gets_every_row_and_is_closed_after_a_failure(experiment, monkeypatch):
    rows, ended = [], []

    class WandbRun:
        def log(self, row, step):
            rows.append((step, row["val_loss"]))
            if step == 2:
                raise KeyboardInterrupt

        def finish(self):
            ended.append(True)

    asked = {}
    fake_module(monkeypatch, "wandb", init=lambda **fields: asked.update(fields) or WandbRun())
    trial = experiment(epochs=3, options={"wandb": "project"})
    with pytest.raises(KeyboardInterrupt):
        fit(trial)
    assert asked["project"] == "project" and asked["config"]["n_embd"] == 8 and asked["config"]["epochs"] == 3
    assert rows == [(row["epoch"], row["val_loss"]) for row in read_metrics(trial.folder)]
    assert ended == [True]


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
    monkeypatch.setattr("urllib.request.urlopen", fail_to_connect)
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


def fail_to_connect(*args, **kwargs):
    raise OSError("no network in tests")


def test_a_quickstart_model_that_does_not_fit_the_digits_is_refused(call_script, tmp_path, capsys):
    assert (
        call_script("train_quickstart.py", "--num-classes", "7", "--device", "cpu", "--runs-dir", tmp_path / "r") == 1
    )
    assert "--num-classes 10" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "r").exists()


def test_the_vit_is_not_sent_to_a_flag_it_lacks(call_script, tmp_path, capsys):
    """Its channels are fixed, so grey images cannot be trained on, and the message must not name --in-channels."""
    flags = "--dataset digits --img-size 8 --patch-size 2 --n-layer 1 --n-embd 4 --n-head 1 --mlp-dim 4".split()
    assert call_script("train_vit_tiny_cifar10.py", *flags, "--device", "cpu", "--runs-dir", tmp_path / "r") == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "channels" in message and "--in-channels" not in message


def test_memory_errors_become_one_message(call_script, data_dir, tmp_path, monkeypatch, capsys):
    def allocate(session):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(loop, "train_epoch", allocate)
    where = ["--device", "cpu", "--data-dir", data_dir, "--runs-dir", tmp_path / "runs"]
    assert call_script("train_v2_cifar10.py", *TINY_FLAGS, *where) == 1
    assert "--batch-size" in capsys.readouterr().err.splitlines()[-1]


def test_errors_of_the_program_keep_their_traceback(call_script, data_dir, tmp_path, monkeypatch):
    def fail(session):
        raise RuntimeError("a bug")

    monkeypatch.setattr(loop, "train_epoch", fail)
    where = ["--device", "cpu", "--data-dir", data_dir, "--runs-dir", tmp_path / "runs"]
    with pytest.raises(RuntimeError, match="a bug"):
        call_script("train_v2_cifar10.py", *TINY_FLAGS, *where)
