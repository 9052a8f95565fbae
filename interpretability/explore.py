"""Writes one HTML page to explore a trained model: pick an image and a patch, see what every level and head attends to.

For each image the page contains the attention between all patches at every level and head, the model's answer after
each level, and (for a BDH) the most active neurons of each patch. It is a single file that needs no server and no
network: open it with a double click, or send it by mail. Point at a patch, tap it, or use the arrow keys.

--live puts the model itself into the page, with a runtime (onnxruntime-web, 5 MB): drop your own images on it, and it
shows the same of them, computed in the browser.

Scores are stored in steps of 1/127 of each query's largest score, or coarser if the page would exceed 10 MB; the page
says which. 64 images fit for the models trained here.

    python interpretability/explore.py
    python interpretability/explore.py --run runs/v2_cifar10/seed0 --images 64
    python interpretability/explore.py --run runs/vit_tiny_cifar10/seed0 --indices 3 17 254
    python interpretability/explore.py --run runs/v2_cifar10/seed0 --live
"""

import html
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor, nn

from analysis.plotting.style import DIVERGING, SEQUENTIAL
from interpretability.common import explore_encoding as encoding
from interpretability.common.activity import GELU_NOTE, QUANTITIES
from interpretability.common.inside import LookInside
from interpretability.common.trained import RunChoice, TrainedRun, open_run, progress
from models.vision_bdh import height_and_width
from training.command_line import run_script
from training.config import UserError
from training.files import written_whole

PAGE_FILES = Path(__file__).parent / "common" / "explore_page"
LARGEST_PAGE = 10_000_000  # bytes
SCRIPTS = "script-src 'unsafe-inline'"  # of the page's content security policy
STEPS = (127, 63, 31)  # per query's largest score; the finest with which the page is small enough
N_NEURONS = 5  # listed per patch, quantity and level
MEANINGS = {
    "x_sparse": "activated by the patch itself",
    "y_sparse": "activated by attention",
    "gated": "both combined, the decoder's input",
}


@dataclass(frozen=True, kw_only=True)
class Options(RunChoice):
    """Which run and images to show."""

    images: int = 24
    """number of test images, evenly spaced"""
    indices: tuple[int, ...] | None = None
    """numbers of the test images to show instead, from 0"""
    live: bool = False
    """put the model into the page, too, to run it there on your own images (needs requirements-export.txt)"""


@dataclass(frozen=True)
class Inside:
    """What the page shows of one image. L levels, H heads, T tokens (class token first, if there is one)."""

    scores: np.ndarray  # (L, H, T, T) float32, query by key
    probabilities: np.ndarray  # (L, classes), from the model's head after each level
    strongest: encoding.Strongest | None  # None for a model that is not a BDH


@torch.no_grad()
def look_inside(model: nn.Module, pixels: Tensor) -> Inside:
    """pixels: (1, C, height, width), the model's input."""
    probabilities, scores, *neurons = LookInside(model, N_NEURONS)(pixels)
    strongest = encoding.Strongest(*(each.cpu().numpy() for each in neurons)) if neurons else None
    return Inside(scores.cpu().numpy(), probabilities.cpu().numpy(), strongest)


def make_page(run: TrainedRun, indices: Sequence[int], live: bool = False) -> str:
    """The page with these test images; live: and with the model, which runs on images dropped there.

    Raises UserError if the images alone exceed LARGEST_PAGE with the coarsest steps.
    """
    images, labels = run.samples(indices)
    frame = describe(run)
    sizes = {steps: len(join_page(frame)) for steps in STEPS}
    encoded: dict[int, list[dict]] = {steps: [] for steps in STEPS}
    samples = list(zip(indices, images, labels.tolist(), strict=True))
    for index, image, label in progress(samples, unit="img"):
        inside = look_inside(run.model, run.pixels(image[None]))
        if not (np.isfinite(inside.scores).all() and np.isfinite(inside.probabilities).all()):
            raise UserError(f"{run.checkpoint} gives NaN or infinite values on image {index}, which cannot be shown")
        one = {"number": index, "png": encoding.encode_image(image), "label": label}
        one["levels"] = encoding.encode_levels(inside.probabilities, label)
        if inside.strongest is not None:
            n_neurons = frame["heads"] * frame["neurons"]["per_head"]
            one["neurons"] = encoding.encode_neurons(inside.strongest, n_neurons)
        for steps in list(encoded):
            codes, limits = map(encoding.pack, encoding.quantise(inside.scores, steps))
            encoded[steps].append(one | {"codes": codes, "limits": limits})
            sizes[steps] += len(to_json(encoded[steps][-1])) + 1
            if sizes[steps] > LARGEST_PAGE:
                fitting = len(encoded.pop(steps)) - 1
        if not encoded:
            limit = f"{LARGEST_PAGE / 1e6:.0f} MB"
            what = f"{run.n_patches:,} patches at {frame['levels']} levels in {frame['heads']} heads"
            if fitting:
                raise UserError(f"a page of {len(indices)} images ({what}) exceeds {limit}: give --images {fitting}")
            raise UserError(f"one image ({what}) exceeds {limit}: use interpretability/visualize_attention.py")
    steps = next(iter(encoded))
    page = join_page(frame | {"images": encoded[steps], "steps": steps})
    return with_model(page, run) if live else page


def with_model(page: str, run: TrainedRun) -> str:
    """The page with the model, its runtime and the permission to run them."""
    from interpretability.common.live import live_scripts  # needs packages that the page does without

    height, width = height_and_width(run.sizes.img_size)
    scripts = live_scripts(run.model.cpu(), (run.sizes.in_channels, height, width), N_NEURONS)
    page = page.replace(f'{SCRIPTS}"', f"{SCRIPTS} 'wasm-unsafe-eval' blob:\"", 1)
    return page.replace("</body>", f"{scripts}</body>")


def describe(run: TrainedRun) -> dict[str, Any]:
    """The page's data apart from the images: sizes, names and explanations."""
    adapter, (rows, columns) = run.adapter, run.grid
    plural = "s" * (adapter.n_heads != 1)
    sizes = f"{adapter.n_levels} levels, {adapter.n_heads} head{plural}, {rows} \u00d7 {columns} patches"
    neurons = None
    if "gated" in adapter.quantities:
        per_head = run.sizes.n_neurons
        quantities = [{"name": name, "text": MEANINGS[name]} for name in QUANTITIES]
        neurons = {"per_head": per_head, "top": min(N_NEURONS, adapter.n_heads * per_head), "quantities": quantities}
    raw = {"scores": "raw score", "shares": "share of the sum of |scores|"}
    return {
        "title": run.title,
        "model": "; ".join([f"{type(run.model).__name__}, {sizes}", *run.views_note]),
        "part": run.part.capitalize(),
        "grid": [rows, columns],
        "input": [run.sizes.in_channels, *height_and_width(run.sizes.img_size)],
        "share": run.train.get("eval_crop", 1.0),
        "levels": adapter.n_levels,
        "heads": adapter.n_heads,
        "class_tokens": adapter.class_tokens,
        "signed": adapter.signed,
        "classes": list(run.class_names),
        "colors": {"sequential": encoding.encode_colors(SEQUENTIAL), "diverging": encoding.encode_colors(DIVERGING)},
        "units": raw if adapter.signed else {"shares": "softmax weight"},
        "neurons": neurons,
        "notes": notes(run),
        "images": [],
        "steps": STEPS[0],
    }


def notes(run: TrainedRun) -> dict[str, str]:
    """Explanations for each part of the page."""
    signed, scores = run.adapter.signed, ""
    if signed:
        scores = "Raw scores multiply the patches in the model, without softmax: red is added, blue is subtracted."
        if run.sizes.attn_norm:
            scores += (
                " A LayerNorm then removes the scale of each query in each head, so compare values within a map only; "
                "in the mean over heads, a head with large scores weighs more than in the model."
            )
    what = "Shares are |score| / sum of |scores|, ignoring signs" if signed else "These are softmax weights"
    rest = ", including the class token, which is not on the map" if run.adapter.class_tokens else ""
    if "gated" in run.adapter.quantities:
        neurons = "Heads and levels count from 1, neurons of a head from 0, as in interpretability/neurons.py."
        if run.sizes.shared:
            neurons += " Levels share their weights, so a neuron is the same one at every level."
        if run.sizes.activation == "gelu":
            neurons += f" {GELU_NOTE}."
    else:
        neurons = f"This list is for BDH models only, not for a {type(run.model).__name__}."
    return {
        "scores": scores,
        "shares": f"{what}; each query's sum to 1 in each head{rest}.",
        "levels": (
            "The model's own final norm and head, applied to the state after this level. They were trained on the last "
            "level only: an early answer shows what they make of the state, not everything that it contains."
        ),
        "neurons": neurons,
    }


def join_page(data: dict[str, Any]) -> str:
    """The files in PAGE_FILES as one, with the data in it."""

    def read(name: str) -> str:
        return (PAGE_FILES / name).read_text(encoding="utf-8")

    page = read("page.html").replace("<title>Vision-BDH</title>", f"<title>{html.escape(data['title'])}</title>")
    page = re.sub(r'<link rel="stylesheet" href="(.+?)">', lambda tag: f"<style>\n{read(tag[1])}</style>", page)
    page = re.sub(r'<script src="(.+?)">', lambda tag: f"<script>\n{read(tag[1])}", page)
    return page.replace('id="data">null<', f'id="data">{to_json(data)}<')


def to_json(data: Any) -> str:
    """JSON for a script element, without any <, which could end the element."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def main(options: Options) -> None:
    run = open_run(options)
    run.require("logits")
    page = make_page(run, run.choose_images(options.images, options.indices), options.live)
    path = options.output_dir / run.stem / f"{run.file_name('explore')}.html"
    with written_whole(path) as partial:
        partial.write_text(page, encoding="utf-8")
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB): open it in a browser")


if __name__ == "__main__":
    run_script(main, __doc__)
