"""Every script that defines an EXPERIMENT, found by itself: run tiny as a user does, and its command line."""

import ast
import contextlib
import csv
import dataclasses
import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training import ClassificationConfig, SegmentationConfig
from models.baselines import (
    DeiTTinyConfig,
    EfficientNetB0Config,
    MobileNetV2Config,
    ResNet20Config,
    ResNetUNetConfig,
    ViTConfig,
)
from models.bdh_unet import bdh_unet_config
from models.vision_bdh import v1_config, v2_config, v2_softmax_config, v3_config
from tests.tiny_scripts import SCRIPTS, has_made_up_data, tiny_flags
from training.command_line import experiment_of, parse_experiment
from training.config import ROOT
from training.runs import load_model
from training.stored import load_checkpoint

FILES = {"config.json", "metrics.csv", "last.pt", "previous.pt", "best.pt", "summary.json"}
QUICKSTART, TO_A_FULL_DISK = "train_quickstart.py", "train_v1_cifar10.py"
VIT, DEIT, RESNET = "train_vit_tiny_cifar10.py", "train_deit_tiny_cifar100.py", "train_resnet34_unet.py"


def scripts_to_run():
    """All, but of each model that no flag makes small one only."""
    chosen = {}
    for script in SCRIPTS:
        text = (ROOT / script).read_text(encoding="utf-8")
        chosen.setdefault(script if "n_layer=" in text else re.search(r"model=(\w+)", text)[1], script)
    return list(chosen.values())


@pytest.fixture(scope="module")
def flags_for(data_dir, tmp_path_factory):
    """The flags of a tiny run of a script on made-up data, which lie in a folder without the scripts."""
    return tiny_flags(tmp_path_factory.mktemp("tiny"), data_dir)


@pytest.fixture(scope="module")
def processes(flags_for, tmp_path_factory):
    """Two scripts as processes of their own, from an empty folder and in ASCII. The second writes to a full disk."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def start(script, options=(), flags=(), **streams):
        command = [sys.executable, *options, str(ROOT / script), *flags_for(script), *flags]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        return subprocess.Popen(command, cwd=elsewhere, env=environment, text=True, stderr=subprocess.PIPE, **streams)

    with Path("/dev/full").open("w") as full:
        quickstart = start(QUICKSTART, stdout=subprocess.PIPE)
        # every import is a line on stderr
        other = start(TO_A_FULL_DISK, ["-X", "importtime"], ["--seed", "1"], stdout=full)
    results = {TO_A_FULL_DISK: (*other.communicate(), other.wait())}
    results[QUICKSTART] = (*quickstart.communicate(), quickstart.wait())
    assert list(elsewhere.iterdir()) == []
    return results


@pytest.fixture(scope="module")
def tiny_run(processes, flags_for, tmp_path_factory):
    """Runs a script once: (exit code, what it said, its folder)."""
    done = {}

    def run(script):
        if script not in done:
            flags = flags_for(script)
            if start := experiment_of(script).train.start_from:  # .../runs/NAME/seed0/best.pt
                source = next(each for each in SCRIPTS if experiment_of(each).name == start.parents[1].name)
                flags += ["--start-from", str(run(source)[2] / start.name)]
            folder = experiment_of(script, " ".join(flags)).folder
            if script == QUICKSTART:
                said, problems, code = processes[script]
                done[script] = code, said + problems, folder
            else:
                done[script] = *_run_here(script, flags, tmp_path_factory.mktemp("elsewhere")), folder
        return done[script]

    return run


def _run_here(script, flags, cwd):
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [str(ROOT / script), *flags])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            return end.code, said.getvalue()
    return 0, said.getvalue()


# ---------------------------------------------------------------------------- as a user runs them


@pytest.mark.parametrize("script", scripts_to_run())
def test_a_script_runs_from_another_folder_and_writes_its_run(script, tiny_run):
    if not has_made_up_data(script):
        pytest.skip("no made-up data here")
    code, said, folder = tiny_run(script)
    assert code == 0 and str(folder) in said, said
    assert {path.name for path in folder.iterdir()} >= FILES
    config = json.loads((folder / "config.json").read_text())
    assert config["experiment"] == folder.parent.name and config["config"]["train"]["epochs"] == 1
    summary = json.loads((folder / "summary.json").read_text())
    metric = experiment_of(script).train.make_task().metric
    assert summary["best"]["epoch"] == 1
    assert metric.show(summary["best"][f"val_{metric.key}"]) in said
    assert summary["test"] is None or metric.show(summary["test"][metric.key]) in said
    with (folder / "metrics.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1"]
    assert [load_checkpoint(folder / name)["epoch"] for name in ("last.pt", "previous.pt")] == [1, 0]
    model, _ = load_model(folder)
    assert sum(p.numel() for p in model.parameters()) == summary["parameters"]


def test_the_quickstart_draws_its_curve_and_its_attention(tiny_run):
    _, said, folder = tiny_run(QUICKSTART)
    pictures = re.findall(r": +(/.*\.(?:png|svg|pdf))$", said, re.MULTILINE)
    assert len(pictures) == 2
    for picture in map(Path, pictures):
        assert picture.stat().st_size > 1000 and folder in picture.parents


def test_a_full_disk_on_stdout_does_not_stop_training(processes, flags_for):
    """`... > /dev/full`; what training imports, and nothing that only analysis needs."""
    _, problems, code = processes[TO_A_FULL_DISK]
    lines = [line for line in problems.splitlines() if not line.startswith("import time:")]
    assert code == 0 and not lines
    folder = experiment_of(TO_A_FULL_DISK, " ".join([*flags_for(TO_A_FULL_DISK), "--seed 1"])).folder
    assert {path.name for path in folder.iterdir()} >= FILES

    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in problems.splitlines()}
    assert {"torch", "training", "models"} < imported
    unneeded = {"matplotlib", "pandas", "sklearn", "tensorboard", "wandb", "timm", "analysis", "interpretability"}
    unneeded |= {"albumentations", "cv2", "segmentation_models_pytorch"}
    assert not imported & unneeded


# ---------------------------------------------------------------------------- the command line


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_field_with_its_default(script, monkeypatch, capsys):
    experiment = experiment_of(script)
    monkeypatch.setenv("COLUMNS", "100")  # one column of flags
    with pytest.raises(SystemExit):
        parse_experiment(experiment, ["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for config in (experiment.model, experiment.train):
        for field in dataclasses.fields(config):
            flag, value = "--" + field.name.replace("_", "-"), getattr(config, field.name)
            # from the flag to the default, with no other flag between but its own negation
            entry = re.search(rf" {flag}[ ,](?:(?! --(?!no-)[a-z]).)*?\(default: ([^)]*)\)", shown)
            assert entry, f"{flag} is not shown with a default"
            default = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            assert entry[1].replace(" ", "") == default.replace(" ", ""), f"{flag}: {entry[1]}"
    for flag in ("--name", "--resume", "--overwrite", "--device", "--data-dir", "--runs-dir", "--tensorboard"):
        assert flag in shown


@pytest.mark.parametrize(
    "script, flags, word",
    [
        *((script, "--epoch 5", "--epochs") for script in SCRIPTS),
        (VIT, "--attention softmax", "attention"),  # it concerns another model
        (VIT, "--in-channels 1", "in-channels"),
        ("train_resnet20_cifar100.py", "--setting fitted", "setting"),  # it has one only
        (DEIT, "--patch-size 4", "patch-size"),  # the setting decides
        (DEIT, "--setting fited", "fitted"),
        (DEIT, "--img-size 40", "not a multiple of 16"),
        ("train_efficientnet_cifar100.py", "--stochastic-depth-prob 1", "stochastic_depth_prob = 1.0"),
        ("train_v2_cifar10.py", "--attention sofmax", "softmax"),
        ("train_v2_cifar10.py", "--vocab-size 10", "vocab-size"),
        ("train_v2_cifar10.py", "--epochs five", "epochs"),
        ("train_v2_cifar10.py", "--dataset camvid", "cifar10"),
        ("train_v2_cifar10.py", "--n_layer many", "n-layer"),
        ("train_bdh_unet.py", "--img-size 100", "img_size = 100 is not a multiple of patch_size = 8"),
        ("train_bdh_unet.py", "--img-size 96 100", "(96, 100) is not a multiple of patch_size = 8"),
        ("train_bdh_unet.py", "--encoder-weights none", "encoder-weights"),
        ("train_bdh_unet.py", "--val-fraction 0.1", "val-fraction"),
        ("train_bdh_unet.py", "--pool cls", "pool"),
        ("train_bdh_unet.py", "--dataset cifar10", "camvid"),
        ("train_bdh_unet.py", "--class-weighting median_frequency --dice-weight 1", "class_weighting"),
        ("train_bdh_unet.py", "--dice-weight 2", "dice_weight = 2.0 must be between 0 and 1"),
        (RESNET, "--img-size 48", "img_size = 48 is not a multiple of 32"),
        (RESNET, "--encoder-weights imagnet", "imagenet"),
        (RESNET, "--n-embd 8", "n-embd"),
    ],
)
def test_a_wrong_flag_is_refused_with_a_hint(script, flags, word, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")  # a narrow box breaks words at their hyphens
    with pytest.raises(SystemExit) as end:
        experiment_of(script, flags)
    captured = capsys.readouterr()
    assert end.value.code == 2 and word in captured.out + captured.err


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
        (DEIT, "--setting fitted", "deit_tiny_cifar100+setting=fitted"),
    ],
)
def test_the_folder_names_every_change_but_the_seed(script, flags, name):
    experiment = experiment_of(script, flags)
    assert experiment.name == name
    assert experiment.folder == experiment.options.runs_dir / name / f"seed{experiment.train.seed}"
    if "--runs-dir" not in flags:
        assert experiment.options.runs_dir == ROOT / "runs"


# ---------------------------------------------------------------------------- what they configure

CLASSIFICATION = dict(epochs=50, batch_size=32, learning_rate=1e-4, weight_decay=0.05, warmup_steps=500)
CLASSIFICATION |= dict(max_grad_norm=1.0, grad_accum=1, val_fraction=0.2, crop_scale_min=0.8, horizontal_flip=True)
CLASSIFICATION |= dict(train_limit=None, precision="tf32", compile=False, seed=0)
SEGMENTATION = dict(dataset="camvid", batch_size=4, learning_rate=3e-4, weight_decay=0.01, warmup_steps=0)
SEGMENTATION |= dict(max_grad_norm=1.0, dice_weight=0.5, horizontal_flip=0.5, brightness_contrast=0.5)
SEGMENTATION |= dict(shift_scale_rotate=0.3)


@pytest.mark.parametrize(
    ("name", "variant", "parameters", "train"),
    [
        ("v1_cifar10", v1_config(), 3_562_570, {}),
        ("v2_cifar10", v2_config(), 3_562_570, {}),
        ("v2_softmax_cifar10", v2_softmax_config(), 3_562_570, {}),
        ("v2_cifar100", v2_config(num_classes=100), 3_579_940, {}),
        ("v3_cifar10", v3_config(), 3_565_258, {}),
        ("ablation", v2_config(), 3_562_570, {}),
        ("vit_tiny_cifar10", ViTConfig(), 5_362_762, {}),
        ("vit_tiny_cifar100", ViTConfig(num_classes=100), 5_380_132, {}),
        ("resnet20_cifar100", ResNet20Config(num_classes=100), 275_572, {}),
        ("mobilenetv2_cifar100", MobileNetV2Config(setting="published", num_classes=100), 2_351_972, {}),
        ("deit_tiny_cifar100", DeiTTinyConfig(setting="published", num_classes=100), 5_506_852, {}),
        ("efficientnet_cifar100", EfficientNetB0Config(setting="published", num_classes=100), 4_135_648, {}),
        ("bdh_unet", bdh_unet_config(), 4_152_235, dict(epochs=80)),
        (
            "bdh_unet_finetune",
            bdh_unet_config(),
            4_152_235,
            dict(epochs=10, learning_rate=3e-5, start_from=ROOT / "runs/bdh_unet/seed0/best.pt"),
        ),
        ("resnet34_unet", ResNetUNetConfig(depth=34), 24_437_819, dict(epochs=40)),
        ("resnet50_unet", ResNetUNetConfig(depth=50), 32_522_555, dict(epochs=40)),
    ],
)
def test_a_published_experiment_is_the_named_variant_under_the_protocol(name, variant, parameters, train):
    script = "finetune_bdh_unet.py" if name == "bdh_unet_finetune" else f"train_{name}.py"
    experiment = experiment_of(script)
    assert experiment.name == name
    assert experiment.model == variant and type(experiment.model) is type(variant)
    with torch.device("meta"):
        assert sum(p.numel() for p in variant.build().parameters()) == parameters
    if train:
        assert experiment.train == SegmentationConfig(**(SEGMENTATION | train))
    else:
        dataset = "cifar100" if name.endswith("_cifar100") else "cifar10"
        assert experiment.train == ClassificationConfig(dataset=dataset, **CLASSIFICATION)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_short_and_shows_its_whole_configuration(script):
    text = (ROOT / script).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    tree = ast.parse(text)
    assert f"python {script}" in ast.get_docstring(tree)
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.For | ast.While | ast.FunctionDef)]
