"""BatchNorm over the whole batch of several processes."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from training import processes
from training.config import UserError

CONVERTED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def has_batchnorm(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def check_batchnorm(model: nn.Module) -> None:
    """Raises UserError if --sync-batchnorm has nothing to act on, or a layer that it cannot replace."""
    if not has_batchnorm(model):
        raise UserError("--sync-batchnorm: this model has no BatchNorm: leave it out")
    for module in model.modules():
        if isinstance(module, _BatchNorm) and type(module) not in CONVERTED:
            raise UserError(f"--sync-batchnorm cannot replace this model's {type(module).__name__}: leave it out")


def sync_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with every BatchNorm normalising over all processes; names and values of its weights stay.

    On a GPU by PyTorch's SyncBatchNorm, which has no CPU implementation; on a CPU by `SharedBatchNorm`.
    """
    if processes.count() == 1:
        return model
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) in CONVERTED:
            module.__class__ = SharedBatchNorm
    return model


class SharedBatchNorm(_BatchNorm):
    """BatchNorm (Ioffe and Szegedy 2015, arXiv 1502.03167) with mean and variance of all processes' samples."""

    def _check_input_dim(self, values: Tensor) -> None:
        pass  # the layer that this one replaces had its own number of dimensions

    @torch.compiler.disable
    def forward(self, values: Tensor) -> Tensor:
        """values: (B, C, ...), B may be 0 in some of the processes."""
        if not self.training:
            return super().forward(values)
        shape, others = (1, -1, *[1] * (values.ndim - 2)), [0, *range(2, values.ndim)]
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        here = wide.new_tensor([values.numel() // values.shape[1]])
        sums = processes.total(torch.cat((wide.sum(others), here)))
        mean, n = sums[:-1] / sums[-1], sums[-1].detach()
        centred = wide - mean.view(shape)
        variance = processes.total(centred.square().sum(others)) / n
        if self.track_running_stats:
            self._follow(mean.detach(), variance.detach() * n / (n - 1).clamp(min=1))
        result = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            result = result * self.weight.view(shape) + self.bias.view(shape)
        return result.to(values.dtype)

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)
