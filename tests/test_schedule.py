"""Many runs in processes of their own: nothing is repeated, one failure stops nothing else, time ends it cleanly."""

import json
import signal
import sys
import time
from types import SimpleNamespace
from unittest import mock

import pytest

from training import ClassificationConfig, Experiment, RunOptions, UserError, schedule
from models.vision_bdh import v2_config
from training.provenance import describe_run
from training.runs import Run
from training.schedule import Job, command_now, run_jobs

TRAIN = dict(dataset="cifar10", epochs=50, batch_size=32, learning_rate=1e-4, weight_decay=0.05)

STAND_IN = """
import json, os, shutil, sys, time
from pathlib import Path
folder, config, what = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
with (folder.parents[1] / "calls.txt").open("a") as file:
    file.write(f"{folder.parent.name} {folder.name} {' '.join(sys.argv[4:])}".strip() + "\\n")
(folder / "config.json").write_text(config)
if what != "last":
    (folder / "last.pt").touch()
if what == "fail":
    sys.exit("some output\\nerror: the reason")
if what == "vanish":
    shutil.rmtree(folder)
    sys.exit(1)
if what == "die":
    os.kill(os.getpid(), 9)
if what == "meet":  # ends only if another runs at the same time
    (folder / "here").touch()
    ends = time.monotonic() + 30
    while len(list(folder.parents[1].glob("*/*/here"))) < 2:
        if time.monotonic() > ends:
            sys.exit("error: alone")
        time.sleep(0.01)
if what == "last":  # until it is stopped
    try:
        (folder / "last.pt").touch()
        time.sleep(60)
    except KeyboardInterrupt:
        (folder / "stopped").touch()
        sys.exit(130)
(folder / "summary.json").write_text('{"test": null, "best": {"epoch": 1}, "epochs": 1, "parameters": 1}')
"""


@pytest.fixture
def make_job(tmp_path):
    """A run that notes its call and does what it is told."""

    def make(name="run", what="work", seed=0, start_from=None, overwrite=False, **model):
        train = ClassificationConfig(seed=seed, start_from=start_from, **TRAIN)
        options = RunOptions(runs_dir=tmp_path / "runs", overwrite=overwrite)
        experiment = Experiment(name, v2_config(**model), train, options)
        facts = dict(parameters=1, hardware={"device": "cpu", "name": "a CPU"})
        config = json.dumps(describe_run(experiment, {"name": "cifar10"}, **facts))
        return Job(experiment, [sys.executable, "-c", STAND_IN, str(experiment.folder), config, what])

    return make


def calls(tmp_path):
    path = tmp_path / "runs" / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    ("files", "flags"),
    [
        ([], []),
        (["config.json"], ["--overwrite"]),
        (["config.json", "last.pt"], ["--resume"]),
        (["previous.pt"], ["--resume"]),
    ],
)
def test_a_run_that_was_begun_goes_on(files, flags, make_job):
    job = make_job()
    job.experiment.folder.mkdir(parents=True)
    for name in files:
        (job.experiment.folder / name).touch()
    assert command_now(job) == [*job.command, *flags]
    job = make_job(overwrite=True)
    assert command_now(job) == [*job.command, "--overwrite"]


def test_a_run_that_fails_stops_no_other_and_is_listed_with_its_error(make_job, tmp_path, capsys):
    jobs = [make_job("a"), make_job("b", "fail"), make_job("c", "die"), make_job("d", seed=1)]
    outcome = run_jobs(jobs, at_once=2)
    assert sorted(calls(tmp_path)) == ["a seed0", "b seed0", "c seed0", "d seed1"] and not outcome.left
    assert outcome.failures.keys() == {"b, seed 0", "c, seed 0"}
    assert outcome.failures["b, seed 0"].startswith("the reason (")
    assert "signal 9" in outcome.failures["c, seed 0"]
    shown = capsys.readouterr().out
    assert "[4/4]" in shown and shown.count("done") == 2 and shown.count("failed: ") == 2


def test_a_run_whose_folder_was_removed_stops_no_other(make_job, tmp_path):
    outcome = run_jobs([make_job("a", "vanish"), make_job("b")], at_once=1)
    assert calls(tmp_path) == ["a seed0", "b seed0"]
    assert outcome.failures.keys() == {"a, seed 0"}
    assert "exit code 1" in (told := outcome.failures["a, seed 0"]) and "log.txt cannot be read" in told


def test_what_is_complete_is_not_repeated(make_job, tmp_path, capsys):
    run_jobs([make_job("a"), make_job("b", "fail")], 1)
    kept = []
    jobs = [make_job("a"), make_job("b"), make_job("b", seed=1)]
    assert run_jobs(jobs, 1, keep=kept.append).failures == {}
    assert calls(tmp_path) == ["a seed0", "b seed0", "b seed0 --resume", "b seed1"]
    assert "3 runs, 1 of them complete" in capsys.readouterr().out
    assert kept == jobs
    run_jobs([make_job("a", overwrite=True)], 1)
    assert calls(tmp_path)[-1] == "a seed0 --overwrite"


def test_a_complete_run_of_another_configuration_is_not_taken_for_this_one(make_job, tmp_path):
    run_jobs([make_job("a", n_layer=5)], 1)
    failures = run_jobs([make_job("a"), make_job("b")], 1).failures
    assert failures.keys() == {"a, seed 0"} and "n_layer: 5 -> 6" in failures["a, seed 0"]
    assert calls(tmp_path) == ["a seed0", "b seed0"]  # the other is made all the same


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_a_damaged_run_is_named_and_stops_no_other(name, make_job, tmp_path):
    run_jobs([make_job("a")], 1)
    (tmp_path / "runs" / "a" / "seed0" / name).write_text("half a fi")
    outcome = run_jobs([make_job("a"), make_job("b")], 1)
    assert outcome.failures.keys() == {"a, seed 0"} and name in outcome.failures["a, seed 0"]
    assert calls(tmp_path) == ["a seed0", "b seed0"]


@pytest.mark.parametrize("seen", [[True], [False, True]])
def test_a_run_that_another_process_trains_is_left_to_it(seen, make_job, tmp_path, monkeypatch, capsys):
    """Whether it is found before the start, or its own process finds the other."""
    looks = {"a": iter(seen)}
    monkeypatch.setattr(Run, "is_locked", lambda run: next(looks.get(run.folder.parent.name, iter([False]))))
    monkeypatch.setattr(Run, "holder", lambda run: "process 7 on host")
    outcome = run_jobs([make_job("a", "fail"), make_job("b")], 1)
    assert (outcome.failures, outcome.elsewhere) == ({}, {"a, seed 0": "process 7 on host"})
    assert "in work elsewhere (process 7 on host)" in capsys.readouterr().out
    assert calls(tmp_path) == [*["a seed0"] * (len(seen) - 1), "b seed0"]


def test_jobs_run_at_the_same_time(make_job):
    assert run_jobs([make_job("a", "meet"), make_job("b", "meet")], 2).failures == {}


def test_when_the_time_is_over_what_runs_is_stopped_and_the_rest_is_left(make_job, tmp_path, monkeypatch):
    jobs = [make_job("a"), make_job("b", "last"), make_job("c"), make_job("d")]
    begun, kept = jobs[1].experiment.folder / "last.pt", []
    clock = SimpleNamespace(monotonic=lambda: 61 * begun.exists(), sleep=time.sleep, perf_counter=time.perf_counter)
    with monkeypatch.context() as patch:
        patch.setattr(schedule, "time", clock)
        outcome = run_jobs(jobs, 1, minutes=1, keep=kept.append)
    assert outcome.failures == {} and outcome.left == ["b, seed 0", "c, seed 0", "d, seed 0"]
    assert kept == jobs[:1] and (begun.parent / "stopped").exists()
    assert calls(tmp_path) == ["a seed0", "b seed0"]
    again = run_jobs([make_job(name) for name in "abcd"], 1)
    assert (again.failures, again.left) == ({}, [])
    assert calls(tmp_path)[2:] == ["b seed0 --resume", "c seed0", "d seed0"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_stop_from_outside_stops_the_runs_too(name, make_job):
    """Also where the shell had interrupts ignored, as it does for what a script starts with &."""
    number, job = getattr(signal, name), make_job("a", "last")
    handler = signal.getsignal(number)

    def stop(_):  # the quick run's end sends the signal while the other one runs
        while not (job.experiment.folder / "last.pt").exists():
            time.sleep(0.01)
        signal.raise_signal(number)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_jobs([job, make_job("b")], 2, keep=stop)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (job.experiment.folder / "stopped").exists()
    assert signal.getsignal(number) is handler


def test_a_run_waits_for_the_one_whose_weights_it_starts_from(make_job, tmp_path):
    first = make_job("first")
    after = make_job("after", start_from=first.experiment.folder / "best.pt")
    alone = make_job("alone")
    assert run_jobs([after, first, alone], 1).failures == {}
    assert calls(tmp_path) == ["first seed0", "after seed0", "alone seed0"]


def test_a_run_whose_source_failed_is_not_begun(make_job, tmp_path):
    """The source may have left weights of an early epoch."""
    first = make_job("first", "fail")
    itself = make_job("itself", start_from=tmp_path / "runs" / "itself" / "seed0" / "best.pt")
    jobs = [make_job("after", start_from=first.experiment.folder / "best.pt"), first, itself]
    failures = run_jobs(jobs, 2).failures
    assert failures.keys() == {"after, seed 0", "first, seed 0"}
    assert failures["after, seed 0"] == "it goes on from a run that failed (first, seed 0)"
    assert sorted(calls(tmp_path)) == ["first seed0", "itself seed0"]


def test_a_run_whose_source_has_another_configuration_is_not_begun(make_job, tmp_path):
    run_jobs([make_job("first", n_layer=5)], 1)
    first = make_job("first")
    failures = run_jobs([first, make_job("after", start_from=first.experiment.folder / "best.pt")], 1).failures
    assert "another configuration" in failures["first, seed 0"]
    assert failures["after, seed 0"] == "it goes on from a run that failed (first, seed 0)"
    assert calls(tmp_path) == ["first seed0"]


def test_a_run_whose_source_another_process_trains_is_not_begun(make_job, tmp_path):
    first = make_job("first")
    with Run(first.experiment.folder).locked():
        outcome = run_jobs([first, make_job("after", start_from=first.experiment.folder / "best.pt")], 1)
    assert outcome.elsewhere.keys() == {"first, seed 0"} and calls(tmp_path) == []
    assert "in work elsewhere (first, seed 0)" in outcome.failures["after, seed 0"]


def test_a_failure_is_not_told_with_the_words_of_an_earlier_attempt(make_job):
    assert "the reason" in run_jobs([make_job("a", "fail")], 1).failures["a, seed 0"]
    assert "last output: no output" in run_jobs([make_job("a", "die")], 1).failures["a, seed 0"]


def test_a_run_that_cannot_be_kept_counts_as_failed(make_job, tmp_path):
    refuse = mock.Mock(side_effect=UserError("no space"))
    jobs = [make_job("a"), make_job("b")]
    assert run_jobs(jobs, 1, keep=refuse).failures == {"a, seed 0": "no space", "b, seed 0": "no space"}
    assert len(calls(tmp_path)) == 2
    assert run_jobs(jobs, 1).failures == {}  # both are complete
    assert len(calls(tmp_path)) == 2
