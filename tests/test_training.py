"""The loop: schedule, accumulation, best epoch, what is written, and how it stops."""

import json
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from training import UserError, fit, loop, provenance, seeds
from tests.trials import COLUMNS, read_metrics, same_weights, weights
from training.data import load_dataset
from training.optimiser import WeightAverage, make_schedule, rate_factor, set_step
from training.runs import Run, load_model
from training.stored import load_checkpoint, load_weights

# ---------------------------------------------------------------------------- schedule


@pytest.mark.parametrize(
    "step, factor",
    [
        (0, 0.0),
        (1, 1 / 500),
        (499, 499 / 500),
        (500, 1.0),
        (31_500, 0.5),
        (62_499, (1 - math.cos(math.pi / 62_000)) / 2),
    ],
)
def test_rate_factor_of_the_published_protocol(step, factor):
    assert rate_factor(step, 62_500, 500) == pytest.approx(factor, rel=1e-6, abs=1e-15)


@pytest.mark.parametrize("total, peak", [(1000, 100), (55, 5), (9, 0), (1, 0)])
def test_warmup_is_capped_at_a_tenth(total, peak):
    factors = [rate_factor(step, total, 500) for step in range(total)]
    assert factors.index(max(factors)) == peak and factors[peak] == 1
    assert factors[:peak] == pytest.approx([step / peak for step in range(peak)])
    assert factors[peak:] == sorted(factors[peak:], reverse=True) and factors[-1] > 0


def test_the_schedule_scales_each_groups_own_peak(experiment):
    peaks = [1e-2, 3e-5]
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": peak} for peak in peaks]
    optimizer = torch.optim.AdamW(groups)
    schedule = make_schedule(optimizer, 40, experiment(warmup_steps=500).train)

    def rates():
        return [group["lr"] for group in optimizer.param_groups]

    seen = []
    for _ in range(40):
        seen.append(rates())
        optimizer.step()
        schedule.step()
    assert seen == [[peak * rate_factor(step, 40, 500) for peak in peaks] for step in range(40)]
    for step in (17, 3):
        set_step(schedule, step)
        assert rates() == seen[step]
        optimizer.step()
        schedule.step()
        assert rates() == seen[step + 1]


def test_every_step_has_the_schedules_rate(experiment, monkeypatch):
    rates, real = [], loop.optimizer_step
    monkeypatch.setattr(loop, "optimizer_step", lambda session: rates.append(real(session)) or rates[-1])
    trial = experiment(epochs=3, grad_accum=2, learning_rate=1e-3)  # 192 images: 3 steps an epoch
    fit(trial)
    assert rates == [1e-3 * rate_factor(step, 9, 500) for step in range(9)]
    assert [row["learning_rate"] for row in read_metrics(trial.folder)] == rates[2::3]


# ---------------------------------------------------------------------------- steps


@pytest.mark.parametrize("limit, n_train", [(None, 192), (110, 88), (95, 76)])
def test_a_step_follows_the_mean_gradient_of_its_own_images(limit, n_train, experiment, monkeypatch):
    """Against gradients taken anew: of the step's 32 images, drawn from two batches, and of none before.

    Also where the last group is smaller, 24 = 16 + 8 or 12 = 12 images. The row's training loss is a mean over images.
    """
    real, losses = loop.optimizer_step, []

    def optimizer_step(session):
        step = session.step % math.ceil(n_train / 32)
        batches = list(session.data.train_batches(session.epoch))[2 * step : 2 * step + 2]
        images, labels = map(torch.cat, zip(*batches, strict=True))
        named = dict(session.model.named_parameters())
        loss = torch.nn.functional.cross_entropy(session.model(images), labels)
        expected = torch.autograd.grad(loss, named.values())
        for (name, weight), gradient in zip(named.items(), expected, strict=True):
            torch.testing.assert_close(weight.grad, gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        losses.append(loss.item() * len(labels))
        return real(session)

    monkeypatch.setattr(loop, "optimizer_step", optimizer_step)
    fields = dict(batch_size=16, grad_accum=2, max_grad_norm=1e9, train_limit=limit, model={"dropout": 0.0})
    trial = experiment(epochs=2, **fields)
    assert fit(trial)["images"]["train"] == n_train
    per_epoch = math.ceil(n_train / 32)
    means = [sum(losses[:per_epoch]) / n_train, sum(losses[per_epoch:]) / n_train]
    assert [row["train_loss"] for row in read_metrics(trial.folder)] == pytest.approx(means, rel=1e-5)


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
    kept = load_checkpoint(trial.folder / "best.pt")
    assert {key: kept[key] for key in summary["best"]} == summary["best"]
    assert same_weights(kept["model"], evaluations[best - 1][1])
    assert same_weights(kept["model"], evaluations[3][1]), "tested with the weights of another epoch"
    model, _ = load_model(trial.folder)
    assert not model.training and same_weights(kept["model"], model.state_dict())


# ---------------------------------------------------------------------------- what is written


@pytest.fixture(scope="module")
def finished(experiment_in, tmp_path_factory):
    """A finished run of three epochs: the experiment, and what fit() returned."""
    fields = dict(epochs=3, crop_scale_min=0.8, horizontal_flip=True, options={"eval_batch_size": 9})
    trial = experiment_in(tmp_path_factory.mktemp("finished"), **fields)
    return trial, fit(trial)


def test_a_run_has_its_files_and_columns(finished):
    trial, summary = finished
    names = "config.json split.npz metrics.csv last.pt previous.pt best.pt summary.json lock".split()
    assert sorted(path.name for path in trial.folder.iterdir()) == sorted(names)
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
    fields = {"model": trial.configuration.model, "train": trial.configuration.train}
    assert config["config"] == fields
    assert (config["model_class"], config["train_class"]) == ("VisionBDHConfig", "ClassificationConfig")
    assert config["parameters"] == summary["parameters"] == sum(p.numel() for p in trial.model.build().parameters())
    assert config["versions"]["torch"] == torch.__version__
    assert config["hardware"]["device"] == "cpu" and "commit" in config

    for name, epoch in (("last.pt", 3), ("previous.pt", 2)):
        state = torch.load(trial.folder / name, weights_only=True)
        assert (state["epoch"], state["step"], state["run_id"]) == (epoch, 6 * epoch, config["run_id"])
        assert state["config"] == fields and set(state["model"]) == set(trial.model.build().state_dict())
        assert state["optimizer"]["state"][0]["step"] == 6 * epoch
        assert [{key: float(row[key]) for key in row} for row in state["history"]] == rows[:epoch]


def test_a_row_tells_speed_and_accuracy_of_training_alone(experiment, monkeypatch):
    """By a clock on which training takes 10 s and validation 100."""
    clock, right = [], []
    train, evaluate, counts_of = loop.train_epoch, loop.evaluate, loop.counts_of

    def counts(task, outputs, targets, loss):
        right.append((outputs.argmax(1) == targets).sum().item() * loss.requires_grad)
        return counts_of(task, outputs, targets, loss)

    monkeypatch.setattr(loop, "time", mock.Mock(perf_counter=lambda: sum(clock)))
    monkeypatch.setattr(loop, "train_epoch", lambda session: clock.append(10) or train(session))
    monkeypatch.setattr(loop, "evaluate", lambda *args: clock.append(100) or evaluate(*args))
    monkeypatch.setattr(loop, "counts_of", counts)
    trial = experiment(epochs=1)
    fit(trial)
    (row,) = read_metrics(trial.folder)
    assert (row["epoch_time_sec"], row["images_per_sec"]) == (110, 19.2)
    assert row["train_accuracy"] == pytest.approx(sum(right) / 192) != row["val_accuracy"]


@pytest.mark.parametrize(("status", "ending"), [("", ""), (" M training/loop.py", "+changes")])
def test_the_commit_tells_of_changed_files(status, ending, monkeypatch):
    def run(command, **_):
        return mock.Mock(stdout="abc\n" if "rev-parse" in command else status)

    monkeypatch.setattr(provenance.subprocess, "run", run)
    assert provenance.describe_run(mock.Mock(), {})["commit"] == "abc" + ending


@pytest.mark.parametrize(
    "fields", [{}, dict(ema=0.9), dict(eval_flip=True), dict(eval_scales=(1, 1.25), eval_flip=True)], ids=str
)
def test_losses_and_accuracies_are_means_over_images(fields, experiment):
    """What validation and test found, counted again one image at a time; 48 and 40 do not fill batches of 9.

    With ema by the average, that is kept; with eval_flip of each image and its mirror image, at all scales.
    """
    trial = experiment(options={"eval_batch_size": 9}, **fields)
    summary = fit(trial)
    assert summary.get("eval_flip", False) == ("eval_flip" in fields)
    assert summary.get("eval_scales") == ([1.0, 1.25] if "eval_scales" in fields else None)
    dataset, val = load_dataset("cifar10", trial.options.data_dir), Run(trial.folder).read_split().val
    model, _ = load_model(trial.folder)
    for found, prefix, images, labels in (
        (summary["test"], "", dataset.test_images, dataset.test_labels),
        (summary["best"], "val_", dataset.train_images[val], dataset.train_labels[val]),
    ):
        with torch.no_grad():
            inputs = [torch.from_numpy(image)[None].float() / 127.5 - 1 for image in images]
            logits = torch.cat([model(image) for image in inputs])
            if "eval_scales" in fields:
                inputs += [F.interpolate(image, (40, 40), mode="bilinear", antialias=True) for image in inputs]
                logits = torch.stack([model(image) for image in inputs]).view(2, -1, 10).mean(0)
            if "eval_flip" in fields:
                mirrored = torch.stack([model(image.flip(-1)) for image in inputs])
                logits = (logits + mirrored.view(-1, len(logits), 10).mean(0)) / 2
        labels = torch.from_numpy(labels)
        assert found[f"{prefix}accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
        losses = -logits.log_softmax(1)[torch.arange(len(labels)), labels]
        assert found[f"{prefix}loss"] == pytest.approx(losses.mean().item(), rel=1e-4)


def test_the_same_seed_repeats_a_run_and_another_does_not(experiment):
    def trained(name, seed):
        trial = experiment(name, epochs=1, seed=seed, options={"keep_every": 1})
        torch.rand(3)  # the global generator's state before the run has no part in it
        fit(trial)
        before = weights(trial.folder, "epoch_000.pt")
        return before, weights(trial.folder), Run(trial.folder).read_split().val.tolist()

    (before, after, val), again, other = trained("one", 1), trained("again", 1), trained("one", 2)
    assert same_weights(before, again[0]) and same_weights(after, again[1]) and val == again[2]
    assert not any(torch.equal(before[name], other[0][name]) for name in ("encoder", "decoder", "head.weight"))
    assert val != other[2]


def test_dropout_is_drawn_anew_each_epoch_and_seed(experiment, monkeypatch):
    """Its generator is PyTorch's own, seeded at the start of each epoch."""
    seen, real = [], loop.optimizer_step
    monkeypatch.setattr(loop, "optimizer_step", lambda session: seen.append(torch.initial_seed()) or real(session))
    for seed in (0, 1):
        fit(experiment(seed=seed))
    assert [len(set(seen[first : first + 6])) for first in range(0, 24, 6)] == [1, 1, 1, 1]
    assert len(set(seen)) == 4


def test_a_cpu_does_not_compile_what_has_a_step_of_its_own(experiment, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda *args: pytest.fail("compiled"))
    fit(experiment("plain", epochs=1)), fit(experiment("compiled", epochs=1, compile=True))
    assert same_weights(*(weights(experiment(name).folder) for name in ("plain", "compiled")))
    assert "--compile" in capsys.readouterr().out


def test_a_compiled_run_writes_plain_keys(experiment, monkeypatch):
    class Compiled(torch.nn.Module):  # as torch.compile returns: holds the model as _orig_mod
        def __init__(self, model):
            super().__init__()
            self._orig_mod, self.calls = model, 0

        def forward(self, images):
            self.calls += 1
            return self._orig_mod(images)

    made = []
    monkeypatch.setattr(torch, "compile", lambda model: made.append(Compiled(model)) or made[-1])
    gated = dict(gate="sigmoid")  # has no fast path
    plain, trial = experiment("plain", gated, epochs=1), experiment("compiled", gated, epochs=1, compile=True)
    fit(plain)
    assert not made
    fit(trial)
    assert len(made) == 1 and made[0].calls == 6 + 1 + 1  # training, validation, test
    for name in ("last.pt", "previous.pt", "best.pt"):
        assert same_weights(weights(trial.folder, name), weights(plain.folder, name))
    load_model(trial.folder)


def test_bf16_trains_float32_weights(experiment):
    trial = experiment(epochs=1, precision="bf16")
    fit(trial)
    assert {value.dtype for value in weights(trial.folder).values()} == {torch.float32}
    assert math.isfinite(read_metrics(trial.folder)[0]["val_loss"])


def test_weights_kept_on_the_way(experiment):
    """Those before training, those after every second epoch, and the same result as without."""
    plain, trial = experiment("plain", epochs=5), experiment(epochs=5, options={"keep_every": 2})
    assert fit(plain)["test"] == fit(trial)["test"]
    kept = Run(trial.folder).kept_weights()
    assert {epoch: path.name for epoch, path in kept.items()} == {epoch: f"epoch_{epoch:03d}.pt" for epoch in (0, 2, 4)}
    models = {epoch: load_model(path)[0].state_dict() for epoch, path in kept.items()}
    assert not any(torch.equal(models[epoch]["encoder"], models[epoch + 2]["encoder"]) for epoch in (0, 2))
    assert same_weights(models[4], weights(trial.folder, "previous.pt"))
    torch.manual_seed(seeds.derive("weights", trial.train.seed))
    assert same_weights(models[0], trial.model.build().state_dict())
    assert not Run(plain.folder).kept_weights()


# ---------------------------------------------------------------------------- averaging


def test_the_average_is_that_of_its_formula():
    """Of weights and of BatchNorm's statistics; the number of its batches is copied."""
    model = torch.nn.BatchNorm1d(3)
    average, expected = WeightAverage(model, 0.7), {}
    for t in range(8):
        model(torch.randn(8, 3) * (t + 1))
        with torch.no_grad():
            model.weight.normal_()
        average.update_parameters(model)
        decay = min(0.7, (1 + t) / (10 + t))
        for name in ("weight", "running_mean", "running_var"):
            value = getattr(model, name).detach().clone()
            expected[name] = value if t == 0 else decay * expected[name] + (1 - decay) * value
            assert torch.allclose(getattr(average.module, name), expected[name], atol=1e-5), name
        assert average.module.num_batches_tracked == model.num_batches_tracked == t + 1


def test_the_best_weights_are_the_average_of_those_after_each_step(experiment, monkeypatch):
    average, real = [], loop.optimizer_step

    def step(session):
        rate, t = real(session), len(average)
        new, decay = session.model.encoder.detach().clone(), min(0.9, (1 + t) / (10 + t))
        average.append(decay * average[-1] + (1 - decay) * new if t else new)
        return rate

    monkeypatch.setattr(loop, "optimizer_step", step)
    trial = experiment(ema=0.9, epochs=1)
    fit(trial)
    torch.testing.assert_close(weights(trial.folder, "best.pt")["encoder"], average[-1])
    best = load_weights(trial.folder / "best.pt")  # of last.pt too, the average is what is opened
    assert same_weights(load_weights(trial.folder / "last.pt"), best)
    assert not same_weights(weights(trial.folder, "last.pt"), best)


# ---------------------------------------------------------------------------- a loss that is not finite


@pytest.mark.parametrize("log_every", [1, 50])
def test_training_stops_at_a_loss_that_is_not_finite(log_every, experiment):
    """The step is named at which it happened, not the one at which it was read."""
    trial = experiment(learning_rate=1e30, options={"log_every": log_every})  # 12 steps: one of warm-up, at rate 0
    with pytest.raises(loop.TrainingError, match=r"step 2 .*not finite.*--learning-rate"):
        fit(trial)
    assert load_checkpoint(trial.folder / "last.pt")["epoch"] == 0
    assert all(value.isfinite().all() for value in weights(trial.folder).values())
    assert not (trial.folder / "metrics.csv").exists() and not (trial.folder / "summary.json").exists()


def test_the_last_good_checkpoint_survives_a_later_epochs_failure(experiment, monkeypatch):
    """An infinite gradient in the second epoch, whose loss was finite."""
    real = loop._clip

    def clip(session):
        if session.step == 9:
            session.model.head.weight.grad[0, 0] = math.inf
        return real(session)

    monkeypatch.setattr(loop, "_clip", clip)
    trial = experiment(epochs=3)
    with pytest.raises(loop.TrainingError, match="step 9 "):
        fit(trial)
    assert load_checkpoint(trial.folder / "last.pt")["epoch"] == 1
    assert all(value.isfinite().all() for value in weights(trial.folder).values())
    assert [row["epoch"] for row in read_metrics(trial.folder)] == [1]


def test_a_validation_loss_that_is_not_finite_stops_too(experiment, scripted_validation):
    scripted_validation([(0.5, 1.0), (0.6, math.nan)])
    trial = experiment(epochs=3)
    with pytest.raises(loop.TrainingError, match="validation loss after epoch 2"):
        fit(trial)
    assert {load_checkpoint(trial.folder / name)["epoch"] for name in ("last.pt", "best.pt")} == {1}


def test_data_that_show_a_process_more_than_its_share_are_refused(experiment, monkeypatch):
    """As every process does that yields whole batches."""
    trial = experiment(epochs=1)
    monkeypatch.setattr(loop.processes, "total", lambda count: 2 * count)
    with pytest.raises(UserError, match=r"must yield its share of every batch"):
        fit(trial)
