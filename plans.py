"""What is run for results/: every published experiment in order of value, and a small version for two CPU cores."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from analysis.published import read_published
from analysis.reading import SMALL
from benchmarks.training_steps import flop_per_image
from training.config import Experiment


@dataclass(frozen=True)
class Entry:
    """An experiment, and with which seeds."""

    script: str
    flags: str = ""
    seeds: Sequence[int] = (0,)
    goes_on_from: str | None = None
    """script whose run of the same seed gives the first weights"""


@dataclass(frozen=True)
class Part:
    """Entries that answer one question, the most valuable first."""

    question: str
    entries: Sequence[Entry]


@dataclass(frozen=True)
class Plan:
    """What to run, and where under results/ its runs belong."""

    folder: str
    parts: Sequence[Part]


THREE = (0, 1, 2)
MORE = (1, 2)  # the seeds that are missing where one was enough at first
AS_RUN = "--residual post --warmup-steps 1000"  # what the published code of v2 computed
CIFAR100_RIVALS = tuple(
    f"train_{name}_cifar100.py" for name in ("resnet20", "efficientnet", "deit_tiny", "mobilenetv2")
)
UNETS = (
    "train_bdh_unet.py",
    "train_bdh_unet.py --skips",
    "train_resnet34_unet.py --encoder-weights none --epochs 80",
)
MULTIPLIERS = (
    "train_v1_cifar10.py --epochs 10",
    "train_v1_cifar10.py --epochs 10 --mlp-internal-dim-multiplier 128",
    "train_v1_cifar10.py --epochs 10 --mlp-internal-dim-multiplier 4",
    "train_vit_tiny_cifar10.py --epochs 10",
)
# With v1 (post, normal, 500 steps), v2 as documented (pre, xavier, 500) and v2 as its code ran (post, xavier, 1000) all
# combinations of what they differ in.
BETWEEN_V1_AND_V2 = (
    "train_v2_cifar10.py --residual post",
    "train_v2_cifar10.py --init normal",
    "train_v1_cifar10.py --warmup-steps 1000",
    "train_v2_cifar10.py --warmup-steps 1000",
    "train_v2_cifar10.py --init normal --warmup-steps 1000",
)


def _entries(lines: Sequence[str], seeds: Sequence[int]) -> list[Entry]:
    """From scripts with their flags; one experiment after the other."""
    return [Entry(*line.partition(" ")[::2], seeds) for line in lines]


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
        Part(
            "CamVid: how far is BDH-UNet from a ResNet34-UNet that starts from scratch, too?",
            _entries(UNETS, (0,)),
        ),
        Part("How many neurons does it need?", _entries(MULTIPLIERS, (0,))),
        Part(
            "Norm and initialisation: what is each worth, beside v1 and v2?",
            _entries(
                [
                    *BETWEEN_V1_AND_V2[:2],
                    "train_v2_cifar10.py --residual true_pre",
                    "train_v2_cifar10.py --residual true_pre --init normal",
                ],
                (0,),
            ),
        ),
        Part(
            "What made the published v2 better than v1: initialisation, warm-up, or the norm before pooling?",
            [Entry("train_v2_cifar10.py", AS_RUN, THREE), *_entries(BETWEEN_V1_AND_V2, THREE)],
        ),
        Part(
            "The other published rows, and three seeds of each",
            [
                *_entries([f"train_v2_cifar100.py {AS_RUN}", f"train_v2_softmax_cifar10.py {AS_RUN}"], THREE),
                Entry("train_v3_cifar10.py", "--warmup-steps 1000", THREE),
                Entry("train_v3_cifar10.py", seeds=MORE),
                *_entries(CIFAR100_RIVALS, MORE),
                *_entries(MULTIPLIERS, MORE),
                *_entries(UNETS, MORE),
                Entry("finetune_bdh_unet.py", seeds=THREE, goes_on_from="train_bdh_unet.py"),
                *_entries(["train_resnet34_unet.py", "train_resnet50_unet.py"], THREE),
            ],
        ),
    ],
)

# Some two hours on two cores with bf16, two runs at once. Widths are such that ViT-Tiny and BDH have 0.2 M weights.
SMALL_PROTOCOL = "--n-embd 64 --n-head 4 --train-limit 12500 --epochs 12 --learning-rate 1e-3 --precision bf16"
SMALL_BDH = f"{SMALL_PROTOCOL} --mlp-internal-dim-multiplier 16"
SMALL_UNET = "--img-size 96 --epochs 30 --precision bf16"
SMALL_CPU = Plan(
    SMALL,
    [
        Part(
            "CIFAR-10 at a small size: v1, v2, v3, softmax, ViT-Tiny",
            [
                entry
                for seed in THREE
                for entry in (
                    Entry("train_v2_cifar10.py", SMALL_BDH, (seed,)),
                    Entry("train_vit_tiny_cifar10.py", f"{SMALL_PROTOCOL} --n-layer 6 --mlp-dim 128", (seed,)),
                    Entry("train_v1_cifar10.py", SMALL_BDH, (seed,)),
                    Entry("train_v3_cifar10.py", SMALL_BDH, (seed,)),
                    Entry("train_v2_softmax_cifar10.py", SMALL_BDH, (seed,)),
                )
            ],
        ),
        Part(
            "CamVid at 96 x 96: BDH-UNet, without and with skips, and a ResNet34-UNet from scratch",
            [
                *(
                    Entry(script, f"{flags} {SMALL_UNET}", (seed,))
                    for seed in THREE
                    for script, flags in (
                        ("train_bdh_unet.py", ""),
                        ("train_resnet34_unet.py", "--encoder-weights none"),
                    )
                ),
                Entry("train_bdh_unet.py", f"--skips {SMALL_UNET}"),
            ],
        ),
    ],
)
PLANS = {"published": PUBLISHED, SMALL: SMALL_CPU}


@cache
def training_images() -> dict[str, int]:
    """Images of the training part of each data set, by the protocol."""
    return {line.dataset: int(line.train_images) for line in read_published() if line.train_images}


def training_flop(experiment: Experiment) -> float:
    """Operations of all products and convolutions of the training, forward and backward; validation is not in it."""
    train = experiment.train
    images = training_images()[train.dataset]
    if train.train_limit is not None:
        images = min(images, round(train.train_limit * (1 - getattr(train, "val_fraction", 0.0))))
    with torch.device("meta"):
        model = experiment.model.build()
    return train.epochs * images * flop_per_image(model, experiment.model.img_size)
