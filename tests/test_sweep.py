"""Sweeps: what they expand to, and a real one that is stopped and goes on."""

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from training import ClassificationConfig, Experiment, UserError, schedule, sweep
from models.vision_bdh import v2_config
from tests.trials import wait_for
from training.command_line import experiment_of, parse_experiment
from training.config import ROOT
from training.experiment import name_of_file
from training.runs import Run
from training.schedule import Outcome
from training.sweep import SweepOptions, command_of, make_plan

SCRIPT = ROOT / "train_ablation.py"
MODEL = v2_config()
TRAIN = ClassificationConfig(dataset="cifar10", epochs=50, batch_size=32, learning_rate=1e-4, weight_decay=0.05)
EXPERIMENT = Experiment("ablation", MODEL, TRAIN)


def asked(*flags):
    return parse_experiment(EXPERIMENT, list(flags), options=SweepOptions())


def plan_of(tmp_path, axes, *flags):
    return make_plan(EXPERIMENT, asked("--sweep", axes, "--runs-dir", str(tmp_path / "runs"), *flags))


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


def test_what_is_named_twice_is_run_once(tmp_path):
    assert names(plan_of(tmp_path, "n_layer=1/1,qk,qk")) == ["ablation", "ablation+n_layer=1", "ablation+qk=separate"]


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
    ("axes", "field", "values"),
    [
        ("learning_rate=1e-3/3e-4", "learning_rate", [1e-4, 1e-3, 3e-4]),
        ("train_limit=200/None", "train_limit", [None, 200]),
        ("crop_scale_min=0.5", "crop_scale_min", [1.0, 0.5]),
        ("compile=yes", "compile", [False, True]),
        ("start_from=/a/best.pt", "start_from", [None, Path("/a/best.pt")]),
    ],
)
def test_values_have_the_type_of_their_field(axes, field, values, tmp_path):
    assert [getattr(each.train, field) for each in plan_of(tmp_path, axes).experiments] == values


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ("residul", "did you mean residual"),
        ("init,zzz=3", "zzz: no such field, choose from .*gate"),
        ("n_layer", "name the values"),
        ("n_layer=2/many", "n_layer=many: it must be int"),
        ("gate=gelu", "gate=gelu: choose from multiplicative, sigmoid, none"),
        ("shared=maybe", "shared=maybe: choose from True, False"),
        ("seed=1/2", "give the number of seeds with --seeds"),
        ("outside_step", "no such field"),
        ("betas=0.9/0.95", "several numbers at once"),
        ("", "name the fields"),
    ],
)
def test_a_wrong_sweep_is_refused_with_a_hint(axes, words, tmp_path):
    with pytest.raises(UserError, match=words):
        plan_of(tmp_path, axes)


@pytest.mark.parametrize("axis", ["depth", "n_layer=a", "gate=foo"])
def test_a_wrong_sweep_is_a_wrong_flag(axis, call_script, capsys):
    assert call_script("train_ablation.py", "--sweep", axis) == 2
    assert capsys.readouterr().err.startswith(f"error: --sweep {axis.split('=')[0]}")


@pytest.mark.parametrize(
    "flags", [["--seeds", "2"], ["--cross"], ["--sweep", "init", "--name", "x"], ["--sweep", "init", "--jobs", "0"]]
)
def test_options_that_make_no_sense_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as end:
        asked(*flags)
    assert end.value.code == 2


def test_two_places_to_start_from_are_refused(capsys):
    with pytest.raises(SystemExit) as end:
        asked("--encoder", "a/best.pt", "--start-from", "b/best.pt")
    assert end.value.code == 2
    assert "encoder = a/best.pt and start_from = b/best.pt both say" in capsys.readouterr().err
    flags = ["--encoder", "a/best.pt"]  # replaces what a script starts from
    tuned = parse_experiment(experiment_of("finetune_bdh_unet.py"), flags)
    assert tuned.train.start_from is None and tuned.name == "bdh_unet_finetune+encoder=" + name_of_file(
        Path("a/best.pt")
    )


def test_a_setting_that_makes_no_sense_is_listed_with_its_reason(tmp_path):
    plan = plan_of(tmp_path, "n_head=5/4,rotary")
    assert set(plan.refused) == {"n_head=5"} and "not a multiple of n_head" in plan.refused["n_head=5"]
    assert len(plan.experiments) == 4  # default, n_head=4, axial, none


def test_a_table_that_cannot_be_written_is_listed_and_its_name_is_cut(tmp_path, capsys):
    written = []

    def report(runs, default, output):
        written.append(output.name)
        raise OSError(28, "No space left on device", str(output))

    plan = dataclasses.replace(plan_of(tmp_path, "n_layer=1"), fields=[f"field_{i}" for i in range(60)])
    with pytest.raises(SystemExit) as end:
        sweep._report_sweep(plan, Outcome(), report, tmp_path)
    assert end.value.code == 1 and "the table: " in (said := capsys.readouterr().err) and "No space left" in said
    assert written[0].startswith("sweep_field_0_") and len(written[0]) < 250


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
        python, script, *args = command_of(each, EXPERIMENT)
        assert (python, script) == (sys.executable, str(SCRIPT))
        again = asked(*args)
        assert (again.name, again.model, again.train) == (each.name, each.model, each.train)
        assert again.options.sweep is None and again.folder == each.folder
        same = ("device", "data_dir", "wandb", "tensorboard", "eval_batch_size")
        assert all(getattr(again.options, name) == getattr(each.options, name) for name in same)


# ---------------------------------------------------------------------------- a real one


def test_ctrl_c_says_how_to_continue(call_script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sweep, "run_jobs", mock.Mock(side_effect=KeyboardInterrupt))
    assert call_script("train_ablation.py", "--sweep", "init", "--runs-dir", tmp_path) == 130
    assert "Repeat the command to continue" in capsys.readouterr().err


def test_a_sweep_killed_and_started_again(data_dir, tmp_path, call_script, capsys):
    """kill -9 of the sweep ends its runs; the same command resumes them and leaves alone what others train."""
    sizes = "--patch-size 8 --n-layer 1 --n-embd 8 --n-head 2 --mlp-internal-dim-multiplier 4 --epochs 12".split()
    where = ["--data-dir", str(data_dir), "--runs-dir", str(tmp_path / "runs"), "--device", "cpu"]
    flags = [*sizes, *where, "--sweep", "n_head=1/3,gate=none"]
    plan = make_plan(EXPERIMENT, asked(*flags)).experiments
    first, gateless = plan[0].folder, next(each.folder for each in plan if each.model.gate == "none")
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *flags],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
    )
    process.stdout.close()  # as `... | head` does: the sweep goes on
    wait_for((first / "metrics.csv").exists)
    process.kill()
    process.wait()
    wait_for(lambda: not Run(first).is_locked())
    assert "stopped. Add --resume" in (first / "log.txt").read_text().splitlines()[-1]

    with Run(gateless).locked():
        assert call_script("train_ablation.py", *flags, "--jobs", "2") == 1
    captured = capsys.readouterr()
    assert "n_head=3: n_embd = 8 is not a multiple" in captured.err
    assert f"in work elsewhere (process {os.getpid()}" in captured.out
    assert "resuming after epoch" in (first / "log.txt").read_text()
    done = [path.parent for path in tmp_path.rglob("summary.json")]
    assert len(done) == 2 and gateless not in done
    assert all(len((folder / "metrics.csv").read_text().splitlines()) == 1 + 12 for folder in done)
    table = next(tmp_path.rglob("sweep_n_head_gate.md")).read_text()
    assert "| default |" in table and "| n_head=1 |" in table and "gate=none" not in table
    assert table in captured.out.replace("\r", "")


# ---------------------------------------------------------------------------- GPUs, several processes a run


def test_jobs_spread_over_the_visible_gpus(experiment, monkeypatch, tmp_path):
    """Five jobs on two of the GPUs, three at once; each notes what it sees."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(Run, "is_complete", lambda run, trial: False)
    note = "import os, sys, time; open(sys.argv[1], 'w').write(os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(0.5)"
    files = [tmp_path / str(number) for number in range(4)]
    jobs = [
        schedule.Job(experiment(f"job{number}", options={"device": "auto"}), [sys.executable, "-c", note, str(file)])
        for number, file in enumerate(files)
    ]
    outcome = schedule.run_jobs(jobs, at_once=4)
    assert not outcome.failures and sorted(file.read_text() for file in files) == ["4", "4", "6", "6"]


def test_which_gpus_a_job_gets():
    assert schedule.least_busy(["0", "1", "2"], [], 1) == ["0"]
    assert schedule.least_busy(["0", "1", "2"], ["0", "1", "0"], 2) == ["2", "1"]
    assert schedule.least_busy(["0"], ["0", "0"], 1) == ["0"] and schedule.least_busy([], [], 1) == []


def test_a_job_of_several_processes_is_started_by_torchrun(experiment):
    job = schedule.Job(experiment(), ["python", "train.py", "--epochs", "2"])
    assert schedule.command_now(job) == ["python", "train.py", "--epochs", "2"]
    assert schedule.command_now(job, 4) == [
        *("python -m torch.distributed.run --standalone --nproc-per-node 4 train.py --epochs 2".split()),
    ]


def test_processes_of_a_run_belong_to_a_sweep(tmp_path, capsys):
    command = command_of(plan_of(tmp_path, "init", "--nproc-per-node", "2", "--jobs", "2").experiments[0], EXPERIMENT)
    assert not {"--nproc-per-node", "--jobs", "--sweep"} & set(command)
    with pytest.raises(SystemExit) as refused:
        asked("--nproc-per-node", "2")
    assert refused.value.code == 2 and "torchrun" in capsys.readouterr().err
