"""Baselines, from libraries: torchvision's and timm's models, ResNet-20 for CIFAR, which neither has, and
segmentation-models-pytorch's U-Nets on ResNets.

DeiT-Tiny, MobileNetV2 and EfficientNet-B0 were made for images of 224 x 224 and have two settings here. `published` is
the library's model as it is, which is how the published numbers were made; of a 32 x 32 image it leaves 2 x 2 patches
(DeiT-Tiny) or 1 x 1 before pooling. `fitted` leaves 8 x 8 patches or 4 x 4 before pooling.
"""

from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models as torchvision_models

from models.vision_bdh import ImageSize, check_image_size

Setting = Literal["published", "fitted"]


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """What every baseline has. Whole numbers in a config must be at least 1, its other numbers are probabilities."""

    img_size: int = 32
    """height and width of the images, in pixels"""
    num_classes: int = 10
    """outputs of the classification head"""

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise ValueError(f"{field.name} = {value} must be at least 1")
            if field.type is float and not 0.0 <= value < 1.0:
                raise ValueError(f"{field.name} = {value} must be at least 0 and below 1")
            if field.type is Setting and value not in get_args(Setting):
                raise ValueError(f"{field.name} = {value} must be one of {', '.join(get_args(Setting))}")

    @property
    def in_channels(self) -> int:
        """Colour channels of the images, fixed in these models."""
        return 3


def _check_patches(img_size: int, patch_size: int, what: str) -> None:
    if img_size % patch_size:
        raise ValueError(f"img_size = {img_size} is not a multiple of {what}: change one of them")


@dataclass(frozen=True, kw_only=True)
class ViTConfig(BaselineConfig):
    """A Vision Transformer; the defaults are ViT-Tiny for 32 x 32 images."""

    n_layer: int = 12
    """transformer layers, each with weights of its own"""
    n_embd: int = 192
    """width of a token"""
    n_head: int = 3
    """attention heads"""
    mlp_dim: int = 768
    """width inside the MLP"""
    dropout: float = 0.0
    """after the positions, the attention and in the MLP"""
    patch_size: int = 4
    """side of a patch, in pixels; each patch is a token"""

    def __post_init__(self):
        super().__post_init__()
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd} is not a multiple of n_head = {self.n_head}: change one of them")
        _check_patches(self.img_size, self.patch_size, f"patch_size = {self.patch_size}")

    def build(self) -> nn.Module:
        return torchvision_models.VisionTransformer(
            image_size=self.img_size,
            patch_size=self.patch_size,
            num_layers=self.n_layer,
            num_heads=self.n_head,
            hidden_dim=self.n_embd,
            mlp_dim=self.mlp_dim,
            dropout=self.dropout,
            num_classes=self.num_classes,
        )


@dataclass(frozen=True, kw_only=True)
class DeiTTinyConfig(BaselineConfig):
    """timm's DeiT-Tiny without distillation, untrained.

    Its layers are those of ViT-Tiny: fitted, the two differ only in the weights that they start from.
    """

    setting: Setting = "published"
    """published: patches of 16 x 16 pixels, 4 tokens of a 32 x 32 image; fitted: 4 x 4 pixels, 64 tokens"""

    def __post_init__(self):
        super().__post_init__()
        _check_patches(self.img_size, self.patch_size, f"{self.patch_size}, a patch of setting = {self.setting}")

    @property
    def patch_size(self) -> int:
        """Side of a patch, in pixels."""
        return {"published": 16, "fitted": 4}[self.setting]

    def build(self) -> nn.Module:
        """Raises ImportError where timm is missing."""
        try:
            import timm  # here, because it takes seconds and no other model needs it
        except ImportError as error:
            raise ImportError(f"DeiT-Tiny comes from timm, which is missing: pip install timm ({error})") from error
        return timm.create_model(
            "deit_tiny_patch16_224",
            pretrained=False,
            img_size=self.img_size,
            patch_size=self.patch_size,
            num_classes=self.num_classes,
        )


@dataclass(frozen=True, kw_only=True)
class MobileNetV2Config(BaselineConfig):
    """torchvision's MobileNetV2, untrained."""

    setting: Setting = "published"
    """published: halves the image five times, 32 x 32 to 1 x 1; fitted: three times, to 4 x 4"""
    dropout: float = 0.2
    """before the head"""

    def build(self) -> nn.Module:
        model = torchvision_models.mobilenet_v2(num_classes=self.num_classes, dropout=self.dropout)
        return _keep_first_two_strides_at_1(model) if self.setting == "fitted" else model


@dataclass(frozen=True, kw_only=True)
class EfficientNetB0Config(BaselineConfig):
    """torchvision's EfficientNet-B0, untrained."""

    setting: Setting = "published"
    """published: halves the image five times, 32 x 32 to 1 x 1; fitted: three times, to 4 x 4"""
    dropout: float = 0.2
    """before the head"""
    stochastic_depth_prob: float = 0.2
    """with which the last block is skipped in training; of those before it, in proportion to their depth"""

    def build(self) -> nn.Module:
        model = torchvision_models.efficientnet_b0(
            num_classes=self.num_classes, dropout=self.dropout, stochastic_depth_prob=self.stochastic_depth_prob
        )
        return _keep_first_two_strides_at_1(model) if self.setting == "fitted" else model


def _keep_first_two_strides_at_1(model: nn.Module) -> nn.Module:
    """The first two convolutions that halve the image no longer do; every weight stays.

    The block of the second has more channels out than in, so that it has no shortcut with either stride.
    """
    strided = [each for each in model.modules() if isinstance(each, nn.Conv2d) and each.stride == (2, 2)]
    for convolution in strided[:2]:
        convolution.stride = (1, 1)
    return model


@dataclass(frozen=True, kw_only=True)
class ResNet20Config(BaselineConfig):
    """ResNet-20 for CIFAR: He et al. 2016 (arXiv 1512.03385), section 4.2, with n = 3."""

    def build(self) -> "ResNet20":
        return ResNet20(self)


class ResNet20(nn.Module):
    """A convolution, three stages of three blocks with 16, 32 and 64 channels, mean over pixels, linear head."""

    def __init__(self, config: ResNet20Config):
        super().__init__()
        self.conv = _conv3x3(3, 16)
        self.norm = nn.BatchNorm2d(16)
        blocks = []
        for before, channels, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)):
            blocks += [ResNetBlock(before, channels, stride), *(ResNetBlock(channels, channels, 1) for _ in range(2))]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(64, config.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")  # He et al. 2015, equation 10

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, 3, S, S) -> logits (B, num_classes)."""
        x = F.relu(self.norm(self.conv(images)))  # (B, 16, S, S)
        x = self.blocks(x)  # (B, 64, S / 4, S / 4)
        return self.head(x.mean((2, 3)))


class ResNetBlock(nn.Module):
    """Two convolutions, and a shortcut that has no parameters (option A of the paper)."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.new_channels = channels - in_channels
        self.conv1 = _conv3x3(in_channels, channels, stride)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv3x3(channels, channels)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, S, S) -> (B, channels, S / stride, S / stride)."""
        update = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(update + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        """x where the shape stays; else every second pixel both ways, and channels of zeros behind those of x."""
        if self.stride == 1 and self.new_channels == 0:
            return x
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


def _conv3x3(in_channels: int, channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, kernel_size=3, stride=stride, padding=1, bias=False)


@dataclass(frozen=True, kw_only=True)
class ResNetUNetConfig(BaselineConfig):
    """A U-Net (Ronneberger et al. 2015) whose encoder is a ResNet, with skip connections at five sizes."""

    img_size: ImageSize = 384
    """side of the images in pixels, or their height and width"""
    num_classes: int = 11
    """classes of a pixel, void not among them"""
    depth: Literal[34, 50] = 34
    """of the ResNet"""
    encoder_weights: Literal["imagenet", "none"] = "imagenet"
    """imagenet: the encoder starts from weights trained there, which are downloaded; none: from scratch"""

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.img_size, list):  # as JSON gives a tuple back
            object.__setattr__(self, "img_size", tuple(self.img_size))
        check_image_size(self.img_size, 32, "32, which the encoder makes one pixel of")

    def build(self) -> "ResNetUNet":
        """With weights drawn; `load_encoder_weights` brings others. Raises ImportError where the library is missing."""
        return ResNetUNet(self)

    def load_encoder_weights(self, model: "ResNetUNet") -> None:
        """Downloads the encoder's weights, or takes them from where an earlier download left them."""
        encoder = _import_smp().encoders.get_encoder(f"resnet{self.depth}", weights=self.encoder_weights)
        model.unet.encoder.load_state_dict(encoder.state_dict())


class ResNetUNet(nn.Module):
    """Takes images in [-1, 1] like every model here, and gives the encoder what ImageNet's ResNets were trained on."""

    def __init__(self, config: ResNetUNetConfig):
        super().__init__()
        self.unet = _import_smp().Unet(f"resnet{config.depth}", encoder_weights=None, classes=config.num_classes)
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels between 0 and 1
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, 3, height, width) -> logits (B, num_classes, height, width)."""
        return self.unet(((images + 1) / 2 - self.mean) / self.std)


def _import_smp():
    try:
        import segmentation_models_pytorch  # here, because it takes seconds and no other model needs it
    except ImportError as error:
        raise ImportError(
            "the ResNet U-Nets come from segmentation-models-pytorch, which is missing: "
            f"pip install segmentation-models-pytorch ({error})"
        ) from error
    return segmentation_models_pytorch


def vit_tiny_config(**overrides) -> ViTConfig:
    return ViTConfig(**overrides)


def deit_tiny_config(**overrides) -> DeiTTinyConfig:
    return DeiTTinyConfig(**overrides)


def resnet20_config(**overrides) -> ResNet20Config:
    return ResNet20Config(**overrides)


def mobilenetv2_config(**overrides) -> MobileNetV2Config:
    return MobileNetV2Config(**overrides)


def efficientnet_b0_config(**overrides) -> EfficientNetB0Config:
    return EfficientNetB0Config(**overrides)


def resnet34_unet_config(**overrides) -> ResNetUNetConfig:
    return ResNetUNetConfig(**(dict(depth=34) | overrides))


def resnet50_unet_config(**overrides) -> ResNetUNetConfig:
    return ResNetUNetConfig(**(dict(depth=50) | overrides))


def vit_tiny(**overrides) -> nn.Module:
    return vit_tiny_config(**overrides).build()


def deit_tiny(**overrides) -> nn.Module:
    return deit_tiny_config(**overrides).build()


def resnet20(**overrides) -> ResNet20:
    return resnet20_config(**overrides).build()


def mobilenetv2(**overrides) -> nn.Module:
    return mobilenetv2_config(**overrides).build()


def efficientnet_b0(**overrides) -> nn.Module:
    return efficientnet_b0_config(**overrides).build()


def resnet34_unet(**overrides) -> ResNetUNet:
    return resnet34_unet_config(**overrides).build()


def resnet50_unet(**overrides) -> ResNetUNet:
    return resnet50_unet_config(**overrides).build()
