"""BDH-UNet on CamVid from scratch: Vision-BDH's encoder and a convolutional decoder, a class for every pixel.

The published configuration. Documented result: 53.17 % validation mIoU at epoch 72 of 80 (one seed, the mean over
batches of each batch's mIoU, which is val_miou_batch here), two to three hours on an RTX 4060.

    python train_bdh_unet.py --seed 1 --precision bf16
    python train_bdh_unet.py --skips --rotary axial
    python train_bdh_unet.py --img-size 128 --epochs 20 --batch-size 8     # a trial
    python train_bdh_unet.py --dataset voc --num-classes 21
"""

from training import Experiment, SegmentationConfig, launch
from models.bdh_unet import bdh_unet_config

EXPERIMENT = Experiment(
    "bdh_unet",
    model=bdh_unet_config(  # residual="pre", attention="raw", init="xavier"
        img_size=384,
        patch_size=8,  # 48 x 48 = 2,304 tokens an image
        n_layer=6,
        n_embd=256,
        n_head=4,
        mlp_internal_dim_multiplier=16,  # 1,024 neurons a head
        dropout=0.1,
        skips=False,  # despite the name, the published decoder has none
        num_classes=11,
    ),
    train=SegmentationConfig(
        dataset="camvid",
        epochs=80,
        batch_size=4,
        learning_rate=3e-4,
        weight_decay=0.01,
        warmup_steps=0,  # a cosine from the first step
        max_grad_norm=1.0,
        dice_weight=0.5,  # the other half is cross-entropy
        horizontal_flip=0.5,
        brightness_contrast=0.5,
        shift_scale_rotate=0.3,
        precision="tf32",
    ),
)

if __name__ == "__main__":
    launch(EXPERIMENT)
