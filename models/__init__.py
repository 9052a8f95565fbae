"""The models. To add one, write its config class and register it in CONFIG_CLASSES below.

* The config class is a frozen dataclass of the model's hyperparameters. Each field becomes a command-line flag, and the
  string below a field is the flag's help text. It has `img_size` (pixels: one side, or height and width) and
  `in_channels`, as fields or properties, and usually `num_classes`. `__post_init__` raises ValueError for impossible
  values. `build()` returns the untrained module. A model that takes images of other sizes, too, has `size_unit`: their
  sides must be multiples of it.
* The module takes images (B, in_channels, height, width) in [-1, 1]. It returns logits: (B, num_classes) for
  classification, (B, num_classes, height, width) for segmentation; for detection, `bdh_detector.Detections`.
* A run stores the class name and the fields in its config.json. Only a registered model can be built from them again.
"""

from dataclasses import fields as dataclass_fields
from typing import Any

from models.baselines import (
    DeiTTinyConfig,
    EfficientNetB0Config,
    MobileNetV2Config,
    ResNet20Config,
    ResNetUNetConfig,
    ViTConfig,
)
from models.bdh_detector import BDHDetectorConfig
from models.bdh_unet import BDHUNetConfig
from models.language import BDHConfig
from models.masked_bdh import MaskedBDHConfig
from models.video_bdh import VideoBDHConfig
from models.vision_bdh import VisionBDHConfig

CONFIG_CLASSES = {
    cls.__name__: cls
    for cls in (
        BDHConfig,
        VisionBDHConfig,
        VideoBDHConfig,
        ViTConfig,
        DeiTTinyConfig,
        ResNet20Config,
        MobileNetV2Config,
        EfficientNetB0Config,
        BDHUNetConfig,
        BDHDetectorConfig,
        MaskedBDHConfig,
        ResNetUNetConfig,
    )
}


def build_config(class_name: str, fields: dict[str, Any]) -> Any:
    """Builds a config again from the class name and the fields stored in a run's config.json.

    Missing fields take their defaults. Raises ValueError for an unknown class, an unknown field, or a value that the
    class refuses.
    """
    if class_name not in CONFIG_CLASSES:
        known = ", ".join(CONFIG_CLASSES)
        raise ValueError(f"unknown model config {class_name}: register it in models/__init__.py (registered: {known})")
    cls = CONFIG_CLASSES[class_name]
    unknown = set(fields) - {field.name for field in dataclass_fields(cls)}
    if unknown:
        raise ValueError(f"{class_name} has no field {', '.join(sorted(unknown))}: was it stored by another version?")
    try:
        return cls(**fields)
    except TypeError as error:  # a value of the wrong type
        raise ValueError(f"{class_name} does not take the stored values ({error})") from None
