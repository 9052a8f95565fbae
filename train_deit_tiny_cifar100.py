"""DeiT-Tiny on CIFAR-100, by default in the published setting. Needs timm.

`setting="published"` is timm's model with ImageNet patches of 16 x 16: 4 tokens per 32 x 32 image, a weak baseline.
`--setting fitted` uses patches of 4 x 4 (64 tokens, as the BDH models) and is the fairer comparison; it then equals
ViT-Tiny except for the initial weights. Documented result of published: 35.31 % test accuracy after 50 epochs (one
seed, 40,000 images); none for fitted. Cost: 0.05 GFLOP per image forward, fitted 0.73; v2 takes 3.1.

    python train_deit_tiny_cifar100.py --seed 1
    python train_deit_tiny_cifar100.py --setting fitted
"""

from training import ClassificationConfig, Experiment, launch
from models.baselines import DeiTTinyConfig

EXPERIMENT = Experiment(
    "deit_tiny_cifar100",
    model=DeiTTinyConfig(
        setting="published",  # 4 tokens an image; fitted: 64
        num_classes=100,
    ),
    train=ClassificationConfig(
        dataset="cifar100",
        epochs=50,
        batch_size=32,
        learning_rate=1e-4,
        weight_decay=0.05,
        warmup_steps=500,
        max_grad_norm=1.0,
        val_fraction=0.2,
        crop_scale_min=0.8,
        horizontal_flip=True,
        precision="tf32",
    ),
)

if __name__ == "__main__":
    launch(EXPERIMENT)
