"""Tests that an untrusted ONNX file is refused before it runs, unless it is a plain graph within limits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from dermis.bundle.classifier import write_classifier
from dermis.classifier import graph_trial
from dermis.classifier.graph_check import OPERATORS, check_graph
from dermis.classifier.graph_trial import try_graph
from dermis.classifier.onnx_session import Classifier
from dermis.errors import BundleError
from tiny_classifier import FEATURES, SIZE, describe, make_model

node = helper.make_node
GOOD = make_model()


def constant(name: str, value: Any, dtype: Any = np.int64) -> TensorProto:
    return numpy_helper.from_array(np.array(value, dtype), name)


def changed(change: Callable[[onnx.ModelProto], Any]) -> bytes:
    model = onnx.load_model_from_string(GOOD)
    change(model)
    return bytes(model.SerializeToString())


def with_nodes(*nodes: onnx.NodeProto, tensors: tuple[TensorProto, ...] = ()) -> bytes:
    """The tiny model, with nodes whose scalar result `more` is added to the logit."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.node[-1].output[0] = "logit.before"
        model.graph.node.extend([*nodes, node("Add", ["logit.before", "more"], ["logit"])])
        model.graph.initializer.extend(tensors)

    return changed(change)


def _external(model: onnx.ModelProto) -> None:
    weight = model.graph.initializer[0]
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="weights.bin")
    weight.ClearField("raw_data")


def _subgraph(operator: str) -> onnx.NodeProto:
    body = helper.make_graph([], "body", [], [])
    name = "then_branch" if operator == "If" else "body"
    return node(operator, ["scale"], ["more"], **{name: body})


def _function(model: onnx.ModelProto) -> None:
    relu = node("Relu", ["x"], ["y"])
    model.functions.append(helper.make_function("", "Softsign", ["x"], ["y"], [relu], [helper.make_opsetid("", 18)]))


REFUSED: dict[str, tuple[bytes, str]] = {
    "a loop": (with_nodes(_subgraph("Loop")), "subgraphs"),
    "a scan": (with_nodes(_subgraph("Scan")), "subgraphs"),
    "a branch": (with_nodes(_subgraph("If")), "subgraphs"),
    "a loop without its body": (with_nodes(node("Loop", ["scale"], ["more"])), "operator Loop"),
    "random numbers": (with_nodes(node("RandomNormal", [], ["more"], shape=[1])), "operator RandomNormal"),
    "a size by values": (with_nodes(node("NonZero", ["float"], ["more"])), "operator NonZero"),
    "another domain": (with_nodes(node("Relu", ["scale"], ["more"], domain="evil\x1b[2J")), r"domain evil\\x1b\[2J"),
    "a function": (changed(_function), "functions"),
    "training steps": (changed(lambda model: model.training_info.add()), "training"),
    "external weights": (changed(_external), "external data"),
    "an external constant": (
        with_nodes(
            node("Constant", [], ["more"], value=onnx.load_model_from_string(changed(_external)).graph.initializer[0])
        ),
        "external data",
    ),
    "sparse weights": (changed(lambda model: model.graph.sparse_initializer.add()), "sparse"),
    "two graphs": (GOOD + changed(lambda model: None), "2 graphs"),
    "a value from nowhere": (with_nodes(node("Relu", ["nothing"], ["more"])), "nothing before it is computed"),
    "a value twice": (with_nodes(node("Relu", ["scale"], ["pooled"])), "pooled more than once"),
    "a shape of pixels": (
        with_nodes(
            node("Cast", ["float"], ["counts"], to=TensorProto.INT64),
            node("ReduceSum", ["counts"], ["count"], keepdims=0),
            node("Unsqueeze", ["count", "zero"], ["shape"]),
            node("ConstantOfShape", ["shape"], ["large"]),
            node("ReduceSum", ["large"], ["more"], keepdims=0),
            tensors=(constant("zero", [0]),),
        ),
        "ConstantOfShape with a shape that depends on the image's pixels",
    ),
    # The smallest integer divided by -1 ends the process; here it would for an image whose first pixel is 128.
    **{
        f"{operator} of pixels": (
            with_nodes(
                node("Cast", ["images"], ["counts"], to=TensorProto.INT32),
                node("Sub", ["least", "counts"], ["difference"]),
                node(operator, ["difference", "minus"], ["quotient"]),
                node("Cast", ["quotient"], ["quotients"], to=TensorProto.FLOAT),
                node("ReduceSum", ["quotients"], ["more"], keepdims=0),
                tensors=(constant("least", -(2**31) + 128, np.int32), constant("minus", -1, np.int32)),
            ),
            f"operator {operator} of integers that depend on the image's pixels",
        )
        for operator in ("Div", "Mod")
    },
    "a dropout of training": (
        with_nodes(
            node("Dropout", ["scale", "ratio", "training"], ["more"]),
            tensors=(constant("ratio", 0.5, np.float32), constant("training", True, np.bool_)),
        ),
        "Dropout with a switch for training",
    ),
    "ONNX Runtime's own format": (b"\x08\x0a\x12\x04ORTM" + GOOD, "is not an ONNX file"),
    "nothing": (b"", "0 graphs"),
    "text": (b"version https://git-lfs.github.com/spec/v1", "is not an ONNX file"),
    "very many parts": (b"\x0a\x00" * 3_000_000, "more than 2,000,000 parts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_graph_that_is_not_plain_is_refused(case: str) -> None:
    model, reason = REFUSED[case]
    with pytest.raises(BundleError, match=f"c.onnx: .*{reason}") as caught:
        check_graph(model, "c.onnx")
    assert str(caught.value).isprintable()


def test_plain_graph_passes_check() -> None:
    check_graph(GOOD, "c.onnx")
    # The shape of the input is known before it runs: exporters compute with it.
    shapes = with_nodes(
        node("Shape", ["images"], ["shape"]),
        node("ConstantOfShape", ["shape"], ["zeros"]),
        node("ReduceSum", ["zeros"], ["more"], keepdims=0),
    )
    check_graph(shapes, "c.onnx")
    try_graph(shapes, "c.onnx", size=SIZE, feature_dim=FEATURES, rows=2)


def test_graph_may_divide_floats_by_pixel_values() -> None:
    model = with_nodes(
        node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        node("Split", ["pixels"], ["left", "right"], axis=1, num_outputs=2),
        node("Add", ["right", "right"], ["twice"]),
        node("Div", ["left", "twice"], ["ratio"]),
        node("IsNaN", ["ratio"], ["undefined"]),
        node("Where", ["undefined", "zero", "ratio"], ["ratios"]),
        node("Mod", ["ratios", "left"], ["rest"], fmod=1),
        node("ReduceSum", ["rest"], ["more"], keepdims=0),
        tensors=(constant("zero", 0, np.float32),),
    )
    check_graph(model, "c.onnx")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_graph_that_passes_is_plain_for_onnx_package(data: st.DataObject) -> None:
    mutated = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(mutated) - 1))
        mutated[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    try:
        check_graph(bytes(mutated), "c.onnx")
    except BundleError:
        return
    try:
        model = onnx.load_model_from_string(bytes(mutated))
    except Exception:
        return  # nobody can read it
    assert {each.op_type for each in model.graph.node} <= OPERATORS and not model.functions
    assert not any(each.data_location or each.external_data for each in model.graph.initializer)
    assert not any(a.HasField("g") or a.graphs for each in model.graph.node for a in each.attribute)


# -- the trial


LARGE = with_nodes(
    node("ConstantOfShape", ["shape"], ["large"]),
    node("ReduceSum", ["large"], ["more"], keepdims=0),
    tensors=(constant("shape", [1 << 20, 1 << 16]),),
)
SLOW = with_nodes(
    node("ConstantOfShape", ["shape"], ["x0"]),
    *(node("MatMul", [f"x{k}", "x0"], [f"x{k + 1}"]) for k in range(100)),
    node("ReduceSum", ["x100"], ["more"], keepdims=0),
    tensors=(constant("shape", [4096, 4096]),),
)


def test_graph_that_exceeds_memory_or_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_graph(LARGE, "c.onnx")
    with pytest.raises(BundleError, match="memory"):
        try_graph(LARGE, "c.onnx", size=SIZE, feature_dim=FEATURES, rows=1)
    check_graph(SLOW, "c.onnx")
    monkeypatch.setattr(graph_trial, "_SECONDS", 1)
    monkeypatch.setattr(graph_trial, "_SECONDS_OF_IMAGE", 0)
    with pytest.raises(BundleError, match="took longer than"):
        try_graph(SLOW, "c.onnx", size=SIZE, feature_dim=FEATURES, rows=1)


def test_external_weights_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = onnx.load_model_from_string(GOOD).graph.initializer[0].raw_data
    (tmp_path / "weights.bin").write_bytes(weight)
    write_classifier(tmp_path / "c", describe(), changed(_external), "# Tiny classifier\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError, match="external data"):
        Classifier(tmp_path / "c", device="cpu")
