"""The model inside explore.py's page: ONNX that answers and shows its attention and neurons, and the runtime for it.

explore_page/live.js runs it in the browser, by onnxruntime-web's files beside it. Nothing is fetched from a network.
"""

import base64
import gzip
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from interpretability.common.inside import LookInside
from tools.exporting.extras import need
from tools.exporting.programs import INPUT, onnx_session, quiet, without_traces
from training.config import UserError

PAGE_FILES = Path(__file__).parent / "explore_page"
RUNTIME = PAGE_FILES / "onnxruntime-web"
OUTPUTS = ("probabilities", "scores", "numbers", "values", "active")  # the last three of a BDH only
TOLERANCE = 2e-2  # weights are stored in float16
LARGEST_HALF = 65504.0


def live_scripts(model: nn.Module, image_shape: tuple[int, int, int], n_neurons: int) -> str:
    """Script elements with the runtime, the model and what runs it. image_shape: (C, height, width).

    Raises UserError if a package is missing, or the page's model computes something else.
    """
    parts = {
        "ort-code": gzip.compress((RUNTIME / "ort.wasm.bundle.min.mjs").read_bytes(), mtime=0),
        "ort-wasm": (RUNTIME / "ort-wasm-simd-threaded.wasm.gz").read_bytes(),
        "model": gzip.compress(model_bytes(LookInside(model, n_neurons).eval(), image_shape), mtime=0),
    }
    texts = (
        f'<script type="text/plain" id="{name}">{base64.b64encode(content).decode()}</script>'
        for name, content in parts.items()
    )
    return "\n".join((*texts, f"<script>\n{(PAGE_FILES / 'live.js').read_text(encoding='utf-8')}</script>\n"))


def model_bytes(inside: LookInside, image_shape: tuple[int, int, int]) -> bytes:
    """ONNX with weights stored in float16, computed with in float32; held to the model on a random image."""
    onnx = need("onnx", "explore.py --live")
    need("onnxscript", "explore.py --live")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inside.onnx"
        with quiet():
            program = torch.export.export(inside, (torch.randn(1, *image_shape),))
            exported = torch.onnx.export(program, dynamo=True, input_names=[INPUT], verbose=False)
        exported.save(path)
        proto = without_traces(onnx.load(path))
        for output, name in zip(proto.graph.output, OUTPUTS, strict=False):
            _rename(proto.graph, output.name, name)
        _store_half(onnx, proto.graph)
        onnx.save(proto, path)
        images = torch.rand(1, *image_shape) * 2 - 1
        found = onnx_session(path).run(None, {INPUT: images.numpy()})
        with torch.inference_mode():
            expected = inside(images)
        for name, ours, theirs in zip(OUTPUTS[:2], expected, map(torch.from_numpy, found), strict=False):
            ours, theirs = ours.flatten(1), theirs.flatten(1)  # a row for each level
            if not ((theirs - ours).abs().amax(1) <= TOLERANCE * ours.abs().amax(1)).all():
                raise UserError(f"the model for the page computes other {name} than the run's model: leave out --live")
        return path.read_bytes()


def _rename(graph: Any, old: str, new: str) -> None:
    """Renames a tensor everywhere in the graph."""
    for node in graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name == old:
                    names[place] = new
    for value in (*graph.output, *graph.value_info):
        if value.name == old:
            value.name = new


def _store_half(onnx: Any, graph: Any) -> None:
    """Stores the float32 weights in float16, each with a Cast in front of the graph."""
    casts = []
    for weight in graph.initializer:
        values = onnx.numpy_helper.to_array(weight)
        if values.dtype != "float32" or values.size < 1024 or abs(values).max() > LARGEST_HALF:
            continue
        name = weight.name
        weight.CopyFrom(onnx.numpy_helper.from_array(values.astype("float16"), f"{name}_half"))
        casts.append(onnx.helper.make_node("Cast", [weight.name], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
