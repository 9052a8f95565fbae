"""Speedrun: a small Vision-BDH v4 that reaches the documented accuracy of v2, 81.73 %, in minutes on two CPU cores.

v2 took 50 epochs for it, which would be 11 to 21 hours on two such cores. Rules: 40,000 of CIFAR-10's training images
train, the other 10,000 validate, every choice was made on validation images (results/v4_search), the test images are
read once, after the last epoch, and the time is that of all training steps, without start-up, validation and test.
analysis/time_to_accuracy.py makes the table and the figure.

    python train_speedrun_cifar10.py --precision bf16
    python analysis/time_to_accuracy.py --runs-dir runs/speedrun_cifar10+precision=bf16
"""

from training import ClassificationConfig, Experiment, launch
from models.vision_bdh import v4_config

EXPERIMENT = Experiment(
    "speedrun_cifar10",
    model=v4_config(  # stem="conv", mixing="conv_per_level", residual="true_pre", level_gain=True, rotary="axial"
        patch_size=4,  # 64 tokens an image
        n_layer=4,
        n_embd=128,
        n_head=4,
        mlp_internal_dim_multiplier=8,  # 256 neurons a head
        dropout=0.0,
        num_classes=10,
    ),
    train=ClassificationConfig(
        dataset="cifar10",
        epochs=10,
        batch_size=64,
        optimizer="muon",
        learning_rate=5e-3,
        weight_decay=0.05,
        warmup_steps=500,
        max_grad_norm=1.0,
        val_fraction=0.2,
        crop_padding=4,
        horizontal_flip=True,
        precision="tf32",
    ),
)

if __name__ == "__main__":
    launch(EXPERIMENT)
