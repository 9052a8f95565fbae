"""The same model with every product with weights as a plain matrix product, for export and for quantisation.

Quantisers look for products whose second factor is a constant matrix; the step's own weights are stacked per head and
enter einsum. Here x E is one product for all heads, a E_v one per head, and the decoder one; everything else is the
model's own code. It computes the plain step, so it is for inference.
"""

import copy

import torch
from torch import Tensor, nn

from models.bdh import BDHCore, StepWeights


class Product(nn.Module):
    """x W. Not an nn.Linear, whose weight is transposed: exporters store a transposed copy for each use."""

    def __init__(self, weight: Tensor):
        """weight: (in, out)."""
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class LevelProducts(nn.Module):
    """The weights of one level as products, under the names of `StepWeights`."""

    def __init__(self, weights: StepWeights):
        super().__init__()
        self.encoder = Product(weights.encoder.transpose(0, 1).flatten(1))
        self.encoder_v = nn.ModuleList(map(Product, weights.encoder_v))
        self.decoder = Product(weights.decoder)
        self.encoder_k = None
        if weights.encoder_k is not None:
            self.encoder_k = Product(weights.encoder_k.transpose(0, 1).flatten(1))


class InProducts:
    """Mixin of a BDHCore whose weights are `LevelProducts`."""

    def take_products(self) -> None:
        """Replaces the stacked weights by plain products."""
        weights = BDHCore.step_weights(self)
        own = [weights[0]] if self.config.shared else weights
        self.products = nn.ModuleList(map(LevelProducts, own))
        for name in StepWeights._fields:
            if hasattr(self, name):
                delattr(self, name)

    def step_weights(self) -> list[LevelProducts]:
        return list(self.products) if len(self.products) > 1 else [self.products[0]] * self.config.n_layer

    def encode(self, x: Tensor, encoder: Product) -> Tensor:
        return encoder(x).unflatten(-1, (self.config.n_head, -1)).transpose(1, 2)

    def encode_attended(self, a: Tensor, encoder_v: nn.ModuleList) -> Tensor:
        return torch.stack([layer(a[:, head]) for head, layer in enumerate(encoder_v)], dim=1)

    def decode(self, gated: Tensor, decoder: Product) -> Tensor:
        return decoder(gated.transpose(1, 2).flatten(2))


def export_form(model: nn.Module) -> nn.Module:
    """A copy of the model in plain products, in evaluation mode; of a model that is not a BDH, just a copy."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for core in [part for part in model.modules() if isinstance(part, BDHCore)]:  # itself, or an encoder in it
        core.__class__ = type(f"Products{type(core).__name__}", (InProducts, type(core)), {})  # the same but for these
        core._fast_path_serves = False
        core.take_products()
    return model
