"""Every train_*.py as a user runs it: tiny, from another folder, and what its command line says and refuses."""

import ast
import csv
import dataclasses
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import training
from training import ClassificationConfig
from models.baselines import (
    DeiTTinyConfig,
    EfficientNetB0Config,
    MobileNetV2Config,
    ResNet20Config,
    ViTConfig,
)
from models.vision_bdh import VisionBDHConfig, v1_config, v2_config, v2_softmax_config, v3_config
from training.runs import load_file, load_model

ROOT = Path(__file__).resolve().parents[1]
TESTED_ELSEWHERE = {"train_ablation.py", "train_bdh_text.py"}
SCRIPTS = sorted({path.name for path in ROOT.glob("train_*.py")} - TESTED_ELSEWHERE)
SCRIPTS = [script for script in SCRIPTS if not script.endswith("_unet.py")]  # in test_segmentation_scripts.py
VIT, QUICKSTART = "train_vit_tiny_cifar10.py", "train_quickstart.py"
BDH_SCRIPTS = [script for script in SCRIPTS if re.match(r"train_v\d_", script)]
VITS = [VIT, "train_vit_tiny_cifar100.py"]
WITH_SETTINGS = [f"train_{model}_cifar100.py" for model in ("deit_tiny", "mobilenetv2", "efficientnet")]
FIXED_SIZE = ["train_resnet20_cifar100.py", *WITH_SETTINGS]  # models that no flag makes small

IMPORTS_SEEN = "train_v1_cifar10.py"

TINY = "--epochs 1 --patch-size 8 --n-layer 1 --n-embd 8 --n-head 2".split()
TINY_OF = {
    **{script: [*TINY, "--mlp-internal-dim-multiplier", "4"] for script in BDH_SCRIPTS},
    **{script: [*TINY, "--mlp-dim", "16"] for script in VITS},
    **{script: "--epochs 1 --train-limit 160".split() for script in FIXED_SIZE},
    QUICKSTART: "--epochs 1 --n-layer 1 --train-limit 200".split(),
}
FILES = {"config.json", "metrics.csv", "last.pt", "previous.pt", "best.pt", "summary.json", "split.npz"}


def experiment_of(script):
    return script.removeprefix("train_").removesuffix(".py")


@pytest.fixture(scope="module")
def processes(run_script, data_dir, tmp_path_factory):
    """Everything here that has to be a process of its own, two at a time: results by script, and the folder of runs."""
    runs, elsewhere = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("elsewhere")
    where = ["--data-dir", data_dir, "--runs-dir", runs, "--device", "cpu"]
    tasks = {script: [ROOT / script, *TINY_OF[script], *where] for script in SCRIPTS}
    tasks[IMPORTS_SEEN] = ["-X", "importtime", *tasks[IMPORTS_SEEN]]  # every import is a line on stderr
    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(tasks, pool.map(lambda args: run_script(*args, cwd=elsewhere), tasks.values()), strict=True))
    assert list(elsewhere.iterdir()) == []
    return results, runs


# ---------------------------------------------------------------------------- as a user runs them


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs_from_another_folder_and_writes_its_run(script, processes):
    results, runs = processes
    result = results[script]
    assert result.returncode == 0, result.stderr
    (folder,) = runs.glob(f"{experiment_of(script)}+*/seed0")
    names = {path.name for path in folder.iterdir()}
    assert names >= FILES if script == QUICKSTART else names == FILES  # the quickstart draws pictures beside them
    assert str(folder) in result.stdout
    config = json.loads((folder / "config.json").read_text())
    assert config["experiment"] == folder.parent.name and config["config"]["train"]["epochs"] == 1
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["test"]) == {"loss", "accuracy"} and summary["best"]["epoch"] == 1
    assert f"{summary['test']['accuracy']:.2%}" in result.stdout
    with (folder / "metrics.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1"]
    assert load_file(folder / "last.pt")["epoch"] == 1 and load_file(folder / "previous.pt")["epoch"] == 0
    model, _ = load_model(folder)
    assert sum(p.numel() for p in model.parameters()) == summary["parameters"]


def test_the_quickstart_draws_its_curve_and_its_attention(processes):
    results, runs = processes
    pictures = re.findall(r": +(/.*\.(?:png|svg|pdf))$", results[QUICKSTART].stdout, re.MULTILINE)
    assert len(pictures) == 2
    for picture in map(Path, pictures):
        assert picture.stat().st_size > 1000 and runs in picture.parents


def test_training_imports_nothing_that_only_analysis_needs(processes):
    results, _ = processes
    lines = [line for line in results[IMPORTS_SEEN].stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
    assert {"torch", "training", "models"} < imported
    unneeded = {"matplotlib", "pandas", "sklearn", "tensorboard", "wandb", "timm", "analysis", "interpretability"}
    unneeded |= {"albumentations", "cv2", "segmentation_models_pytorch"}
    assert not imported & unneeded


# ---------------------------------------------------------------------------- the command line


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_field_with_its_default(script, call_script, captured_launch, monkeypatch, capsys):
    _, model, train = captured_launch(script)
    monkeypatch.setenv("COLUMNS", "100")  # one column of flags
    assert call_script(script, "--help") == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for config in (model, train):
        for field in dataclasses.fields(config):
            flag, value = "--" + field.name.replace("_", "-"), getattr(config, field.name)
            # from the flag to the default, with no other flag between but its own negation
            entry = re.search(rf" {flag}[ ,](?:(?! --(?!no-)[a-z]).)*?\(default: ([^)]*)\)", shown)
            assert entry, f"{flag} is not shown with a default"
            assert entry[1] == str(value), f"{flag}: {entry[1]}"
    for flag in ("--name", "--resume", "--overwrite", "--device", "--data-dir", "--runs-dir", "--tensorboard"):
        assert flag in shown


@pytest.mark.parametrize(
    "script, flags, word",
    [
        *((script, "--epoch 5", "--epochs") for script in SCRIPTS),
        (VIT, "--attention softmax", "attention"),  # it concerns another model
        (VIT, "--in-channels 1", "in-channels"),
        ("train_resnet20_cifar100.py", "--setting fitted", "setting"),  # it has one only
        ("train_deit_tiny_cifar100.py", "--patch-size 4", "patch-size"),  # the setting decides
        *((script, "--setting fited", "fitted") for script in WITH_SETTINGS),
        ("train_deit_tiny_cifar100.py", "--img-size 40", "not a multiple of 16"),
        ("train_efficientnet_cifar100.py", "--stochastic-depth-prob 1", "stochastic_depth_prob = 1.0"),
        ("train_v2_cifar10.py", "--attention sofmax", "softmax"),
        ("train_v2_cifar10.py", "--vocab-size 10", "vocab-size"),
        ("train_v2_cifar10.py", "--epochs five", "epochs"),
        ("train_v2_cifar10.py", "--dataset camvid", "cifar10"),
        ("train_v2_cifar10.py", "--n_layer many", "n-layer"),
    ],
)
def test_a_wrong_flag_is_refused_with_a_hint(script, flags, word, call_script, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")  # a narrow box breaks words at their hyphens
    assert call_script(script, *flags.split(), "--runs-dir", tmp_path / "runs") == 2
    captured = capsys.readouterr()
    assert word in captured.out + captured.err
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def fitted(monkeypatch):
    """Replaces fit(): nothing is trained; returns the list of experiments that were asked for."""
    asked = []

    def fit(experiment):
        asked.append(experiment)
        best = {"epoch": 1, "val_loss": 1.0, "val_accuracy": 0.5}
        return {"test": {"loss": 1.0, "accuracy": 0.5}, "best": best, "parameters": 1}

    monkeypatch.setitem(training.launch.__globals__, "fit", fit)
    return asked


@pytest.mark.parametrize("script", BDH_SCRIPTS)
def test_an_ablation_is_a_flag(script, call_script, fitted):
    assert call_script(script, "--attention", "softmax", "--no-update-norm", "--residual", "true_pre") == 0
    (experiment,) = fitted
    assert (experiment.model.attention, experiment.model.update_norm) == ("softmax", False)
    assert experiment.model.residual == "true_pre"
    assert experiment.train.epochs == 50


@pytest.mark.parametrize(
    "script, flags, name",
    [
        ("train_v2_cifar10.py", "", "v2_cifar10"),
        ("train_v2_cifar10.py", "--epochs 1 --n-layer 1", "v2_cifar10+epochs=1+n_layer=1"),
        ("train_v2_cifar10.py", "--n-layer 1 --epochs 1", "v2_cifar10+epochs=1+n_layer=1"),
        ("train_v2_cifar10.py", "--epochs 50 --n-layer 6", "v2_cifar10"),  # what the script says already
        ("train_v2_cifar10.py", "--seed 7", "v2_cifar10"),
        ("train_v2_cifar10.py", "--data-dir /a --runs-dir /b --device cpu --log-every 3 --tensorboard", "v2_cifar10"),
        ("train_v2_cifar10.py", "--epochs 2 --name mine", "mine"),
        ("train_v2_cifar10.py", "--train-limit 100 --compile", "v2_cifar10+compile=True+train_limit=100"),
        ("train_v3_cifar10.py", "--attn-norm", "v3_cifar10+attn_norm=True"),
        ("train_v1_cifar10.py", "--learning-rate 3e-4", "v1_cifar10+learning_rate=0.0003"),
        (VIT, "--dropout 0.1 --seed 2", "vit_tiny_cifar10+dropout=0.1"),
        *((script, "--setting fitted", f"{script[6:-3]}+setting=fitted") for script in WITH_SETTINGS),
    ],
)
def test_the_folder_names_every_change_but_the_seed(script, flags, name, call_script, fitted):
    assert call_script(script, *flags.split()) == 0
    (experiment,) = fitted
    assert experiment.name == name
    assert experiment.folder == experiment.options.runs_dir / name / f"seed{experiment.train.seed}"


def test_runs_lie_beside_the_scripts_unless_told_otherwise(call_script, fitted):
    call_script("train_v2_cifar10.py")
    assert fitted[0].folder == ROOT / "runs" / "v2_cifar10" / "seed0"


# ---------------------------------------------------------------------------- what they configure


@pytest.fixture
def captured_launch(call_script, monkeypatch):
    """Calls a script whose launch() only notes its arguments: (name, model, train)."""

    def capture(script):
        noted = []

        def launch(name, model, train):
            noted.extend((name, model, train))
            raise SystemExit  # the quickstart would go on to draw

        with monkeypatch.context() as patch:
            patch.setattr(training, "launch", launch)
            call_script(script)
        return noted

    return capture


@pytest.mark.parametrize(
    "script, variant, parameters",
    [
        ("train_v1_cifar10.py", v1_config(), 3_562_570),
        ("train_v2_cifar10.py", v2_config(), 3_562_570),
        ("train_v2_softmax_cifar10.py", v2_softmax_config(), 3_562_570),
        ("train_v2_cifar100.py", v2_config(num_classes=100), 3_579_940),
        ("train_v3_cifar10.py", v3_config(), 3_565_258),
        (VIT, ViTConfig(), 5_362_762),
        ("train_vit_tiny_cifar100.py", ViTConfig(num_classes=100), 5_380_132),
        ("train_resnet20_cifar100.py", ResNet20Config(num_classes=100), 275_572),
        ("train_mobilenetv2_cifar100.py", MobileNetV2Config(setting="published", num_classes=100), 2_351_972),
        ("train_deit_tiny_cifar100.py", DeiTTinyConfig(setting="published", num_classes=100), 5_506_852),
        ("train_efficientnet_cifar100.py", EfficientNetB0Config(setting="published", num_classes=100), 4_135_648),
    ],
)
def test_a_script_trains_the_named_variant_under_the_protocol(script, variant, parameters, captured_launch):
    name, model, train = captured_launch(script)
    assert name == experiment_of(script)
    assert model == variant and type(model) is type(variant)
    with torch.device("meta"):
        assert sum(p.numel() for p in model.build().parameters()) == parameters
    assert train == ClassificationConfig(
        dataset="cifar100" if script.endswith("_cifar100.py") else "cifar10",
        epochs=50,
        batch_size=32,
        learning_rate=1e-4,
        weight_decay=0.05,
        warmup_steps=500,
        max_grad_norm=1.0,
        grad_accum=1,
        val_fraction=0.2,
        crop_scale_min=0.8,
        horizontal_flip=True,
        train_limit=None,
        precision="tf32",
        compile=False,
        seed=0,
    )


def test_the_quickstart_trains_a_small_v2_on_the_digits(captured_launch):
    name, model, train = captured_launch(QUICKSTART)
    assert name == "quickstart" and train.dataset == "digits"
    assert (model.img_size, model.in_channels, model.num_classes) == (8, 1, 10)
    assert (model.residual, model.init, model.attention) == ("pre", "xavier", "raw")
    assert train.crop_scale_min == 1.0 and not train.horizontal_flip  # a mirrored digit is another sign


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_short_and_shows_its_whole_model_and_protocol(script):
    text = (ROOT / script).read_text()
    assert 20 <= len(text.splitlines()) <= 60
    tree = ast.parse(text)
    assert ast.get_docstring(tree) and f"python {script}" in ast.get_docstring(tree)
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.For | ast.While | ast.FunctionDef)]


def test_every_experiment_has_a_script_here():
    """So that the tests above, which go by what they find, cannot pass for having found nothing."""
    assert {*BDH_SCRIPTS, *VITS, *FIXED_SIZE, QUICKSTART} == set(SCRIPTS)
    variants = ("v1_cifar10", "v2_cifar10", "v2_softmax_cifar10", "v3_cifar10", "v2_cifar100")
    assert {f"train_{variant}.py" for variant in variants} <= set(BDH_SCRIPTS)
    assert {field.name for field in dataclasses.fields(VisionBDHConfig)} > {"attention"}
    assert "attention" not in {field.name for field in dataclasses.fields(ViTConfig)}
