"""Published rows and made-up results: which runs count, the interval, every verdict, the text of CLAIMS.md."""

import dataclasses
import math

import numpy as np
import pytest

import training
from training import UserError
from analysis import published as rows
from analysis.claims import HOW, NOTES, README, RESULTS_PAGE, claims_markdown
from analysis.published import (
    ABOVE,
    BELOW,
    NOT_COMPARABLE,
    NOT_RUN,
    REPRODUCED,
    TOO_FEW,
    claims_of,
    mismatches,
    prediction_interval,
    read_published,
    read_results,
)
from analysis.reading import read_run
from models.vision_bdh import v1_config, v2_as_run_config, v2_config, v2_softmax_config, v3_config
from tests.claimed_runs import GPU, T_975, published, write_run, write_seeds
from training.command_line import experiment_of
from training.launch import launch

NAMES = {  # experiments here by document and published name, as this repository's scripts call them
    ("spec_current", "v2_softmax"): ["v2_softmax_cifar10", "v2_softmax_cifar10+residual=post+warmup_steps=1000"],
    ("spec_current", "v1"): ["v1_cifar10"],
    ("spec_current", "v3_scaled_ln"): ["v3_cifar10", "v3_cifar10+warmup_steps=1000"],
    ("spec_current", "resnet20"): ["resnet20_cifar100"],
    ("spec_current", "efficientnet_b0"): ["efficientnet_cifar100"],
    ("spec_current", "deit_tiny"): ["deit_tiny_cifar100"],
    ("spec_current", "mobilenetv2"): ["mobilenetv2_cifar100"],
    ("spec_current", "bdh_unet"): ["bdh_unet"],
    ("spec_current", "bdh_unet_finetune"): ["bdh_unet_finetune"],
    ("spec_current", "resnet34_unet_pretrained"): ["resnet34_unet"],
    ("spec_current", "resnet50_unet_pretrained"): ["resnet50_unet"],
    ("spec_current", "resnet34_unet_scratch"): ["resnet34_unet+encoder_weights=none+epochs=80"],
    ("spec_current", "resnet50_scratch_literature"): [],
    ("spec_first", "v1_mlp32"): ["v1_cifar10+epochs=10"],
    ("spec_first", "v1_mlp128"): ["v1_cifar10+epochs=10+mlp_internal_dim_multiplier=128"],
    ("spec_first", "v1_mlp4"): ["v1_cifar10+epochs=10+mlp_internal_dim_multiplier=4"],
    ("spec_first", "vit_tiny"): ["vit_tiny_cifar10+epochs=10"],
}
V2 = "train_v2_cifar10.py"
AS_RUN = "--residual post --warmup-steps 1000"


@pytest.fixture
def results(tmp_path):
    """An empty folder of results."""
    (tmp_path / "results").mkdir()
    return tmp_path / "results"


def claims_in(results, name, source="spec_current", dataset=None):
    """The claims on one published row beside the runs there."""
    runs = [run for run in read_results(results) if not rows.is_small(run, results)]
    return claims_of(runs, [published(name, source, dataset)])


def lines_of(results, name):
    """Cells of the lines of CLAIMS.md that begin with that name."""
    text = claims_markdown(read_results(results), results)[1]
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(f"| {name}")]


# ---------------------------------------------------------------------------- the published rows


def test_every_row_names_what_there_is():
    lines = read_published()
    assert len(lines) == 21 and len({(line.source, line.experiment, line.dataset) for line in lines}) == 21
    named = set()
    for line in lines:
        assert line.kind in ("measured", *rows.OTHER_KINDS) and line.unit == "%"
        assert line.kind != "measured" or 30 < float(line.value) < 82
        assert line.metric in ("test_accuracy", "best_val_miou") or not line.script
        named |= set(line.not_comparable.split()) | set(line.remarks.split())
    assert named == set(NOTES)


def test_rows_are_repeated_by_the_scripts_that_bear_their_names():
    for line in read_published():
        names = [experiment_of(line.script, flags).name for _, flags in line.settings if flags is not None]
        v2 = [f"v2_{line.dataset}", f"v2_{line.dataset}+residual=post+warmup_steps=1000"]
        expected = {"v2_raw": v2, "vit_tiny": [f"vit_tiny_{line.dataset}"]}.get(line.experiment)
        assert names == NAMES.get((line.source, line.experiment), expected)


def test_scripts_and_flags_ask_for_what_was_published():
    for line in read_published():
        for _, flags in line.settings:
            if flags is not None:
                train = experiment_of(line.script, flags).train
                assert (train.dataset, train.epochs, train.seed) == (line.dataset, int(line.epochs), 0)


@pytest.mark.parametrize(
    ("name", "documented", "as_run"),
    [
        ("v2_raw", v2_config(), v2_as_run_config()),
        ("v2_softmax", v2_softmax_config(), v2_as_run_config(attention="softmax")),
        ("v3_scaled_ln", v3_config(), v3_config()),
    ],
)
def test_what_the_published_code_did_stands_beside_what_is_documented(name, documented, as_run):
    line = published(name, dataset="cifar10")
    asked = [experiment_of(line.script, flags) for _, flags in line.settings]
    assert [each.model for each in asked] == [documented, as_run]
    assert [each.train.warmup_steps for each in asked] == [500, 1000]


def test_a_script_is_asked_and_not_run(monkeypatch):
    assert experiment_of("train_v1_cifar10.py", "--epochs 10").model == v1_config()
    assert training.launch is launch


# ---------------------------------------------------------------------------- the interval


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_the_interval_is_the_formula(n):
    values = np.random.default_rng(n).normal(0.8, 0.01, n)
    mean = sum(values) / n
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    half = T_975[n] * deviation * math.sqrt(1 + 1 / n)
    assert prediction_interval(values) == pytest.approx((mean - half, mean + half), rel=1e-8)


@pytest.mark.parametrize("n", [3, 5])
def test_a_further_run_falls_into_the_interval_as_often_as_it_says(n):
    draws = np.random.default_rng(n).normal(0.8, 0.01, (4000, n + 1))
    held = [low < new < high for *seeds, new in draws for low, high in [prediction_interval(seeds)]]
    assert np.mean(held) == pytest.approx(0.95, abs=0.014)  # four standard deviations of 4,000 draws


def test_the_text_says_how_wide_it_is_for_three_seeds():
    _, high = prediction_interval([-1.0, 0.0, 1.0])  # deviation 1
    assert f"m ± {high:.1f} s" in HOW


# ---------------------------------------------------------------------------- verdicts

HALF = T_975[3] * 0.001 * math.sqrt(4 / 3)  # of three results that are 0.001 apart


@pytest.mark.parametrize(
    ("tests", "verdict"),
    [
        ([], NOT_RUN),
        ([0.8173], TOO_FEW),
        ([0.8173, 0.8174], TOO_FEW),
        ([0.816, 0.817, 0.818], REPRODUCED),
        ([0.8173 - HALF + shift for shift in (-0.00099, 0.00001, 0.00101)], REPRODUCED),
        ([0.8173 - HALF + shift for shift in (-0.00101, -0.00001, 0.00099)], BELOW),
        ([0.8173 + HALF + shift for shift in (-0.00099, 0.00001, 0.00101)], ABOVE),
        ([0.8173 + HALF + shift for shift in (-0.00101, -0.00001, 0.00099)], REPRODUCED),
    ],
)
def test_verdicts(results, tests, verdict):
    write_seeds(results, tests)
    documented, as_run = claims_in(results, "v2_raw", dataset="cifar10")
    assert documented.verdict == verdict and len(documented.values) == len(tests)
    assert as_run.verdict == NOT_RUN


def test_the_code_that_ran_has_a_verdict_of_its_own(results):
    write_seeds(results, [0.80, 0.801, 0.802])
    write_seeds(results, [0.816, 0.817, 0.818], flags=AS_RUN)
    documented, as_run = claims_in(results, "v2_raw", dataset="cifar10")
    assert (documented.verdict, as_run.verdict) == (BELOW, REPRODUCED)


def test_what_cannot_be_compared_shows_what_was_measured_both_ways(results):
    """The best by batches is not at the best epoch by one matrix."""
    for seed, shift in enumerate((0.0, 0.01, 0.02)):
        by_batches, standard = np.linspace(0.6, 0.3, 80), np.linspace(0.2, 0.5, 80)
        columns = {"val_miou": standard + shift, "val_miou_batch": by_batches - shift}
        write_run(results / "bdh_unet" / f"seed{seed}", "train_bdh_unet.py", seed=seed, columns=columns)
    (claim,) = claims_in(results, "bdh_unet")
    assert claim.verdict == NOT_COMPARABLE and claim.interval is None
    assert sorted(claim.values) == pytest.approx([0.58, 0.59, 0.60])
    cells = lines_of(results, "bdh_unet |")[0]
    assert cells[3:7] == ["53.17", "59.00 ± 1.00", "51.00 ± 1.00", "3"]
    reasons = [NOTES[name] for name in ("labels", "configuration", "rotary")]
    numbers = cells[8].removeprefix("not comparable (").removesuffix(")").split(", ")
    assert [list(NOTES.values())[int(number) - 1] for number in numbers] == reasons


@pytest.mark.parametrize(
    ("name", "source", "kind"),
    [("v1_mlp4", "spec_first", "estimate"), ("resnet50_scratch_literature", "spec_current", "literature")],
)
def test_what_nobody_measured_gets_no_verdict(results, name, source, kind):
    flags = "--epochs 10 --mlp-internal-dim-multiplier 4"
    write_seeds(results, [0.59, 0.60, 0.61], "train_v1_cifar10.py", flags)
    (claim,) = claims_in(results, name, source)
    assert claim.verdict == kind and claim.interval is None
    assert list(claim.values) == ([0.59, 0.60, 0.61] if kind == "estimate" else [])


# ---------------------------------------------------------------------------- which runs count


@pytest.mark.parametrize(
    "changed",
    [
        dict(epochs=49),
        dict(n_layer=5),
        dict(dropout=0.0),
        dict(batch_size=16, grad_accum=2),
        dict(learning_rate=2e-4),
        dict(train_limit=30_000),
        dict(warmup_steps=1000),
        dict(residual="post"),
        dict(residual=...),  # an older run without the field has the class's default, v1's
        dict(images=(39_999, 10_000, 10_000)),
        dict(images=(40_000, 10_000, 9_999)),
        dict(images=(None, None, None)),
        dict(dataset="cifar100"),
        dict(finished=False),
    ],
    ids=str,
)
def test_another_protocol_does_not_count_under_any_name(results, changed):
    write_seeds(results, [0.816, 0.817, 0.818], name="v2_cifar10", **changed)
    documented, as_run = claims_in(results, "v2_raw", dataset="cifar10")
    assert (documented.verdict, as_run.verdict) == (NOT_RUN, NOT_RUN)


@pytest.mark.parametrize("key", ["model_class", "data"])
def test_another_model_or_other_data_do_not_count(results, key):
    run = read_run(write_run(results / "v2_cifar10" / "seed0", V2))
    line = published("v2_raw", dataset="cifar10")
    assert mismatches(run, line, experiment_of(V2, "")) == []
    other = dataclasses.replace(run, config=run.config | {key: {"name": "digits"} if key == "data" else "ViTConfig"})
    reasons = mismatches(other, line, experiment_of(V2, ""))
    assert any(reason.startswith(key) for reason in reasons)


@pytest.mark.parametrize(
    "script, sync_batchnorm, counts",
    [("train_resnet20_cifar100.py", False, False), ("train_resnet20_cifar100.py", True, True), (V2, False, True)],
)
def test_several_processes_count_if_batchnorm_sees_the_whole_batch(script, sync_batchnorm, counts, results):
    run = read_run(write_run(results / "several" / "seed0", script))
    run.config["hardware"]["processes"] = 4
    run.train["sync_batchnorm"] = sync_batchnorm
    name, dataset = ("v2_raw", "cifar10") if script == V2 else ("resnet20", "cifar100")
    reasons = mismatches(run, published(name, dataset=dataset), experiment_of(script, ""))
    assert reasons == ([] if counts else ["BatchNorm saw shares of the batch (several processes)"])


def test_a_run_that_went_on_in_several_processes_is_one_of_several(results):
    run = read_run(write_run(results / "several" / "seed0", "train_resnet20_cifar100.py"))
    run.config["resumed_on"] = [run.config["hardware"] | {"processes": 4}]
    assert run.normalised_shares


def test_a_script_that_was_changed_makes_no_reproductions(results):
    """The run agrees with the script of today, and not with what was published."""
    run = read_run(write_run(results / "v2_cifar10" / "seed0", V2, "--epochs 5"))
    reasons = mismatches(run, published("v2_raw", dataset="cifar10"), experiment_of(V2, "--epochs 5"))
    assert reasons == ["epochs is 5, not 50", "epochs done is 5, not 50"]


def test_small_runs_never_count(results):
    for folder in ("small_cpu", "ablation_small_cpu/deeper", "v2_cifar10_small_cpu"):
        write_seeds(results / folder, [0.816, 0.817, 0.818])
    for root in (results, results / "small_cpu"):
        (documented, _) = claims_in(root, "v2_raw", dataset="cifar10")
        assert documented.verdict == NOT_RUN
        assert all(claim.row is None for claim in claims_markdown(read_results(root), root)[0])


def test_a_run_counts_by_what_it_is_and_a_copy_is_no_further_seed(results, capsys):
    write_seeds(results, [0.816, 0.817])
    write_run(results / "mine" / "seed2", V2, seed=2, test=0.818, name="mine")
    write_run(results / "copy" / "seed1", V2, seed=1, test=0.817, name="copy")
    (documented, _) = claims_in(results, "v2_raw", dataset="cifar10")
    assert documented.verdict == REPRODUCED and sorted(documented.values) == [0.816, 0.817, 0.818]
    assert "is left out: same seed and fields as" in capsys.readouterr().err


def test_a_field_younger_than_the_run_has_its_default(results):
    write_seeds(results, [0.816, 0.817, 0.818], rotary=..., start_from=..., pool=...)
    assert claims_in(results, "v2_raw", dataset="cifar10")[0].verdict == REPRODUCED


def test_precision_and_compile_may_differ_and_have_lines_of_their_own(results):
    write_seeds(results, [0.816, 0.817, 0.818], flags="--precision bf16")
    (only, _) = claims_in(results, "v2_raw", dataset="cifar10")
    assert (only.verdict, only.experiment) == (REPRODUCED, "`v2_cifar10`")
    write_seeds(results, [0.70, 0.701], flags="--compile")
    lines = {claim.experiment: claim.verdict for claim in claims_in(results, "v2_raw", dataset="cifar10")}
    assert lines == {
        "`v2_cifar10` (compile=False, precision=bf16)": REPRODUCED,
        "`v2_cifar10` (compile=True, precision=tf32)": TOO_FEW,
        "`v2_cifar10+residual=post+warmup_steps=1000`": NOT_RUN,
    }


@pytest.mark.parametrize(
    ("start", "counts"),
    [
        ("bdh_unet-seed0-best.pt", True),
        ("bdh_unet-seed12-best.pt", True),
        ("bdh_unet+precision=bf16-seed1-best.pt", True),
        ("bdh_unet+epochs=16+img_size=128-seed0-best.pt", False),
        ("bdh_unet-seed0-last.pt", False),
        (None, False),
    ],
)
def test_fine_tuning_has_to_start_from_the_published_configuration(results, start, counts):
    write_run(results / "bdh_unet_finetune" / "seed0", "finetune_bdh_unet.py", start_from=start)
    (claim,) = claims_in(results, "bdh_unet_finetune")
    assert len(claim.values) == counts


def test_a_segmentation_run_without_the_mean_over_batches_is_named_and_left_out(results):
    folder = write_run(results / "bdh_unet" / "seed0", "train_bdh_unet.py")
    table = (folder / "metrics.csv").read_text().replace("val_miou_batch", "val_miou_other")
    (folder / "metrics.csv").write_text(table)
    assert len(claims_in(results, "bdh_unet")[0].values) == 0
    assert "`bdh_unet/seed0`: metrics.csv has no val_miou_batch" in claims_markdown(read_results(results), results)[1]


# ---------------------------------------------------------------------------- CLAIMS.md


def test_the_table_shows_numbers_protocol_and_verdict(results):
    write_seeds(results, [0.816, 0.818, 0.820])
    write_run(results / "v1_cifar10" / "seed0", "train_v1_cifar10.py", test=0.8, precision="bf16")
    cpu = {"device": "cpu", "name": "CPU Y", "threads": 2}
    write_seeds(results, [0.7] * 2, "train_vit_tiny_cifar10.py", hardware=cpu)
    documented, as_run = lines_of(results, "v2_raw, as")[:2]
    half = 100 * T_975[3] * 0.002 * math.sqrt(4 / 3)
    interval = f"{81.8 - half:.2f} to {81.8 + half:.2f}"
    assert documented[1:8] == ["`v2_cifar10`", "50", "81.73", "81.80 ± 0.20", "3", interval, REPRODUCED]
    assert as_run[4:8] == ["–", "0", "–", NOT_RUN]  # noqa: RUF001
    assert lines_of(results, "v1 |")[0][4:8] == ["80.00", "1", "–", TOO_FEW]  # noqa: RUF001
    protocol = [line[1:] for line in (lines_of(results, f"`{name}_cifar10` |")[0] for name in ("v2", "v1", "vit_tiny"))]
    assert protocol[0] == ["50", "40,000", "tf32", GPU["name"], "3,562,570", "3.2M"]
    assert protocol[1][2:4] == ["bf16", GPU["name"]]
    assert protocol[2][2:4] == ["float32", "CPU Y, 2 threads"]  # tf32 is float32 there


def test_a_run_under_a_wrong_name_is_told(results):
    write_run(results / "v1_cifar10" / "seed0", "train_v1_cifar10.py", "--epochs 5", name="v1_cifar10")
    assert (
        "- `v1_cifar10/seed0`: epochs is 5, not 50; epochs done is 5, not 50\n"
        in claims_markdown(read_results(results), results)[1]
    )
    write_run(results / "v1_cifar10" / "seed1", "train_v1_cifar10.py", seed=1)
    assert "v1_cifar10/seed1" not in claims_markdown(read_results(results), results)[1]


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere is no folder"):
        claims_markdown(read_results(tmp_path / "nowhere"), tmp_path / "nowhere")


def test_only_the_claims_can_be_written_elsewhere(results, tmp_path, call_script, capsys):
    write_seeds(results, [0.7, 0.701, 0.702])
    where = ["--results-dir", results, "--output", tmp_path / "c.md"]
    assert call_script("analysis/claims.py", *where) == 0
    assert f"| {BELOW} |" in (tmp_path / "c.md").read_text() and not (results / "CLAIMS.md").exists()
    assert call_script("analysis/claims.py", *where, "--check") == 0
    assert call_script("analysis/claims.py", "--results-dir", tmp_path / "nowhere") == 1
    assert "--results-dir" in capsys.readouterr().err


def test_the_pages_of_the_repository_are_not_filled_from_another_folder(results, tmp_path, call_script, capsys):
    before = [path.read_bytes() for path in (README, RESULTS_PAGE)]
    (tmp_path / "empty").mkdir()
    assert call_script("analysis/claims.py", "--results-dir", tmp_path / "empty", "--output", tmp_path / "c.md") == 1
    assert "holds no finished run" in capsys.readouterr().err and not (tmp_path / "c.md").exists()
    write_seeds(results, [0.7])
    where = ["--results-dir", results, "--check"]  # --check, so that a failing test changes nothing
    for flags in ([], ["--readme", tmp_path / "README.md"]):
        assert call_script("analysis/claims.py", *where, *flags) == 1
        assert "give --output FILE" in capsys.readouterr().err
    assert [path.read_bytes() for path in (README, RESULTS_PAGE)] == before
