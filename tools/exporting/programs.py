"""A model as a torch.export program, as ONNX, and as ONNX with int8 weights.

Each takes any number of images at once; those of a BDH-UNet may have any height and width that its patch divides, from
two patches each way (of one, PyTorch would make another program), above 32 pixels with decoder=upernet. A file is
written under a temporary name, opened again, held to the model on random images, and only then renamed.
"""

import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from models.bdh_unet import BDHUNet
from models.export_form import export_form
from models.vision_bdh import height_and_width
from tools.exporting.extras import need
from training.config import UserError
from training.files import written_whole

TOLERANCE = 1e-4  # largest difference of an answer, as a share of the largest answer, in float32
INPUT, OUTPUT = "images", "logits"


def open_program(model: nn.Module, config: Any) -> ExportedProgram:
    """The model in its export form, with sizes left open. config: the model's, for the size of its images."""
    patch = config.patch_size if isinstance(model, BDHUNet) else None
    sizes: dict[int, Any] = {0: Dim("batch", min=1)}
    channels, height, width = _image_shape(config)
    if patch:  # sizes of the example must differ from the trained one and from each other: equal ones would be kept
        least = config.least_patches
        sizes |= {2: patch * Dim("rows", min=least), 3: patch * Dim("columns", min=least)}
        height, width = height + patch, width + 2 * patch
    example = torch.randn(2, channels, height, width)
    with quiet():
        return torch.export.export(export_form(model), (example,), dynamic_shapes=(sizes,))


def _image_shape(config: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images that the model was built for."""
    return (config.in_channels, *height_and_width(config.img_size))


def fresh_images(model: nn.Module, config: Any) -> Iterator[Tensor]:
    """Random images in odd batch sizes, and for a BDH-UNet in other sizes, too."""
    channels, height, width = _image_shape(config)
    for n in (1, 3):
        yield torch.rand(n, channels, height, width) * 2 - 1
    if isinstance(model, BDHUNet):
        rows, columns = config.least_patches + 1, config.least_patches + 3
        yield torch.rand(1, channels, rows * config.patch_size, columns * config.patch_size) * 2 - 1


def difference(model: nn.Module, config: Any, answer: Callable[[Tensor], Tensor]) -> float:
    """Largest difference between the model's and the other's answers, as a share of the model's largest."""
    worst = 0.0
    with torch.inference_mode():
        for images in fresh_images(model, config):
            expected = model(images)
            worst = max(worst, ((answer(images) - expected).abs().max() / expected.abs().max()).item())
    return worst


def write_torch(model: nn.Module, config: Any, path: Path) -> str:
    """Writes a torch.export program; returns what the check found. Raises UserError if it computes something else."""
    with written_whole(path) as partial:
        torch.export.save(open_program(model, config), partial)
        return _checked(model, config, torch.export.load(partial).module(), path)


def write_onnx(model: nn.Module, config: Any, path: Path, facts: dict[str, Any] | None = None) -> str:
    """Writes ONNX; returns what the check by onnxruntime found. facts: kept as metadata.

    Raises UserError if a package is missing, or the file computes something else.
    """
    onnx = need("onnx", "--to onnx")
    need("onnxscript", "--to onnx")
    need("onnxruntime", "--to onnx")
    with written_whole(path) as partial:
        with quiet():
            program = torch.onnx.export(
                open_program(model, config), dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False
            )
        program.save(partial)
        proto = without_traces(onnx.load(partial))
        for key, value in (facts or {}).items():
            proto.metadata_props.add(key=key, value=json.dumps(value))
        onnx.save(proto, partial)
        return _checked(model, config, onnx_answer(partial), path)


def without_traces(proto: Any) -> Any:
    """The ONNX model without stack traces of its export, which name paths of this machine and are a third of it."""
    for part in (*proto.graph.node, *proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        del part.metadata_props[:]
    return proto


def _checked(model: nn.Module, config: Any, answer: Callable[[Tensor], Tensor], path: Path) -> str:
    found = difference(model, config, answer)
    if not found <= TOLERANCE:  # NaN, too
        raise UserError(
            f"{path.name} was not written: its answers differ from the model's by {found:.1e} of the largest"
        )
    return f"largest difference from the model {found:.1e} of the largest answer"


def onnx_session(path: Path, threads: int | None = None) -> Any:
    """An onnxruntime session on the CPU. threads: default as PyTorch's. Raises UserError for a bad file."""
    onnxruntime = need("onnxruntime", "opening ONNX")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3  # errors
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises errors of many kinds
        raise UserError(f"{path} cannot be read as ONNX ({str(error).strip().splitlines()[0]})") from None


def onnx_answer(path: Path, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """The model in an ONNX file as a function of images. Raises UserError for a bad file."""
    session = onnx_session(path, threads)
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.cpu().numpy()})[0])


def write_int8(source: Path, path: Path, batches: Iterable[Tensor]) -> None:
    """Writes a copy of an ONNX file whose products with weights are int8.

    Weights: per output channel, symmetric, in 7 bits, as CPUs without VNNI instructions add two products in 16 bits.
    Activations: 8 bits, one range for each tensor, the extremes over the batches (B, C, height, width). Convolutions,
    attention and norms stay in float32. Raises UserError if a package is missing.
    """
    need("onnxruntime", "--to int8")
    need("onnx", "--to int8")
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self):
            self.batches = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            images = next(self.batches, None)
            return None if images is None else {INPUT: images.cpu().numpy()}

    with tempfile.TemporaryDirectory() as folder, written_whole(path) as partial:
        prepared = str(Path(folder) / "prepared.onnx")
        with quiet():
            quant_pre_process(str(source), prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                str(partial),
                Images(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True},
            )
        onnx_session(partial)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and notes of the exporters."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
