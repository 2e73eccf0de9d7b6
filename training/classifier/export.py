"""A finished network as one ONNX file: uint8 images in, logit and features out, weights stored as float16."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dermis.classifier.torch_network import TorchClassifier
from dermis.errors import TrainingError
from training.classifier.network import as_stored

OPSET = 18
TOLERANCE = 1e-4  # of probabilities, between torch and ONNX Runtime


def require_onnx() -> None:
    """TrainingError if the packages that export needs are not installed."""
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise TrainingError(f'export needs the package {package}: pip install "dermis[train]"')


def to_onnx(network: TorchClassifier, size: int) -> bytes:
    """The graph of a `finished_network`: images uint8 [N, S, S, 3] -> logit float32 [N], features float32 [N, D].

    Weights stand in it under the names of the backbone's state_dict, as float16 where that holds them exactly, and are
    cast to float32 as the graph is loaded. The bytes depend on network, size and library versions alone.
    """
    require_onnx()
    import onnx

    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=65536)
    with _quiet():
        program: Any = torch.onnx.export(
            _Graph(network).eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=({0: batch},),
            input_names=["images"],
            output_names=["logit", "features"],
            verbose=False,
        )
    model = program.model_proto
    weights = {name: value.detach() for name, value in network.backbone.state_dict().items()}
    _store_weights(model.graph, weights)
    _forget_origin(model)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString(deterministic=True))


def run_onnx(model: bytes, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Logits float64 [N] by ONNX Runtime on the CPU. TrainingError if it is not installed."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise TrainingError(f'export checks itself with ONNX Runtime ({error}); pip install "dermis[cpu]"') from error
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    parts = [session.run(["logit"], {"images": images[i : i + 32]})[0] for i in range(0, len(images), 32)]
    return np.concatenate(parts).astype(np.float64)


class _Graph(nn.Module):
    """What the file computes."""

    def __init__(self, network: TorchClassifier) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.network(images.permute(0, 3, 1, 2).float())
        return found


def _store_weights(graph: Any, weights: dict[str, Tensor]) -> None:
    """Give the weights their own names and store them as float16, behind a cast to float32."""
    from onnx import TensorProto, helper, numpy_helper

    prefix = "network.backbone."
    renamed, casts = {}, []
    kept = [value for value in graph.initializer if not value.name.startswith(prefix)]
    used = {value.name for value in graph.initializer} - {value.name for value in kept}
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for name, value in weights.items():
        stored = as_stored(value)
        exact = stored.dtype == torch.float16 and bool(torch.equal(stored.float(), value))
        array = (stored if exact else value).contiguous().numpy()
        # The exporter keeps one of several weights with the same values: the others stand here for readers only.
        graph.initializer.append(numpy_helper.from_array(array, name))
        if prefix + name not in used:
            continue
        renamed[prefix + name] = f"{name}.float32" if exact else name
        if exact:
            casts.append(
                helper.make_node("Cast", [name], [f"{name}.float32"], name=f"cast.{name}", to=TensorProto.FLOAT)
            )
    for node in graph.node:
        node.input[:] = [renamed.get(each, each) for each in node.input]
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _forget_origin(model: Any) -> None:
    """Drop what the exporter notes of the place and the code that it ran from."""
    graph = model.graph
    model.doc_string = graph.doc_string = ""
    graph.name = "classifier"
    for place in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del place.metadata_props[:]
        place.doc_string = ""


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's progress and its warnings about itself are no output of ours."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
