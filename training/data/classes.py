"""The classes of the segmentation data sets, in the order of their labels, with their colours."""

from dataclasses import dataclass

import numpy as np
from torchvision import datasets


@dataclass(frozen=True)
class Classes:
    """The classes of a data set, in the order of their labels."""

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    """RGB, for pictures"""
    void_colour: tuple[int, int, int] = (0, 0, 0)

    @property
    def void(self) -> int:
        return len(self.names)

    @property
    def palette(self) -> np.ndarray:
        """(classes + 1, 3) uint8, void's last."""
        return np.array([*self.colours, self.void_colour], dtype=np.uint8)


CAMVID = Classes(  # the 11 classes of SegNet (arXiv 1511.00561) in their usual order and colours
    *zip(
        ("sky", (128, 128, 128)),
        ("building", (128, 0, 0)),
        ("pole", (192, 192, 128)),
        ("road", (128, 64, 128)),
        ("pavement", (60, 40, 222)),
        ("tree", (128, 128, 0)),
        ("sign", (192, 128, 128)),
        ("fence", (64, 64, 128)),
        ("car", (64, 0, 128)),
        ("pedestrian", (64, 64, 0)),
        ("bicyclist", (0, 128, 192)),
        strict=True,
    )
)
CAMVID_FOLD = {  # the 32 classes of CamVid (Brostow et al. 2009) folded to those 11
    "sky": ("Sky",),
    "building": ("Building", "Wall", "Bridge", "Tunnel", "Archway"),
    "pole": ("Column_Pole", "TrafficCone"),
    "road": ("Road", "LaneMkgsDriv", "LaneMkgsNonDriv"),
    "pavement": ("Sidewalk", "ParkingBlock", "RoadShoulder"),
    "tree": ("Tree", "VegetationMisc"),
    "sign": ("SignSymbol", "Misc_Text", "TrafficLight"),
    "fence": ("Fence",),
    "car": ("Car", "SUVPickupTruck", "Truck_Bus", "Train", "OtherMoving"),
    "pedestrian": ("Pedestrian", "Child", "CartLuggagePram", "Animal"),
    "bicyclist": ("Bicyclist", "MotorcycleScooter"),
    "void": ("Void",),
}


def _voc_colour(label: int) -> tuple[int, int, int]:
    """The colour of a label in Pascal VOC's palette: its bits, dealt to red, green and blue in turn, highest first."""
    return tuple(sum((label >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)) for channel in range(3))


VOC_NAMES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow dining_table dog horse motorbike person "
    "potted_plant sheep sofa train tv_monitor"
).split()
VOC = Classes(tuple(VOC_NAMES), tuple(map(_voc_colour, range(len(VOC_NAMES)))), void_colour=_voc_colour(255))

CITYSCAPES_CLASSES = sorted(  # as torchvision describes them
    (each for each in datasets.Cityscapes.classes if each.train_id not in (255, -1)), key=lambda each: each.train_id
)
CITYSCAPES = Classes(
    tuple(each.name.replace(" ", "_") for each in CITYSCAPES_CLASSES), tuple(each.color for each in CITYSCAPES_CLASSES)
)

ADE20K_NAMES = (  # the first name of each line of objectInfo150.txt, in its order
    "wall building sky floor tree ceiling road bed windowpane grass cabinet sidewalk person earth door table mountain "
    "plant curtain chair car water painting sofa shelf house sea mirror rug field armchair seat fence desk rock "
    "wardrobe lamp bathtub railing cushion base box column signboard chest_of_drawers counter sand sink skyscraper "
    "fireplace refrigerator grandstand path stairs runway case pool_table pillow screen_door stairway river bridge "
    "bookcase blind coffee_table toilet flower book hill bench countertop stove palm kitchen_island computer "
    "swivel_chair boat bar arcade_machine hovel bus towel light truck tower chandelier awning streetlight booth "
    "television airplane dirt_track apparel pole land bannister escalator ottoman bottle buffet poster stage van ship "
    "fountain conveyer_belt canopy washer plaything swimming_pool stool barrel basket waterfall tent bag minibike "
    "cradle oven ball food step tank trade_name microwave pot animal bicycle lake dishwasher screen blanket sculpture "
    "hood sconce vase traffic_light tray ashcan fan pier crt_screen plate monitor bulletin_board shower radiator "
    "glass clock flag"
).split()
ADE20K = Classes(tuple(ADE20K_NAMES), tuple(_voc_colour(label) for label in range(1, len(ADE20K_NAMES) + 1)))

CLASSES = {"camvid": CAMVID, "voc": VOC, "cityscapes": CITYSCAPES, "ade20k": ADE20K}
