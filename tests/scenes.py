"""Made-up detection data: squares of a class's colour on noise, written as tools/make_detection_data.py does."""

import numpy as np

from tools.make_detection_data import write_part

CLASS_NAMES = tuple(f"colour {label}" for label in range(10))


def write_scenes(folder, n_train=6, n_val=3, size=(48, 32), side=12, seed=0):
    """size: width and height. Each image has none to three squares, the first one always one."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (len(CLASS_NAMES), 3))

    def scenes(n):
        for index in range(n):
            image = rng.integers(96, 160, (size[1], size[0], 3)).astype(np.uint8)
            objects = []
            for _ in range(rng.integers(0, 4) if index else 1):
                label = int(rng.integers(len(CLASS_NAMES)))
                x, y = (int(rng.integers(each - side + 1)) for each in size)
                image[y : y + side, x : x + side] = colours[label]
                objects.append((label, (x, y, side, side)))
            yield image, objects

    for part, n in (("train", n_train), ("val", n_val)):
        write_part(folder, part, n, scenes(n), CLASS_NAMES)
    return folder
