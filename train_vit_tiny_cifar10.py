"""ViT-Tiny on CIFAR-10: the baseline of the same width, under the same protocol.

Twelve layers, softmax attention, patch 4 (64 tokens, as in the BDH models). Documented
result: 76.05 % test accuracy after 50 epochs (one seed, 40,000 images, about 45 s per epoch on an RTX 4060).

    python train_vit_tiny_cifar10.py --seed 1 --precision bf16
    python train_vit_tiny_cifar10.py --epochs 5 --dropout 0.1
"""

from training import ClassificationConfig, Experiment, launch
from models.baselines import ViTConfig

EXPERIMENT = Experiment(
    "vit_tiny_cifar10",
    model=ViTConfig(
        patch_size=4,  # 64 tokens an image
        n_layer=12,
        n_embd=192,
        n_head=3,
        mlp_dim=768,
        dropout=0.0,
        num_classes=10,
    ),
    train=ClassificationConfig(
        dataset="cifar10",
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
