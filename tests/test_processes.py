"""Several processes train one run, as torchrun starts them: to the result of one, to one end, and on from any point."""

import inspect
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from training import (
    ClassificationConfig,
    Experiment,
    RunOptions,
    SegmentationConfig,
    TextConfig,
    UserError,
    fit,
    launch,
    loop,
    processes,
    progress,
    tasks,
)
from models.baselines import ResNet20Config, ViTConfig
from models.bdh import BDHCore
from models.bdh_unet import bdh_unet_config
from models.language import BDHConfig
from models.masked_bdh import MaskedBDHConfig
from models.vision_bdh import v2_config, v4_config
from tests.camvid_data import write_camvid
from tests.children import before, kill, launch_in_child, nth, run_together
from tests.conftest import TINY_MODEL, made_up_cifar
from tests.test_resume import assert_same_run
from tests.trials import interrupt, read_rows, resumed, wait_for, with_options
from training.batchnorm import sync_batchnorm
from training.command_line import experiment_of, flags_of
from training.config import ROOT
from training.data import load_dataset
from training.data.batches import ImageBatches, draw_split
from training.device import pick_device
from training.launch import train
from training.metrics import Items, Sums
from training.onlooker import Onlooker
from training.runs import Run
from training.stored import load_checkpoint

MIXED = dict(crop_scale_min=0.8, horizontal_flip=True, randaugment=1, random_erasing=0.3, mixup=0.8, cutmix=1.0)
MIXED |= dict(train_sizes=(24, 32))
COMMON = dict(epochs=3, learning_rate=2e-3, weight_decay=0.05, warmup_steps=4, precision="float32")


def as_process(monkeypatch, rank, n):
    """As if torchrun had started this process as one of n."""
    for name, value in dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=n, LOCAL_WORLD_SIZE=n).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")


# ---------------------------------------------------------------------------- shares of a batch


@pytest.mark.parametrize("n_processes", [1, 2, 3, 8])
def test_shares_cover_a_batch_once_and_hold_the_partners(n_processes, monkeypatch):
    for n in range(20):
        batch, shares, mixed = torch.arange(n), [], []
        for rank in range(n_processes):
            as_process(monkeypatch, rank, n_processes)
            shares.append(batch[processes.share(n)])
            rows, mine = processes.share_with_partners(n)
            made = torch.cat([batch[each] for each in rows])
            assert torch.equal(made[mine], shares[-1])
            mixed.append(made.flip(0)[mine])
        assert torch.equal(torch.cat(shares), batch) and torch.equal(torch.cat(mixed), batch.flip(0))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_shares_are_made_as_whole_batches_are(data_dir, monkeypatch):
    """Crops, flips, RandAugment and partners in mixup agree; the last batch of 2 leaves a share empty."""
    config = ClassificationConfig(dataset="cifar10", batch_size=10, train_limit=53, **MIXED, **COMMON)
    source = load_dataset("cifar10", data_dir)
    data = ImageBatches(source, draw_split(source, 0.2, 53, 0), config, 7, torch.device("cpu"))
    assert data.size("train") == 42
    whole = {"train": list(data.train_batches(1)), "val": list(data.eval_batches("val"))}
    parts = {"train": [], "val": []}
    for rank in range(3):
        as_process(monkeypatch, rank, 3)
        parts["train"].append(list(data.train_batches(1)))
        parts["val"].append(list(data.eval_batches("val")))
        later = list(data.train_batches(1, 2))
        assert all(torch.equal(*each) for each in zip(later[0], parts["train"][-1][2], strict=True))
    for part, expected in whole.items():
        assert len(parts[part][2][-1][0]) == 0 or part == "val"
        for batch, shares in zip(expected, zip(*parts[part], strict=True), strict=True):
            for tensor, of_shares in zip(batch, zip(*shares, strict=True), strict=True):
                torch.testing.assert_close(torch.cat(of_shares), tensor)


def test_the_sums_of_two_processes_go_on_in_one(monkeypatch):
    """In a checkpoint inside an epoch; items stay in the order of one process."""
    rows, states = torch.arange(12).view(6, 2), []
    for rank in range(2):
        as_process(monkeypatch, rank, 2)
        sums = Sums()
        for batch in rows.split([5, 1]):
            mine = batch[processes.share(len(batch))]
            sums.add({"rows": Items(mine), "total": mine.sum()})
        states.append(sums.state())
    monkeypatch.delenv("RANK")
    together = Sums.load(states, torch.device("cpu"))
    assert together.read()["rows"].tolist() == rows.tolist() and together.read()["total"] == rows.sum()
    together.clear()
    assert together.read()["rows"].shape == (0, 2) and together.read()["total"] == 0


def copied_buffers():
    module = nn.BatchNorm1d(2)
    with processes.joined():
        module.running_mean.fill_(1.0 + processes.rank())
        processes.copy_buffers(module)
    return module.running_mean.tolist()


def test_buffers_are_those_of_the_main_process():
    ended = run_together(2, copied_buffers)
    assert [result for *_, result in ended] == [[1.0, 1.0]] * 2, ended


SIZE = dict(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4)
MODELS = {
    "fast path": v2_config(patch_size=8, dropout=0.1, **SIZE),
    "v4": v4_config(**SIZE),
    "softmax": v2_config(patch_size=8, attention="softmax", pool="cls", **SIZE),
    "plain path": v2_config(patch_size=8, gate="none", **SIZE),
    "masked": MaskedBDHConfig(patch_size=8, **SIZE),
    "unet": bdh_unet_config(img_size=32, **SIZE),
    "resnet20": ResNet20Config(),
    "vit": ViTConfig(),
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_an_empty_share_gives_gradients_of_zero(name, recompute):
    """To every parameter: DistributedDataParallel waits for each."""
    model = MODELS[name].build().train()
    for module in model.modules():
        if isinstance(module, BDHCore):
            module.recompute = recompute
    outputs = model(torch.randn(0, 3, 32, 32))
    loss = (outputs.predicted if name == "masked" else outputs).float().mean()
    loss.masked_fill(torch.tensor(True), 0.0).backward()
    assert all(torch.equal(each.grad, torch.zeros_like(each)) for each in model.parameters())


# ---------------------------------------------------------------------------- the result of one process


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Trials of four kinds without dropout, in folders of runs made by (number of processes)."""
    place = tmp_path_factory.mktemp("several")
    (place / "data_cifar10").mkdir()
    np.savez(place / "data_cifar10" / "cifar10.npz", **made_up_cifar())
    write_camvid(place / "data_camvid", n_train=8, n_val=4)
    text = place / "song.txt"
    text.write_bytes(
        b"".join(b"%d bottles on the wall, and if one of them should fall, " % (i % 11) for i in range(40))
    )
    size = SIZE | dict(dropout=0.0)
    images = dict(dataset="cifar10", **COMMON)
    mixed = dict(batch_size=24, grad_accum=2, train_limit=122, label_smoothing=0.1, optimizer="muon", ema=0.9)
    sgd = dict(optimizer="sgd", learning_rate=0.05, momentum=0.9)  # AdamW divides tiny gradients by tiny ones: noise
    masks = dict(horizontal_flip=0.5, brightness_contrast=0.5, shift_scale_rotate=0.3, scale_min=0.8)
    unet = bdh_unet_config(img_size=(32, 48), skips=True, skip_levels=(2, 1), **size)
    models = {  # the last training batch of the first three has 2 samples, of 3 processes one then has none
        "v2": (v2_config(patch_size=8, **size), ClassificationConfig(**images, **MIXED, **mixed)),
        "resnet20": (
            ResNet20Config(num_classes=10),
            ClassificationConfig(batch_size=12, train_limit=33, sync_batchnorm=True, **images | sgd),
        ),
        "bdh_unet": (unet, SegmentationConfig(batch_size=6, sync_batchnorm=True, **masks, **COMMON | sgd)),
        "text": (BDHConfig(**size), TextConfig(text=text, context=16, batch_size=6, val_fraction=0.1, **COMMON)),
    }

    def make(n):
        options = dict(data_dir=place, runs_dir=place / f"by_{n}", device="cpu", num_workers=0, log_every=3)
        evaluated = {"v2": 23, "resnet20": 6}  # 24 and 7 images: the last batch has 1
        return {
            name: Experiment(name, *both, RunOptions(**options, eval_batch_size=evaluated.get(name)))
            for name, both in models.items()
        }

    return make


def train_all(trials):
    """Runs all in one group of processes; then what is below."""
    with processes.joined():
        for trial in trials.values():
            fit(trial)
        return gathered_items(), [synced_gradients(n) for n in (2, 5)]


def gathered_items():
    """Rows of batches of 5, 1 and 4."""
    sums, rows = Sums(), torch.arange(20).view(10, 2)
    for batch in rows.split([5, 1, 4]):
        sums.add({"rows": Items(batch[processes.share(len(batch))])})
    return sums.read()["rows"].tolist()


def synced_gradients(n):
    """Gradients and statistics of a network with BatchNorm on n samples, in float64."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5), nn.BatchNorm1d(5)
    model, images, labels = nn.Sequential(*layers).double(), torch.randn(n, 3, 8, 8).double(), torch.arange(n) % 5
    model = sync_batchnorm(model, torch.device("cpu"))
    trained = DistributedDataParallel(model) if processes.count() > 1 else model
    mine, task = processes.share(n), tasks.Classification(None)
    loss = progress.loss_of(task, trained(images[mine]), labels[mine])
    progress.share_of_loss(task, loss, len(labels[mine]), n, n).backward()
    return {name: each.grad for name, each in model.named_parameters()} | dict(model.named_buffers())


@pytest.fixture(scope="module")
def by_one(several):
    """The trials of one process, and what else it computed."""
    return several(1), train_all(several(1))


# a ReLU's input near 0 may change its sign; Muon, which trains v2 here, rounds to bf16 where that is fast
NOISE = {"v2": 2e-4, "text": 2e-5, "bdh_unet": 2e-5, "resnet20": 2e-3}


@pytest.mark.parametrize("n", [2, 3])
def test_several_processes_make_the_run_of_one(n, several, by_one):
    (expected, (rows, gradients)), trials = by_one, several(n)
    ended = run_together(n, train_all, trials)
    assert [code for code, *_ in ended] == [0] * n, ended
    assert "epoch   3/3" in ended[0][1] and not any(output for _, output, _ in ended[1:])
    for _, _, (their_rows, their_gradients) in ended:
        assert their_rows == rows == torch.arange(20).view(10, 2).tolist()
        torch.testing.assert_close(their_gradients, gradients)
    for name, trial in trials.items():
        assert_equal_but_for_noise(name, expected[name].folder, trial.folder)
        assert Run(trial.folder).read_config()["hardware"]["processes"] == n


def assert_equal_but_for_noise(name, folder, other):
    ours, theirs = (read_rows(each, measured=False) for each in (folder, other))
    assert len(ours) == len(theirs) == 3
    for one, two in zip(ours, theirs, strict=True):
        assert one.keys() == two.keys()
        for key in one:
            counted = any(word in key for word in ("accuracy", "miou", "iou_"))
            close = one[key] == two[key] or math.isclose(
                float(one[key]), float(two[key]), rel_tol=1e-6 if counted else NOISE[name]
            )
            assert close, f"{name}, epoch {one['epoch']}, {key}: {one[key]}, {two[key]}"
    ours, theirs = (load_checkpoint(each / "last.pt") for each in (folder, other))
    assert ours["model"].keys() == theirs["model"].keys()


# ---------------------------------------------------------------------------- checkpoints inside an epoch

EACH_STEP = dict(checkpoint_minutes=1e-9, log_every=1)
TRIAL = dict(epochs=3, batch_size=16, grad_accum=2, ema=0.9, **MIXED)  # 6 steps an epoch; dropout is on


def killed_in_step(step, rank=0):
    """SIGKILL for the process of that rank, in that step, from 1."""
    if processes.rank() == rank:
        before(loop, "optimizer_step", nth(step, lambda session: kill()))


def seldom(trial):
    """With checkpoints after epochs only, so that previous.pt is that of an epoch too."""
    return with_options(trial, checkpoint_minutes=None)


def train_hindered(trial, hinder=None):
    """As a script does, after hinder()."""
    if hinder:
        hinder()
    train(trial)


@pytest.mark.parametrize("step", [9, 12])  # the third step of the second epoch, and its last
def test_killed_inside_an_epoch_and_resumed_ends_the_same(step, experiment, capsys):
    whole, cut = experiment("whole", **TRIAL), experiment("cut", **TRIAL, options=EACH_STEP)
    fit(whole)
    code, _ = launch_in_child(cut, partial(killed_in_step, step), *flags_of(EACH_STEP))
    assert code == -signal.SIGKILL
    assert load_checkpoint(cut.folder / "last.pt")["inside"]["steps"] == step - 7
    fit(resumed(seldom(cut)))
    assert f"resuming in epoch 2 of 3, after {32 * (step - 7)} of 192 images" in capsys.readouterr().out
    assert_same_run(cut.folder, whole.folder)


def test_killed_and_resumed_processes_end_the_same(experiment):
    """One of two is killed inside the second epoch; then two go on, and on a copy one alone."""
    options = EACH_STEP | dict(recompute=True)
    whole, cut, alone = (experiment(name, **TRIAL, options=options) for name in ("whole", "cut", "alone"))
    assert [code for code, *_ in run_together(2, train_hindered, seldom(whole))] == [0, 0]
    ended = run_together(2, train_hindered, cut, partial(killed_in_step, 9, 1))
    assert [code for code, *_ in ended] == [1, -signal.SIGKILL]
    assert "error: another process of this run has ended unexpectedly" in ended[0][1]
    shutil.copytree(cut.folder, alone.folder)
    assert [code for code, *_ in run_together(2, train_hindered, resumed(seldom(cut)))] == [0, 0]
    assert_same_run(cut.folder, whole.folder)
    code, output = launch_in_child(resumed(alone), None, *flags_of(EACH_STEP))
    assert code == 0 and "resuming in epoch 2 of 3" in output
    assert "number of processes: 2 before, 1 now" in output
    assert [row["epoch"] for row in read_rows(alone.folder)] == ["1", "2", "3"]


def interrupted_in_epoch(epoch):
    """Ctrl-C in the first step of that epoch of 8 steps, in every process."""
    before(loop, "optimizer_step", nth(8 * epoch - 7, ctrl_c))


def ctrl_c(session):
    raise KeyboardInterrupt


def test_three_processes_resumed_round_as_without_a_stop(experiment):
    """From three on, a sum of gradients depends on where in a message they lie."""
    fields = TRIAL | dict(batch_size=24, grad_accum=1, epochs=2)
    whole, cut = (experiment(name, **fields) for name in ("whole", "cut"))
    ended = run_together(3, train_hindered, whole)
    assert [code for code, *_ in ended] == [0] * 3 and not any(output for _, output, _ in ended[1:]), ended
    assert [code for code, *_ in run_together(3, train_hindered, cut, partial(interrupted_in_epoch, 2))] == [130] * 3
    assert [code for code, *_ in run_together(3, train_hindered, resumed(cut))] == [0] * 3
    assert_same_run(cut.folder, whole.folder)


def test_what_writes_into_a_run_is_left_to_the_main_process():
    marks = ("_replace(", "_write_partial(", '.open("a"')
    methods = {name: value for name, value in vars(Run).items() if inspect.isfunction(value) and name[0] != "_"}
    writing = {name for name, value in methods.items() if any(mark in inspect.getsource(value) for mark in marks)}
    assert len(writing) > 8 and writing <= vars(Onlooker).keys()


# ---------------------------------------------------------------------------- one end for all


def raised_in_step(error, rank):
    """The error, in the second step of the process of that rank."""

    def stop(session):
        raise error

    if processes.rank() == rank:
        before(loop, "optimizer_step", nth(2, stop))


def errors_in(ended):
    """Lines of all outputs that name an error."""
    lines = [line for _, output, _ in ended for line in output.splitlines()]
    return [line for line in lines if re.match("error: |[A-Za-z]+Error: ", line)]


def launch_with(trial, *flags):
    sys.argv = ["train.py", *flags]
    launch(trial)


@pytest.mark.parametrize(
    ("error", "rank", "code", "words"),
    [
        (UserError("the image is broken"), 1, 1, "error: the image is broken"),
        (KeyboardInterrupt(), 1, 130, "error: stopped. Add --resume to continue from the last finished epoch"),
        (RuntimeError("out of memory"), 0, 1, "error: out of memory: try a smaller --batch-size"),
        (ZeroDivisionError("a bug"), 0, 1, "ZeroDivisionError: a bug"),
    ],
)
def test_an_error_of_one_process_ends_all_with_its_code_and_one_message(error, rank, code, words, experiment):
    ended = run_together(2, train_hindered, experiment(), partial(raised_in_step, error, rank))
    assert [each[0] for each in ended] == [code, code]
    assert len(said := errors_in(ended)) == 1 and said[0].startswith(words), ended


def test_errors_of_all_are_said_once(experiment, tmp_path):
    """A loss that is not finite, data that are damaged, a batch that cannot be shared, a wrong flag."""
    (tmp_path / "data_cifar10").mkdir()
    (tmp_path / "data_cifar10" / "cifar10.npz").write_text("no archive")
    cases = [
        (train, (experiment("a", learning_rate=1e30),), 1, "is not finite: training stopped"),
        (train, (experiment("b", options={"data_dir": tmp_path}),), 1, "cifar10.npz cannot be read"),
        (train, (experiment("c", batch_size=9),), 1, "--batch-size 9 is the batch of all processes together"),
        (launch_with, (experiment("d"), "--no-such-flag", "1"), 2, "no-such-flag"),
    ]
    for work, args, code, words in cases:
        ended = run_together(2, work, *args)
        assert [each[0] for each in ended] == [code, code], ended
        assert sum(words in output for _, output, _ in ended) == 1, ended
        assert len(errors_in(ended)) == (code == 1), ended  # tyro says in its own words what flag is wrong


def read_lines(path):
    return path.read_text().splitlines() if path.exists() else []


def test_torchrun_stops_and_leaves_a_run_that_goes_on(data_dir, tmp_path):
    """The real thing: torchrun, a script, SIGTERM; then one more epoch in one process."""
    flags = ["--epochs", "100000", *flags_of(TINY_MODEL), "--device", "cpu"]
    flags += ["--data-dir", str(data_dir), "--runs-dir", str(tmp_path / "runs")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    trial = experiment_of("train_v2_cifar10.py", " ".join(flags))
    process = subprocess.Popen(
        [*torchrun, str(ROOT / "train_v2_cifar10.py"), *flags],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for(lambda: len(read_lines(trial.folder / "metrics.csv")) > 2 or process.poll() is not None)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert process.returncode != 0 and "2 processes on cpu" in output, output
    assert output.count("epoch   1/") == 1
    assert not Run(trial.folder).is_locked()
    kept = [trial.folder / name for name in ("last.pt", "previous.pt")]  # the end may come between two renames
    done = load_checkpoint(next(path for path in kept if path.exists()))["epoch"]
    interrupt(resumed(trial), done + 2)
    assert load_checkpoint(trial.folder / "last.pt")["epoch"] == done + 1


# ---------------------------------------------------------------------------- sync_batchnorm, devices


def test_sync_batchnorm_needs_batchnorm_and_changes_nothing_in_one_process(experiment):
    with pytest.raises(UserError, match="--sync-batchnorm: this model has no BatchNorm"):
        fit(experiment(sync_batchnorm=True))
    model = ResNet20Config(num_classes=10).build()
    kinds = [type(module) for module in model.modules()]
    assert [type(module) for module in sync_batchnorm(model, torch.device("cpu")).modules()] == kinds


@pytest.mark.parametrize(("n_gpus", "name", "words"), [(2, "cuda:1", "GPU for each"), (1, "auto", "need as many GPUs")])
def test_each_process_takes_a_gpu_of_its_own(n_gpus, name, words, monkeypatch):
    as_process(monkeypatch, 1, 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with pytest.raises(UserError, match=words):
        pick_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == torch.device("cuda:1") == chosen[0] and pick_device("cpu") == torch.device("cpu")
