"""A run's best weights as one small file, with the config.json and the model card that make its folder complete.

The file is safetensors: it holds no code. Parameters are stored in bf16, half the bytes of float32; buffers (rotary
frequencies, BatchNorm statistics) keep their precision.
"""

from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from tools.exporting.model_card import model_card
from training.config import UserError
from training.stored import CARD, EXPORTED, read_config, read_summary

COPIED = ("config.json", "metrics.csv", "summary.json")


def export_weights(model: nn.Module, folder: Path, target: Path) -> Path:
    """Writes EXPORTED and the model card into target, beside copies of the run's small files; returns EXPORTED.

    model: with the run's best weights. folder: of the run. Raises OSError if a file cannot be written, Damaged for a
    damaged summary.json, UserError if target holds something else.
    """
    check_target(folder, target)
    parameters = {name for name, _ in model.named_parameters()}
    tensors = {
        name: (tensor.to(torch.bfloat16) if name in parameters else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    target.mkdir(parents=True, exist_ok=True)
    elsewhere = target.resolve() != folder.resolve()
    for name in COPIED if elsewhere else ():
        if (folder / name).is_file():
            write_whole(target / name, (folder / name).read_bytes())
        else:
            (target / name).unlink(missing_ok=True)
    path = write_whole(target / EXPORTED, save(tensors))
    if read_summary(target) is not None:
        write_whole(target / CARD, model_card(target).encode())
    elif elsewhere:
        (target / CARD).unlink(missing_ok=True)
    return path


def check_target(folder: Path, target: Path) -> None:
    """Raises UserError if files of another run, or a README that is no model card, would be replaced in target."""
    if target.resolve() == folder.resolve():
        return
    if (target / "config.json").exists():
        if read_config(target).get("run_id") != read_config(folder).get("run_id"):
            raise UserError(f"{target} holds another run: give another folder for the exported one")
    elif (target / CARD).exists():
        raise UserError(f"{target} has a {CARD}, which the model card would replace: give another folder")


def write_whole(path: Path, content: bytes) -> Path:
    """Writes a file under a temporary name and renames it, so that it is whole or not there. Raises OSError."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
