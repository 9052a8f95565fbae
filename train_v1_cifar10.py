"""Vision-BDH v1 on CIFAR-10: the first version, the baseline of v2.

v1 normalises the residual stream after every step and starts from N(0, 0.02) weights. Documented result: 80.43 % test
accuracy after 50 epochs (one seed, 40,000 images, about 50 s per epoch on an RTX 4060).

    python train_v1_cifar10.py --seed 1 --precision bf16
    python train_v1_cifar10.py --epochs 10 --mlp-internal-dim-multiplier 128
"""

from training import ClassificationConfig, Experiment, launch
from models.vision_bdh import v1_config

EXPERIMENT = Experiment(
    "v1_cifar10",
    model=v1_config(  # residual="post", attention="raw", init="normal"
        patch_size=4,  # 64 tokens an image
        n_layer=6,
        n_embd=192,
        n_head=6,
        mlp_internal_dim_multiplier=32,  # 1,024 neurons a head
        dropout=0.1,
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
