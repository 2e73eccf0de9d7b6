"""Convert pickle records to arrays and to the persisted objects of official checkpoints.

A network is one `torch_utils.persistence._reconstruct_persistent_obj` call per module; its state is the module's
`__dict__`. Tensors are views of storages, each of which is stored as the bytes of a small torch file. They are read with
numpy, so that the process that reads foreign files starts without torch.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dermis.errors import BundleError, escape, quote
from dermis.official.pickled import Call, Global, Persistent, Stream, read_pickle
from dermis.official.source import check_source

PERSISTED = "torch_utils.persistence._reconstruct_persistent_obj"
_MAPPINGS = frozenset({"collections.OrderedDict", "dnnlib.util.EasyDict", "dnnlib.EasyDict"})
_REBUILD = frozenset({"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"})
_PARAMETER = frozenset({"torch._utils._rebuild_parameter", "torch.nn.parameter.Parameter"})
_SCALAR = frozenset({"numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"})
_DTYPES = {
    "HalfStorage": "<f2",
    "BFloat16Storage": "<u2",  # the upper half of a float32
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
}
_OTHER_STORAGES = ("BoolStorage", "ByteStorage", "CharStorage", "ShortStorage", "IntStorage", "LongStorage")
_STORAGES = frozenset(
    [f"torch.{name}" for name in (*_DTYPES, *_OTHER_STORAGES)]
    + ["torch.storage.UntypedStorage", "torch.UntypedStorage"]
)
ALLOWED = (
    _MAPPINGS
    | _REBUILD
    | _PARAMETER
    | _SCALAR
    | _STORAGES
    | frozenset({PERSISTED, "torch.storage._load_from_bytes", "torch.device", "torch.Size", "_codecs.encode"})
    | frozenset(
        f"torch.{name}" for name in ["float16", "bfloat16", "float32", "float64", "uint8", "int32", "int64", "bool"]
    )
    | frozenset(f"{core}.multiarray._reconstruct" for core in ("numpy.core", "numpy._core"))
    | frozenset(f"{core}.numeric._frombuffer" for core in ("numpy.core", "numpy._core"))
    | frozenset(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("set", "frozenset"))
    | frozenset({"numpy.ndarray", "numpy.dtype", "builtins.bytearray"})
)
"""Every name to which an official checkpoint can refer. All are records here: none is imported or called."""

CLASSES = frozenset({
    "Generator", "MappingNetwork", "SynthesisNetwork", "SynthesisBlock", "SynthesisLayer", "ToRGBLayer",
    "FullyConnectedLayer", "Conv2dLayer", "Discriminator", "DiscriminatorBlock", "DiscriminatorEpilogue",
    "MinibatchStdLayer", "AugmentPipe",
})  # fmt: skip
SUPPORTED = (
    "supported are the networks of StyleGAN2-ADA (PyTorch), also those that the StyleGAN3 repository trains with "
    "--cfg=stylegan2"
)
NO_STYLEGAN3 = f"StyleGAN3 networks are not supported (StyleGAN3-T or -R); {SUPPORTED}"
_STYLEGAN3_CLASSES = frozenset({"SynthesisInput"})
_STYLEGAN3_LAYER = re.compile(r"L\d+_\d+_\d+")  # number, size and channels
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")  # name of a module or tensor
_MAX_DEPTH = 16  # levels of nested modules; an official network has 5
_MAX_MODULES = 10_000  # an official 1024 px network has some 100
_MAX_CHARACTERS = 4096  # characters of a text in a configuration
_MAX_ITEMS = 32  # items of a list or dictionary in a configuration; small, because a pickle can share them many times
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


@dataclass(frozen=True)
class Module:
    """A persisted object: its class name and its `__dict__`, whose values are still records."""

    class_name: str
    state: dict[str, Any]

    def plain(self, name: str) -> Any:
        """Return an attribute as a plain value; None if it is missing."""
        return plain(self.state.get(name))

    def children(self) -> dict[str, Any]:
        modules = mapping(self.state.get("_modules"), "_modules")
        return {name: value for name, value in modules.items() if value is not None}


@dataclass
class Checkpoint:
    """The dictionary of the file, not yet converted to arrays. `storages` has the decoded storages by record."""

    values: dict[str, Any]
    storages: dict[int, np.ndarray] = field(default_factory=dict)


def read_checkpoint(stream: Stream) -> Checkpoint:
    """Parse the file and check every object in it.

    Raises:
        BundleError: The file has an object that does not belong into a checkpoint.
    """
    root = read_pickle(stream, ALLOWED)
    if stream.read(1):
        raise BundleError("has data after the end of the pickle; it is damaged or not a StyleGAN2-ADA checkpoint")
    values = mapping(root, "the file")
    seen: set[int] = set()
    sources: set[str] = set()
    classes: set[str] = set()
    pending: list[Any] = [values]
    while pending:
        value = pending.pop()
        if not isinstance(value, Call | dict | list | tuple) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Call):
            if value.name == PERSISTED:
                meta = _meta(value)
                sources.add(meta["module_src"])
                classes.add(meta["class_name"])
            pending += [value.args, value.state, value.items]
        else:
            pending += value.values() if isinstance(value, dict) else value
    if classes & _STYLEGAN3_CLASSES:
        raise BundleError(NO_STYLEGAN3)
    if unknown := sorted(classes - CLASSES):
        raise BundleError(f"persists an object of the unknown class {quote(unknown[0])}; {SUPPORTED}")
    for source in sources:
        check_source(source)
    return Checkpoint(values)


def _meta(call: Call) -> dict[str, Any]:
    meta = mapping(call.args[0] if len(call.args) == 1 else None, "a persisted object")
    kind, version, name = meta.get("type"), meta.get("version"), meta.get("class_name")
    if kind != "class" or not isinstance(meta.get("module_src"), str) or not isinstance(name, str):
        raise BundleError("holds a persisted object that is not a class with a source; it is damaged or tampered with")
    if not isinstance(version, int) or version > 6:
        raise BundleError("persists objects in another format than dermis reads (up to version 6)")
    return meta


def module(value: Any, what: str) -> Module:
    """Convert a persisted object to a `Module`. `what` names it in errors."""
    if not isinstance(value, Call) or value.name != PERSISTED:
        raise BundleError(f"{what} is not a persisted network; is this an official StyleGAN2-ADA (PyTorch) checkpoint?")
    meta = _meta(value)
    return Module(meta["class_name"], mapping(meta.get("state"), what))


def mapping(value: Any, what: str) -> dict[str, Any]:
    """Convert a dict, OrderedDict or EasyDict with string keys. Values are not converted."""
    if isinstance(value, Call) and value.name in _MAPPINGS and not value.args:
        value = value.items
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise BundleError(f"{what} is not a dictionary; is this an official StyleGAN2-ADA (PyTorch) checkpoint?")
    return value


def plain(value: Any, depth: int = 0) -> Any:
    """Convert a configuration value: a number, string, None, or a short list or dictionary of these."""
    if depth > 3:
        raise BundleError("nests its configuration deeper than any official checkpoint")
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int) and value.bit_length() < 64:
        return value
    if isinstance(value, str) and len(value) <= _MAX_CHARACTERS:
        return value
    if isinstance(value, int | str):
        raise BundleError(f"holds a configuration value that is too large ({quote(value, 60)})")
    if isinstance(value, list | tuple) and len(value) <= _MAX_ITEMS:
        return [plain(item, depth + 1) for item in value]
    if isinstance(value, dict) or (isinstance(value, Call) and value.name in _MAPPINGS):
        options = mapping(value, "a configuration")
        if len(options) <= _MAX_ITEMS:
            return {key: plain(item, depth + 1) for key, item in options.items()}
    if isinstance(value, Call) and value.name in _SCALAR and len(value.args) == 2:
        return _numpy_scalar(*value.args)
    raise BundleError(f"holds a configuration value that is not a number, text or list ({_describe(value)})")


def _describe(value: Any) -> str:
    return value.name if isinstance(value, Call | Global) else type(value).__name__


def _numpy_scalar(dtype: Any, data: Any) -> Any:
    code = dtype.args[0] if isinstance(dtype, Call) and dtype.name == "numpy.dtype" and dtype.args else None
    data = _bytes(data)
    known = ("b1", "u1", "i1", "i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8")
    if code not in known or not isinstance(data, bytes) or len(data) != int(code[1:]):
        raise BundleError("holds a damaged numpy scalar")
    order = ">" if isinstance(dtype.state, tuple) and dtype.state[1:2] == (">",) else "<"
    return np.frombuffer(data, dtype=order + code)[0].item()


def _bytes(record: Any) -> Any:
    """Decode bytes as pickle protocols below 3 write them. Other values are returned unchanged."""
    if isinstance(record, Call) and record.name == "_codecs.encode" and record.args[1:] == ("latin1",):
        text = record.args[0]
        try:
            return text.encode("latin-1") if isinstance(text, str) else None
        except UnicodeError:
            return None
    return record


# -- tensors


def modules(root: Module) -> dict[str, Module]:
    """Return the network and all modules in it, by path ("" is the network itself)."""
    by_path: dict[str, Module] = {}
    seen: set[int] = set()
    pending = [("", root)]
    while pending:
        path, current = pending.pop()
        if id(current.state) in seen:
            raise BundleError(f"holds the module {path} in two places, as no official checkpoint does")
        if len(by_path) >= _MAX_MODULES or path.count(".") >= _MAX_DEPTH:
            raise BundleError("has more modules, or deeper ones, than any official checkpoint")
        seen.add(id(current.state))
        by_path[path] = current
        for name, value in current.children().items():
            _check_name(name, path)
            if path == "synthesis" and (name == "input" or _STYLEGAN3_LAYER.fullmatch(name)):
                raise BundleError(NO_STYLEGAN3)
            child = f"{path}.{name}" if path else name
            pending.append((child, module(value, child)))
    return by_path


def _check_name(name: str, path: str) -> None:
    if not _NAME.fullmatch(name):
        raise BundleError(f"has a part of {path or 'a network'} with the name {quote(name)}; it is tampered with")


def tensors(network: Mapping[str, Module]) -> dict[str, Call]:
    """Return the records of all parameters and persistent buffers of a network's modules, by their state_dict names."""
    return {
        f"{path}.{name}" if path else name: record
        for path, current in network.items()
        for name, record in _own_tensors(current, path).items()
    }


def _own_tensors(current: Module, path: str) -> dict[str, Call]:
    tensors: dict[str, Call] = {}
    skipped = current.state.get("_non_persistent_buffers_set", set())
    if isinstance(skipped, Call) and skipped.args:  # a set in older pickle protocols
        skipped = set(plain(skipped.args[0]))
    for kind in ("_parameters", "_buffers"):
        for name, value in mapping(current.state.get(kind), kind).items():
            _check_name(name, path)
            wrapped = isinstance(value, Call) and value.name in _PARAMETER and len(value.args) > 0
            record = value.args[0] if wrapped else value
            if record is None or (isinstance(skipped, set) and name in skipped):
                continue
            if not isinstance(record, Call) or record.name not in _REBUILD:
                raise BundleError(f"{path}.{name} is not a tensor; the file is damaged or tampered with")
            tensors[name] = record
    return tensors


def shape(record: Call, name: str) -> tuple[int, ...]:
    """Return the shape in a tensor record."""
    size = record.args[2] if len(record.args) >= 4 else None
    if isinstance(size, Call) and size.name == "torch.Size" and len(size.args) == 1:
        size = tuple(size.args[0]) if isinstance(size.args[0], list | tuple) else None
    valid = isinstance(size, tuple) and len(size) <= 8 and all(isinstance(n, int) and 0 <= n < 2**40 for n in size)
    if not isinstance(size, tuple) or not valid:
        raise BundleError(f"{name} has no valid shape; the file is damaged or tampered with")
    return size


def array(checkpoint: Checkpoint, record: Call, name: str) -> np.ndarray:
    """Convert a tensor record to a new contiguous float32 array."""
    size, stride, offset = shape(record, name), record.args[3], record.args[1]
    storage = _storage(checkpoint, record.args[0], name)
    numbers = [offset, *stride] if isinstance(stride, tuple) and len(stride) == len(size) else [None]
    if not all(isinstance(n, int) and 0 <= n < 2**40 for n in numbers) or math.prod(size) > storage.size:
        raise BundleError(f"{name} is larger than the data stored for it; the file is damaged or tampered with")
    if 0 in size:
        return np.zeros(size, np.float32)
    if offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 > storage.size:
        raise BundleError(f"{name} extends beyond the data stored for it; the file is damaged or tampered with")
    steps = [step * storage.itemsize for step in stride]
    view = np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)
    with np.errstate(over="ignore"):
        return np.array(view, dtype=np.float32, order="C")


def _storage(checkpoint: Checkpoint, record: Any, name: str) -> np.ndarray:
    if not isinstance(record, Call) or record.name != "torch.storage._load_from_bytes":
        raise BundleError(f"{name} has no stored data; the file is damaged or tampered with")
    if id(record) not in checkpoint.storages:
        data = _bytes(record.args[0]) if len(record.args) == 1 else None
        if not isinstance(data, bytes):
            raise BundleError(f"{name} has no stored data; the file is damaged or tampered with")
        try:
            checkpoint.storages[id(record)] = _read_storage(data)
        except BundleError as error:
            raise BundleError(f"the data of {name}: {error}") from None
        except (ValueError, LookupError, struct.error, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
            raise BundleError(f"the data of {name} are damaged ({escape(error)}); get the file again") from None
    return checkpoint.storages[id(record)]


def _read_storage(data: bytes) -> np.ndarray:
    """Read the only storage of a torch file, in either of torch's two formats, as a flat array."""
    if data[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("a compressed torch file")
            folder = archive.namelist()[0].split("/")[0][:100]
            pid = _pid(read_pickle(io.BytesIO(archive.read(f"{folder}/data.pkl")), ALLOWED, persistent=True))
            order = f"{folder}/byteorder"
            little = order not in archive.namelist() or archive.read(order) == b"little"
            raw = archive.read(f"{folder}/data/{pid[1]}")
    else:
        stream = io.BytesIO(data)
        magic, protocol = (read_pickle(stream, ()) for _ in range(2))
        if (magic, protocol) != (_LEGACY_MAGIC, _LEGACY_PROTOCOL):
            raise ValueError("no torch file")
        little = mapping(read_pickle(stream, ()), "the system information").get("little_endian") is True
        pid = _pid(read_pickle(stream, ALLOWED, persistent=True))
        if read_pickle(stream, ()) != [pid[1]]:
            raise ValueError("not exactly one storage")
        (count,) = struct.unpack("<q", stream.read(8))
        raw = stream.read()
        if count != pid[2]:
            raise ValueError("two sizes of one storage")
    if not little:
        raise ValueError("big-endian data are not supported")
    kind, _, numel = pid
    dtype = np.dtype(_DTYPES[kind])
    if numel * dtype.itemsize != len(raw):
        raise ValueError(f"{len(raw):,} bytes stored, {quote(numel)} numbers announced")
    values = np.frombuffer(raw, dtype)
    return (values.astype(np.uint32) << 16).view(np.float32) if kind == "BFloat16Storage" else values


def _pid(value: Any) -> tuple[str, str, int]:
    """Return (kind of storage, key, number of elements) of a torch storage reference."""
    pid = value.pid if isinstance(value, Persistent) else None
    if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage" or (len(pid) == 6 and pid[5]):
        raise ValueError("no single storage")
    kind, key, numel = pid[1], pid[2], pid[4]
    name = kind.name.removeprefix("torch.") if isinstance(kind, Global) else ""
    if name not in _DTYPES:
        raise ValueError(f"weights of the type {name or 'unknown'}; only floating-point weights can be read")
    if not isinstance(key, str) or not isinstance(numel, int) or numel < 0:
        raise ValueError("no valid storage reference")
    return name, key, numel
