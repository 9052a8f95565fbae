"""Quickstart: a small Vision-BDH on scikit-learn's handwritten digits, without a GPU or a download.

1,797 images of 8 x 8 pixels. Expected: 95 to 99 % test accuracy after 40 epochs, about a minute on two CPU cores. Then
draws the learning curve and the attention of the centre patch.

    python train_quickstart.py
    python train_quickstart.py --seed 1 --n-layer 2
"""

from training import ClassificationConfig, Experiment, launch
from analysis.analyze import analyze
from interpretability.visualize_attention import visualize
from models.vision_bdh import v2_config

EXPERIMENT = Experiment(
    "quickstart",
    model=v2_config(
        img_size=8,
        patch_size=2,  # 16 tokens an image
        in_channels=1,
        n_layer=4,
        n_embd=48,
        n_head=4,
        mlp_internal_dim_multiplier=8,  # 96 neurons a head
        dropout=0.1,
    ),
    train=ClassificationConfig(
        dataset="digits",
        epochs=40,
        batch_size=64,
        learning_rate=2e-3,  # 20 times CIFAR's: the model and the data are small
        weight_decay=0.05,
        val_fraction=0.1,
        horizontal_flip=False,  # a mirrored digit is another sign
    ),
)

if __name__ == "__main__":
    run = launch(EXPERIMENT)
    curves, *_ = analyze([run], run)
    attention = visualize(run, run)
    print(f"\nThe run is in            {run}\nIts learning curve:      {curves}\nWhat it attends to:      {attention}")
