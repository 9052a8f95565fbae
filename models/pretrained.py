"""Trained models that come with the repository.

    from models.pretrained import load_pretrained, pretrained_names

    print(pretrained_names())
    model = load_pretrained("speedrun")       # in evaluation mode, float32

A model is there if a folder below results/ holds its weights (best_bf16.safetensors) and its config.json; nothing else
lists them. Its name is the folder's path below results/, without a final seed0. This adds one:

    python tools/export.py RUN --output results/NAME/seed0
"""

from pathlib import Path

from torch import nn

from training.config import ROOT, UserError
from training.runs import load_model
from training.stored import EXPORTED

RESULTS = ROOT / "results"


def pretrained_folders(results: Path = RESULTS) -> dict[str, Path]:
    """Folders with weights by the model's name, sorted by name."""
    folders = [path.parent for path in results.rglob(EXPORTED) if (path.parent / "config.json").is_file()]
    named = {}
    for folder in sorted(folders, key=lambda folder: folder.name == "seed0"):  # a shorter path takes the name first
        full = folder.relative_to(results).as_posix()
        short = full.removesuffix("/seed0")
        named[full if short in named else short] = folder
    return dict(sorted(named.items()))


def pretrained_names(results: Path = RESULTS) -> list[str]:
    """Names that `load_pretrained` takes."""
    return list(pretrained_folders(results))


def pretrained_folder(name: str, results: Path = RESULTS) -> Path:
    """The folder of that model, which every --run takes. Raises UserError if there is no such model."""
    folders = pretrained_folders(results)
    if name in folders:
        return folders[name]
    if not folders:
        raise UserError(
            f"{results} holds no weights ({EXPORTED} beside a config.json) yet: train a model (python "
            "train_quickstart.py), or add one with python tools/export.py RUN --output results/NAME/seed0"
        )
    raise UserError(f"there is no pretrained model {name}: choose one of {', '.join(folders)}")


def load_pretrained(name: str, results: Path = RESULTS) -> nn.Module:
    """The model with its trained weights, in evaluation mode. Stored in bf16, it computes in float32.

    Raises UserError if there is no such model, or a file of it is damaged.
    """
    return load_model(pretrained_folder(name, results))[0]
