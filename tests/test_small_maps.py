"""Convolutions of small maps as products, held to the library's convolution."""

import pytest
import torch
from torch import nn
from torchvision import models as torchvision_models

from models.baselines import EfficientNetB0Config, MobileNetV2Config
from models.small_maps import SmallMapConv2d, with_fast_small_maps

LIBRARY = {MobileNetV2Config: torchvision_models.mobilenet_v2, EfficientNetB0Config: torchvision_models.efficientnet_b0}


def results(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of a random weighting of it: by x, then by the parameters."""
    x = x.clone().requires_grad_()
    y = model(x)
    weighting = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    return [y, *torch.autograd.grad((y * weighting).sum(), [x, *model.parameters()])]


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (4, 4), (1, 3), (5, 2), (16, 1)])
@pytest.mark.parametrize(
    "fields",
    [
        dict(kernel_size=3, padding=1, groups=6),
        dict(kernel_size=5, padding=2, groups=6),
        dict(kernel_size=5, padding=2, stride=2, groups=6),
        dict(kernel_size=3, padding=2, dilation=2, groups=6),
        dict(kernel_size=(1, 3), padding=(0, 1), stride=(2, 1), groups=6),
        dict(kernel_size=1, out_channels=9),
        dict(kernel_size=1, out_channels=9, bias=True),
    ],
    ids=str,
)
def test_products_are_the_convolution(fields, size):
    fields = dict(out_channels=6, bias=False) | fields
    plain = nn.Conv2d(6, **fields, dtype=torch.float64)
    fast = SmallMapConv2d(plain)
    x = torch.randn(4, 6, *size, dtype=torch.float64)
    for ours, librarys in zip(results(fast, x), results(plain, x), strict=True):
        torch.testing.assert_close(ours, librarys)


@pytest.mark.parametrize("fields", [dict(kernel_size=3, padding=1, groups=6, bias=False), dict(kernel_size=1)], ids=str)
def test_products_in_bf16(fields):
    plain = nn.Conv2d(6, 6, **fields)
    x = torch.randn(4, 6, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        ours, librarys = SmallMapConv2d(plain)(x), plain(x)
    assert ours.dtype == librarys.dtype == torch.bfloat16
    torch.testing.assert_close(ours, librarys, rtol=0.02, atol=0.01)


def test_small_maps_take_products_and_only_in_training(monkeypatch):
    sizes = []
    as_products = SmallMapConv2d.as_products
    monkeypatch.setattr(SmallMapConv2d, "as_products", lambda conv, x: sizes.append(x.shape[2]) or as_products(conv, x))
    conv = SmallMapConv2d(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False))
    side = int(conv.few_pixels**0.5)
    for map_side in (1, side, side + 1):
        conv.train()(torch.randn(2, 8, map_side, map_side))
        conv.eval()(torch.randn(2, 8, map_side, map_side))
    assert sizes == [1, side]


@pytest.mark.parametrize("config", LIBRARY)
def test_a_model_trains_as_the_librarys(config):
    """Same initial weights from the same seed, same names, and in training the same output and gradients."""
    torch.manual_seed(4)
    fields = {"stochastic_depth_prob": 0.0} if config is EfficientNetB0Config else {}
    ours = config(num_classes=10, dropout=0.0, **fields).build().double()
    torch.manual_seed(4)
    librarys = LIBRARY[config](num_classes=10, dropout=0.0, **fields).double()
    assert sum(isinstance(module, SmallMapConv2d) for module in ours.modules()) > 30
    for (name, value), (librarys_name, librarys_value) in zip(
        ours.state_dict().items(), librarys.state_dict().items(), strict=True
    ):
        assert name == librarys_name and torch.equal(value, librarys_value)
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    for our_value, value in zip(results(ours, x), results(librarys, x), strict=True):
        torch.testing.assert_close(our_value, value, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.Conv2d(8, 16, 3, padding=1, groups=8),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False, padding_mode="reflect"),
        nn.Conv2d(8, 8, 1, stride=2),
        nn.Conv2d(8, 8, 1, padding=1),
    ],
    ids=str,
)
def test_other_convolutions_stay(conv):
    model = with_fast_small_maps(nn.Sequential(conv))
    assert model[0] is conv
