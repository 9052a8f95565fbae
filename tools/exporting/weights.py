"""A run's best weights as one small file, with the config.json and the model card that make its folder complete.

The file is safetensors: it holds no code. Parameters are stored in bf16, half the bytes of float32; buffers (rotary
frequencies, BatchNorm statistics) keep their precision.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from tools.exporting.model_card import model_card
from training.config import UserError
from training.stored import CARD, EXPORTED, SMALL_FILES, read_config, read_summary


def export_weights(model: nn.Module, folder: Path, target: Path) -> Path:
    """Writes EXPORTED and the model card into target, beside copies of the run's small files; returns EXPORTED.

    model: with the run's best weights. folder: of the run. Raises OSError if a file cannot be written, Damaged for a
    damaged summary.json, UserError if target holds something else.
    """
    parameters = {name for name, _ in model.named_parameters()}
    elsewhere = target.resolve() != folder.resolve()
    again = (target / EXPORTED).exists()
    if elsewhere:
        check_target(target, read_config(folder))
    has_card = read_summary(folder) is not None
    if has_card and not again and (target / CARD).exists():
        raise UserError(f"{target} has a {CARD}, which the model card would replace: give another --output folder")
    card = model_card(folder).encode() if has_card else None
    tensors = {
        name: (tensor.to(torch.bfloat16) if name in parameters else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    target.mkdir(parents=True, exist_ok=True)
    for name in SMALL_FILES if elsewhere else ():
        if (folder / name).is_file():
            write_whole(target / name, (folder / name).read_bytes())
        elif again:
            (target / name).unlink(missing_ok=True)
    path = write_whole(target / EXPORTED, save(tensors))
    if card is not None:
        write_whole(target / CARD, card)
    elif again:
        (target / CARD).unlink(missing_ok=True)
    return path


def check_target(target: Path, config: dict[str, Any]) -> None:
    """Raises UserError if the folder holds a run, or what was exported from another one than that of this config."""
    if any((target / name).exists() for name in ("last.pt", "best.pt")):
        raise UserError(f"{target} holds a run: give another --output folder")
    if (target / "config.json").exists():
        found = read_config(target, "give another --output folder")
        if any(found.get(key) != config.get(key) for key in ("experiment", "run_id", "config")):
            raise UserError(f"{target} holds another run: give another --output folder")


def write_whole(path: Path, content: bytes) -> Path:
    """Writes a file under a temporary name and renames it, so that it is whole or not there. Raises OSError."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
