"""Vision-BDH v4 on CIFAR-100: a convolutional stem, mixing of neighbouring tokens, and a modern recipe.

Not a published experiment: v4 has as many parameters as the published v2, and the same shared step with sparse neurons
and raw attention; see docs/model.md for what is around it.

    python train_v4_cifar100.py --seed 1 --precision bf16
    python train_v4_cifar100.py --gate none --precision bf16
"""

from training import ClassificationConfig, Experiment, launch
from models.vision_bdh import v4_config

EXPERIMENT = Experiment(
    "v4_cifar100",
    model=v4_config(  # stem="conv", mixing="conv_per_level", residual="true_pre", level_gain=True, rotary="axial"
        patch_size=4,  # 64 tokens an image
        n_layer=6,
        n_embd=256,
        n_head=4,
        mlp_internal_dim_multiplier=16,  # 1,024 neurons a head
        dropout=0.1,
        num_classes=100,
    ),
    train=ClassificationConfig(
        dataset="cifar100",
        epochs=50,
        batch_size=64,
        optimizer="muon",
        learning_rate=5e-3,
        weight_decay=0.05,
        decay="matrices",
        warmup_steps=500,
        max_grad_norm=1.0,
        val_fraction=0.2,
        crop_padding=4,
        horizontal_flip=True,
        randaugment=2,
        random_erasing=0.25,
        label_smoothing=0.1,
        ema=0.999,
        precision="tf32",
    ),
)

if __name__ == "__main__":
    launch(EXPERIMENT)
