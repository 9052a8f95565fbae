"""Optimizers and the learning-rate schedule."""

import math
from functools import partial

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR


def make_adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> AdamW:
    """AdamW over all parameters, weight decay on every one, fused where PyTorch has a fused kernel."""
    device = next(model.parameters()).device
    fused = device.type in ("cpu", "cuda")
    return AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=fused)


def make_schedule(optimizer: Optimizer, total_steps: int, warmup_steps: int) -> LambdaLR:
    """Scales each group's peak rate by `rate_factor`, from step 0."""
    return LambdaLR(optimizer, partial(rate_factor, total_steps=total_steps, warmup_steps=warmup_steps))


def set_step(schedule: LambdaLR, step: int) -> None:
    """Sets the rates of a step counted from 0: the schedule has no other state, and resumes from it."""
    schedule.last_epoch = step
    for group, peak, factor in zip(
        schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["initial_lr"], group["lr"] = peak, peak * factor(step)


def rate_factor(step: int, total_steps: int, warmup_steps: int) -> float:
    """Learning rate of a step, counted from 0, as a share of the peak: step / warm-up, then half a cosine down to 0.

    Warm-up takes at most a tenth of all steps, so that short runs learn.
    """
    warmup = min(warmup_steps, total_steps // 10)
    if step < warmup:
        return step / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup))) / 2
