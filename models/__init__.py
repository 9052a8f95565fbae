"""The models. A config class describes each family; its build() makes the module."""

from typing import Any

from models.baselines import (
    DeiTTinyConfig,
    EfficientNetB0Config,
    MobileNetV2Config,
    ResNet20Config,
    ResNetUNetConfig,
    ViTConfig,
)
from models.bdh import BDHConfig
from models.bdh_unet import BDHUNetConfig
from models.masked_bdh import MaskedBDHConfig
from models.vision_bdh import VisionBDHConfig

CONFIG_CLASSES = {
    cls.__name__: cls
    for cls in (
        BDHConfig,
        VisionBDHConfig,
        ViTConfig,
        DeiTTinyConfig,
        ResNet20Config,
        MobileNetV2Config,
        EfficientNetB0Config,
        BDHUNetConfig,
        MaskedBDHConfig,
        ResNetUNetConfig,
    )
}


def build_config(class_name: str, fields: dict[str, Any]) -> Any:
    """The config of that class name, as stored in a run's config.json. Raises KeyError for an unknown class."""
    return CONFIG_CLASSES[class_name](**fields)
