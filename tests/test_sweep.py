"""Sweeps: what they expand to, and a real one that is stopped and goes on."""

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training import ClassificationConfig, UserError
from models.vision_bdh import v2_config
from training.config import parse_experiment
from training.sweep import SweepOptions, command_of, make_plan

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "train_ablation.py"
MODEL = v2_config()
TRAIN = ClassificationConfig(dataset="cifar10", epochs=50, batch_size=32, learning_rate=1e-4, weight_decay=0.05)


def plan_of(tmp_path, sweep, *flags):
    flags = ["--sweep", sweep, "--runs-dir", str(tmp_path / "runs"), *flags]
    return make_plan("ablation", MODEL, TRAIN, parse_experiment("ablation", MODEL, TRAIN, "", flags, SweepOptions()))


def names(plan):
    return [each.name for each in plan.experiments]


# ---------------------------------------------------------------------------- expanding


def test_fields_vary_one_at_a_time(tmp_path):
    plan = plan_of(tmp_path, "residual=post/true_pre,gate")
    assert plan.default == "ablation" and not plan.refused
    assert names(plan) == [
        "ablation",
        "ablation+residual=post",
        "ablation+residual=true_pre",
        "ablation+gate=sigmoid",  # multiplicative is the default itself, and not run twice
        "ablation+gate=none",
    ]
    for each in plan.experiments[3:]:
        assert dataclasses.replace(each.model, gate="multiplicative") == MODEL and each.train == TRAIN


def test_every_combination(tmp_path):
    plan = plan_of(tmp_path, "residual=post/pre,init=normal/xavier", "--cross")
    assert {(each.model.residual, each.model.init) for each in plan.experiments} == set(
        itertools.product(["post", "pre"], ["normal", "xavier"])
    )
    assert len(plan.experiments) == 4 and plan.default == "ablation"


def test_the_default_takes_part_even_where_it_is_not_named(tmp_path):
    plan = plan_of(tmp_path, "init=normal,gate=none", "--cross")
    assert names(plan) == ["ablation", "ablation+gate=none+init=normal"]


def test_seeds_go_round_by_round(tmp_path):
    plan = plan_of(tmp_path, "init=normal", "--seeds", "3", "--seed", "4")
    assert [(each.name, each.train.seed) for each in plan.experiments] == [
        (name, seed) for seed in (4, 5, 6) for name in ("ablation", "ablation+init=normal")
    ]
    assert plan.experiments[0].folder == tmp_path / "runs" / "ablation" / "seed4"


def test_what_is_changed_for_all_is_in_every_name_and_the_default(tmp_path):
    plan = plan_of(tmp_path, "n-layer=2/4,horizontal_flip", "--n-embd", "96", "--epochs", "3")
    assert plan.default == "ablation+epochs=3+n_embd=96"
    assert names(plan)[1:] == [
        "ablation+epochs=3+n_embd=96+n_layer=2",
        "ablation+epochs=3+n_embd=96+n_layer=4",
        "ablation+epochs=3+horizontal_flip=True+n_embd=96",
    ]
    assert plan.experiments[1].model.n_layer == 2 and plan.experiments[3].train.horizontal_flip is True


@pytest.mark.parametrize(
    ("sweep", "field", "values"),
    [
        ("learning_rate=1e-3/3e-4", "learning_rate", [1e-4, 1e-3, 3e-4]),
        ("train_limit=200/None", "train_limit", [None, 200]),
        ("crop_scale_min=0.5", "crop_scale_min", [1.0, 0.5]),
        ("compile=yes", "compile", [False, True]),
    ],
)
def test_values_have_the_type_of_their_field(sweep, field, values, tmp_path):
    assert [getattr(each.train, field) for each in plan_of(tmp_path, sweep).experiments] == values


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ("residul", "did you mean residual"),
        ("init,zzz=3", "zzz: there is no such field: there are .*gate"),
        ("n_layer", "name the values"),
        ("n_layer=2/many", "n_layer=many: it must be int"),
        ("gate=gelu", "gate=gelu: choose from multiplicative, sigmoid, none"),
        ("shared=maybe", "shared=maybe: choose from True, False"),
        ("seed=1/2", "no such field"),
        ("", "no such field"),
    ],
)
def test_a_wrong_sweep_is_refused_with_a_hint(sweep, words, tmp_path):
    with pytest.raises(UserError, match=words):
        plan_of(tmp_path, sweep)


@pytest.mark.parametrize(
    "flags", [["--seeds", "2"], ["--cross"], ["--sweep", "init", "--name", "x"], ["--sweep", "init", "--jobs", "0"]]
)
def test_options_that_make_no_sense_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as end:
        parse_experiment("ablation", MODEL, TRAIN, "", flags, SweepOptions())
    assert end.value.code == 2


def test_a_setting_that_makes_no_sense_is_listed_with_its_reason(tmp_path):
    plan = plan_of(tmp_path, "n_head=5/4,rotary")
    assert set(plan.refused) == {"n_head=5"} and "not a multiple of n_head" in plan.refused["n_head=5"]
    assert len(plan.experiments) == 4  # default, n_head=4, axial, none


# ---------------------------------------------------------------------------- the command of a run


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--n-layer", "2", "--no-attn-norm", "--train-limit", "100", "--device", "cpu", "--wandb", "p q"],
        ["--data-dir", "some where", "--tensorboard", "--eval-batch-size", "8", "--seed", "7"],
    ],
)
def test_a_run_is_what_its_command_makes(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    plan = plan_of(tmp_path, "shared,dropout=0/0.5,horizontal_flip,train_limit=50", "--seeds", "2", *flags)
    assert len(plan.experiments) == 2 * 6
    for each in plan.experiments:
        python, script, *args = command_of(each, MODEL, TRAIN)
        assert (python, script) == (sys.executable, str(SCRIPT))
        again = parse_experiment("ablation", MODEL, TRAIN, "", args, SweepOptions())
        assert (again.name, again.model, again.train) == (each.name, each.model, each.train)
        assert again.options.sweep is None and again.folder == each.folder
        same = ("device", "data_dir", "wandb", "tensorboard", "eval_batch_size")
        assert all(getattr(again.options, name) == getattr(each.options, name) for name in same)


# ---------------------------------------------------------------------------- a real one


def test_a_sweep_stopped_and_started_again_repeats_nothing(data_dir, tmp_path):
    sizes = "--patch-size 8 --n-layer 1 --n-embd 8 --n-head 2 --mlp-internal-dim-multiplier 4 --epochs 2".split()
    where = ["--data-dir", str(data_dir), "--runs-dir", str(tmp_path / "runs"), "--device", "cpu"]
    command = [sys.executable, str(SCRIPT), *sizes, *where, "--sweep", "n_head=1/3,gate=none", "--jobs", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    look = dict(cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, **look)
    ends = time.monotonic() + 240
    while not (done := list(tmp_path.rglob("summary.json"))) and process.poll() is None:
        assert time.monotonic() < ends
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    if process.returncode != 1:  # it had not yet come to its end
        assert process.returncode == 130, out + err
        assert "The same command goes on" in err
    kept = {path: path.stat().st_mtime_ns for summary in done for path in summary.parent.iterdir()}

    again = subprocess.run(command, **look)
    assert again.returncode == 1 and "n_head=3: n_embd = 8 is not a multiple" in again.stderr, again.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    summaries = list(tmp_path.rglob("summary.json"))
    assert len(summaries) == 3
    table = next(tmp_path.rglob("sweep_n_head_gate.md")).read_text()
    assert "| default |" in table and "| n_head=1 |" in table and "| gate=none |" in table
    assert table in again.stdout.replace("\r", "")
    for summary in summaries:
        assert (summary.parent / "log.txt").stat().st_size > 0
        assert len((summary.parent / "metrics.csv").read_text().splitlines()) == 3
