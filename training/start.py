"""The weights that training starts from where they are not drawn: a checkpoint, an encoder's, or a library's."""

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from models import build_config
from models.vision_bdh import VisionEncoder, VisionEncoderConfig, interpolate_positions
from training.config import Experiment, UserError, name_of_file
from training.runs import UNREADABLE, Run, first_line, load_file


def start_weights(model: nn.Module, experiment: Experiment) -> dict[str, Any] | None:
    """Gives the model the weights that the experiment asks for, says which, and returns where they are from.

    An encoder's checkpoint goes before one of the whole model. Raises UserError where weights cannot be had or misfit.
    """
    config, whole = experiment.model, experiment.train.start_from
    if encoder := getattr(config, "encoder", None):
        return take_encoder(model.encoder, encoder)
    if whole is not None:
        return take_all(model, config, whole)
    if getattr(config, "encoder_weights", "none") != "none":
        return _take_from_library(model, config)
    return None


def take_all(model: nn.Module, config: Any, path: Path) -> dict[str, Any]:
    """Every weight of a checkpoint of the same model; learned positions are interpolated for another image size."""
    state, fields, class_name = read_checkpoint(path)
    if class_name != type(config).__name__:
        raise UserError(
            f"{path} holds the weights of a {class_name}, not of a {type(config).__name__}: name another file"
        )
    weights = state["model"]
    if isinstance(config, VisionEncoderConfig):
        before = build_config(class_name, fields).grid
        weights = {
            name: interpolate_positions(weight, before, config.grid) if name.endswith("pos_embed") else weight
            for name, weight in weights.items()
        }
    problems = _misfits(model.state_dict(), weights)
    if problems:
        raise UserError(
            f"{path} holds weights of another architecture ({'; '.join(problems[:3])}): give the model the sizes of "
            f"the run it is from ({_differences(config, fields)}), or name another file"
        )
    # rotary frequencies follow from the model's own configuration
    own = {name: value for name, value in model.state_dict().items() if name.endswith("attn.freqs")}
    model.load_state_dict(weights | own)
    print(f"starting from {path}, epoch {state['epoch']}: all of its {len(weights)} tensors taken")
    _say_differences(config, fields)
    return {"file": name_of_file(path), "epoch": state["epoch"]}


def take_encoder(encoder: VisionEncoder, path: Path) -> dict[str, Any]:
    """The encoder's weights from the checkpoint of any Vision-BDH (or BDH-UNet), as far as their shapes agree.

    Learned positions are interpolated. The core has to agree, else there is nothing worth starting from; patches of
    another size or images of other channels leave the patch embedding as it was drawn.
    """
    state, fields, class_name = read_checkpoint(path)
    source = build_config(class_name, fields)
    if not isinstance(source, VisionEncoderConfig):
        raise UserError(f"{path} holds a {class_name}, not a Vision-BDH: name the best.pt of a run of one")
    mine = dict(encoder.named_parameters())
    theirs = {name.removeprefix("encoder."): weight for name, weight in state["model"].items()}
    if "pos_embed" in theirs and "pos_embed" in mine:
        theirs["pos_embed"] = interpolate_positions(theirs["pos_embed"], source.grid, encoder.config.grid)
    taken = {name: theirs[name] for name in mine if name in theirs and theirs[name].shape == mine[name].shape}
    core = [name for name in mine if not name.startswith(("patch_embed", "pos_embed"))]
    if missing := [name for name in core if name not in taken]:
        raise UserError(
            f"{path} does not fit the encoder (its {', '.join(missing)}): give the encoder the sizes and choices of "
            f"the run it is from ({_differences(encoder.config, fields)})"
        )
    encoder.load_state_dict(taken, strict=False)
    left = sorted(mine.keys() - taken)
    grids = "" if source.grid == encoder.config.grid else f" (positions interpolated from {_by(source.grid)} patches)"
    print(
        f"encoder from {path}, epoch {state['epoch']}: {', '.join(sorted(taken))} taken{grids}; "
        f"{', '.join(left) or 'nothing'} in it and the rest of the model drawn anew"
    )
    _say_differences(encoder.config, fields)
    return {"file": name_of_file(path), "epoch": state["epoch"], "taken": sorted(taken), "drawn": left}


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """A checkpoint, the fields of its model, and the model's config class. Raises UserError where it is none."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: name the file in it, {path / 'best.pt'}")
    if not path.exists():
        raise UserError(f"{path} is not there: train what it comes from first, or name another checkpoint (a best.pt)")
    try:
        state = load_file(path)
        config = Run(path.parent).read_config()
        build_config(config["model_class"], state["config"]["model"])
        return {"model": state["model"], "epoch": state["epoch"]}, state["config"]["model"], config["model_class"]
    except (*UNREADABLE, TypeError) as error:
        raise UserError(
            f"{path} cannot be used as a checkpoint ({first_line(error)}): name a best.pt or last.pt in the folder of "
            "its run, with config.json beside it"
        ) from None


def _take_from_library(model: nn.Module, config: Any) -> dict[str, Any]:
    try:
        config.load_encoder_weights(model)
    except Exception as error:  # the hub's libraries raise errors of many kinds
        raise UserError(
            f"the {config.encoder_weights} weights could not be downloaded ({first_line(error)}): connect to the "
            "network, or train from scratch with --encoder-weights none --epochs 80"
        ) from None
    print(f"encoder from the library: its {config.encoder_weights} weights; the decoder is drawn anew")
    return {"library": config.encoder_weights}


def _misfits(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """What keeps theirs from being loaded, a few words each."""
    problems = [f"no {name}" for name in mine.keys() - theirs] + [f"{name} unknown" for name in theirs.keys() - mine]
    return sorted(problems) + [
        f"{name} is {_by(theirs[name].shape)}, not {_by(mine[name].shape)}"
        for name in mine
        if name in theirs and mine[name].shape != theirs[name].shape
    ]


def _differences(config: Any, fields: dict[str, Any]) -> str:
    """The flags that would give the config those fields."""
    mine = dataclasses.asdict(config)
    flags = [
        f"--{name.replace('_', '-')} {value}"
        for name, value in fields.items()
        if name in mine and name not in ("num_classes", "img_size", "encoder") and value != mine[name]
    ]
    return " ".join(flags)


def _say_differences(config: Any, fields: dict[str, Any]) -> None:
    if differences := _differences(config, fields):
        print(f"note: the weights were trained with {differences}")


def _by(sizes: Any) -> str:
    return " x ".join(map(str, sizes))
