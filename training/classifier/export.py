"""A finished network as one ONNX file: uint8 images in, logit and features out, weights stored in 16 or 8 bits."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dermis.classifier.torch_network import SCALE, TorchClassifier
from dermis.errors import TrainingError, install_command
from dermis.onnx_export import quiet_exporter, remove_notes
from training.classifier.config import WeightsDtype
from training.classifier.network import as_stored, eight_bit, is_large

OPSET = 18
TOLERANCE = 1e-4  # maximum difference of probabilities between torch and ONNX Runtime


def require_onnx() -> None:
    """Raise TrainingError if the packages that export needs are not installed."""
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise TrainingError(f"export needs the package {package}: {install_command('train')}")


def to_onnx(network: TorchClassifier, size: int, weights_dtype: WeightsDtype = "fp16") -> bytes:
    """Export a `finished_network` as a graph: images uint8 [N, S, S, 3] -> logit float32 [N], features float32 [N, D].

    Weights have the names of the backbone's state_dict. They are stored as float16 if that is exact; with "int8", large
    weights are stored as int8 with their scales (NAME.scale). They become float32 when the graph is loaded. The bytes
    depend on network, size, dtype and library versions alone.

    Args:
        network: The network.
        size: Side S of the images.
        weights_dtype: Type of the stored weights.

    Raises:
        TrainingError: A package that export needs is not installed.
    """
    require_onnx()
    import onnx

    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=65536)
    with quiet_exporter():
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
    _store_weights(model.graph, weights, weights_dtype)
    remove_notes(model, "classifier")
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString(deterministic=True))


def run_onnx(model: bytes, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Compute logits float64 [N] with ONNX Runtime on the CPU. Raises TrainingError if it is not installed."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise TrainingError(
            f"export needs ONNX Runtime to check the exported file ({error}); {install_command('cpu')}"
        ) from error
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    parts = [session.run(["logit"], {"images": images[i : i + 32]})[0] for i in range(0, len(images), 32)]
    return np.concatenate(parts).astype(np.float64)


class _Graph(nn.Module):
    """The computation that is exported."""

    def __init__(self, network: TorchClassifier) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logit_and_features: tuple[Tensor, Tensor] = self.network(images.permute(0, 3, 1, 2).float())
        return logit_and_features


def _store_weights(graph: Any, weights: dict[str, Tensor], weights_dtype: WeightsDtype) -> None:
    """Rename the weights and store them in 16 or 8 bits, with nodes that convert them to float32.

    DequantizeLinear is not used, because ONNX Runtime would keep it in the graph and run it for every image.
    """
    from onnx import TensorProto, helper, numpy_helper

    prefix = "network.backbone."
    renamed, nodes = {}, []
    kept = [value for value in graph.initializer if not value.name.startswith(prefix)]
    used = {value.name for value in graph.initializer} - {value.name for value in kept}
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for name, value in weights.items():
        stored, scales = _smallest(value, weights_dtype)
        # The exporter uses one of several weights with the same values; the others are stored for readers only.
        graph.initializer.append(numpy_helper.from_array(stored.contiguous().numpy(), name))
        if scales is not None:
            graph.initializer.append(numpy_helper.from_array(scales.contiguous().numpy(), name + SCALE))
        if prefix + name not in used:
            continue
        wide = name if stored.dtype == torch.float32 else f"{name}.float32"
        renamed[prefix + name] = wide
        if wide != name:
            cast = wide if scales is None else f"{name}.integers"
            nodes.append(helper.make_node("Cast", [name], [cast], name=f"cast.{name}", to=TensorProto.FLOAT))
        if scales is not None:
            nodes.append(helper.make_node("Mul", [cast, name + SCALE], [wide], name=f"scale.{name}"))
    for node in graph.node:
        node.input[:] = [renamed.get(each, each) for each in node.input]
    nodes += graph.node
    del graph.node[:]
    graph.node.extend(nodes)


def _smallest(value: Tensor, weights_dtype: WeightsDtype) -> tuple[Tensor, Tensor | None]:
    """A weight as it is stored, and its scales if that is int8. It stays float32 if nothing smaller is exact."""
    if weights_dtype == "int8" and is_large(value):
        values, integers, scales = eight_bit(value)
        if torch.equal(values, value):
            return integers, scales
    stored = as_stored(value)
    return (stored if torch.equal(stored.float(), value) else value), None
