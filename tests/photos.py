"""Made-up photographs: JPEGs of many sizes in class folders."""

import numpy as np
from PIL import Image

SIDES = [(40, 30), (30, 40), (24, 24), (160, 20), (20, 160), (33, 17)]  # width, height


def write_photos(folder, per_class, classes=("n01", "n02", "n03"), seed=0):
    """folder/CLASS/IMAGE.JPEG of many sizes: a smooth picture in a colour of its class, and some noise."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            width, height = SIDES[i % len(SIDES)]
            ramp = np.linspace(0, 120, width)[None, :, None] + np.linspace(0, 60, height)[:, None, None]
            pixels = ramp + 60 * np.eye(3)[label % 3] + rng.integers(0, 9, (height, width, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.JPEG", quality=95)
    return folder
