"""Optimizers, their parameter groups, the learning-rate schedule and weight averaging."""

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from models.bdh import BDHCore
from training.muon import MuonWithAdamW

if TYPE_CHECKING:
    from training.config import TrainConfig

INPUTS_AND_TOKENS = ("embed", "pos_", "token", "conv_proj")  # parts of names: patch projections, positions, tokens
HEADS = {"head", "heads", "lm_head", "classifier", "fc", "segmentation_head"}  # whole parts of names: output layers
COOLDOWN = 0.2  # share of the steps in which the trapezoid falls to 0


def make_optimizer(model: nn.Module, train: "TrainConfig") -> Optimizer:
    """The optimizer that the train config describes; each group's `lr` is its peak rate."""
    if train.optimizer == "muon":
        return _make_muon(model, train)
    groups, kind = decay_groups(model.named_parameters(), train), next(model.parameters()).device.type
    if train.optimizer == "sgd":
        nesterov = train.momentum > 0
        return SGD(groups, lr=train.learning_rate, momentum=train.momentum, nesterov=nesterov, fused=kind == "cuda")
    fused = kind in ("cpu", "cuda")
    return AdamW(groups, lr=train.learning_rate, betas=train.betas, fused=fused)


def decay_groups(named: Iterator[tuple[str, nn.Parameter]], train: "TrainConfig") -> list[dict]:
    """One group with weight decay on everything, or two: `decay="matrices"` spares biases, norms, positions, tokens."""
    if train.decay == "all":
        return [{"params": [each for _, each in named], "weight_decay": train.weight_decay}]
    decayed, spared = [], []
    for name, parameter in named:
        is_token = "pos_" in name or "token" in name
        (spared if parameter.ndim < 2 or is_token else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _make_muon(model: nn.Module, train: "TrainConfig") -> MuonWithAdamW:
    """Muon for the hidden matrices, AdamW with its own peak rate for everything else."""
    shapes = hidden_matrices(model)
    rest = ((name, each) for name, each in model.named_parameters() if name not in shapes)
    adamw_rate = train.learning_rate if train.adamw_learning_rate is None else train.adamw_learning_rate
    parameters = dict(model.named_parameters())
    muon = {
        "params": [parameters[name] for name in shapes],
        "shapes": list(shapes.values()),
        "weight_decay": train.weight_decay,
    }
    adamw = [group | {"lr": adamw_rate, "shapes": None} for group in decay_groups(rest, train)]
    return MuonWithAdamW([muon, *adamw], lr=train.learning_rate, momentum=train.momentum, betas=train.betas)


def hidden_matrices(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names of the parameters that Muon trains, each with its shape as a stack of matrices (..., rows, columns).

    Encoders and decoder of a BDH are one matrix per head (and level), convolutions are flattened to (out, in * k * k),
    transposed ones to (in, out * k * k), query, key and value projections that share a tensor are three. Embeddings,
    positions, tokens, norms, biases, depthwise convolutions (a vector per channel), convolutions to one channel (a
    vector) and the output layer are not among them.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            parts = name.split(".")
            is_convolution = isinstance(module, nn.modules.conv._ConvNd)
            vectors = is_convolution and (module.groups == module.in_channels > 1 or module.out_channels == 1)
            takes_input = any(part in name for part in INPUTS_AND_TOKENS) and "hidden" not in parts
            if parameter.ndim < 2 or vectors or takes_input or HEADS & set(parts):
                continue
            shapes[name] = _as_matrices(module, name, parameter)
    return shapes


def _as_matrices(module: nn.Module, name: str, parameter: Tensor) -> tuple[int, ...]:
    if isinstance(module, BDHCore) and name.endswith("decoder"):  # (..., H N, D)
        return (-1, module.config.n_neurons, parameter.shape[-1])
    if isinstance(module, nn.modules.conv._ConvNd):
        return (parameter.shape[0], -1)
    if name.endswith(("in_proj_weight", "qkv.weight")):  # of torchvision, of timm
        return (3, -1, parameter.shape[-1])
    return tuple(parameter.shape)


# ---------------------------------------------------------------------------- schedule


def make_schedule(optimizer: Optimizer, total_steps: int, train: "TrainConfig") -> LambdaLR:
    """Scales each group's peak rate by `rate_factor`, from step 0."""
    factor = partial(rate_factor, total_steps=total_steps, warmup_steps=train.warmup_steps, shape=train.schedule)
    return LambdaLR(optimizer, factor)


def set_step(schedule: LambdaLR, step: int) -> None:
    """Sets the rates of a step counted from 0: the schedule has no other state, and resumes from it."""
    schedule.last_epoch = step
    groups = schedule.optimizer.param_groups
    for group, peak, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["initial_lr"], group["lr"] = peak, peak * factor(step)


def rate_factor(step: int, total_steps: int, warmup_steps: int, shape: str = "cosine") -> float:
    """Learning rate of a step, counted from 0, as a share of the peak: step / warm-up, then the shape.

    cosine: half a cosine down to 0. linear: straight down to 0. constant: 1. trapezoid: 1, then straight down to 0 over
    the last fifth of the steps. Warm-up takes at most a tenth of all steps, so that short runs learn.
    """
    warmup = min(warmup_steps, total_steps // 10)
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    if shape == "cosine":
        return (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup))) / 2
    if shape == "linear":
        return 1 - progress
    if shape == "trapezoid":
        return min(1.0, (total_steps - step) / max(1, round(COOLDOWN * total_steps)))
    return 1.0


# ---------------------------------------------------------------------------- averaging


class WeightAverage(AveragedModel):
    """An exponential moving average of a model's weights and of BatchNorm's statistics; other buffers are copied.

    Update 0 copies the weights; update t makes d average + (1 - d) weights with d = min(decay, (1 + t) / (10 + t)), so
    that the average follows quickly at first. The number of updates lives on the CPU, where reading it waits for
    nothing; PyTorch's own update copies it to the device, and an averaging function has to wait for it there.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        t, averaged, copied = int(self.n_averaged), [], []
        of_both = (itertools.chain(each.parameters(), each.buffers()) for each in (self.module, model))
        for pair in zip(*of_both, strict=True):
            is_number = pair[0].is_floating_point() or pair[0].is_complex()  # not a count
            (averaged if t > 0 and is_number else copied).append(pair)
        if averaged:
            torch._foreach_lerp_(*zip(*averaged, strict=True), 1 - min(self.decay, (1 + t) / (10 + t)))
        if copied:
            torch._foreach_copy_(*zip(*copied, strict=True))
        self.n_averaged += 1
