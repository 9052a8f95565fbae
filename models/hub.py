"""Models that are saved to, loaded from and pushed to the Hugging Face Hub, by its PyTorchModelHubMixin.

    from models.hub import HubVisionBDH, on_hub
    from models.pretrained import load_pretrained

    model = on_hub(load_pretrained("speedrun"))
    model.push_to_hub("you/vision-bdh-speedrun")        # or model.save_pretrained("folder")
    model = HubVisionBDH.from_pretrained("you/vision-bdh-speedrun")

Each is the model that its name says, with the same weights; config.json holds the fields of its config class, and
model.safetensors its weights in float32. A checkpoint without safetensors is read with `weights_only=True`.
"""

import dataclasses
from typing import Any, TypeVar

from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from models.bdh_detector import BDHDetector
from models.bdh_unet import BDHUNet
from models.language import BDH
from models.video_bdh import VideoBDH
from models.vision_bdh import VisionBDH

M = TypeVar("M", bound=nn.Module)
PAPER = "https://arxiv.org/abs/2509.26507"
CARD = """---
{{ card_data }}
---

A model of Vision-BDH, which brings the Baby Dragon Hatchling ({{ paper_url }}) to images.
config.json holds all its fields. With Python in a checkout of Vision-BDH whose requirements.txt is installed:

```python
from models.hub import CLASS

model = CLASS.from_pretrained("THIS REPOSITORY, OR A FOLDER WITH ITS FILES")
```
"""


def _about(class_name: str, task: str) -> dict[str, Any]:
    """What the mixin writes into a card. task: the Hub's name for it."""
    tags = ["vision-bdh", "arxiv:2509.26507"]
    card = dict(model_card_template=CARD.replace("CLASS", class_name), paper_url=PAPER)
    return dict(library_name="vision-bdh", license="mit", tags=tags, pipeline_tag=task) | card


class HubVisionBDH(VisionBDH, PyTorchModelHubMixin, **_about("HubVisionBDH", "image-classification")):
    """VisionBDH on the Hub."""


class HubVideoBDH(VideoBDH, PyTorchModelHubMixin, **_about("HubVideoBDH", "video-classification")):
    """VideoBDH on the Hub."""


class HubBDHUNet(BDHUNet, PyTorchModelHubMixin, **_about("HubBDHUNet", "image-segmentation")):
    """BDHUNet on the Hub."""


class HubBDHDetector(BDHDetector, PyTorchModelHubMixin, **_about("HubBDHDetector", "object-detection")):
    """BDHDetector on the Hub."""


class HubBDH(BDH, PyTorchModelHubMixin, **_about("HubBDH", "text-generation")):
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
