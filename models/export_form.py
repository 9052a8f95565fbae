"""The same model with every product with weights as an nn.Linear, for export and for quantisation.

Quantisers look for linear layers, or for matrix products whose second factor is a constant matrix; the step's own
weights are stacked per head and enter einsum. Here x E is one layer for all heads, a E_v one layer per head, and the
decoder one layer; everything else is the model's own code. It computes the plain step, so it is for inference.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from models.bdh import BDH, BDHCore, StepWeights
from models.bdh_unet import BDHUNet
from models.vision_bdh import VisionBDH, VisionEncoder


class LevelLinears(nn.Module):
    """The weights of one level as linear layers, under the names of `StepWeights`."""

    def __init__(self, weights: StepWeights):
        super().__init__()
        self.encoder = _linear(weights.encoder.transpose(1, 2).flatten(0, 1))
        self.encoder_v = nn.ModuleList(_linear(each.mT) for each in weights.encoder_v)
        self.decoder = _linear(weights.decoder.mT)
        self.encoder_k = None
        if weights.encoder_k is not None:
            self.encoder_k = _linear(weights.encoder_k.transpose(1, 2).flatten(0, 1))


def _linear(weight: Tensor) -> nn.Linear:
    """weight: (out, in)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    return layer


class InLinears:
    """Mixin of a BDHCore whose weights are `LevelLinears`."""

    def take_linears(self) -> None:
        """Replaces the stacked weights by linear layers."""
        weights = BDHCore.step_weights(self)
        own = [weights[0]] if self.config.shared else weights
        self.linears = nn.ModuleList(map(LevelLinears, own))
        for name in StepWeights._fields:
            if hasattr(self, name):
                delattr(self, name)

    def step_weights(self) -> list[LevelLinears]:
        return list(self.linears) if len(self.linears) > 1 else [self.linears[0]] * self.config.n_layer

    def encode(self, x: Tensor, encoder: nn.Linear) -> Tensor:
        return encoder(x).unflatten(-1, (self.config.n_head, -1)).transpose(1, 2)

    def encode_attended(self, a: Tensor, encoder_v: nn.ModuleList) -> Tensor:
        return torch.stack([layer(a[:, head]) for head, layer in enumerate(encoder_v)], dim=1)

    def decode(self, gated: Tensor, decoder: nn.Linear) -> Tensor:
        return decoder(gated.transpose(1, 2).flatten(2))


class LinearVisionBDH(InLinears, VisionBDH):
    pass


class LinearVisionEncoder(InLinears, VisionEncoder):
    pass


class LinearBDH(InLinears, BDH):
    pass


FORMS: dict[type, type] = {VisionBDH: LinearVisionBDH, VisionEncoder: LinearVisionEncoder, BDH: LinearBDH}


def export_form(model: nn.Module) -> nn.Module:
    """A copy of the model in linear layers, in evaluation mode; of a model that is not a BDH, just a copy."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    if isinstance(model, BDHUNet):
        model.encoder = _in_linears(model.encoder)
        return model
    return _in_linears(model)


def _in_linears(model: Any) -> nn.Module:
    for base, form in FORMS.items():
        if isinstance(model, base):
            model.__class__ = form  # same attributes, other products
            model._fast_path_serves = False
            model.take_linears()
            return model
    return model
