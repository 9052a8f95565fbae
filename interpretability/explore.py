"""One HTML page to look around in a trained model: pick an image and a patch, see what every level and head attends to.

For each image the page holds the attention of all patches at every level and head, what the model's own head says after
each level, and the neurons that each patch excites most (of a BDH). It needs no network, no server and nothing beside
it: it opens with a double click, and can be sent by mail. Move over a patch with the pointer, tap it, or go there with
the arrow keys.

Scores are stored in whole steps of 1/127 of what each query gives at most, in coarser ones where the page would grow
over 10 MB; the page says which. 64 images fit, for the models of the scripts here.

    python interpretability/explore.py
    python interpretability/explore.py --run runs/v2_cifar10/seed0 --images 64
    python interpretability/explore.py --run runs/vit_tiny_cifar10/seed0 --indices 3 17 254
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
from tqdm import tqdm

from analysis.plotting.style import DIVERGING, SEQUENTIAL
from interpretability.common.activity import GELU_NOTE, QUANTITIES
from interpretability.common.explore_encoding import (
    Strongest,
    encode_colors,
    encode_image,
    encode_levels,
    encode_neurons,
    pack,
    quantise,
)
from interpretability.common.recorder import Trace, record
from interpretability.common.trained import RESULTS, RunChoice, TrainedRun, open_run
from training.command_line import run_script
from training.config import UserError

PAGE_FILES = Path(__file__).parent / "common" / "explore_page"
LARGEST_PAGE = 10_000_000  # bytes
STEPS = (127, 63, 31)  # between 0 and a query's largest score; the finest with which the page is small enough
N_NEURONS = 5  # a patch, quantity and level
UNITS = {
    "raw": {"scores": "raw score", "shares": "share of the sum of |scores|"},
    "softmax": {"shares": "softmax weight"},
}
MEANINGS = {
    "x_sparse": "what the patch itself excites",
    "y_sparse": "what attention excites",
    "gated": "what the decoder reads of both",
}


@dataclass(frozen=True, kw_only=True)
class Options(RunChoice):
    """Which images of which run."""

    images: int = 24
    """number of test images, at equal distances over the test set"""
    indices: tuple[int, ...] | None = None
    """these test images instead, by their place in the test set, from 0"""
    output_dir: Path = RESULTS
    """the page goes into a folder of the run's name in it"""


@dataclass(frozen=True)
class Inside:
    """One image, looked into. L levels, H heads, T tokens (class token first, where there is one)."""

    scores: np.ndarray
    """(L, H, T, T) float32, query by key"""
    probabilities: np.ndarray
    """(L, classes), by the model's head after each level"""
    strongest: Strongest | None
    """None for a model without such neurons"""


@torch.no_grad()
def look_inside(model: nn.Module, pixels: Tensor) -> Inside:
    """What the page shows of an image. pixels: (1, C, height, width), what the model reads."""
    with record(model) as trace:
        model(pixels)
    scores = torch.stack([trace.scores(level)[0] for level in trace.levels])
    logits = torch.cat([trace.logits(level) for level in trace.levels])
    has_neurons = set(QUANTITIES) <= set(trace.names)
    return Inside(
        scores.float().cpu().numpy(),
        logits.float().softmax(-1).cpu().numpy(),
        strongest_neurons(trace, N_NEURONS) if has_neurons else None,
    )


def strongest_neurons(trace: Trace, n: int) -> Strongest:
    """Of the one image in the trace, one level at a time. n: neurons a token, fewer where there are fewer."""
    levels = []
    for level in trace.levels:
        activity = torch.stack(trace.activity(level))[:, 0].transpose(1, 2).flatten(2)  # (Q, T, H N)
        values, numbers = activity.topk(min(n, activity.shape[-1]))
        each = (numbers, values.float().clamp(min=0), (activity > 0).sum(-1))
        levels.append([tensor.cpu().numpy() for tensor in each])
    return Strongest(*(np.stack(each) for each in zip(*levels, strict=True)))


# ---------------------------------------------------------------------------- the page


def make_page(run: TrainedRun, indices: Sequence[int]) -> str:
    """The page on these test images. Raises UserError where it would be over LARGEST_PAGE with the coarsest steps."""
    images, labels = run.samples(indices)
    frame = describe(run)
    sizes = {steps: len(join_page(frame)) for steps in STEPS}
    encoded: dict[int, list[dict]] = {steps: [] for steps in STEPS}
    bar = tqdm(zip(indices, images, labels.tolist(), strict=True), total=len(indices), leave=False, disable=None)
    for index, image, label in bar:
        inside = look_inside(run.model, run.pixels(image[None]))
        if not (np.isfinite(inside.scores).all() and np.isfinite(inside.probabilities).all()):
            raise UserError(f"{run.checkpoint} gives numbers that are not finite on image {index}: it cannot be shown")
        one = {"number": index, "png": encode_image(image), "label": label}
        one["levels"] = encode_levels(inside.probabilities, label)
        if inside.strongest is not None:
            one["neurons"] = encode_neurons(inside.strongest, frame["heads"] * frame["neurons"]["per_head"])
        for steps in list(encoded):
            codes, limits = quantise(inside.scores, steps)
            encoded[steps].append(one | {"codes": pack(codes), "limits": pack(limits)})
            sizes[steps] += len(to_json(encoded[steps][-1])) + 1
            if sizes[steps] > LARGEST_PAGE:
                fitting = len(encoded.pop(steps)) - 1
        if not encoded:
            raise UserError(too_large(run, len(indices), fitting))
    steps = next(iter(encoded))
    return join_page(frame | {"images": encoded[steps], "steps": steps})


def too_large(run: TrainedRun, n: int, fitting: int) -> str:
    rows, columns = run.grid
    what = f"attention among {rows * columns:,} patches at {run.adapter.n_levels} levels in {run.adapter.n_heads} heads"
    limit = f"{LARGEST_PAGE / 1e6:.0f} MB"
    if not fitting:
        return f"one image's {what} is over {limit}: draw it with interpretability/visualize_attention.py"
    return f"a page of {n} images would be over {limit} ({what}): {fitting} of them fit, so try --images {fitting}"


def describe(run: TrainedRun) -> dict[str, Any]:
    """What holds for all images: sizes, names, and the words about what is shown."""
    adapter, (rows, columns) = run.adapter, run.grid
    plural = "s" * (adapter.n_heads != 1)
    sizes = f"{adapter.n_levels} levels, {adapter.n_heads} head{plural}, {rows} \u00d7 {columns} patches"
    return {
        "title": run.title,
        "model": f"{type(run.model).__name__}, {sizes}",
        "part": run.part_name.capitalize(),
        "grid": [rows, columns],
        "levels": adapter.n_levels,
        "heads": adapter.n_heads,
        "class_tokens": adapter.class_tokens,
        "signed": adapter.signed,
        "classes": list(run.class_names),
        "colors": {"sequential": encode_colors(SEQUENTIAL), "diverging": encode_colors(DIVERGING)},
        "units": UNITS["raw" if adapter.signed else "softmax"],
        "neurons": describe_neurons(run),
        "notes": notes(run),
        "images": [],
        "steps": STEPS[0],
    }


def describe_neurons(run: TrainedRun) -> dict[str, Any] | None:
    if not set(QUANTITIES) <= set(run.adapter.quantities):
        return None
    per_head = run.sizes.n_neurons
    quantities = [{"name": name, "text": MEANINGS[name]} for name in QUANTITIES]
    return {"per_head": per_head, "top": min(N_NEURONS, run.adapter.n_heads * per_head), "quantities": quantities}


def notes(run: TrainedRun) -> dict[str, str]:
    """Of each part of the page, what its numbers mean and what they do not."""
    if run.adapter.signed:
        scores = "Raw scores multiply the patches in the model. BDH has no softmax: red is added, blue subtracted."
        if run.sizes.attn_norm:
            scores += (
                " A LayerNorm then divides each query's scale out in each head, so compare within a map; "
                "in the mean, a head of large scores weighs more than in the model."
            )
    else:
        scores = ""
    rest = ", of which the class token's is not in the map" if run.adapter.class_tokens else ""
    what = "Shares are |score| / sum of |scores|, without the signs" if run.adapter.signed else "Softmax weights"
    return {
        "scores": scores,
        "shares": f"{what}: those of a query sum to 1 in each head{rest}.",
        "levels": (
            "The model's own last norm and head, applied to the state after this level. They were trained on the last "
            "level's only: an early answer is what they make of the state, not all that is in it."
        ),
        "neurons": note_on_neurons(run),
    }


def note_on_neurons(run: TrainedRun) -> str:
    if not set(QUANTITIES) <= set(run.adapter.quantities):
        return f"Only a BDH has such neurons, so a {type(run.model).__name__} comes without this list."
    note = "Heads and levels count from 1, the neurons of a head from 0, as in interpretability/neurons.py."
    if run.sizes.shared:
        note += " The levels share their weights: a neuron of one level is that neuron in every other."
    if run.sizes.activation == "gelu":
        note += f" Of this model, {GELU_NOTE}."
    return note


def join_page(data: dict[str, Any]) -> str:
    """The files of explore_page as one, with the data in it."""

    def read(name: str) -> str:
        return (PAGE_FILES / name).read_text(encoding="utf-8")

    page = read("page.html").replace("<title>Vision-BDH</title>", f"<title>{html.escape(data['title'])}</title>")
    page = re.sub(r'<link rel="stylesheet" href="(.+?)">', lambda tag: f"<style>\n{read(tag[1])}</style>", page)
    page = re.sub(r'<script src="(.+?)">', lambda tag: f"<script>\n{read(tag[1])}", page)
    return page.replace('id="data">null<', f'id="data">{to_json(data)}<')


def to_json(data: Any) -> str:
    """For a script element: in there, nothing but its end tag may begin with <."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def explore(options: Options) -> Path:
    """Writes the page; returns where."""
    run = open_run(options)
    run.require("logits")
    indices = run.spread(options.images) if options.indices is None else list(options.indices)
    if not indices:
        raise UserError("there is no image to look at: give --images 1 or more, or --indices")
    page = make_page(run, indices)
    path = options.output_dir / run.stem / f"{run.file_name('explore')}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def main(options: Options) -> None:
    path = explore(options)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB): open it in a browser")


if __name__ == "__main__":
    run_script(main, __doc__)
