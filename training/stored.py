"""What is read back from a run's folder, validated in one place.

Every reader (resume, interpretability, analysis, sweeps) comes through here: damage of any kind raises `Damaged`, one
message that names the file and says what to do. Nothing in a file is executed.
"""

import io
import json
import zipfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NotRequired

import numpy as np
import torch
from pydantic import ConfigDict, Field, PydanticUserError, TypeAdapter, ValidationError
from safetensors.torch import load_file as load_safetensors
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from training import config as train_configs
from models import CONFIG_CLASSES
from training.config import UserError
from training.data.batches import Split
from training.experiment import Configuration, default_fields

if TYPE_CHECKING:
    import pandas as pd

SMALL_FILES = ("config.json", "metrics.csv", "summary.json")  # the last one marks a copied run as complete
EXPORTED = "best_bf16.safetensors"  # written by tools/export.py from best.pt
CARD = "README.md"  # its model card
EXPORTS = (EXPORTED, "model*.pt2", "model*.onnx")  # files that it writes beside a run, but for the card
FINGERPRINTS = {"file_names_and_sizes", "sha256"}  # keys of data that identify them without a name
TRAIN_CLASSES = {  # of runs stored before config.json named the class, by model; all others are classification
    "BDHConfig": "TextConfig",
    "BDHUNetConfig": "SegmentationConfig",
    "ResNetUNetConfig": "SegmentationConfig",
    "MaskedBDHConfig": "PretrainingConfig",
}
Number = int | float
LENIENT = ConfigDict(extra="allow")


class Damaged(UserError):
    """A file of a run that cannot be used; the message names it and says what to do."""


class _Fields(TypedDict):
    model: dict[str, Any]
    train: dict[str, Any]


class _Data(TypedDict):
    __pydantic_config__ = LENIENT
    name: str
    class_names: NotRequired[list[str]]
    images: NotRequired[dict[str, int]]


class _Hardware(TypedDict):
    __pydantic_config__ = LENIENT
    device: str
    name: str
    threads: NotRequired[int | None]


class ConfigFile(TypedDict):
    """config.json."""

    __pydantic_config__ = LENIENT
    experiment: Annotated[str, Field(pattern=r"^[^/]*[^/.][^/]*$")]  # it becomes part of file names
    config: _Fields
    model_class: str
    train_class: NotRequired[str]
    task: NotRequired[str]
    data: _Data
    parameters: Annotated[int, Field(ge=0)]
    hardware: _Hardware
    resumed_on: NotRequired[list[_Hardware]]
    run_id: NotRequired[str]


class SummaryFile(TypedDict):
    """summary.json."""

    __pydantic_config__ = LENIENT
    test: dict[str, Number | None] | None
    best: dict[str, Number | None]
    epochs: Annotated[int, Field(ge=1)]
    parameters: Annotated[int, Field(ge=0)]
    images: NotRequired[dict[str, int]]


class _Inside(TypedDict):
    """How far an epoch is, in a checkpoint inside it: `progress.Progress`."""

    steps: Annotated[int, Field(ge=1)]
    seen: Annotated[int, Field(ge=1)]
    rate: float
    seconds: float
    of_processes: Annotated[list[dict[str, Any]], Field(min_length=1)]


class Checkpoint(TypedDict):
    """last.pt and previous.pt; best.pt and epoch_<n>.pt have neither step nor optimizer."""

    __pydantic_config__ = ConfigDict(extra="allow", arbitrary_types_allowed=True)
    epoch: Annotated[int, Field(ge=0)]
    model: dict[str, torch.Tensor]
    config: _Fields
    step: NotRequired[int]
    optimizer: NotRequired[dict[str, Any]]
    best: NotRequired[dict[str, Number | None] | None]
    run_id: NotRequired[str]
    processes: NotRequired[int]
    inside: NotRequired[_Inside]


@cache
def _adapter(kind: type) -> TypeAdapter:
    return TypeAdapter(kind)


def changed_data(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Keys in which data are not those that a run recorded, sorted; an older run lacks keys, which do not count.

    The name, which may be a folder's, counts only without a fingerprint of the files or of their content.
    """
    identified = FINGERPRINTS & before.keys()
    return [key for key in sorted(before) if before[key] != now.get(key) and not (identified and key == "name")]


def validated(value: Any, kind: type, path: Path, remedy: str) -> Any:
    """The value, if it has the structure of the TypedDict `kind`; raises Damaged otherwise."""
    try:
        _adapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "content"
        raise Damaged(f"{path} is damaged ({where}: {first['msg']}): {remedy}") from None
    return value


def read_json(path: Path, kind: type, remedy: str) -> dict[str, Any]:
    """A validated JSON file. Raises Damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{path} cannot be read ({first_line(error)}): {remedy}") from None
    return validated(value, kind, path, remedy)


def read_config(folder: Path, remedy: str = "start again with --overwrite") -> dict[str, Any]:
    """config.json of a run. Raises Damaged."""
    path = folder / "config.json"
    config = read_json(path, ConfigFile, remedy)
    train = config["config"]["train"]
    for name, least in (("seed", 0), ("epochs", 1)):
        if type(train.get(name)) is not int or train[name] < least:
            raise Damaged(f"{path} is damaged (train.{name} = {train.get(name)!r}): {remedy}")
    kind = config["data"]["name"].partition(" ")[0]  # "folder NAME"
    if train.get("dataset", kind) != kind:
        raise Damaged(f"{path} is damaged (train.dataset = {train['dataset']!r}, but data.name differs): {remedy}")
    for part, config_class in zip(("model", "train"), _config_classes(config)[1], strict=True):
        _check_fields(config["config"][part], config_class, part, path, remedy)
    return config


def _config_classes(config: dict[str, Any]) -> tuple[tuple[str, str], tuple[type | None, type | None]]:
    """Names of the model's and the training's config class, and the classes; None for one not in this project."""
    model_class = config["model_class"]
    train_class = config.get("train_class") or TRAIN_CLASSES.get(model_class, "ClassificationConfig")
    found = getattr(train_configs, train_class, None)
    known = isinstance(found, type) and issubclass(found, train_configs.TrainConfig)
    return (model_class, train_class), (CONFIG_CLASSES.get(model_class), found if known else None)


def task_of(config: dict[str, Any]) -> str:
    """`TrainConfig.task` of a run, from its config.json; "" for an old run of a class that is not in this project."""
    return config.get("task") or getattr(_config_classes(config)[1][1], "task", "")


def _check_fields(fields: dict[str, Any], config_class: type | None, part: str, path: Path, remedy: str) -> None:
    """Raises Damaged if the class refuses a stored value or lacks a default for a missing one.

    Fields that the class does not have are passed over: another version may have stored them.
    """
    try:
        adapter = _adapter(config_class) if config_class else None
    except PydanticUserError:  # a field of a type that only the class itself can check
        return
    try:
        if adapter:
            adapter.validate_json(json.dumps(fields, allow_nan=False), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (part, *first["loc"][:1])))
        raise Damaged(f"{path} is damaged ({where}: {first['msg']}): {remedy}") from None
    except ValueError:
        raise Damaged(f"{path} is damaged ({part} has a number that is not finite): {remedy}") from None


def configuration_of(config: dict[str, Any]) -> Configuration:
    """The configuration in a config.json; fields younger than the run get their defaults."""
    (model_class, train_class), classes = _config_classes(config)
    defaults = [default_fields(each) if each is not None else {} for each in classes]
    stored = json.loads(json.dumps([config["config"]["model"], config["config"]["train"]]))  # tuples become lists
    return Configuration(model_class, train_class, *(new | old for new, old in zip(defaults, stored, strict=True)))


def read_summary(folder: Path, remedy: str = "remove it and add --resume to test again") -> dict[str, Any] | None:
    """summary.json of a finished run, None before the end. Raises Damaged."""
    path = folder / "summary.json"
    if not path.exists():
        return None
    summary = read_json(path, SummaryFile, remedy)
    if type(summary["best"].get("epoch")) is not int:
        raise Damaged(f"{path} is damaged (best.epoch = {summary['best'].get('epoch')!r}): {remedy}")
    return summary


def read_metrics(folder: Path, remedy: str = "add --resume to the run's command to restore it") -> "pd.DataFrame":
    """metrics.csv, indexed by epoch from 1 without gaps; all columns numeric. Raises Damaged."""
    import pandas as pd  # here, so that training does not wait for it

    path = folder / "metrics.csv"

    def damaged(why: str) -> Damaged:
        return Damaged(f"{path} is damaged ({why}): {remedy}")

    try:
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # a last line without its end: stopped while writing
        table = pd.read_csv(io.StringIO(whole)).set_index("epoch")
        table = table.apply(pd.to_numeric)
    except (OSError, ValueError, KeyError, TypeError, pd.errors.ParserError) as error:
        raise damaged(first_line(error)) from None
    if table.index.tolist() != list(range(1, len(table) + 1)) or not len(table):
        raise damaged("its epochs do not count from 1 without gaps")
    missing = [name for name in ("train_loss", "val_loss", "epoch_time_sec") if name not in table]
    if missing or not np.isfinite(table[["train_loss", "val_loss", "epoch_time_sec"]].to_numpy(float)).all():
        raise damaged(f"no column {', '.join(missing)}" if missing else "a loss or time is missing")
    return table


def read_split(folder: Path, config: dict[str, Any], remedy: str = "start with --overwrite") -> Split | None:
    """split.npz; None for a run without a drawn split. Raises Damaged, also for the split of another run.

    config: the run's config.json.
    """
    path = folder / "split.npz"
    if not path.exists():
        return None
    try:
        with np.load(path) as arrays:
            stored = {name: arrays[name] for name in arrays.files}
        train, val = stored["train"], stored["val"]
    except Exception as error:  # numpy and zipfile raise errors of many kinds
        raise Damaged(f"{path} cannot be read ({first_line(error)}): {remedy}") from None
    if any(each.ndim != 1 or each.dtype.kind not in "iu" or each.size == 0 for each in (train, val)):
        raise Damaged(f"{path} is damaged (no two lists of indices): {remedy}")
    both = np.concatenate((train, val))
    if both.min() < 0 or len(np.unique(both)) != len(both):
        raise Damaged(f"{path} is damaged (indices are negative or occur twice): {remedy}")
    sizes = config["data"].get("images", {})
    if "train" in sizes and both.max() >= sizes["train"] + sizes.get("val", 0):  # the val part is numbered after train
        raise Damaged(f"{path} is damaged (an index is beyond the {sizes['train']} images): {remedy}")
    run_id = config.get("run_id")
    if run_id and str(stored.get("run_id", run_id)) != run_id:
        raise Damaged(f"{path} belongs to another run: {remedy}")
    return Split(train=train, val=val)


def hardware_of(config: dict[str, Any]) -> list[dict[str, Any]]:
    """All that a run was trained on, in order, from its config.json."""
    return [config["hardware"], *config.get("resumed_on", [])]


def load_checkpoint(path: Path, remedy: str = "name another checkpoint") -> dict[str, Any]:
    """A checkpoint on the CPU, checksums verified. Raises Damaged."""
    try:
        if path.is_dir():
            raise ValueError("it is a folder")
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load does not check CRC-32
                raise ValueError(f"wrong checksum of {Path(damaged).name}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises errors of many kinds, and advises what would execute the file
        raise Damaged(f"{path} cannot be read as a checkpoint ({_reason(error)}): {remedy}") from None
    return validated(state, Checkpoint, path, remedy)


def check_origin(state: dict[str, Any], config: dict[str, Any], path: Path, remedy: str) -> None:
    """Raises Damaged for a checkpoint that does not belong to the config.json beside it."""
    theirs, ours = state.get("run_id"), config.get("run_id")
    other = configuration_of(config | {"config": state["config"]}).differences(configuration_of(config))
    if (theirs and ours and theirs != ours) or other:
        differs = f" ({'; '.join(other)})" if other else ""
        raise Damaged(f"{path} belongs to another run than the config.json beside it{differs}: {remedy}")


def load_weights(
    path: Path, remedy: str = "name a best.pt, last.pt or .safetensors", config: dict[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """Model weights of a checkpoint or an exported safetensors file, on the CPU, names as the model has them.

    Prefixes of wrappers (module., _orig_mod.) are stripped. config: the config.json that a checkpoint must belong to.
    Raises Damaged.
    """
    if path.suffix == ".safetensors":
        try:
            weights = load_safetensors(path)
        except Exception as error:
            raise Damaged(f"{path} cannot be read as safetensors ({first_line(error)}): {remedy}") from None
    else:
        state = load_checkpoint(path, remedy)
        if config is not None:
            check_origin(state, config, path, remedy)
        weights = state["model"]
        if average := state.get("average"):  # of last.pt: what was validated
            weights = {name: value for name, value in average.items() if name.startswith("module.")}
    return _unwrapped(weights)


def _unwrapped(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the prefixes of DistributedDataParallel and torch.compile, in whichever order they were applied."""
    for prefix in ("module.", "_orig_mod."):
        if weights and all(name.startswith(prefix) for name in weights):
            return _unwrapped({name.removeprefix(prefix): value for name, value in weights.items()})
    return weights


def first_line(error: Exception) -> str:
    """The error's message on one line; its class if it has none."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _reason(error: Exception) -> str:
    """Without the advice of PyTorch to load with weights_only=False, which would execute the file."""
    known = isinstance(error, OSError | ValueError | zipfile.BadZipFile) and "weights_only" not in str(error)
    return first_line(error) if known else "not a checkpoint of this project"
