"""Vision-BDH v4 on short clips: all frames' patches are tokens of one sequence (models/video_bdh.py).

Not a published experiment. Reads clips of your own: folders of frames, video files or GIFs, one folder per class.
Another number of frames needs both of its flags, such as --n-frames 16 --in-channels 48. tools/make_clips.py makes
clips of a moving camera from photographs, on which it is right for 99.6 % of the test clips after 12 epochs (three
seeds; CamVid's photographs; results/clips). A model of the frame in the middle (--n-frames 1 --in-channels 3 --tubelet
1) is right for 14 %, as by chance, and one whose tokens are of single frames (--tubelet 1) still for 14 % of the
validation clips after three epochs: it is the stem that sees motion.

    python train_video_bdh.py --data-dir clips
"""

from training import Experiment, VideoConfig, launch
from models.video_bdh import v4_video_config

EXPERIMENT = Experiment(
    "video_bdh",
    model=v4_video_config(  # stem="conv", mixing="conv_per_level", residual="true_pre", level_gain=True, rotary="axial"
        img_size=32,
        n_frames=8,
        in_channels=24,  # 8 frames of 3 colours
        tubelet=2,  # a token is a patch of 2 frames
        patch_size=8,  # 16 x 4 = 64 tokens a clip
        n_layer=4,
        n_embd=96,
        n_head=4,
        mlp_internal_dim_multiplier=8,  # 192 neurons a head
        dropout=0.0,
        num_classes=7,
    ),
    train=VideoConfig(
        dataset="clips",
        epochs=12,
        batch_size=32,
        optimizer="muon",
        learning_rate=3e-3,
        weight_decay=0.05,
        warmup_steps=200,
        max_grad_norm=1.0,
        val_fraction=0.2,
        crop_padding=4,
        horizontal_flip=False,  # a mirrored motion to the left is one to the right
        precision="tf32",
    ),
)

if __name__ == "__main__":
    launch(EXPERIMENT)
