"""A small BDH whose neurons are known by hand, images for it, and counting with plain loops."""

import numpy as np
import torch

from interpretability.common.recorder import record
from models.bdh_unet import bdh_unet_config
from models.vision_bdh import v2_config
from tests.inspecting import BDH, with_large_weights

CLASS_0, OTHERS, NEVER, ALWAYS, CLASS_0_TOO = range(5)  # neurons of each head; those after them are silent, too


def planted_model():
    """One level, in which the red of a patch is dimension 0 and a constant dimension 1.

    In every head, x_sparse of neurons 0 and 4 is active where red is above 0 and grows with it, of neuron 1 where it
    is below, of neuron 3 always, of all others never; y_sparse of every neuron is always active.
    """
    model = v2_config(**(BDH | dict(n_layer=1, rotary="none"))).build().eval()
    signs = {CLASS_0: (0, 1), OTHERS: (0, -1), ALWAYS: (1, 1), CLASS_0_TOO: (0, 2)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.patch_embed.weight[0, 0] = 0.25
        model.patch_embed.bias[1] = 1.0
        for neuron, (dimension, sign) in signs.items():
            model.encoder[:, dimension, neuron] = sign
        model.encoder_v[:, 1] = 1.0
    return model


def planted_images(labels):
    """(B, 3, 8, 8): red is 1 in images of class 0 and -1 in all others."""
    images = torch.zeros(len(labels), 3, 8, 8)
    images[:, 0] = torch.where(torch.tensor(labels) == 0, 1.0, -1.0)[:, None, None]
    return images


def random_model(unet=False, **changed):
    return with_large_weights((bdh_unet_config if unet else v2_config)(**(BDH | changed)).build())


def batches(images, classes, size):
    """images: (B, ...), classes: (B, T), or (B,) for all patches alike."""
    classes = torch.as_tensor(classes)
    if classes.ndim == 1:
        classes = classes[:, None].expand(-1, 16)
    return [(images[at : at + size], classes[at : at + size]) for at in range(0, len(images), size)]


def recorded(model, images):
    """By quantity: (levels, B, H, T, N), of patches, in one pass over all images."""
    with torch.no_grad(), record(model) as trace:
        model(images)
        first = trace.adapter.class_tokens
        by_level = [trace.activity(level) for level in trace.levels]
    return {
        name: np.stack([getattr(activity, name)[:, :, first:].numpy() for activity in by_level])
        for name in ("x_sparse", "y_sparse", "gated")
    }
