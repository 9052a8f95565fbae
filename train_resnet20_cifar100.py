"""ResNet-20 on CIFAR-100: a small convolutional network designed for 32 x 32 images, under the same protocol.

Three stages of 16, 32 and 64 channels, 0.28 M parameters (He et al. 2016). Documented result: 45.62 % test accuracy
after 50 epochs (one seed, 40,000 images). Cost: 0.08 GFLOP per image forward; v2 takes 3.1.

    python train_resnet20_cifar100.py --seed 1
    python train_resnet20_cifar100.py --epochs 5 --learning-rate 1e-3
"""

from training import ClassificationConfig, Experiment, launch
from models.baselines import ResNet20Config

EXPERIMENT = Experiment(
    "resnet20_cifar100",
    model=ResNet20Config(num_classes=100),
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
