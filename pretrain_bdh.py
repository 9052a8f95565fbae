"""Pretrains the encoder of BDH-UNet without labels, by reconstructing masked patches (SimMIM).

The sizes are those of BDH-UNet, so that all weights can be loaded; positions are interpolated. CIFAR-10 downloads
itself. Larger images that resemble those to be segmented should work better: put your own into DIR/ANY/ and DIR/OTHER/;
how many such folders and their names do not matter, but there must be at least two.

    python pretrain_bdh.py
    python pretrain_bdh.py --dataset folder --data-dir DIR --img-size 128 --epochs 200
    python finetune_bdh_unet.py --encoder runs/bdh_masked/seed0/best.pt --epochs 80 --learning-rate 3e-4
"""

from training import Experiment, PretrainingConfig, launch
from models.masked_bdh import MaskedBDHConfig

EXPERIMENT = Experiment(
    "bdh_masked",
    model=MaskedBDHConfig(
        img_size=32,
        patch_size=8,  # 16 tokens an image
        n_layer=6,
        n_embd=256,
        n_head=4,
        mlp_internal_dim_multiplier=16,  # 1,024 neurons a head
        dropout=0.1,
        residual="pre",
        init="xavier",
        init_projections="xavier",
        mask_ratio=0.6,
    ),
    train=PretrainingConfig(
        dataset="cifar10",
        epochs=100,
        batch_size=128,
        learning_rate=3e-4,
        weight_decay=0.05,
        warmup_steps=500,
        max_grad_norm=1.0,
        val_fraction=0.1,
        crop_scale_min=0.6,
        horizontal_flip=True,
        precision="tf32",
    ),
)

if __name__ == "__main__":
    launch(EXPERIMENT)
