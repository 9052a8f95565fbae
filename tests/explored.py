"""Tiny runs for explore.py, and its page read back by other means than the page's own."""

import base64
import dataclasses
import json
import re
import zlib

import numpy as np
import torch

from training import fit
from interpretability.common.recorder import record
from models.baselines import DeiTTinyConfig, ViTConfig
from models.vision_bdh import v2_config
from training.stored import load_checkpoint

SIZES = dict(patch_size=8, n_layer=3, n_embd=8, n_head=2)  # 4 x 4 patches
BDH = SIZES | dict(mlp_internal_dim_multiplier=4)  # 16 neurons a head
MODELS = {
    "v2": v2_config(**BDH),
    "separate": v2_config(**BDH, qk="separate", pool="cls", activation="gelu", attn_norm=False, shared=False),
    "softmax": v2_config(**BDH, attention="softmax"),
    "vit": ViTConfig(**SIZES, mlp_dim=16),
    "deit": DeiTTinyConfig(setting="published"),
}


def train_runs(experiment_in, folder, names):
    """Folders of runs of these MODELS on the made-up CIFAR-10, by name, with weights so large that all parts matter."""
    generator = torch.Generator().manual_seed(11)
    for name in names:
        trial = dataclasses.replace(experiment_in(folder, name, epochs=1), model=MODELS[name])
        fit(trial)
        best = load_checkpoint(trial.folder / "best.pt")
        for weight in best["model"].values():
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
        torch.save(best, trial.folder / "best.pt")
    return {name: folder / name / "seed0" for name in names}


def data_of(page):
    """What the page holds, from its text."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def numbers(text, dtype):
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype)


def scores_of(data, image):
    """(L, H, T, T) float64 from the codes of an image, and the step of each query (L, H, T)."""
    T = data["class_tokens"] + data["grid"][0] * data["grid"][1]
    shape = (data["levels"], data["heads"], T)
    codes = numbers(image["codes"], np.int8).astype(float)
    limits = numbers(image["limits"], "<f4").reshape(shape).astype(float)
    if codes.size == np.prod(shape) * T:
        scores = codes.reshape(*shape, T) * limits[..., None] / data["steps"]
    else:
        scores = np.zeros((*shape, T))
        entries = iter(codes)
        for place in np.ndindex(shape[:2]):
            for i in range(T):
                for j in range(i + 1):
                    value = next(entries) * min(limits[*place, i], limits[*place, j]) / data["steps"]
                    scores[*place, i, j] = scores[*place, j, i] = value
        assert next(entries, None) is None
    return scores, limits / data["steps"]


@torch.no_grad()
def traced(run, index):
    """Of one test image, the trace of its own pass and the model's output."""
    pixels = run.pixels(run.samples([index]).images)
    with record(run.model) as trace:
        output = run.model(pixels)
    return trace, output[0]


def traced_scores(trace):
    """(L, H, T, T) float64."""
    return np.stack([trace.scores(level)[0].double().numpy() for level in trace.levels])
