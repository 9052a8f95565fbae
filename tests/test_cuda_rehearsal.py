"""CUDA without CUDA: every script's epoch on the meta device, where reading a value or mixing devices raises."""

import re

import pytest
import torch

from training import ClassificationConfig
from models import kernels
from models.bdh import BDHCore
from tests.rehearsal import rehearse
from tests.tiny_scripts import SCRIPTS, has_made_up_data, tiny_flags
from training.command_line import experiment_of
from training.config import ROOT
from training.tasks import Classification

V2, UNET, PRETRAINING = "train_v2_cifar10.py", "train_bdh_unet.py", "pretrain_bdh.py"
IMAGES = "--randaugment 2 --randaugment-magnitude 15 --random-erasing 0.5 --repeat-augment 2"
LABELS = "--mixup 0.8 --cutmix 1 --label-smoothing 0.1 --eval-flip"
SIZES = "--train-sizes 24 32 40 --eval-scales 1 1.25"
MUON = "--optimizer muon --adamw-learning-rate 1e-3 --momentum 0.9 --weight-decay 0.1 --decay matrices --ema 0.9"
SGD = "--optimizer sgd --momentum 0.8 --schedule trapezoid --warmup-steps 2 --max-grad-norm 0.1 --ema 0.99"
SEGMENTS = "--horizontal-flip 0.5 --brightness-contrast 0.5 --shift-scale-rotate 0.5 --scale-min 0.5 --scale-max 2"
RECIPES = [
    (V2, f"--crop-scale-min 0.5 --horizontal-flip {IMAGES} {LABELS} {MUON} --drop-path 0.1 --grad-accum 2 --recompute"),
    (V2, f"--crop-scale-min 1 --crop-padding 4 --schedule linear --betas 0.9 0.95 {IMAGES} {SIZES}"),
    (V2, f"{SGD} --mixup 0.2 --attention softmax --grad-accum 3 --learning-rate 1e-3"),
    ("train_vit_tiny_cifar10.py", f"{MUON} {IMAGES} {LABELS} --drop-path 0.1 --schedule constant"),
    ("train_resnet20_cifar100.py", f"{SGD} {IMAGES} {LABELS} --decay matrices"),
    (PRETRAINING, f"{MUON} {IMAGES} --recompute"),
    (UNET, f"{MUON} {SEGMENTS} --class-weighting median_frequency --recompute --grad-accum 2"),
    (UNET, f"{SGD} --eval-full-size --eval-scales 1 1.5"),
    ("train_bdh_text.py", f"{MUON} --grad-accum 2 --recompute"),
]


@pytest.fixture(scope="module")
def tiny(data_dir, tmp_path_factory):
    """The experiment of a script's tiny run, with more flags."""
    flags = tiny_flags(tmp_path_factory.mktemp("tiny"), data_dir)

    def make(script, more=""):
        train = experiment_of(script).train
        few = "--train-limit 15 --batch-size 8" if isinstance(train, ClassificationConfig) else ""
        return experiment_of(script, " ".join([*flags(script), few, "--log-every 2", more]))

    return make


MATCHES_ON_THE_CPU = {"train_bdh_detector.py"}  # the Hungarian algorithm waits for the device in every step


@pytest.mark.parametrize("script", sorted(set(SCRIPTS) - MATCHES_ON_THE_CPU))
def test_an_epoch_reads_no_value_but_the_progress(script, tiny):
    if not has_made_up_data(script):
        pytest.skip("no made-up data here")
    rehearse(tiny(script))


@pytest.mark.parametrize(("script", "flags"), RECIPES)
def test_an_epoch_of_a_recipe_reads_no_value_but_the_progress(script, flags, tiny):
    assert rehearse(tiny(script, flags)).step


def test_the_recipes_set_every_field_of_the_recipe():
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    fields = {name for row in re.findall(r"^\| (`.+?`) \|", page, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    flags = " ".join(flags for _, flags in RECIPES)
    assert len(fields) > 25
    fields -= {"train_val", "crop_original", "eval_crop"}  # which images and pixels are read: nothing on the device
    assert not [name for name in fields if f"--{name.replace('_', '-')}" not in flags]


@pytest.mark.parametrize(
    ("precision", "dtype"), [("tf32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_the_fast_path_is_rehearsed(precision, dtype, tiny, monkeypatch):
    seen, real = [], kernels.fast_update
    monkeypatch.setattr(kernels, "fast_update", lambda *a, **k: seen.append(a[2][0].dtype) or real(*a, **k))
    session = rehearse(tiny(V2, f"--precision {precision} --recompute"))
    assert len(seen) > session.step and set(seen) == {dtype}


def read(loss):
    loss.item()


def branch(loss):
    if loss > 0:
        pass


def mix_devices(loss):
    loss.expand(2) + torch.ones(2)


def choose_by_mask(loss):
    loss[loss > 0]


def copy_and_wait(loss):
    torch.ones(2).to(loss.device)


def make_from_numbers(loss):
    loss.new_tensor((1.0, 2.0))


def index_from_the_host(loss):
    loss.expand(2)[torch.tensor([1, 0])]


FAULTS = {
    read: "item",
    branch: "nonzero|item|bool",
    mix_devices: "device",
    choose_by_mask: "nonzero|item",
    copy_and_wait: "wait",
    make_from_numbers: "wait",
    index_from_the_host: "two devices",
}


@pytest.mark.parametrize(("fault", "words"), FAULTS.items(), ids=[each.__name__ for each in FAULTS])
@pytest.mark.parametrize("part", ["training", "validation"])
def test_the_rehearsal_finds_a_fault(fault, words, part, tiny, monkeypatch):
    real = Classification.loss

    def loss(self, logits, labels):
        result = real(self, logits, labels)
        if logits.requires_grad == (part == "training"):
            fault(result)
        return result

    monkeypatch.setattr(Classification, "loss", loss)
    with pytest.raises(RuntimeError, match=words):  # NotImplementedError is one
        rehearse(tiny(V2))


def test_the_rehearsal_finds_a_fault_in_the_backward_pass(tiny, monkeypatch):
    real = kernels._backward_slice

    def faulty(dy, kept, weights, *args):
        return real(dy.mul_(torch.ones(dy.shape[-1])), kept, weights, *args)

    monkeypatch.setattr(kernels, "_backward_slice", faulty)
    with pytest.raises(RuntimeError, match="two devices"):
        rehearse(tiny(V2))
    assert BDHCore.has_fast_path.__module__ == "models.bdh"
