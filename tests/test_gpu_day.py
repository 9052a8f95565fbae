"""benchmarks/gpu_day.py: steps in order, within the time, not repeated; its commands are ones that the scripts take."""

import json

import pytest
import tyro

import reproduce
from benchmarks import gpu_day, train_speed
from benchmarks.gpu_day import Options, Step, run_steps, steps_of

FLAGS = (tyro.conf.OmitArgPrefixes,)


@pytest.fixture(autouse=True)
def short_start(monkeypatch):
    monkeypatch.setattr(gpu_day, "LEAST_SECONDS", 0.05)


def step(name, code, **fields):
    return Step(name, lambda minutes: ["-S", "-c", code], **fields)


def states(folder):
    return {name: each["state"] for name, each in json.loads((folder / "steps.json").read_text()).items()}


def test_what_is_done_is_not_repeated_and_what_failed_is(tmp_path, capsys):
    steps = [
        step("good", "print('one')"),
        step("bad", "print('two'); raise SystemExit(3)"),
        step("again", "print('three')", repeats=True),
    ]
    options = Options(output_dir=tmp_path / "day", minutes=1)
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            run_steps(steps, options)
        assert end.value.code == 1
    assert states(options.output_dir) == {"good": "done", "bad": "failed with exit code 3", "again": "done"}
    said = {each.name: (options.output_dir / f"{each.name}.txt").read_text().count("\n+") for each in steps}
    assert said == {"good": 0, "bad": 1, "again": 1}  # the first line of a file starts with +, too
    captured = capsys.readouterr()
    assert "good: already done" in captured.out and "bad.txt" in captured.err


def test_a_step_is_stopped_at_its_share_and_what_it_said_stays(tmp_path):
    options = Options(output_dir=tmp_path, minutes=6 / 60)
    slow = step("slow", "import time; print('begun', flush=True); time.sleep(60)", share=0.4)
    run_steps([slow, step("next", "print('ran')")], options)
    assert states(tmp_path)["slow"].startswith("stopped after") and states(tmp_path)["next"] == "done"
    assert "begun" in (tmp_path / "slow.txt").read_text()


def test_without_time_nothing_starts(tmp_path, capsys):
    run_steps([step("late", "print(1)")], Options(output_dir=tmp_path, minutes=1e-6))
    assert "no time left" in capsys.readouterr().out and not (tmp_path / "late.txt").exists()


def test_a_damaged_table_is_named(tmp_path):
    (tmp_path / "steps.json").write_text("{")
    with pytest.raises(gpu_day.UserError, match=r"steps\.json"):
        run_steps([], Options(output_dir=tmp_path))


@pytest.mark.parametrize("rehearse", [True, False])
def test_the_scripts_take_the_commands(rehearse, tmp_path):
    options = Options(output_dir=tmp_path, data_dir=tmp_path, compile=True, rehearse=rehearse)
    tests, *speeds, runs = [each.command(7.0) for each in steps_of(options)]
    assert tests[:2] == ["-m", "pytest"] and (gpu_day.ROOT / tests[3]).exists()
    assert tests[tests.index("--device") + 1] == ("cpu" if rehearse else "cuda")
    measured = [tyro.cli(train_speed.Options, args=args[1:], config=FLAGS) for args in speeds]
    assert [each.precisions for each in measured] == [("bf16",), ("float32" if rehearse else "tf32",)]
    assert len({each.output_dir for each in measured}) == 2
    plan = tyro.cli(reproduce.Options, args=runs[1:], config=FLAGS)
    assert (plan.budget_minutes, plan.compile, plan.precision, plan.data_dir) == (7, True, "bf16", tmp_path)
    assert tmp_path in plan.runs_dir.parents and tmp_path in plan.results_dir.parents


def test_without_a_gpu_there_is_one_message(call_script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_day.pick_device.__globals__["torch"].cuda, "is_available", lambda: False)
    assert call_script("benchmarks/gpu_day.py", "--output-dir", tmp_path / "day") == 1
    assert capsys.readouterr().err.startswith("error: --device cuda") and not (tmp_path / "day").exists()
