"""Ablations of Vision-BDH: one run with any design choice changed, or a sweep over many.

Starts from v2 on CIFAR-10 (see train_v2_cifar10.py for cost and result); every choice is a flag. A sweep skips finished
runs, resumes stopped ones, and writes a table of means and differences over seeds. Cost: three seeds of one field with
five values are fifteen runs, about ten hours on one GPU at 50 seconds per epoch.

    python train_ablation.py --gate none --rotary axial
    python train_ablation.py --sweep residual,init,attention --seeds 3 --jobs 4
    python train_ablation.py --sweep residual=post/pre,init=normal/xavier --cross --seeds 3 --epochs 10
    python train_ablation.py --dataset cifar100 --num-classes 100 --sweep qk
"""

from training import ClassificationConfig, Experiment
from analysis.compare import compare
from models.vision_bdh import v2_config
from training.sweep import launch_sweep

EXPERIMENT = Experiment(
    "ablation",
    model=v2_config(  # residual="pre", attention="raw", init="xavier"
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
    launch_sweep(EXPERIMENT, report=compare)
