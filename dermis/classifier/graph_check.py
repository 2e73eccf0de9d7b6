"""Check that an ONNX file is a plain feed-forward graph, without the package onnx, which serving does not install.

A graph of ONNX can loop without end (Loop, Scan), have subgraphs and functions, read other files (external data), and need an
amount of memory that depends on the pixels of an image (a computed shape). This module refuses all of that: operators must be
in an allow-list, and no size of a result can depend on the values of the input. So a graph costs the same for every image,
and one trial with limits shows what it needs (`dermis.classifier.graph_trial`). Integers that depend on pixels must not be
divided: dividing the smallest integer by -1 ends the process on x86, as division by 0 did in some versions.

The file is a Protocol Buffers message: fields of a number, a wire type and a value. onnx.proto numbers the fields.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from dermis.errors import BundleError, escape

MAX_MODEL_BYTES = 1 << 31  # the limit of Protocol Buffers
_MAX_FIELDS = 2_000_000  # fields of one file; the demo's classifier has 5,031

# Operators of ONNX's own domain whose cost follows from the shapes of their inputs. These must not be added: Loop, Scan,
# If and SequenceMap (subgraphs); NonZero, Unique, Compress, NonMaxSuppression (results sized by values); sequences,
# optional values and strings; random numbers, with which an image's score would change from run to run.
OPERATORS = frozenset(
    """
    Abs Acos Acosh Add AffineGrid And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BatchNormalization BitShift
    Cast CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvInteger ConvTranspose Cos Cosh CumSum
    DepthToSpace DequantizeLinear Div Dropout DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand Flatten Floor Gather
    GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GridSample
    GroupNormalization HardSigmoid HardSwish Hardmax Identity InstanceNormalization IsInf IsNaN LRN LayerNormalization
    LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization LpPool MatMul MatMulInteger Max MaxPool Mean
    MeanVarianceNormalization Min Mish Mod Mul Neg Not OneHot Or PRelu Pad Pow QLinearConv QLinearMatMul QuantizeLinear
    RMSNormalization Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
    ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize RotaryEmbedding Round ScatterElements ScatterND Selu Shape
    Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Swish Tan Tanh
    ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor
    """.split()  # noqa: SIM905  (easier to read than two hundred quoted names)
)
# Inputs, by position, whose values decide the shape of the result. They must not depend on the values of an image.
_SHAPING: Mapping[str, tuple[int, ...]] = {
    "AffineGrid": (1,),
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "OneHot": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
    "Upsample": (1,),
    **{name: (1,) for name in OPERATORS if name.startswith("Reduce")},
}
_SHAPE_OF = frozenset({"Shape", "Size"})  # their results depend on shapes alone
_OWN_DOMAIN = ("", "ai.onnx")
_DIVISIONS = frozenset({"Div", "Mod"})
# The type of a result is that of the first input, except for these operators: that of another input, or never floating point.
_TYPE_FROM: Mapping[str, int] = {"CastLike": 1, "OneHot": 2, "Where": 1}
_NEVER_FLOATING = frozenset(
    """
    And ArgMax ArgMin ConvInteger DynamicQuantizeLinear Equal Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual
    MatMulInteger Not Or QLinearConv QLinearMatMul QuantizeLinear Shape Size Xor
    """.split()  # noqa: SIM905
)
_FLOATING_TYPES = frozenset({1, 10, 11, 16})  # float32, float16, float64, bfloat16 in TensorProto.DataType

_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5
# The fields that each message may have, by number. A file with any other field is refused.
_MODEL = dict(enumerate(("ir_version", "producer_name", "producer_version", "domain", "model_version"), 1)) | {
    6: "doc_string",
    7: "graph",
    8: "opset_import",
    14: "metadata_props",
}
_GRAPH = {
    1: "node",
    2: "name",
    5: "initializer",
    10: "doc_string",
    11: "input",
    12: "output",
    13: "value_info",
    14: "quantization_annotation",
    16: "metadata_props",
}
_INPUT = {1: "name", 2: "type", 3: "doc_string", 4: "metadata_props"}
_NODE = dict(enumerate(("input", "output", "name", "op_type", "attribute", "doc_string", "domain"), 1)) | {
    9: "metadata_props"
}
_ATTRIBUTE = {
    1: "name",
    2: "f",
    3: "i",
    4: "s",
    5: "t",
    7: "floats",
    8: "ints",
    9: "strings",
    13: "doc_string",
    20: "type",
}
_TENSOR = {
    1: "dims",
    2: "data_type",
    4: "float_data",
    5: "int32_data",
    7: "int64_data",
    8: "name",
    9: "raw_data",
    10: "double_data",
    11: "uint64_data",
    12: "doc_string",
    14: "data_location",
    16: "metadata_props",
}
_REFUSED: Mapping[tuple[str, int], str] = {
    ("model", 20): "training steps",
    ("model", 25): "functions",
    ("graph", 15): "sparse weights",
    ("node", 8): "overloaded functions",
    ("attribute", 6): "subgraphs",
    ("attribute", 11): "subgraphs",
    ("attribute", 21): "functions",
    ("attribute", 22): "sparse weights",
    ("attribute", 23): "sparse weights",
    ("tensor", 13): "weights in another file (external data)",
}


def check_graph(model: bytes, where: str) -> None:
    """Check that an ONNX file is a plain graph. Nothing is run or copied.

    Raises:
        BundleError: It is not. The message begins with `where`.
    """
    try:
        _Check().model(memoryview(model))
    except ValueError as error:
        raise BundleError(
            f"{where}: {error}; dermis runs only feed-forward graphs without control flow; export it again"
        ) from None


@dataclass
class _Check:
    """The check of one file. Its methods raise ValueError with a description of the fault."""

    defined: set[str] = field(default_factory=lambda: {""})  # "" means an optional input that is left out
    by_image: set[str] = field(default_factory=set)
    """Names of values that depend on the pixels of the image."""
    floating: set[str] = field(default_factory=set)
    """Names of values that are certainly of a floating-point type."""
    fields: int = 0

    def model(self, model: memoryview) -> None:
        if len(model) > MAX_MODEL_BYTES:
            raise ValueError(f"is larger than {MAX_MODEL_BYTES:,} bytes")
        if bytes(model[4:8]) == b"ORTM":  # a format of ONNX Runtime, which it recognises by these letters
            raise ValueError("is not an ONNX file")
        graphs = [value for name, value in self._message(model, "model", _MODEL) if name == "graph"]
        if len(graphs) != 1:
            raise ValueError(f"is not an ONNX file: it has {len(graphs)} graphs, not one")
        nodes = []
        for name, value in self._message(_view(graphs[0]), "graph", _GRAPH):
            if name == "node":
                nodes.append(_view(value))
            elif name == "initializer":
                named, types = self._tensor(_view(value))
                self.defined.add(named)
                if _are_floating(types):
                    self.floating.add(named)
            elif name == "input":
                self.by_image.add(self._input(_view(value)))
        self.defined |= self.by_image
        for node in nodes:
            self._node(node)

    def _input(self, message: memoryview) -> str:
        """Return the name of an input. ONNX Runtime checks its type."""
        names = [value for name, value in self._message(message, "input", _INPUT) if name == "name"]
        if len(names) != 1:
            raise ValueError("is not an ONNX file: an input has no name")
        return _text(names[0])

    def _node(self, node: memoryview) -> None:
        inputs: list[str] = []
        outputs: list[str] = []
        single = {"op_type": "", "domain": ""}
        types: list[int] = []  # in the attributes
        attributes = 0
        for name, value in self._message(node, "node", _NODE):
            if name == "input":
                inputs.append(_text(value))
            elif name == "output":
                outputs.append(_text(value))
            elif name == "attribute":
                types += self._attribute(_view(value))
                attributes += 1
            elif name in single:
                if single[name]:
                    raise ValueError(f"is not an ONNX file: a node has {name} more than once")
                single[name] = _text(value)
        operator = single["op_type"]
        if single["domain"] not in _OWN_DOMAIN:
            raise ValueError(f"has an operator of the domain {escape(single['domain'])}, which is not ONNX's own")
        if operator not in OPERATORS:
            raise ValueError(f"has the operator {escape(operator)}, which is not allowed")
        if unknown := [name for name in inputs if name not in self.defined]:
            raise ValueError(f"uses {escape(unknown[0])} before it is computed")
        shaping = [inputs[position] for position in _SHAPING.get(operator, ()) if position < len(inputs)]
        if any(name in self.by_image for name in shaping):
            raise ValueError(f"has the operator {operator} with a shape that depends on the image's pixels")
        if operator == "Dropout" and len(inputs) > 2 and inputs[2]:
            raise ValueError("has the operator Dropout with a switch for training, which makes it random")
        divided = any(name in self.by_image for name in inputs) and not any(name in self.floating for name in inputs)
        if operator in _DIVISIONS and divided:
            raise ValueError(f"has the operator {operator} of integers that depend on the image's pixels")
        results = [name for name in outputs if name]
        if repeated := [name for name in results if name in self.defined]:
            raise ValueError(f"computes {escape(repeated[0])} more than once")
        self.defined.update(results)
        if operator not in _SHAPE_OF and any(name in self.by_image for name in inputs):
            self.by_image.update(results)
        if self._is_floating(operator, inputs, types, attributes):
            self.floating.update(results if operator == "Split" else [name for name in outputs[:1] if name])

    def _is_floating(self, operator: str, inputs: list[str], types: list[int], attributes: int) -> bool:
        """Whether the first result of a node is certainly of a floating-point type."""
        if operator in _NEVER_FLOATING:
            return False
        if operator == "DequantizeLinear":
            return True
        if operator in ("Cast", "Constant"):
            return _are_floating(types)
        if operator == "ConstantOfShape":
            return attributes == 0 or _are_floating(types)
        position = _TYPE_FROM.get(operator, 0)
        return position < len(inputs) and inputs[position] in self.floating

    def _attribute(self, attribute: memoryview) -> list[int]:
        """Return the types in an attribute: that of a tensor, or the result of Cast."""
        names: list[str] = []
        whole: list[int] = []
        types: list[int] = []
        for name, value in self._message(attribute, "attribute", _ATTRIBUTE):
            if name == "t":
                types += self._tensor(_view(value))[1]
            elif name == "name":
                names.append(_text(value))
            elif name == "i" and isinstance(value, int):
                whole.append(value)
        if len(names) != 1:
            raise ValueError(f"is not an ONNX file: an attribute has {len(names)} names")
        return types + whole if names == ["to"] else types

    def _tensor(self, tensor: memoryview) -> tuple[str, list[int]]:
        """Return name and types of a tensor. Raises ValueError if its values are in another file."""
        tensor_name = ""
        types: list[int] = []
        for name, value in self._message(tensor, "tensor", _TENSOR):
            if name == "name":
                tensor_name = _text(value)
            elif name == "data_type" and isinstance(value, int):
                types.append(value)
            elif name == "data_location" and value != 0:
                raise ValueError("has weights in another file (external data)")
        return tensor_name, types

    def _message(self, data: memoryview, kind: str, known: Mapping[int, str]) -> Iterator[tuple[str, int | memoryview]]:
        """Yield name and value, an integer or bytes, of each field of a message. Raises ValueError if a field is not known."""
        position = 0
        while position < len(data):
            self.fields += 1
            if self.fields > _MAX_FIELDS:
                raise ValueError(f"has more than {_MAX_FIELDS:,} parts")
            key, position = _varint(data, position)
            number, wire = key >> 3, key & 7
            if number not in known:
                if (kind, number) in _REFUSED:
                    raise ValueError(f"has {_REFUSED[kind, number]}")
                raise ValueError(
                    f"is not an ONNX file, or has a feature that is not allowed (field {number} of a {kind})"
                )
            value: int | memoryview
            if wire == _VARINT:
                value, position = _varint(data, position)
            else:
                length = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}.get(wire)
                if wire == _BYTES:
                    length, position = _varint(data, position)
                if length is None or length > len(data) - position:
                    raise ValueError("is not an ONNX file, or ends early")
                value, position = data[position : position + length], position + length
            yield known[number], value


def _are_floating(types: list[int]) -> bool:
    """Whether all types that a file has for one value are floating point: of repeated fields, readers take different ones."""
    return bool(types) and all(each in _FLOATING_TYPES for each in types)


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("is not an ONNX file, or ends early")


def _view(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("is not an ONNX file: a field has another type")
    return value


def _text(value: int | memoryview) -> str:
    try:
        return bytes(_view(value)).decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("is not an ONNX file: a name is not UTF-8") from None
