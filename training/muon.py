"""Muon (K. Jordan et al. 2024): momentum whose update is orthogonalised, for weights that are matrices."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from training.device import has_fast_bf16

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic whose slope at 0 is steep: five steps bring all to about 0.7 to 1.2
STEPS = 5
RMS = 0.2  # root mean square of an AdamW update: Moonshot AI 2025 (arXiv 2502.16982), so that rates are comparable


def orthogonalise(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearly U V^T of each matrix U S V^T, by Newton-Schulz steps in dtype. matrices: (B, m, n) -> (B, m, n).

    X = G / |G|; then X <- a X + (b A + c A^2) X with A = X X^T, on the side where A is smaller.
    """
    x = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class MuonWithAdamW(Optimizer):
    """Muon for groups with `shapes`, AdamW for groups whose `shapes` is None; one state, one schedule.

    shapes: of each parameter as a stack of matrices (..., rows, columns); each matrix is orthogonalised by itself. A
    Muon step is the Nesterov momentum g + mu B, orthogonalised and scaled to a root mean square of 0.2, after decoupled
    weight decay. Matrices of equal shape go through the Newton-Schulz steps as one batch.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        eps: float = 1e-8,
    ):
        super().__init__(groups, dict(lr=lr, momentum=momentum, betas=betas, weight_decay=weight_decay, eps=eps))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            if "step" in state:  # PyTorch moves everything to the parameter's device but this
                state["step"] = state["step"].to(parameter.device)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for group in self.param_groups:
            if group["shapes"] is None:
                self._adamw_step(group)
            else:
                self._muon_step(group)

    def _muon_step(self, group: dict[str, Any]) -> None:
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter, shape in zip(group["params"], group["shapes"], strict=True):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer = state["momentum_buffer"]
            buffer.lerp_(parameter.grad, 1 - group["momentum"])
            update = parameter.grad.lerp(buffer, group["momentum"])
            matrices = update.reshape(shape).flatten(0, -3) if len(shape) > 2 else update.reshape(shape)[None]
            by_shape[tuple(matrices.shape[1:])].append((parameter, matrices))
        for (rows, columns), members in by_shape.items():
            together = torch.cat([matrices for _, matrices in members])
            dtype = torch.bfloat16 if has_fast_bf16(together.device) else together.dtype
            updates = orthogonalise(together, dtype).split([len(matrices) for _, matrices in members])
            rate = group["lr"] * RMS * math.sqrt(max(rows, columns))
            for (parameter, _), update in zip(members, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                update = update.reshape(parameter.shape)
                if isinstance(rate, Tensor):  # in a CUDA graph
                    parameter.addcmul_(update, rate, value=-1)
                else:
                    parameter.add_(update, alpha=-rate)

    def _adamw_step(self, group: dict[str, Any]) -> None:
        parameters = [each for each in group["params"] if each.grad is not None]
        if not parameters:
            return
        for parameter in parameters:
            if not self.state[parameter]:
                zeros = (torch.zeros_like(parameter), torch.zeros_like(parameter))
                step = torch.zeros((), dtype=torch.float32, device=parameter.device)
                self.state[parameter] |= dict(zip(("exp_avg", "exp_avg_sq", "step"), (*zeros, step), strict=True))
        states = [self.state[each] for each in parameters]
        adamw(
            parameters,
            [each.grad for each in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=parameters[0].device.type in ("cpu", "cuda"),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
