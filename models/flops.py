"""Training operations of a model: those of its matrix products and convolutions, forward and backward."""

import math
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.vision_bdh import ImageSize, height_and_width


def flop_per_image(model: nn.Module, img_size: ImageSize, in_channels: int = 3) -> float:
    """Operations of the products and convolutions of a training step for one image, forward and backward.

    Some products of a fast path are not counted; on the device "meta" a BDH takes its plain path.
    """
    height, width = height_and_width(img_size)
    device = next(model.parameters()).device
    images = torch.zeros(2, in_channels, height, width, device=device)  # two, as BatchNorm needs
    counts = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=counts) as counter:
        outputs = model(images)
        sum(each.sum() for each in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
    return counter.get_total_flops() / len(images)


def _convolution_backward(grad, x, weight, *settings, out_shape=None) -> int:
    """Operations of a convolution's two gradients, from shapes; PyTorch's own count leaves out its groups."""
    *_, transposed, _, _, (for_input, for_weight, _) = settings
    return 2 * math.prod(x if transposed else grad) * math.prod(weight[1:]) * (for_input + for_weight)


@cache
def flop_of(config: Any, sizes: tuple[int, ...] = ()) -> float:
    """`flop_per_image` of a config's model on the device "meta": counted once, nothing is computed.

    sizes: of the training images, if they are drawn from several (`train_sizes`); the mean over them.
    """
    with torch.device("meta"):
        model = config.build()
    counts = [flop_per_image(model, size, getattr(config, "in_channels", 3)) for size in sizes or (config.img_size,)]
    return sum(counts) / len(counts)
