"""Fine-tunes BDH-UNet on CamVid: ten epochs at a tenth of the learning rate, from trained weights.

By default from the best epoch of train_bdh_unet.py, on the same images, as the published fine-tuning did.
Documented result: 53.33 % validation mIoU at epoch 8, after 53.17 % (one seed, mean over batches). Or, beyond the
published work, with the encoder of any Vision-BDH of the same width, heads and neurons, and a new decoder:

    python finetune_bdh_unet.py
    python finetune_bdh_unet.py --seed 1 --start-from runs/bdh_unet/seed1/best.pt --name bdh_unet_finetune
    python finetune_bdh_unet.py --encoder runs/v2_cifar10/seed0/best.pt --n-embd 192 --n-head 6 \\
        --mlp-internal-dim-multiplier 32 --epochs 80 --learning-rate 3e-4
"""

from training import Experiment, SegmentationConfig, launch
from models.bdh_unet import bdh_unet_config
from training.config import ROOT

EXPERIMENT = Experiment(
    "bdh_unet_finetune",
    model=bdh_unet_config(  # residual="pre", attention="raw", init="xavier"
        img_size=384,
        patch_size=8,  # 48 x 48 = 2,304 tokens an image
        n_layer=6,
        n_embd=256,
        n_head=4,
        mlp_internal_dim_multiplier=16,  # 1,024 neurons a head
        dropout=0.1,
        skips=False,
        num_classes=11,
        encoder=None,
    ),
    train=SegmentationConfig(
        dataset="camvid",
        start_from=ROOT / "runs" / "bdh_unet" / "seed0" / "best.pt",
        epochs=10,
        batch_size=4,
        learning_rate=3e-5,
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
