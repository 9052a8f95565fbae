"""Made-up detection data: squares of a class's colour on noise, written as tools/make_detection_data.py does."""

import json

import numpy as np

from training import DetectionConfig, Experiment, RunOptions
from models.bdh_detector import v4_detector_config
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


SIZE = dict(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4, decoder_layers=2, decoder_mlp_dim=16)
TRAIN = dict(epochs=2, batch_size=2, learning_rate=1e-2, weight_decay=0.05, horizontal_flip=True, precision="float32")


def detection_trial(place, runs_dir, name="trial", options=None, model=None, **train):
    """A tiny Experiment on place/data_coco. Keywords but model and options are fields of its training."""
    where = dict(data_dir=place, runs_dir=runs_dir, device="cpu", num_workers=0)
    config = v4_detector_config(**(SIZE | dict(img_size=(32, 48)) | (model or {})))
    return Experiment(name, config, DetectionConfig(**(TRAIN | train)), RunOptions(**(where | (options or {}))))


def corners(box):
    x, y, w, h = map(float, box)
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def as_pixels(boxes, size):
    """x0, y0, x1, y1 in pixels. boxes: (n, 6), size: width and height."""
    return [[round(each * size[k % 2]) for k, each in enumerate(corners(box[1:5]))] for box in boxes]


def annotated(folder, part="train"):
    return folder / "annotations" / f"instances_{part}.json"


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
