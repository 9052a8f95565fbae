"""The plans: what is in them, that each command makes its run, time estimates, and a small plan carried out."""

import json
import re
import shutil
from itertools import product
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

import plans
import reproduce
from training import UserError, device
from analysis.published import read_published
from plans import FULL_CPU, PLANS, PUBLISHED, SMALL_CPU, Entry, Part, Plan, epoch_minutes, training_flop
from reproduce import Options, main, planned_runs
from tests.claimed_runs import write_run
from training.command_line import experiment_of
from training.schedule import Outcome
from training.stored import SMALL_FILES

TINY = "--patch-size 8 --n-layer 1 --n-embd 8 --n-head 2 --mlp-internal-dim-multiplier 4 --epochs 2"


def options_in(tmp_path, **changed):
    return Options(**(dict(runs_dir=tmp_path / "runs", results_dir=tmp_path / "results", device="cpu") | changed))


def decisive(experiment):
    """Without what runs of one row may differ in."""
    fields = experiment.configuration.fields()
    for key in ("seed", "start_from"):
        del fields["train"][key]
    return json.dumps(fields), experiment.train.start_from is None


# ---------------------------------------------------------------------------- what is planned


def test_three_seeds_of_every_published_row_are_planned(tmp_path):
    seeds = {}
    for each in planned_runs(PUBLISHED, options_in(tmp_path)):
        seeds.setdefault(decisive(each.job.experiment), []).append(each.job.experiment.train.seed)
    rows = [(line.script, flags) for line in read_published() if line.script for _, flags in line.settings]
    assert len(rows) > 20
    for script, flags in rows:
        assert sorted(seeds[decisive(experiment_of(script, flags))]) == [0, 1, 2], (script, flags)


def labels_of(plan, options):
    return [each.job.label for each in planned_runs(plan, options)]


def test_no_run_is_planned_twice_and_the_most_valuable_come_first(tmp_path):
    for plan in PLANS.values():
        runs = [each.job.experiment for each in planned_runs(plan, options_in(tmp_path))]
        assert len({(decisive(each), each.train.seed) for each in runs}) == len(runs)
        assert len({each.folder for each in runs}) == len(runs)
    first = labels_of(PUBLISHED, options_in(tmp_path))[:10]
    assert first == [f"{name}_cifar10, seed {seed}" for name in ("v2", "vit_tiny", "v1") for seed in (0, 1, 2)] + [
        "v2_softmax_cifar10, seed 0"
    ]


@pytest.mark.parametrize(("has_bf16", "precision"), [(True, "bf16"), (False, "float32")])
def test_the_full_protocol_on_a_cpu(has_bf16, precision, tmp_path, monkeypatch):
    """In order, in the precision of the CPU, and with results where the claims count them."""
    monkeypatch.setattr(reproduce, "has_fast_bf16", lambda device: has_bf16)
    vit, v1, m4 = "vit_tiny_cifar10+epochs=10", "v1_cifar10+epochs=10", "mlp_internal_dim_multiplier=4"
    rivals = [f"{name}_cifar100" for name in ("resnet20", "deit_tiny", "mobilenetv2", "efficientnet")]
    v1_m4 = f"{v1}+{m4}"
    expected = [(name, 0) for name in (vit, v1, *rivals, v1_m4)]
    expected += [(name, seed) for name in (vit, *rivals, v1_m4, v1) for seed in (1, 2)]
    expected += [("v2_cifar10", 0), ("vit_tiny_cifar10", 0)]
    options = options_in(tmp_path, device="auto")
    planned = planned_runs(FULL_CPU, options)
    runs = [each.job.experiment for each in planned]
    assert [(each.name.replace(f"+precision={precision}", ""), each.train.seed) for each in runs] == expected
    assert {each.options.device for each in runs} == {"cpu"}
    assert planned[0].kept == tmp_path / "results" / f"{vit}+precision={precision}" / "seed0"
    small = [each for name in PLANS if name.endswith("_cpu") for each in planned_runs(PLANS[name], options)]
    assert {(each.job.experiment.options.device, each.job.experiment.train.precision) for each in small} == {
        ("cpu", precision)
    }
    assert "precision=tf32" not in planned_runs(FULL_CPU, options_in(tmp_path, precision="tf32"))[0].job.experiment.name


def test_a_run_that_two_questions_ask_for_is_made_for_the_first(tmp_path):
    """Places may be relative to the folder that the command is called from."""
    options = options_in(tmp_path, runs_dir=Path("some/runs"), only="v2_cifar10+residual=post")
    planned = [each for each in planned_runs(PUBLISHED, options) if each.job.experiment.name == options.only]
    assert [each.job.experiment.train.seed for each in planned] == [0, 1, 2]
    assert planned[0].part.question.startswith("Norm") and planned[1].part.question.startswith("What made")
    assert planned[0].job.experiment.folder == Path.cwd() / "some/runs" / options.only / "seed0"
    assert planned[0].kept == tmp_path / "results" / options.only / "seed0"


def test_what_v1_and_v2_differ_in_is_planned_in_every_combination(tmp_path):
    """v1 is (post, normal, 500), v2 as documented (pre, xavier, 500), as its code ran (post, xavier, 1000)."""
    seen = {}
    for each in planned_runs(PUBLISHED, options_in(tmp_path)):
        seen.setdefault(decisive(each.job.experiment), []).append(each.job.experiment.train.seed)
    for residual, init, steps in product(("post", "pre"), ("normal", "xavier"), (500, 1000)):
        flags = f"--residual {residual} --init {init} --init-projections {init} --warmup-steps {steps}"
        assert sorted(seen[decisive(experiment_of("train_v1_cifar10.py", flags))]) == [0, 1, 2], flags


def test_every_plan_can_be_chosen():
    assert set(get_args(get_type_hints(Options)["plan"])) == PLANS.keys()


@pytest.mark.parametrize("name", PLANS)
def test_each_command_makes_the_run_that_is_planned(name, tmp_path):
    """With flags for all of them, and with a run that goes on from another."""
    options = options_in(tmp_path, precision="bf16", compile=True, data_dir=tmp_path / "data")
    planned = {each.job.experiment.name: each for each in planned_runs(PLANS[name], options)}  # one seed of each
    for each in planned.values():
        _, script, *flags = each.job.command
        made = experiment_of(script, " ".join(flags))
        assert made == each.job.experiment
        assert made.folder == each.job.experiment.folder
        assert each.kept.relative_to(tmp_path / "results" / PLANS[name].folder).parts == made.folder.parts[-2:]
        assert made.train.precision == "bf16" and made.train.compile
    if name == "published":
        after = planned["bdh_unet_finetune+compile=True+precision=bf16"].job
        assert after.source == planned["bdh_unet+compile=True+precision=bf16"].job.experiment.folder


def test_small_runs_are_kept_where_they_never_count_as_reproductions(tmp_path):
    planned = planned_runs(SMALL_CPU, options_in(tmp_path))
    assert all(each.kept.parents[1] == tmp_path / "results" / "small_cpu" for each in planned)
    names = {each.job.experiment.name.partition("+")[0] for each in planned}
    assert names == {
        *(f"{model}_cifar10" for model in ("v1", "v2", "v2_softmax", "v3", "vit_tiny")),
        "bdh_unet",
        "resnet34_unet",
    }


def test_the_work_of_a_training():
    v2 = training_flop(experiment_of("train_v2_cifar10.py", ""))
    assert v2 == pytest.approx(9.2e9 * 40_000 * 50, rel=0.01)
    assert training_flop(experiment_of("train_v2_cifar10.py", "--epochs 5 --train-limit 5000")) == pytest.approx(
        v2 / 100
    )
    # a softmax adds no products
    assert training_flop(experiment_of("train_v2_softmax_cifar10.py", "")) == pytest.approx(v2, rel=0.01)
    unet = training_flop(experiment_of("train_bdh_unet.py", "--img-size 96"))
    assert training_flop(experiment_of("train_bdh_unet.py", "--img-size 96 --train-limit 36")) == pytest.approx(
        unet * 36 / 367
    )


# ---------------------------------------------------------------------------- time


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("model name: X\nflags\t\t: fpu avx512f avx512_bf16", True),
        ("flags: amx_bf16 amx_tile", True),
        ("processor: 0\nFeatures\t: fp asimd bf16 i8mm", True),  # ARM
        ("flags: avx512f", False),
        (None, False),
    ],
)
def test_bf16_is_read_from_the_flags_of_the_cpu(flags, expected, tmp_path, monkeypatch):
    """A CPU that is known to have none is named to the user."""
    monkeypatch.setattr(device, "Path", lambda name: tmp_path / name.strip("/").replace("/", "_"))
    device._cpu_info.cache_clear()
    if flags is not None:
        (tmp_path / "proc_cpuinfo").write_text(flags)
    assert device.has_fast_bf16(torch.device("cpu")) == expected
    said = []
    for precision in ("float32", "tf32", "bf16", "fp16"):
        device.warn_of_precision(precision, torch.device("cpu"), said.append)
    assert len(said) == 1 + (flags is not None and not expected)  # fp16 is slow on every CPU
    device._cpu_info.cache_clear()


def test_an_epoch_is_its_steps_and_the_validation():
    """40,000 training images, and 10,000 of validation that take a third of the time each."""
    minutes = epoch_minutes(experiment_of("train_v2_cifar10.py", ""), step_seconds=0.6)
    assert minutes == pytest.approx((40_000 + 10_000 / 3) / 32 * 0.6 / 60, rel=1e-3)
    unet = experiment_of("train_bdh_unet.py", "--img-size 32 --patch-size 8 --n-layer 1 --n-embd 8 --n-head 2")
    assert epoch_minutes(unet, step_seconds=0.6) == pytest.approx((367 + 92 / 3) / 4 * 0.6 / 60, rel=1e-2)
    for tiny in (experiment_of("train_v2_cifar10.py", f"{TINY} --precision float32"), unet):
        assert plans.measure_step(tiny, seconds=0.0) > 0


def test_runs_that_fit_come_first_and_longer_ones_if_an_epoch_fits(tmp_path):
    """A 50-epoch run of 90 epochs' time left over, one of them half done, and one whose epoch is too long."""
    planned = planned_runs(FULL_CPU, options_in(tmp_path, only="cifar10+"))[:3]  # ten epochs each
    names = [each.job.experiment.name for each in planned]
    epoch = dict(zip((each.job.label for each in planned), (30.0, 2.0, 4.0), strict=True))

    def chosen(budget, jobs=1):
        runs = reproduce.choose_runs(planned, epoch, budget, jobs)
        return [names.index(each.job.experiment.name) for each in runs]

    assert chosen(1000) == [0, 1, 2]
    assert chosen(70) == [1, 2]  # 10 minutes are left over
    assert chosen(90) == [1, 2, 0]
    assert chosen(21) == [1]
    assert chosen(160, jobs=2) == [1, 2, 0]  # the first takes 300 minutes, however many run beside it
    folder = planned[2].job.experiment.folder
    columns = {"train_loss": [0.5] * 9}
    write_run(folder, "train_v1_cifar10.py", "--epochs 10", finished=False, columns=columns)
    assert chosen(24) == [1, 2]


def test_what_a_run_starts_from_is_made_even_if_its_result_is_kept(tmp_path):
    planned = planned_runs(plans.PUBLISHED, options_in(tmp_path))
    runs = {each.job.label: each for each in planned}
    todo = {label: runs[label] for label in ("bdh_unet_finetune, seed 1", "v1_cifar10, seed 0")}
    expected = ["v1_cifar10, seed 0", "bdh_unet, seed 1", "bdh_unet_finetune, seed 1"]
    assert list(reproduce.add_sources(todo, planned)) == expected


def test_estimates_are_listed_and_decide_within_a_budget(tmp_path, monkeypatch, capsys):
    """Each model, batch size and precision is measured once."""
    measured = []
    monkeypatch.setattr(reproduce, "measure_step", lambda experiment: measured.append(experiment.name) or 0.06)
    monkeypatch.setattr(reproduce, "tune_cpu_allocator", lambda: True)
    monkeypatch.setattr(reproduce, "run_jobs", lambda jobs, *_, **__: ran.extend(jobs) or Outcome())
    ran, options = [], dict(plan="full_cpu", only="tiny", precision="bf16")
    main(options_in(tmp_path, **options, list=True))
    shown = capsys.readouterr().out
    assert len(measured) == 2 and "precision bf16 (--precision)" in shown and "0.060 s a step of 32 images" in shown
    minutes = epoch_minutes(experiment_of("train_vit_tiny_cifar10.py", ""), 0.06)
    assert f" {10 * minutes:.0f} " in shown and f" {50 * minutes:.0f} " in shown
    main(options_in(tmp_path, **options, budget_minutes=25 * minutes))
    assert [job.experiment.train.epochs for job in ran[:2]] == [10, 10] and len(ran) == 7
    assert "runs left" not in capsys.readouterr().out
    ran.clear()
    main(options_in(tmp_path, **options, budget_minutes=10.5 * minutes))
    assert [job.experiment.name.partition("+")[0] for job in ran] == ["vit_tiny_cifar10"]
    assert "6 runs left; the same command continues with deit_tiny_cifar100" in capsys.readouterr().out


# ---------------------------------------------------------------------------- carried out


@pytest.fixture
def small_plan(monkeypatch):
    """Two seeds of a tiny model, and between them a run that cannot start."""
    plan = Plan(
        "small_cpu",
        [
            Part("does it run?", [Entry("train_v2_cifar10.py", TINY)]),
            Part("does it fail?", [Entry("train_v1_cifar10.py", f"{TINY} --start-from nowhere.pt")]),
            Part("does it go on?", [Entry("train_v2_cifar10.py", TINY, (0, 1))]),
        ],
    )
    monkeypatch.setitem(reproduce.PLANS, "small_cpu", plan)
    return plan


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()
    }


def test_a_plan_carried_out(small_plan, data_dir, tmp_path, capsys):
    """The failing run is reported and stops nothing; small files are kept; complete runs are not made again."""
    options = options_in(tmp_path, plan="small_cpu", data_dir=data_dir, jobs=2)
    with pytest.raises(SystemExit) as end:
        main(options)
    shown = capsys.readouterr()
    assert end.value.code == 1 and "nowhere.pt" in shown.err and "v1_cifar10" in shown.err
    results, runs = tmp_path / "results" / "small_cpu", tmp_path / "runs"
    (name,) = (path.name for path in results.iterdir())
    assert name.startswith("v2_cifar10+epochs=2+")
    names = {f"{name}/seed{seed}/{file}" for seed in (0, 1) for file in SMALL_FILES}
    assert files_of(results).keys() == names
    assert all((results / each).read_bytes() == (runs / each).read_bytes() for each in names)

    shutil.rmtree(results)
    before, only = files_of(runs), options_in(tmp_path, plan="small_cpu", data_dir=data_dir, only="v2")
    main(only)
    assert files_of(runs) == before and files_of(results).keys() == names

    shutil.rmtree(runs)
    kept = files_of(results)
    main(only)
    assert "2 runs in the plan, 2 already in" in capsys.readouterr().out
    assert files_of(results) == kept and not runs.exists()

    main(options_in(tmp_path, plan="small_cpu", list=True))
    shown = capsys.readouterr().out
    assert shown.count("kept") == 2 and "does it fail?" in shown


@pytest.mark.parametrize(
    ("damage", "words"),
    [(False, "another configuration (n_layer: 3 -> 1): move it away"), (True, "summary.json cannot be read")],
)
def test_kept_files_that_are_not_this_run_are_named_and_the_rest_goes_on(damage, words, small_plan, tmp_path, capsys):
    options = options_in(tmp_path, plan="small_cpu", only="v2", budget_minutes=1e-6)
    kept = planned_runs(small_plan, options)[0].kept
    write_run(kept, "train_v2_cifar10.py", TINY, n_layer=3, qk=...)  # qk: a field younger than the run
    if damage:
        (kept / "summary.json").write_text("{")
    with pytest.raises(SystemExit):
        main(options)
    shown = capsys.readouterr()
    assert words in shown.err and "1 runs left" in shown.out
    main(options_in(tmp_path, plan="small_cpu", only="v2", list=True))
    assert "other or" in capsys.readouterr().out


def test_an_exported_folder_without_metrics_does_not_stand_for_the_run(small_plan, tmp_path, capsys):
    options = options_in(tmp_path, list=True)
    planned = planned_runs(small_plan, options)[0]
    write_run(planned.kept, "train_v2_cifar10.py", TINY)
    assert planned.is_kept()
    (planned.kept / "metrics.csv").unlink()
    assert not planned.is_kept() and reproduce.state_of(planned) == ("", "")


@pytest.mark.parametrize("name", SMALL_FILES)
@pytest.mark.parametrize("lost", [False, True])
def test_a_damaged_file_of_a_complete_run_is_named_and_not_kept(name, lost, small_plan, tmp_path):
    """No checkpoint is there that metrics.csv could be restored from."""
    planned = planned_runs(small_plan, options_in(tmp_path))[0]
    folder = planned.job.experiment.folder
    write_run(folder, "train_v2_cifar10.py", TINY)
    content = (folder / name).read_text()
    (folder / name).unlink() if lost else (folder / name).write_text(content[: len(content) // 2])
    with pytest.raises(UserError, match=re.escape(f"{folder / name} ")):
        planned.keep()
    assert not planned.kept.exists()


def test_kept_metrics_that_have_lost_rows_are_named(small_plan, tmp_path):
    planned = planned_runs(small_plan, options_in(tmp_path))[0]
    write_run(planned.kept, "train_v2_cifar10.py", TINY)
    path = planned.kept / "metrics.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match=re.escape(f"{path} has lost rows: restore it, or move the folder away")):
        planned.is_kept()


def test_a_run_that_cannot_be_read_is_listed_as_not_started(small_plan, tmp_path, capsys):
    options = options_in(tmp_path, plan="small_cpu", only="v2", list=True)
    folder = planned_runs(small_plan, options)[0].job.experiment.folder
    write_run(folder, "train_v2_cifar10.py", TINY, finished=False)
    main(options)
    assert "epoch 2 of 2" in capsys.readouterr().out
    (folder / "metrics.csv").write_text("epoch\n")
    main(options)
    shown = capsys.readouterr()
    assert "epoch 2 of 2" not in shown.out and f"{folder} is left out" in shown.err


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--jobs", "0"], 2, "jobs = 0 must be at least 1"),
        (["--budget-minutes", "-1"], 2, "must be above 0"),
        (["--plan", "small"], 2, "small"),
        (["--only", "v9"], 1, "--only v9: no experiment"),
    ],
)
def test_wrong_flags_are_refused_with_a_message(flags, code, words, call_script, capsys):
    assert call_script("reproduce.py", *flags) == code
    shown = capsys.readouterr()
    assert words in shown.err + shown.out
