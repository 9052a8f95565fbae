"""Made-up clips: a bright bar that moves over noise; the class is the way that it moves."""

import numpy as np
from PIL import Image

WAYS = {"down": 1, "left": -1, "right": 1}


def moving_bar(way, frames, size, rng):
    """(frames, size, size, 3) uint8: a bar that moves by size / frames pixels and comes in again at the other side."""
    clip = rng.integers(0, 90, (frames, size, size, 3)).astype(np.uint8)
    places = (rng.integers(size) + WAYS[way] * np.arange(frames) * max(1, size // frames)) % size
    for frame, place in zip(clip, places, strict=True):
        bar = frame[place] if way == "down" else frame[:, place]
        bar[:] = 250
    return clip


def write_clips(folder, per_class, frames=8, size=32, seed=0):
    """folder/CLASS/NUMBER.webp, lossless."""
    rng = np.random.default_rng(seed)
    for way in WAYS:
        (folder / way).mkdir(parents=True)
        for number in range(per_class):
            first, *rest = map(Image.fromarray, moving_bar(way, frames, size, rng))
            first.save(folder / way / f"{number}.webp", save_all=True, append_images=rest, lossless=True)
    return folder
