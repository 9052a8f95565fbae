"""A run's best weights as one small file, with the config.json and the model card that make its folder complete.

The file is safetensors: it holds no code. Parameters are stored in bf16, half the bytes of float32; buffers (rotary
frequencies, BatchNorm statistics) keep their precision.
"""

from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from tools.exporting.model_card import model_card
from training.stored import CARD, EXPORTED, read_summary


def export_weights(model: nn.Module, folder: Path, target: Path) -> Path:
    """Writes EXPORTED and the model card into target, beside copies of config.json and summary.json; returns EXPORTED.

    folder: of the run. Raises OSError if a file cannot be written, Damaged for a damaged summary.json.
    """
    parameters = {name for name, _ in model.named_parameters()}
    tensors = {
        name: (tensor.to(torch.bfloat16) if name in parameters else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    target.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "metrics.csv", "summary.json"):
        if (folder / name).is_file() and target.resolve() != folder.resolve():
            write_whole(target / name, (folder / name).read_bytes())
    path = write_whole(target / EXPORTED, save(tensors))
    if read_summary(target) is not None:
        write_whole(target / CARD, model_card(target).encode())
    return path


def write_whole(path: Path, content: bytes) -> Path:
    """Writes a file under a temporary name and renames it, so that it is whole or not there. Raises OSError."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
