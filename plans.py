"""The runs behind results/: plans of published experiments and smaller versions of them, and what each run costs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from analysis.published import read_published
from analysis.reading import SMALL
from benchmarks.measure import seconds_of
from benchmarks.training_steps import made_up_batches, training_step
from models.flops import flop_of
from training.config import SegmentationConfig
from training.experiment import Experiment


@dataclass(frozen=True)
class Entry:
    """An experiment and its seeds."""

    script: str
    flags: str = ""
    seeds: Sequence[int] = (0,)
    goes_on_from: str | None = None
    """script whose run with the same seed gives the initial weights"""


@dataclass(frozen=True)
class Part:
    """Entries that answer one question, most valuable first."""

    question: str
    entries: Sequence[Entry]


@dataclass(frozen=True)
class Plan:
    """What to run."""

    folder: str
    """folder under results/ for its runs"""
    parts: Sequence[Part]
    on_cpu: bool = False
    """train on the CPU, in bf16 if the CPU has it, with estimates of each run's time"""


def _entries(lines: Sequence[str], seeds: Sequence[int]) -> list[Entry]:
    """lines: scripts with flags; all seeds of an experiment before the next one."""
    return [Entry(*line.partition(" ")[::2], seeds) for line in lines]


def _seed_by_seed(lines: Sequence[str]) -> list[Entry]:
    """Three seeds; all experiments of a seed before the next one."""
    return [entry for seed in THREE for entry in _entries(lines, (seed,))]


THREE = (0, 1, 2)
MORE = (1, 2)  # the seeds after the first
AS_RUN = "--residual post --warmup-steps 1000"  # what the published code of v2 computed
CIFAR100_RIVALS = tuple(
    f"train_{name}_cifar100.py" for name in ("resnet20", "efficientnet", "deit_tiny", "mobilenetv2")
)
UNETS = ("train_bdh_unet.py", "train_bdh_unet.py --skips", "train_resnet34_unet.py --encoder-weights none --epochs 80")
V1_10_EPOCHS = "train_v1_cifar10.py --epochs 10"
V1_4_TIMES = f"{V1_10_EPOCHS} --mlp-internal-dim-multiplier 4"
VIT_10_EPOCHS = "train_vit_tiny_cifar10.py --epochs 10"
MULTIPLIERS = (V1_10_EPOCHS, f"{V1_10_EPOCHS} --mlp-internal-dim-multiplier 128", V1_4_TIMES, VIT_10_EPOCHS)
# Together with v1 (post, normal, 500 steps), v2 as documented (pre, xavier, 500) and v2 as its code ran (post, xavier,
# 1000): every combination of the three choices in which they differ.
BETWEEN_V1_AND_V2 = (
    "train_v2_cifar10.py --residual post",
    "train_v2_cifar10.py --init normal --init-projections normal",
    "train_v1_cifar10.py --warmup-steps 1000",
    "train_v2_cifar10.py --warmup-steps 1000",
    "train_v2_cifar10.py --init normal --init-projections normal --warmup-steps 1000",
)
# With v2, v2 with softmax and v2 with residual=post: is the norm at the head of the step worth more with raw scores?
SOFTMAX_AFTER = "train_v2_softmax_cifar10.py --residual post"
TRUE_PRE = (
    "train_v2_cifar10.py --residual true_pre",
    "train_v2_cifar10.py --residual true_pre --init normal --init-projections normal",
)

PUBLISHED = Plan(
    "",
    [
        Part(
            "The headline: is v2 better than ViT-Tiny, v1, softmax and v3 on CIFAR-10?",
            [
                *_entries(["train_v2_cifar10.py", "train_vit_tiny_cifar10.py", "train_v1_cifar10.py"], THREE),
                Entry("train_v2_softmax_cifar10.py", seeds=THREE),
                Entry("train_v3_cifar10.py"),
            ],
        ),
        Part(
            "CIFAR-100: does it hold with 100 classes, and against convolutional networks?",
            [
                *_entries(["train_v2_cifar100.py", "train_vit_tiny_cifar100.py"], THREE),
                *_entries(CIFAR100_RIVALS, (0,)),
            ],
        ),
        Part("CamVid: how far is BDH-UNet from a ResNet34-UNet, both from scratch?", _entries(UNETS, (0,))),
        Part("How many neurons does it need?", _entries(MULTIPLIERS, (0,))),
        Part(
            "Norm and initialisation: what is each worth, beside v1 and v2?",
            _entries([*BETWEEN_V1_AND_V2[:2], *TRUE_PRE], (0,)),
        ),
        Part(
            "What made the published v2 better than v1: initialisation, warm-up, or the norm before pooling?",
            [Entry("train_v2_cifar10.py", AS_RUN, THREE), *_entries([*BETWEEN_V1_AND_V2, SOFTMAX_AFTER], THREE)],
        ),
        Part(
            "The other published rows, and three seeds of each",
            [
                *_entries([f"train_v2_cifar100.py {AS_RUN}", f"train_v2_softmax_cifar10.py {AS_RUN}"], THREE),
                Entry("train_v3_cifar10.py", "--warmup-steps 1000", THREE),
                Entry("train_v3_cifar10.py", seeds=MORE),
                *_entries([*CIFAR100_RIVALS, *MULTIPLIERS, *UNETS], MORE),
                Entry("finetune_bdh_unet.py", seeds=THREE, goes_on_from="train_bdh_unet.py"),
                *_entries(["train_resnet34_unet.py", "train_resnet50_unet.py"], THREE),
            ],
        ),
    ],
)

CPU_CIFAR100 = tuple(f"train_{name}_cifar100.py" for name in ("resnet20", "deit_tiny", "mobilenetv2", "efficientnet"))
FULL_CPU = Plan(
    "",
    [
        Part("Which published rows can a CPU repeat?", _entries([VIT_10_EPOCHS, V1_10_EPOCHS, *CPU_CIFAR100], (0,))),
        Part("How well does v1 do with 4 instead of 32 neurons per dimension?", _entries([V1_4_TIMES], (0,))),
        Part(
            "Two more seeds of each: is the published number reproduced?",
            _entries([VIT_10_EPOCHS, *CPU_CIFAR100, V1_4_TIMES, V1_10_EPOCHS], MORE),
        ),
        Part(
            "The headline, one seed: is v2 better than ViT-Tiny after 50 epochs?",
            _entries(["train_v2_cifar10.py", "train_vit_tiny_cifar10.py"], (0,)),
        ),
    ],
    on_cpu=True,
)

# Two runs at once take about two hours on two cores with bf16. The widths give ViT-Tiny and BDH 0.2 M weights each.
SMALL_PROTOCOL = "--n-embd 64 --n-head 4 --train-limit 12500 --epochs 12 --learning-rate 1e-3"
SMALL_BDH = f"{SMALL_PROTOCOL} --mlp-internal-dim-multiplier 16"
SMALL_UNET = "--img-size 96 --epochs 30"
AS_KEPT = "--init-projections normal"  # the runs under results/small_cpu have these, unlike the published code
SMALL_CIFAR10 = (
    f"train_v2_cifar10.py {SMALL_BDH} {AS_KEPT}",
    f"train_vit_tiny_cifar10.py {SMALL_PROTOCOL} --n-layer 6 --mlp-dim 128",
    f"train_v1_cifar10.py {SMALL_BDH}",
    f"train_v3_cifar10.py {SMALL_BDH} {AS_KEPT}",
    f"train_v2_softmax_cifar10.py {SMALL_BDH} {AS_KEPT}",
)
SMALL_CAMVID = (
    f"train_bdh_unet.py {SMALL_UNET} {AS_KEPT}",
    f"train_resnet34_unet.py --encoder-weights none {SMALL_UNET}",
)
SMALL_CPU = Plan(
    SMALL,
    [
        Part(
            "CIFAR-10 at a small size: v1, v2, v3, softmax, ViT-Tiny",
            _seed_by_seed(SMALL_CIFAR10),
        ),
        Part(
            "CamVid at 96 x 96: BDH-UNet, without and with skips, and a ResNet34-UNet from scratch",
            [
                *_seed_by_seed(SMALL_CAMVID),
                Entry("train_bdh_unet.py", f"--skips {SMALL_UNET} {AS_KEPT}"),
            ],
        ),
    ],
    on_cpu=True,
)

# What each field of the recipe brings to both models: first the rates of each optimizer, equally many for both, then
# each optimizer at the rate that validated best, and one change at a time from AdamW.
RECIPE_MODELS = {
    "v2": f"train_v2_cifar10.py {SMALL_BDH}",
    "vit_tiny": f"train_vit_tiny_cifar10.py {SMALL_PROTOCOL} --n-layer 6 --mlp-dim 128",
}
RATES = {
    "adamw": ("1e-4", "3e-4", "1e-3", "3e-3"),
    "muon": ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2"),
    "sgd": ("1e-3", "3e-3", "1e-2", "3e-2", "1e-1"),
}
OPTIMIZERS = {"adamw": "", "muon": " --optimizer muon", "sgd": " --optimizer sgd --weight-decay 5e-4"}
BEST_RATES = {  # by validation accuracy
    "v2": {"adamw": "3e-4", "muon": "3e-4", "sgd": "3e-3"},
    "vit_tiny": {"adamw": "1e-3", "muon": "3e-3", "sgd": "3e-2"},
}
RECIPE_CHANGES = (
    "--decay matrices",
    "--schedule linear",
    "--schedule trapezoid",
    "--ema 0.999",
    "--crop-scale-min 1 --crop-padding 4",
    "--randaugment 2",
    "--random-erasing 0.25",
    "--mixup 0.8",
    "--cutmix 1",
    "--label-smoothing 0.1",
    "--repeat-augment 2",
    "--drop-path 0.1",
    "--eval-flip",
)


def at_rate(model: str, optimizer: str, rate: str) -> str:
    line = RECIPE_MODELS[model].replace("--learning-rate 1e-3", f"--learning-rate {rate}")
    return line + OPTIMIZERS[optimizer]


RECIPE_SMALL_CPU = Plan(
    "recipe_small_cpu",
    [
        Part(
            "Which learning rate suits each optimizer, by validation accuracy?",
            _entries(
                [at_rate(m, o, rate) for o, rates in RATES.items() for rate in rates for m in RECIPE_MODELS], (0,)
            ),
        ),
        Part(
            "What does one change of the recipe bring to v2 and to ViT-Tiny?",
            _seed_by_seed(
                [at_rate(m, o, rate) for m, rates in BEST_RATES.items() for o, rate in rates.items()]
                + [
                    f"{at_rate(m, 'adamw', BEST_RATES[m]['adamw'])} {change}"
                    for change in RECIPE_CHANGES
                    for m in RECIPE_MODELS
                ]
            ),
        ),
    ],
    on_cpu=True,
)

# v4 beside v2 and ViT-Tiny with the same recipe, at the size of SMALL_CPU: a ViT with as many parameters as v4 (0.2 M),
# and one with as many training operations (1.6 M parameters). Rates first, as many for each, by validation accuracy.
V4_PROTOCOL = (
    "--train-limit 12500 --epochs 12 --batch-size 64 --optimizer muon --dropout 0 "
    "--weight-decay 0.05 --crop-scale-min 1 --crop-padding 4 --n-head 4"
)
V4_SIZE = "--n-layer 6 --n-embd 64 --mlp-internal-dim-multiplier 16"
V4_RIVALS = (
    f"train_speedrun_cifar10.py {V4_PROTOCOL} {V4_SIZE}",
    f"train_v2_cifar10.py {V4_PROTOCOL} {V4_SIZE}",
    f"train_vit_tiny_cifar10.py {V4_PROTOCOL} --n-layer 6 --n-embd 64 --mlp-dim 128",
    f"train_vit_tiny_cifar10.py {V4_PROTOCOL} --n-layer 6 --n-embd 160 --mlp-dim 512",
)
V4_RATES = ("1e-3", "2e-3", "5e-3", "1e-2", "2e-2")
V4_BEST_RATES = ("1e-2", "1e-3", "5e-3", "2e-3")  # of V4_RIVALS, by validation accuracy
V4_CHANGES = (  # from the script's own rate, 5e-3; more matrices have fewer neurons
    "",
    " --stem patch",
    " --mixing none",
    " --mixing conv",
    " --no-level-gain",
    " --residual pre --update-norm",
    " --rotary raster",
    " --gate none",
    " --attention softmax",
    " --qk separate --mlp-internal-dim-multiplier 12",
    " --no-shared --mlp-internal-dim-multiplier 3",
)
V4_UNETS = (
    f"train_v4_unet.py {SMALL_UNET}",
    "train_resnet34_unet.py --encoder-weights none --optimizer muon --weight-decay 0.05 --warmup-steps 200 "
    f"{SMALL_UNET}",
)
V4_SMALL_CPU = Plan(
    "v4_small_cpu",
    [
        Part(
            "Which learning rate suits each model, by validation accuracy?",
            _entries([f"{rival} --learning-rate {rate}" for rate in V4_RATES for rival in V4_RIVALS], (0,)),
        ),
        Part(
            "Is v4 better than v2 and than ViT-Tiny, each at its best rate?",
            _seed_by_seed(
                [f"{each} --learning-rate {rate}" for each, rate in zip(V4_RIVALS, V4_BEST_RATES, strict=True)]
            ),
        ),
        Part(
            "What is each part of v4 worth, and what of BDH matters, at equal parameters?",
            _seed_by_seed([V4_RIVALS[0] + change for change in V4_CHANGES]),
        ),
        Part(
            "Is BDH-UNet with v4's encoder better than a ResNet34-UNet, both from scratch with Muon at the same rate?",
            _seed_by_seed([f"{unet} --learning-rate 2e-3" for unet in V4_UNETS]),
        ),
        Part("Does another rate suit them?", _entries([f"{unet} --learning-rate 5e-3" for unet in V4_UNETS], (0,))),
    ],
    on_cpu=True,
)
PLANS = {"published": PUBLISHED, "full_cpu": FULL_CPU, SMALL: SMALL_CPU, "recipe_small_cpu": RECIPE_SMALL_CPU}
PLANS |= {"v4_small_cpu": V4_SMALL_CPU}


# ---------------------------------------------------------------------------- cost


@cache
def published_images() -> dict[str, int]:
    """Training images of each data set by the protocol."""
    return {line.dataset: int(line.train_images) for line in read_published() if line.train_images}


def training_images(experiment: Experiment) -> int:
    """Images in an epoch of training."""
    train = experiment.train
    images = published_images()[train.dataset]
    if train.train_limit is not None:
        images = min(images, round(train.train_limit * (1 - getattr(train, "val_fraction", 0.0))))
    return images


def training_flop(experiment: Experiment) -> float:
    """Operations of all matrix products and convolutions in training, forward and backward, without validation."""
    sizes = getattr(experiment.train, "train_sizes", ())
    return experiment.train.epochs * training_images(experiment) * flop_of(experiment.model, sizes)


def measure_step(experiment: Experiment, seconds: float = 4.0) -> float:
    """Median seconds of a training step on random images, over steps that take about this long in all, at least one."""
    device, model, train = torch.device("cpu"), experiment.model, experiment.train
    batches = made_up_batches(train.batch_size, model.img_size, model.num_classes, device)
    if isinstance(train, SegmentationConfig):  # a label for each pixel instead of one for the image
        batches = ((images, labels[:, None, None].expand(images[:, 0].shape)) for images, labels in batches)
    step = training_step(model.build(), batches, train.precision, device)
    step()  # warm up
    times = [seconds_of(step)]
    while sum(times) < seconds:
        times.append(seconds_of(step))
    return float(np.median(times))


def epoch_minutes(experiment: Experiment, step_seconds: float) -> float:
    """Estimate for an epoch with validation, whose images take a third of the time of training images.

    Segmentation has a validation part of its own, in CamVid about a fifth of both.
    """
    images, share = training_images(experiment), getattr(experiment.train, "val_fraction", 0.2)
    images += images * share / (1 - share) / 3
    return math.ceil(images / experiment.train.batch_size) * step_seconds / 60
