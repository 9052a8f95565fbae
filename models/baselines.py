"""Baseline models: ViT, MobileNetV2 and EfficientNet-B0 from torchvision, DeiT-Tiny from timm, ResNet U-Nets from
segmentation-models-pytorch, and ResNet-20 for CIFAR, which these libraries lack.

DeiT-Tiny, MobileNetV2 and EfficientNet-B0 were designed for 224 x 224 images and have two settings here. `published` is
the unchanged library model, used for the published numbers: a 32 x 32 image becomes 2 x 2 patches (DeiT-Tiny) or a
1 x 1 feature map before pooling. `fitted` is adapted to 32 x 32 images: 8 x 8 patches or a 4 x 4 feature map.
"""

from dataclasses import dataclass, fields
from functools import partial
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision import models as torchvision_models
from torchvision.ops import stochastic_depth

from models.small_maps import with_fast_small_maps
from models.vision_bdh import ImageSize, check_image_size

FEW_TOKENS = 577  # with the class token
Setting = Literal["published", "fitted"]


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """Fields of every baseline. Integers must be at least 1; floats are probabilities, at least 0 and below 1."""

    size_unit: ClassVar[int | None] = None  # as `VisionEncoderConfig.size_unit`: images of img_size only

    img_size: int = 32
    """height and width of the images, in pixels"""
    num_classes: int = 10
    """number of classes"""

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
        """Image channels; these models take RGB only."""
        return 3


@dataclass(frozen=True, kw_only=True)
class ViTConfig(BaselineConfig):
    """Vision Transformer (torchvision); the defaults are ViT-Tiny for 32 x 32 images."""

    n_layer: int = 12
    """number of transformer layers"""
    n_embd: int = 192
    """embedding width of a token"""
    n_head: int = 3
    """attention heads"""
    mlp_dim: int = 768
    """hidden width of the MLP"""
    dropout: float = 0.0
    """dropout probability after the position embedding, after attention and in the MLP"""
    drop_path: float = 0.0
    """stochastic depth: probability of skipping the last layer for an image; earlier layers in proportion"""
    patch_size: int = 4
    """side of a square patch in pixels; each patch is one token"""

    def __post_init__(self):
        super().__post_init__()
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd} is not a multiple of n_head = {self.n_head}: change one of them")
        check_image_size(self.img_size, self.patch_size, f"patch_size = {self.patch_size}")

    def build(self) -> nn.Module:
        model = ViT(
            image_size=self.img_size,
            patch_size=self.patch_size,
            num_layers=self.n_layer,
            num_heads=self.n_head,
            hidden_dim=self.n_embd,
            mlp_dim=self.mlp_dim,
            dropout=self.dropout,
            num_classes=self.num_classes,
        )
        if self.drop_path:
            for index, layer in enumerate(model.encoder.layers):
                layer.register_forward_hook(partial(_sometimes, self.drop_path * (index + 1) / self.n_layer))
        return model


class ViT(torchvision_models.VisionTransformer):
    """torchvision's; on a CPU in bf16 or fp16, few tokens attend by plain products, many by PyTorch's flash attention.

    Forward and backward, flash attention takes 2.5 times as long for 65 tokens, and is faster above 577.
    """

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, 3, img_size, img_size) -> logits (B, num_classes)."""
        if images.device.type == "cpu" and torch.is_autocast_enabled("cpu") and self.seq_length <= FEW_TOKENS:
            with sdpa_kernel(SDPBackend.MATH):
                return super().forward(images)
        return super().forward(images)


def _sometimes(probability: float, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """Stochastic depth (arXiv 1603.09382) of a whole layer: what it adds to its input is dropped for some samples."""
    (x,) = inputs
    return x + stochastic_depth(output - x, probability, "row") if layer.training else output


@dataclass(frozen=True, kw_only=True)
class DeiTTinyConfig(BaselineConfig):
    """DeiT-Tiny (timm) without distillation, untrained.

    The architecture is ViT-Tiny's; with setting = fitted the two differ only in their initial weights.
    """

    setting: Setting = "published"
    """published: patches of 16 x 16 pixels, 4 tokens for a 32 x 32 image;
    fitted: patches of 4 x 4 pixels, 64 tokens"""

    def __post_init__(self):
        super().__post_init__()
        check_image_size(self.img_size, self.patch_size, f"{self.patch_size}, a patch of setting = {self.setting}")

    @property
    def patch_size(self) -> int:
        """Side of a square patch in pixels."""
        return {"published": 16, "fitted": 4}[self.setting]

    def build(self) -> nn.Module:
        import timm  # here, because the import takes seconds and no other model needs it

        return timm.create_model(
            "deit_tiny_patch16_224",
            pretrained=False,
            img_size=self.img_size,
            patch_size=self.patch_size,
            num_classes=self.num_classes,
        )


@dataclass(frozen=True, kw_only=True)
class MobileNetV2Config(BaselineConfig):
    """MobileNetV2 (torchvision), untrained."""

    size_unit: ClassVar[int | None] = 1

    setting: Setting = "published"
    """published: the library's strides, which leave 1 x 1 of 32 x 32 pixels;
    fitted: the first two strides are 1 instead of 2, which leaves 4 x 4"""
    dropout: float = 0.2
    """dropout probability before the classification head"""

    def build(self) -> nn.Module:
        model = torchvision_models.mobilenet_v2(num_classes=self.num_classes, dropout=self.dropout)
        model = with_fast_small_maps(model)
        return _keep_first_two_strides_at_1(model) if self.setting == "fitted" else model


@dataclass(frozen=True, kw_only=True)
class EfficientNetB0Config(BaselineConfig):
    """EfficientNet-B0 (torchvision), untrained."""

    size_unit: ClassVar[int | None] = 1

    setting: Setting = "published"
    """published: the library's strides, which leave 1 x 1 of 32 x 32 pixels;
    fitted: the first two strides are 1 instead of 2, which leaves 4 x 4"""
    dropout: float = 0.2
    """dropout probability before the classification head"""
    stochastic_depth_prob: float = 0.2
    """probability of skipping the last residual block in training; it grows linearly from 0 with depth"""

    def build(self) -> nn.Module:
        model = torchvision_models.efficientnet_b0(
            num_classes=self.num_classes, dropout=self.dropout, stochastic_depth_prob=self.stochastic_depth_prob
        )
        model = with_fast_small_maps(model)
        return _keep_first_two_strides_at_1(model) if self.setting == "fitted" else model


def _keep_first_two_strides_at_1(model: nn.Module) -> nn.Module:
    """Sets the first two convolutions of stride 2 to stride 1; the weights are unaffected.

    The block of the second one changes the number of channels, so it has no shortcut with either stride.
    """
    strided = [each for each in model.modules() if isinstance(each, nn.Conv2d) and each.stride == (2, 2)]
    for convolution in strided[:2]:
        convolution.stride = (1, 1)
    return model


@dataclass(frozen=True, kw_only=True)
class ResNet20Config(BaselineConfig):
    """ResNet-20 for CIFAR: He et al. 2016 (arXiv 1512.03385), section 4.2, with n = 3."""

    size_unit: ClassVar[int | None] = 1

    def build(self) -> "ResNet20":
        return ResNet20(self)


class ResNet20(nn.Module):
    """A convolution, three stages of three blocks with 16, 32 and 64 channels, global average pooling, linear head."""

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
    """Two convolutions and a shortcut without parameters (option A of the paper)."""

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
        """Identity if the shape is unchanged; otherwise subsampling by the stride and zero-padding of the channels."""
        if self.stride == 1 and self.new_channels == 0:
            return x
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


def _conv3x3(in_channels: int, channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, kernel_size=3, stride=stride, padding=1, bias=False)


@dataclass(frozen=True, kw_only=True)
class ResNetUNetConfig(BaselineConfig):
    """U-Net (Ronneberger et al. 2015) with a ResNet encoder and skip connections at five resolutions."""

    size_unit: ClassVar[int | None] = 32  # the encoder's downsampling factor

    img_size: ImageSize = 384
    """image size in pixels: one side, or height and width"""
    num_classes: int = 11
    """number of classes, not counting void"""
    depth: Literal[34, 50] = 34
    """layers of the ResNet encoder: ResNet-34 or ResNet-50"""
    encoder_weights: Literal["imagenet", "none"] = "imagenet"
    """initial encoder weights: imagenet downloads pretrained ones, none trains from scratch"""

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.img_size, list):  # JSON has no tuples
            object.__setattr__(self, "img_size", tuple(self.img_size))
        check_image_size(self.img_size, self.size_unit, "32, the encoder's downsampling factor")

    def build(self) -> "ResNetUNet":
        """With random weights, see `load_encoder_weights`."""
        return ResNetUNet(self)

    def load_encoder_weights(self, model: "ResNetUNet") -> None:
        """Loads the pretrained encoder weights, downloading them unless they are cached."""
        from segmentation_models_pytorch.encoders import get_encoder  # here, because the import takes seconds

        encoder = get_encoder(f"resnet{self.depth}", weights=self.encoder_weights)
        model.unet.encoder.load_state_dict(encoder.state_dict())


class ResNetUNet(nn.Module):
    """The library's U-Net behind a conversion from [-1, 1], the input of all models here, to ImageNet normalisation."""

    def __init__(self, config: ResNetUNetConfig):
        super().__init__()
        from segmentation_models_pytorch import Unet  # here, because the import takes seconds

        self.unet = Unet(f"resnet{config.depth}", encoder_weights=None, classes=config.num_classes)
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1]
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, 3, height, width) -> logits (B, num_classes, height, width)."""
        return self.unet(((images + 1) / 2 - self.mean) / self.std)
