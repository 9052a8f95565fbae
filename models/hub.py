"""Models that are saved to, loaded from and pushed to the Hugging Face Hub, by its PyTorchModelHubMixin.

    from models.hub import HubVisionBDH, on_hub
    from models.pretrained import load_pretrained

    model = on_hub(load_pretrained("v2_cifar10"))
    model.push_to_hub("you/vision-bdh-v2-cifar10")        # or model.save_pretrained("folder")
    model = HubVisionBDH.from_pretrained("you/vision-bdh-v2-cifar10")

Each is the model that its name says, with the same weights; config.json holds the fields of its config class, and
model.safetensors its weights in float32. A checkpoint without safetensors is read with `weights_only=True`.
"""

import dataclasses
from typing import TypeVar

from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from models.bdh_detector import BDHDetector
from models.bdh_unet import BDHUNet
from models.language import BDH
from models.video_bdh import VideoBDH
from models.vision_bdh import VisionBDH

M = TypeVar("M", bound=nn.Module)
ABOUT = dict(library_name="vision-bdh", license="mit", tags=["vision-bdh", "arxiv:2509.26507"])


class HubVisionBDH(VisionBDH, PyTorchModelHubMixin, pipeline_tag="image-classification", **ABOUT):
    """VisionBDH on the Hub."""


class HubVideoBDH(VideoBDH, PyTorchModelHubMixin, pipeline_tag="video-classification", **ABOUT):
    """VideoBDH on the Hub."""


class HubBDHUNet(BDHUNet, PyTorchModelHubMixin, pipeline_tag="image-segmentation", **ABOUT):
    """BDHUNet on the Hub."""


class HubBDHDetector(BDHDetector, PyTorchModelHubMixin, pipeline_tag="object-detection", **ABOUT):
    """BDHDetector on the Hub."""


class HubBDH(BDH, PyTorchModelHubMixin, pipeline_tag="text-generation", **ABOUT):
    """The language model on the Hub."""


HUB_CLASSES = {
    VisionBDH: HubVisionBDH,
    VideoBDH: HubVideoBDH,
    BDHUNet: HubBDHUNet,
    BDHDetector: HubBDHDetector,
    BDH: HubBDH,
}


def on_hub(model: M) -> M:
    """The same model, with a copy of its weights, as a class with save_pretrained and push_to_hub.

    Raises TypeError for a model without such a class.
    """
    if type(model) not in HUB_CLASSES:
        names = ", ".join(each.__name__ for each in HUB_CLASSES)
        raise TypeError(f"{type(model).__name__} has no class for the Hub, only {names}")
    config = model.config
    if getattr(config, "encoder", None):  # a path of the machine that trained it
        config = dataclasses.replace(config, encoder=None)
    copy = HUB_CLASSES[type(model)](config)
    copy.load_state_dict(model.state_dict())
    return copy.train(model.training)
