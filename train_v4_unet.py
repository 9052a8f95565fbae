"""BDH-UNet with v4's encoder on CamVid from scratch: a convolutional stem, mixing of neighbouring tokens, skips, Muon.

Not a published experiment. It has 6 % more parameters than train_bdh_unet.py's model.

    python train_v4_unet.py --seed 1 --precision bf16
    python train_v4_unet.py --bridges attention        # attention gates on the skip connections
    python train_v4_unet.py --no-skips --decoder upernet
    python train_v4_unet.py --img-size 96 --epochs 30 --precision bf16      # 45 to 51 minutes on a CPU core
"""

from training import Experiment, SegmentationConfig, launch
from models.bdh_unet import v4_unet_config

EXPERIMENT = Experiment(
    "v4_unet",
    model=v4_unet_config(  # stem="conv", mixing="conv_per_level", residual="true_pre", level_gain=True, rotary="axial"
        img_size=384,
        patch_size=8,  # 48 x 48 = 2,304 tokens an image
        n_layer=6,
        n_embd=256,
        n_head=4,
        mlp_internal_dim_multiplier=16,  # 1,024 neurons a head
        dropout=0.1,
        skips=True,
        num_classes=11,
    ),
    train=SegmentationConfig(
        dataset="camvid",
        epochs=80,
        batch_size=4,
        optimizer="muon",
        learning_rate=2e-3,
        weight_decay=0.05,
        warmup_steps=200,
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
