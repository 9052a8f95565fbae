"""Vision-BDH v3 on CIFAR-10: depth-scaled pre-norm; documented as a failed experiment.

v3 has an affine LN scaled by 1 / sqrt(level) before every step and no other LN. Documented result: 77.27 % test
accuracy after 50 epochs, 4.46 points below v2 (one seed, 40,000 images). Costs about as much as v2.

    python train_v3_cifar10.py --seed 1 --precision bf16
    python train_v3_cifar10.py --attn-norm --update-norm
"""

from training import ClassificationConfig, Experiment, launch
from models.vision_bdh import v3_config

EXPERIMENT = Experiment(
    "v3_cifar10",
    model=v3_config(  # residual="scaled_pre", attn_norm=False, update_norm=False, attention="raw", init="xavier"
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
