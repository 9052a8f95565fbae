"""Made-up CamVid: the same images and masks in either of its layouts, written to a folder."""

import csv

import numpy as np
from PIL import Image

# The colours of CamVid's own class_dict.csv, by the label that its classes are folded to; 11 is void.
COLOURS = {
    0: {"Sky": (128, 128, 128)},
    1: {
        "Building": (128, 0, 0),
        "Wall": (64, 192, 0),
        "Bridge": (0, 128, 64),
        "Tunnel": (64, 0, 64),
        "Archway": (192, 0, 128),
    },
    2: {"Column_Pole": (192, 192, 128), "TrafficCone": (0, 0, 64)},
    3: {"Road": (128, 64, 128), "LaneMkgsDriv": (128, 0, 192), "LaneMkgsNonDriv": (192, 0, 64)},
    4: {"Sidewalk": (0, 0, 192), "ParkingBlock": (64, 192, 128), "RoadShoulder": (128, 128, 192)},
    5: {"Tree": (128, 128, 0), "VegetationMisc": (192, 192, 0)},
    6: {"SignSymbol": (192, 128, 128), "Misc_Text": (128, 128, 64), "TrafficLight": (0, 64, 64)},
    7: {"Fence": (64, 64, 128)},
    8: {
        "Car": (64, 0, 128),
        "SUVPickupTruck": (64, 128, 192),
        "Truck_Bus": (192, 128, 192),
        "Train": (192, 64, 128),
        "OtherMoving": (128, 64, 64),
    },
    9: {"Pedestrian": (64, 64, 0), "Child": (192, 128, 64), "CartLuggagePram": (64, 0, 192), "Animal": (64, 128, 64)},
    10: {"Bicyclist": (0, 128, 192), "MotorcycleScooter": (192, 0, 192)},
    11: {"Void": (0, 0, 0)},
}


def write_camvid(folder, layout="labels", n_train=6, n_val=3, size=(48, 32), seed=0):
    """Images of blocks, each in a colour of its label and noise. size: width and height, multiples of 8.

    layout: "labels" has masks of labels in trainannot/ and valannot/; "colours" has masks of 32 colours, NAME_L.png, in
    train_labels/ and val_labels/, and class_dict.csv. The same seed makes the same images and labels in both.
    """
    rng = np.random.default_rng(seed)
    grey = rng.permutation(np.linspace(20, 235, 12)).astype(int)  # of each label
    for part, n in (("train", n_train), ("val", n_val)):
        masks = folder / f"{part}{'annot' if layout == 'labels' else '_labels'}"
        for path in (folder / part, masks):
            path.mkdir(parents=True, exist_ok=True)
        for index in range(n):
            labels = np.kron(rng.integers(12, size=(size[1] // 8, size[0] // 8)), np.ones((8, 8), int))
            noise = rng.integers(-8, 9, (*labels.shape, 3))
            image = np.stack([grey[labels], 255 - grey[labels], grey[labels - 6]], axis=-1) + noise
            which = rng.integers(60, size=labels.shape)  # of the colours that are folded to a label
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / part / f"{part}_{index:03d}.png")
            if layout == "labels":
                Image.fromarray(labels.astype(np.uint8)).save(masks / f"{part}_{index:03d}.png")
            else:
                Image.fromarray(_coloured(labels, which)).save(masks / f"{part}_{index:03d}_L.png")
    if layout == "colours":
        write_class_dict(folder / "class_dict.csv")


def write_class_dict(path):
    rows = [(name, *colour) for group in COLOURS.values() for name, colour in group.items()]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("name", "r", "g", "b"), *sorted(rows)])


def _coloured(labels, which):
    """(h, w) labels -> (h, w, 3) uint8, each pixel in one of the colours that are folded to its label."""
    pixels = np.empty((*labels.shape, 3), dtype=np.uint8)
    for label, group in COLOURS.items():
        colours = np.array(list(group.values()), dtype=np.uint8)
        here = labels == label
        pixels[here] = colours[which[here] % len(colours)]
    return pixels
