"""The weights that training starts from where they are not drawn: a checkpoint, an encoder's, or a library's."""

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from models import build_config
from models.vision_bdh import VisionEncoder, VisionEncoderConfig, interpolate_positions
from training.config import Experiment, UserError, name_of_file
from training.runs import UNREADABLE, Run, first_line, load_file

CORE = ("encoder", "decoder", "level_norms")  # what the names of the core's weights begin with
NO_DIFFERENCE = {"encoder", "encoder_weights", "dropout"}  # fields that leave the weights' shapes and meaning alone


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
    state, source = read_checkpoint(path)
    if type(source) is not type(config):
        raise UserError(
            f"{path} holds the weights of a {type(source).__name__}, not of a {type(config).__name__}: "
            "name another file"
        )
    weights, fields = state["model"], {field.name for field in dataclasses.fields(config)}
    if isinstance(config, VisionEncoderConfig):
        fields.remove("img_size")
        weights = {
            name: interpolate_positions(weight, source.grid, config.grid) if name.endswith("pos_embed") else weight
            for name, weight in weights.items()
        }
    flags = _flags_of(source, config, fields)
    if problems := _misfits(model.state_dict(), weights):
        encoder = " (--encoder takes the encoder alone)" if hasattr(config, "encoder") else ""
        raise UserError(
            f"{path} holds weights of another architecture ({'; '.join(problems[:3])}): give the model what the run "
            f"had that it is from ({flags}), or name another file{encoder}"
        )
    # rotary frequencies follow from the model's own configuration
    own = {name: value for name, value in model.state_dict().items() if name.endswith("attn.freqs")}
    model.load_state_dict(weights | own)
    print(f"starting from {path}, epoch {state['epoch']}: all of its {len(weights)} tensors taken")
    _say_differences(flags)
    return {"file": name_of_file(path), "epoch": state["epoch"]}


def take_encoder(encoder: VisionEncoder, path: Path) -> dict[str, Any]:
    """The encoder's weights from the checkpoint of any Vision-BDH (or BDH-UNet), as far as their shapes agree.

    Learned positions are interpolated. The core has to agree, else there is nothing worth starting from; patches of
    another size or images of other channels leave the patch embedding as it was drawn.
    """
    state, source = read_checkpoint(path)
    if not isinstance(source, VisionEncoderConfig):
        raise UserError(f"{path} holds a {type(source).__name__}, not a Vision-BDH: name the best.pt of a run of one")
    mine = dict(encoder.named_parameters())
    theirs = {name.removeprefix("encoder."): weight for name, weight in state["model"].items()}
    if "pos_embed" in theirs and "pos_embed" in mine:
        theirs["pos_embed"] = interpolate_positions(theirs["pos_embed"], source.grid, encoder.config.grid)
    taken = {name: theirs[name] for name in mine if name in theirs and theirs[name].shape == mine[name].shape}
    if "patch_embed.weight" not in taken:
        taken.pop("patch_embed.bias", None)  # it belongs to it
    fields = {field.name for field in dataclasses.fields(VisionEncoderConfig)} - {"img_size"}
    flags = _flags_of(source, encoder.config, fields)
    core = {name for name in mine.keys() | theirs if name.startswith(CORE)}
    if misfits := sorted(core - taken.keys()):
        raise UserError(
            f"{path} does not fit the encoder (its {', '.join(misfits)}): give the encoder what the run had that it is "
            f"from ({flags})"
        )
    encoder.load_state_dict(taken, strict=False)
    left = sorted(mine.keys() - taken)
    other_grid = "pos_embed" in taken and source.grid != encoder.config.grid
    grids = f" (positions interpolated from {_by(source.grid)} patches)" if other_grid else ""
    print(
        f"encoder from {path}, epoch {state['epoch']}: {', '.join(sorted(taken))} taken{grids}; "
        f"{', '.join(left) or 'nothing'} in it and the rest of the model drawn anew"
    )
    _say_differences(flags)
    return {"file": name_of_file(path), "epoch": state["epoch"], "taken": sorted(taken), "drawn": left}


def read_checkpoint(path: Path) -> tuple[dict[str, Any], Any]:
    """A checkpoint and the config of its model. Raises UserError where it is none."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: name the file in it, {path / 'best.pt'}")
    if not path.exists():
        raise UserError(f"{path} is not there: train what it comes from first, or name another checkpoint (a best.pt)")
    try:
        state = load_file(path)
        config = build_config(Run(path.parent).read_config()["model_class"], state["config"]["model"])
        return {"model": state["model"], "epoch": state["epoch"]}, config
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


def _flags_of(source: Any, config: Any, names: set[str]) -> str:
    """The flags that would give the config those fields of the source, as the command line takes them."""
    flags = []
    for name in sorted(names - NO_DIFFERENCE):
        value, flag = getattr(source, name), name.replace("_", "-")
        if value == getattr(config, name):
            continue
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags.append(f"--{flag} {' '.join(map(str, value)) if isinstance(value, tuple) else value}")
    return " ".join(flags)


def _say_differences(flags: str) -> None:
    if flags:
        print(f"note: the weights were trained with {flags}")


def _by(sizes: Any) -> str:
    return " x ".join(map(str, sizes))
