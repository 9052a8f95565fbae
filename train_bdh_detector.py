"""BDH-Detector: v4's encoder and a DETR head, on images with boxes in COCO's format. Not a published experiment.

    python tools/make_detection_data.py     # makes data_coco/: scenes of 1 to 4 CIFAR-10 images on noise, 96 x 96
    python train_bdh_detector.py --precision bf16

A CPU core trains on about 44 images a second: two minutes for an epoch of the 5,000 scenes, 40 minutes for all. It has
not been run to its end. DETR learns slowly: the first epochs find where objects are, not yet what they are.
"""

from training import DetectionConfig, Experiment, launch
from models.bdh_detector import v4_detector_config

EXPERIMENT = Experiment(
    "bdh_detector",
    # stem="conv", mixing="conv_per_level", residual="true_pre", level_gain=True, rotary="axial"
    model=v4_detector_config(
        img_size=96,
        patch_size=8,  # 12 x 12 = 144 tokens an image
        n_layer=4,
        n_embd=128,
        n_head=4,
        mlp_internal_dim_multiplier=8,  # 256 neurons a head
        dropout=0.0,
        num_classes=10,
        n_queries=12,
        decoder_layers=3,
        decoder_heads=4,
        decoder_mlp_dim=256,
    ),
    train=DetectionConfig(
        dataset="coco",
        epochs=20,
        batch_size=16,
        optimizer="muon",
        learning_rate=2e-3,
        weight_decay=0.05,
        warmup_steps=300,
        max_grad_norm=1.0,
        horizontal_flip=True,
        precision="tf32",
    ),
)

if __name__ == "__main__":
    launch(EXPERIMENT)
