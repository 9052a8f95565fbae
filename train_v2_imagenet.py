"""Vision-BDH v2 on ImageNet-1k at 224 pixels, patch 16: as many parameters as ViT-Small, a little more work.

Levels have weights of their own: 22.0 M parameters, 5.3 G multiply-adds an image (ViT-Small: 22.1 M, 4.6 G). The size
`base` (86.4 M, 19.6 G; ViT-Base: 86.6 M, 17.6 G) and one set of weights for all levels are flags. DeiT's recipe (arXiv
2012.12877), without repeated augmentation, for 100 epochs: about 4,000 PFLOP, some 6 hours at 200 TFLOP/s. Never run to
its end so far.

    python train_v2_imagenet.py --data-dir DIR --num-workers 16
    python train_v2_imagenet.py --data-dir DIR --n-embd 768 --n-head 8 --batch-size 128 --grad-accum 8    # base
    python train_v2_imagenet.py --data-dir DIR --shared     # the same work, 4.3 M parameters
"""

from training import ClassificationConfig, Experiment, launch
from models.vision_bdh import v2_config

EXPERIMENT = Experiment(
    "v2_imagenet",
    model=v2_config(  # residual="pre", attention="raw", init="xavier"
        img_size=224,
        patch_size=16,  # 196 tokens an image
        num_classes=1000,
        n_layer=6,
        n_embd=384,
        n_head=4,
        mlp_internal_dim_multiplier=8,  # 768 neurons a head
        shared=False,
        dropout=0.0,
        drop_path=0.1,
    ),
    train=ClassificationConfig(
        dataset="imagenet",
        val_fraction=0.01,  # of the training images; the official validation part is the test set
        epochs=100,
        batch_size=256,
        grad_accum=4,  # 1,024 images a step
        learning_rate=1e-3,
        weight_decay=0.05,
        decay="matrices",
        warmup_steps=6000,
        crop_original=True,
        crop_scale_min=0.08,
        eval_crop=0.875,
        horizontal_flip=True,
        randaugment=2,
        random_erasing=0.25,
        mixup=0.8,
        cutmix=1.0,
        label_smoothing=0.1,
        precision="bf16",
    ),
)

if __name__ == "__main__":
    launch(EXPERIMENT)
