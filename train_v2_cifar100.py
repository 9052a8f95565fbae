"""Vision-BDH v2 on CIFAR-100: the headline model on 100 classes with 400 training images each.

The model of train_v2_cifar10.py with 100 outputs. Documented result: 51.44 % test accuracy after 50 epochs (one seed,
40,000 images). An epoch costs the same as on CIFAR-10.

    python train_v2_cifar100.py --seed 1 --precision bf16
    python train_v2_cifar100.py --epochs 5 --n-layer 12
"""

from training import ClassificationConfig, Experiment, launch
from models.vision_bdh import v2_config

EXPERIMENT = Experiment(
    "v2_cifar100",
    model=v2_config(  # residual="pre", attention="raw", init="xavier"
        patch_size=4,  # 64 tokens an image
        n_layer=6,
        n_embd=192,
        n_head=6,
        mlp_internal_dim_multiplier=32,  # 1,024 neurons a head
        dropout=0.1,
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
