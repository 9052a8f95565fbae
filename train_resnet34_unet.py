"""ResNet34-UNet on CamVid, the baseline of BDH-UNet: encoder pretrained on ImageNet, or from scratch.

The weights are downloaded once by segmentation-models-pytorch. Documented result with them: 70.73 %
validation mIoU at epoch 36 of 40 (one seed, mean over batches). From scratch it was only estimated, at 52 to 58 %; as
BDH-UNet is trained:

    python train_resnet34_unet.py --seed 1
    python train_resnet34_unet.py --encoder-weights none --epochs 80
"""

from training import Experiment, SegmentationConfig, launch
from models.baselines import ResNetUNetConfig

EXPERIMENT = Experiment(
    "resnet34_unet",
    model=ResNetUNetConfig(
        depth=34,
        img_size=384,
        encoder_weights="imagenet",
        num_classes=11,
    ),
    train=SegmentationConfig(
        dataset="camvid",
        epochs=40,
        batch_size=4,
        learning_rate=3e-4,
        weight_decay=0.01,
        warmup_steps=0,
        max_grad_norm=1.0,
        dice_weight=0.5,
        horizontal_flip=0.5,
        brightness_contrast=0.5,
        shift_scale_rotate=0.3,
        precision="tf32",
    ),
)

if __name__ == "__main__":
    launch(EXPERIMENT)
