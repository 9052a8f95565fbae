"""Makes short clips of a moving camera from photographs, to try train_video_bdh.py: the class is the camera's motion.

The camera is a window that moves over a photograph: left, right, up, down, closer, away or not at all. Size and place
of the window in the middle of a clip do not depend on the class, so a model of one frame (--n-frames 1 --in-channels 3
--tubelet 1), which reads that one, can only guess: what others reach beyond chance, they have from time. Test clips
come from other photographs than training clips. Each frame gets a little noise. Clips are lossless animated WebP
pictures.

    python tools/make_clips.py --images PHOTOS --output clips     # such as data_camvid/train
    python train_video_bdh.py --data-dir clips
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image
from tqdm import tqdm

from training.command_line import run_script
from training.config import UserError, require
from training.data.finding import Finder
from training.data.image_files import open_image
from training.files import whole_folder

MOTIONS = {  # shift of the window to the right and down, and growth, per clip; the scene moves the other way
    "still": (0, 0, 0),
    "left": (-1, 0, 0),
    "right": (1, 0, 0),
    "up": (0, -1, 0),
    "down": (0, 1, 0),
    "closer": (0, 0, -1),
    "away": (0, 0, 1),
}
LEAST, MOST = 0.1, 0.5  # motion over a clip, as a share of the window's side in the middle
NOISE = 2.0  # standard deviation, of 255


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to make, and from which photographs."""

    images: Path
    """folder of photographs, at any depth"""
    output: Path
    """folder for train/CLASS/ and test/CLASS/; it must not exist"""
    train: int = 10500
    """training clips"""
    test: int = 700
    """test clips"""
    frames: int = 8
    """frames per clip"""
    size: int = 32
    """width and height of a clip in pixels"""
    seed: int = 0
    """seed of all draws"""

    def __post_init__(self):
        for name, least in {"train": len(MOTIONS), "test": len(MOTIONS), "frames": 2, "size": 8, "seed": 0}.items():
            require(getattr(self, name) >= least, self, name, f"must be at least {least}")


def boxes(motion: str, width: int, height: int, frames: int, rng: np.random.Generator) -> np.ndarray:
    """(frames, 4): left, top, right, bottom of a square window that moves inside a photograph."""
    right, down, growth = MOTIONS[motion]
    way = np.linspace(-0.5, 0.5, frames)[:, None] * rng.uniform(LEAST, MOST)  # 0 in the middle of the clip
    room = 1 + MOST  # for any motion, in units of the side in the middle
    side = rng.uniform(0.3, 0.9) * min(width, height) / room
    centre = side * room / 2 + rng.uniform(0, 1, 2) * ((width, height) - side * np.array(room))
    centres, halves = centre + side * way * (right, down), side * (1 + growth * way) / 2
    return np.concatenate((centres - halves, centres + halves), axis=1)


def clip(photo: Image.Image, motion: str, options: Options, rng: np.random.Generator) -> list[Image.Image]:
    """The frames of a clip."""
    size, made = (options.size, options.size), []
    for box in boxes(motion, *photo.size, options.frames, rng):
        frame = np.asarray(photo.resize(size, Image.Resampling.BICUBIC, box=tuple(box)), dtype=np.float32)
        noisy = frame + rng.normal(0, NOISE, frame.shape)
        made.append(Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8)))
    return made


def parts(options: Options, rng: np.random.Generator) -> Iterator[tuple[str, int, list[str]]]:
    """Part, number of clips and photographs of each part."""
    paths = [file.path for file in Finder().all_images(options.images)]
    if len(paths) < 2:
        raise UserError(f"{options.images} holds fewer than two photographs: name another folder with --images")
    paths = rng.permutation(paths).tolist()
    n_test = max(1, len(paths) // 6)
    yield "train", options.train, paths[n_test:]
    yield "test", options.test, paths[:n_test]


def main(options: Options) -> None:
    if options.output.exists():
        raise UserError(f"{options.output} exists: name a new folder with --output, or remove it")
    rng = np.random.default_rng(options.seed)
    with whole_folder(options.output):
        write(options, rng)
    print(f"-> {options.output}: {options.train} training and {options.test} test clips of {len(MOTIONS)} motions")


def write(options: Options, rng: np.random.Generator) -> None:
    for part, n_clips, paths in parts(options, rng):
        for motion in MOTIONS:
            (options.output / part / motion).mkdir(parents=True)
        for i in tqdm(range(n_clips), desc=part, unit="clip", leave=False, disable=None):
            turn, place = divmod(i, len(paths))
            path, motion = paths[place], list(MOTIONS)[(i + turn) % len(MOTIONS)]  # any photograph with any motion
            try:
                photo = open_image(path, "RGB")
            except Exception as error:  # Pillow raises errors of many kinds for damaged files
                raise UserError(f"{path} cannot be read ({error}): replace or remove it") from None
            first, *rest = clip(photo, motion, options, rng)
            target = options.output / part / motion / f"{i:05d}.webp"
            first.save(target, save_all=True, append_images=rest, lossless=True, duration=100)


if __name__ == "__main__":
    run_script(main, __doc__)
