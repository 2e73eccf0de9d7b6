"""A tiny classifier: an ONNX graph built by hand, and its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from dermis.bundle.classifier import ClassifierDescription, InputSpec, write_classifier

SIZE, FEATURES = 16, 4


def make_model(size: int = SIZE, *, seed: int = 0, **change: Any) -> bytes:
    """A convolution pooled to 4 features, then one logit that spreads about 0 over random images.

    change: "outputs" to name other outputs, "dtype" for another type of the input.
    """
    rng = np.random.default_rng(seed)
    weights = {
        "conv.weight": rng.normal(size=(FEATURES, 3, 3, 3)).astype(np.float16),
        "head.weight": (rng.normal(size=(1, FEATURES)) * 2).astype(np.float16),
        "head.bias": np.array([0.0], np.float16),
        "scale": np.array(127.5, np.float32),
        "one": np.array(1.0, np.float32),
        "axis": np.array([1], np.int64),
    }
    feature, logit = change.get("outputs", ("features", "logit"))
    nodes = [helper.make_node("Cast", [name], [f"{name}.32"], to=TensorProto.FLOAT) for name in weights if "." in name]
    nodes += [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["float", "scale"], ["scaled"]),
        helper.make_node("Sub", ["scaled", "one"], ["normal"]),
        helper.make_node("Transpose", ["normal"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["nchw", "conv.weight.32"], ["conv"], strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["conv"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], [feature]),
        helper.make_node("Gemm", [feature, "head.weight.32", "head.bias.32"], ["column"], transB=1),
        helper.make_node("Squeeze", ["column", "axis"], [logit]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", change.get("dtype", TensorProto.UINT8), ["batch", size, size, 3])],
        [
            helper.make_tensor_value_info(logit, TensorProto.FLOAT, ["batch"]),
            helper.make_tensor_value_info(feature, TensorProto.FLOAT, ["batch", FEATURES]),
        ],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def describe(size: int = SIZE, **change: Any) -> ClassifierDescription:
    """The description of `make_model`."""
    values: dict[str, Any] = {
        "architecture": "tiny",
        "input": InputSpec(size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        "class_names": ("benign", "malignant"),
        "positive_class": "malignant",
        "temperature": 2.0,
        "thresholds": {"default": 0.5, "sensitivity_90": 0.25},
        "weights_dtype": "fp16",
        "feature_dim": FEATURES,
        "provenance": {"licence": "CC0-1.0"},
        "metrics": {"auc": 0.5},
    }
    return ClassifierDescription(**values | change)


def make_classifier(out: Path, *, size: int = SIZE, seed: int = 0, **change: Any) -> ClassifierDescription:
    """The folder of a tiny classifier."""
    return write_classifier(out, describe(size, **change), make_model(size, seed=seed), "# Tiny classifier\n")
