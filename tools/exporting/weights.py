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
from training.files import written_whole
from training.stored import CARD, EXPORTED, SMALL_FILES, read_config, read_summary


def export_weights(model: nn.Module, folder: Path, target: Path) -> Path:
    """Writes EXPORTED and the model card into target, beside copies of the run's small files; returns EXPORTED.

    model: with the run's best weights. folder: of the run; without a summary.json there is no card. Raises Damaged for
    a damaged summary.json, UserError if a file cannot be written, or target holds something else.
    """
    if target.resolve() != folder.resolve():
        check_target(target, read_config(folder))
    card = model_card(folder).encode() if read_summary(folder) is not None else None
    if (target / CARD).exists() and (target / CARD).read_bytes() != card:
        raise UserError(
            f"{target / CARD} is not the model card of these weights: move it, or give another --output folder"
        )
    parameters = {name for name, _ in model.named_parameters()}
    tensors = {
        name: (tensor.to(torch.bfloat16) if name in parameters else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    copy_small_files(folder, target)
    if card is not None:
        write_bytes(target / CARD, card)
    return write_bytes(target / EXPORTED, save(tensors))


def copy_small_files(folder: Path, target: Path) -> None:
    """Makes target's small files those of the run in folder, so that it is known as an export of this run."""
    for name in SMALL_FILES if target.resolve() != folder.resolve() else ():
        if (folder / name).is_file():
            write_bytes(target / name, (folder / name).read_bytes())
        else:
            (target / name).unlink(missing_ok=True)


def check_target(target: Path, config: dict[str, Any]) -> None:
    """Raises UserError if the folder holds a run, or what was exported from another one than that of this config."""
    if any((target / name).exists() for name in ("last.pt", "best.pt")):
        raise UserError(f"{target} holds a run: give another --output folder")
    if (target / "config.json").exists():
        found = read_config(target, "give another --output folder")
        if any(found.get(key) != config.get(key) for key in ("experiment", "run_id", "config")):
            raise UserError(f"{target} holds another run: give another --output folder")


def write_bytes(path: Path, content: bytes) -> Path:
    """Writes a file whole or not at all; returns its path. Raises UserError if it cannot be written."""
    with written_whole(path) as partial:
        partial.write_bytes(content)
    return path
