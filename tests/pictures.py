"""What every figure's files have to be: a PNG as wide as a page at most, with something on it, and the same as SVG."""

import xml.etree.ElementTree

import matplotlib.image
import numpy as np
from matplotlib.colors import to_rgb

from analysis.plotting.style import DPI, PAGE


def check_picture(path):
    """The pixels (height, width, RGB) from 0 to 1 of the PNG at path, beside which its SVG has to be."""
    pixels = matplotlib.image.imread(path)[..., :3]
    height, width = pixels.shape[:2]
    assert width <= PAGE * DPI and height > 200
    assert pixels.std() > 0.02 and (pixels.min(2) < 0.5).mean() > 1e-3  # neither blank nor of faint lines alone
    root = xml.etree.ElementTree.parse(path.with_suffix(".svg")).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert np.isclose(float(root.get("width").removesuffix("pt")) / 72, width / DPI, atol=1 / DPI)
    assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 10
    return pixels


def share_of_color(pixels, color):
    """The share of a picture's pixels (height, width, RGB) that have this colour."""
    return np.isclose(pixels, to_rgb(color), atol=0.01).all(-1).mean()
