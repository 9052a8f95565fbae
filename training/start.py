"""Initial weights that are not drawn: from a checkpoint, from an encoder's checkpoint, or from a library."""

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from models import build_config
from models.vision_bdh import VisionBDH, VisionEncoder, VisionEncoderConfig, interpolate_positions
from training.command_line import flags_of
from training.config import UserError
from training.experiment import Experiment, name_of_file
from training.stored import first_line, load_weights, read_config

FREQUENCIES = "attn.freqs"
CORE = ("encoder", "decoder", "level_", "update_gain", "mixing", "blocks_")  # prefixes of the core's weights
NO_DIFFERENCE = {"encoder", "encoder_weights", "dropout"}  # fields that do not change the weights' shapes or meaning


def start_weights(model: nn.Module, experiment: Experiment) -> dict[str, Any] | None:
    """Loads the weights that the experiment starts from, if any; returns their origin for config.json.

    An encoder's checkpoint takes precedence over one of the whole model. Raises UserError if weights cannot be had or
    do not fit.
    """
    config, whole = experiment.model, experiment.train.start_from
    if encoder := getattr(config, "encoder", None):
        return take_encoder(model if isinstance(model, VisionEncoder) else model.encoder, encoder)
    if whole is not None:
        return take_all(model, config, whole)
    if getattr(config, "encoder_weights", "none") != "none":
        return _take_from_library(model, config)
    return None


def take_all(model: nn.Module, config: Any, path: Path) -> dict[str, Any]:
    """Loads every weight of the same model; learned positions are interpolated for another image size."""
    weights, source = read_weights(path)
    if type(source) is not type(config):
        raise UserError(
            f"{path} holds weights of a {type(source).__name__}, not of a {type(config).__name__}: name another file"
        )
    n_tensors, fields = len(weights), {field.name for field in dataclasses.fields(config)}
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
            f"{path} holds weights of another architecture ({'; '.join(problems[:3])}): give the model the "
            f"flags of the run they come from ({flags}), or name another file{encoder}"
        )
    # rotary frequencies belong to the configuration, not to the weights, except those that pruning has kept
    own = {name: value for name, value in model.state_dict().items() if name.endswith(FREQUENCIES)}
    model.load_state_dict(weights | {name: value for name, value in own.items() if not of_each_head(weights[name])})
    print(f"starting from {path}: all of its {n_tensors} tensors taken")
    _say_differences(flags)
    return {"file": name_of_file(path)}


def take_encoder(encoder: VisionEncoder, path: Path) -> dict[str, Any]:
    """Loads the encoder's weights from a checkpoint of any Vision-BDH or BDH-UNet, as far as shapes agree.

    encoder: a BDH-UNet's, or a Vision-BDH, whose head keeps its drawn weights. Learned positions are interpolated. The
    core has to agree; with another patch size or other image channels the patch embedding keeps its drawn weights.
    """
    weights, source = read_weights(path)
    if not isinstance(source, VisionEncoderConfig):
        raise UserError(f"{path} holds a {type(source).__name__}, not a Vision-BDH: name the best.pt of a run of one")
    mine = dict(encoder.named_parameters())
    theirs = {name.removeprefix("encoder."): value for name, value in weights.items() if not name.startswith("head.")}
    if "pos_embed" in theirs and "pos_embed" in mine:
        theirs["pos_embed"] = interpolate_positions(theirs["pos_embed"], source.grid, encoder.config.grid)
    taken = {name: theirs[name] for name in mine if name in theirs and theirs[name].shape == mine[name].shape}
    stem = {name for name in mine if name.startswith("patch_embed.")}
    if not stem <= taken.keys():  # one part is useless without the others
        taken = {name: weight for name, weight in taken.items() if name not in stem}
    fields = {field.name for field in dataclasses.fields(VisionEncoderConfig)} - {"img_size"}
    if source.image_channels == encoder.config.image_channels:  # in_channels counts all frames of a clip
        fields.remove("in_channels")
    flags = _flags_of(source, encoder.config, fields)
    core = {name for name in mine.keys() | theirs if name.startswith(CORE)}
    if misfits := sorted(core - taken.keys()):
        named = ", ".join(misfits[:3]) + (f" and {len(misfits) - 3} more" if len(misfits) > 3 else "")
        raise UserError(
            f"{path} does not fit the encoder (its {named}): give the encoder the flags of the run it "
            f"comes from ({flags})"
        )
    pruned = {name: value for name, value in theirs.items() if name == FREQUENCIES and of_each_head(value)}
    encoder.load_state_dict(taken | pruned, strict=False)
    left = sorted(mine.keys() - taken)
    other_grid = "pos_embed" in taken and source.grid != encoder.config.grid
    grids = f" (positions interpolated from {_by(source.grid)} patches)" if other_grid else ""
    drawn = left if isinstance(encoder, VisionBDH) else [*left, "the rest of the model"]
    print(f"encoder from {path}: {', '.join(sorted(taken))} taken{grids}; drawn: {', '.join(drawn)}")
    if source.rotary == encoder.config.rotary == "axial" and source.axes != encoder.config.axes:
        print("note: its neurons rotate by other axes: frame, row and column in clips, row and column in images")
    _say_differences(flags)
    return {"file": name_of_file(path), "taken": sorted(taken), "drawn": left}


def read_weights(path: Path) -> tuple[dict[str, Tensor], Any]:
    """The weights in a checkpoint or safetensors file of a run, and the config of its model. Raises UserError."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: name the file in it, {path / 'best.pt'}")
    if not path.exists():
        raise UserError(f"{path} does not exist: train the run it comes from first, or name another checkpoint")
    remedy = "name a best.pt, last.pt or exported .safetensors in the folder of its run, beside config.json"
    weights, stored = load_weights(path, remedy), read_config(path.parent, remedy)
    try:
        return weights, build_config(stored["model_class"], stored["config"]["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is of a model that this version does not know ({error}): {remedy}") from None


def _take_from_library(model: nn.Module, config: Any) -> dict[str, Any]:
    try:
        config.load_encoder_weights(model)
    except Exception as error:  # its libraries raise errors of many kinds
        raise UserError(
            f"the {config.encoder_weights} weights could not be downloaded ({first_line(error)}): connect to the "
            "network, or train from scratch with --encoder-weights none --epochs 80"
        ) from None
    print(f"encoder from the library: its {config.encoder_weights} weights; the decoder is drawn")
    return {"library": config.encoder_weights}


def _misfits(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """What keeps the weights `theirs` from being loaded."""
    problems = [f"no {name}" for name in mine.keys() - theirs] + [f"{name} unknown" for name in theirs.keys() - mine]
    return sorted(problems) + [
        f"{name} is {_by(theirs[name].shape)}, not {_by(mine[name].shape)}"
        for name in mine
        if name in theirs
        and mine[name].shape != theirs[name].shape
        and not (name.endswith(FREQUENCIES) and of_each_head(theirs[name]))
    ]


def of_each_head(frequencies: Tensor) -> bool:
    """Whether these are the rotary frequencies of a pruned model, which has its own for each head."""
    return frequencies.dim() == 4 and frequencies.shape[1] > 1


def _flags_of(source: Any, config: Any, names: set[str]) -> str:
    """Flags that give the config the source's values of those fields."""
    differ = {name: getattr(source, name) for name in sorted(names - NO_DIFFERENCE)}
    return " ".join(flags_of({name: value for name, value in differ.items() if value != getattr(config, name)}))


def _say_differences(flags: str) -> None:
    if flags:
        print(f"note: the weights were trained with {flags}")


def _by(sizes: Any) -> str:
    return " x ".join(map(str, sizes))
