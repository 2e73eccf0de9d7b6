"""Read untrusted arrays (.npy, safetensors). Headers are checked before memory is allocated."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dermis.errors import BundleError, escape
from dermis.resources import lacks_resources
from dermis.strict_json import parse_json

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER_BYTES = 4 << 20
_MAX_TENSORS = 20_000
FLOATS = ("F16", "F32")
_SIZES: Mapping[str, int] = {"F16": 2, "F32": 4, "I8": 1}
"""Types of numbers in bundles, with their sizes in bytes."""
_NPY_HEADER_BYTES = 10_000
_METADATA = "__metadata__"


def read_array(data: bytes, where: str, shape: tuple[int, ...], dtypes: Sequence[str] = ("<f4", "<f2")) -> NDArray[Any]:
    """Read the array of an .npy file.

    Raises:
        BundleError: It has another shape or type, or the file is damaged. The message begins with `where`.
    """
    expected = f"{' or '.join(np.dtype(dtype).name for dtype in dtypes)} of shape {shape}"
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        actual_shape, fortran, dtype = read(file, max_header_size=_NPY_HEADER_BYTES)
    except Exception as error:  # numpy evaluates the header as a Python literal, whose exceptions have no common class
        raise BundleError(f"{where}: is not a .npy file of {expected} ({escape(error)})") from None
    if actual_shape != shape or dtype not in [np.dtype(each) for each in dtypes] or (fortran and len(shape) > 1):
        actual = escape(f"{dtype} of shape {actual_shape}")
        raise BundleError(f"{where}: must hold {expected}, but its header says {actual}; get it again")
    start, size = file.tell(), math.prod(shape) * dtype.itemsize
    if len(data) - start != size:
        raise BundleError(
            f"{where}: holds {len(data) - start:,} bytes of numbers, its header says {size:,}; get it again"
        )
    return np.frombuffer(data, dtype, offset=start).reshape(shape)


@dataclass(frozen=True)
class TensorHeader:
    """The header of a safetensors file: shapes of tensors by name, and metadata."""

    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    dtype: str
    shape: list[int] = Field(max_length=8)
    data_offsets: list[int] = Field(min_length=2, max_length=2)


def read_header(data: bytes, where: str, types: Sequence[str] = FLOATS) -> TensorHeader:
    """Read the header of a safetensors file.

    Raises:
        BundleError: The header is not valid, or its tensors are not numbers of these types that fill the file without a gap.
            The message begins with `where`.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise BundleError(
            f"{where}: is not a safetensors file: its header is longer than the file or {MAX_HEADER_BYTES:,} bytes"
        )
    try:
        document = parse_json(data[8 : 8 + length])
    except ValueError as error:
        raise BundleError(
            f"{where}: is not a safetensors file: its header is not JSON that can be used ({error})"
        ) from None
    if not isinstance(document, dict) or len(document) > _MAX_TENSORS:
        raise BundleError(
            f"{where}: is not a safetensors file: its header is not an object of at most {_MAX_TENSORS:,} tensors"
        )
    metadata = document.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BundleError(f"{where}: {_METADATA}: must be an object of strings")
    end, shapes = 0, {}
    entries = [(name, _entry(name, value, where, types)) for name, value in document.items()]
    for name, entry in sorted(entries, key=lambda item: item[1].data_offsets):
        size = _SIZES[entry.dtype] * math.prod(entry.shape)
        if entry.data_offsets != [end, end + size]:
            raise BundleError(f"{where}: {escape(name)}: data_offsets do not fit its shape and the tensors beside it")
        end += size
        shapes[name] = tuple(entry.shape)
    if end != len(data) - 8 - length:
        raise BundleError(
            f"{where}: holds {len(data) - 8 - length:,} bytes of numbers, its header says {end:,}; get it again"
        )
    return TensorHeader(shapes, metadata)


def read_tensors(data: bytes, where: str, types: Sequence[str] = FLOATS) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, whose numbers are of one of `types`.

    Raises:
        BundleError: As `read_header`.
    """
    import safetensors
    import safetensors.torch

    read_header(data, where, types)
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, RuntimeError) as error:
        cause = error if lacks_resources(error) else None
        problem = "is not a safetensors file" if cause is None else "does not fit into memory"
        raise BundleError(f"{where}: {problem} ({escape(error)})") from cause
    return tensors


def read_vectors(data: bytes, where: str) -> dict[str, NDArray[Any]]:
    """Read the tensors of a safetensors file as NumPy arrays, without torch.

    Raises:
        BundleError: As `read_header`.
    """
    import safetensors
    import safetensors.numpy

    read_header(data, where)
    try:
        arrays: dict[str, NDArray[Any]] = safetensors.numpy.load(data)
    except (safetensors.SafetensorError, ValueError) as error:
        raise BundleError(f"{where}: is not a safetensors file ({escape(error)})") from None
    return arrays


def _entry(name: str, value: Any, where: str, types: Sequence[str]) -> _Entry:
    try:
        entry = _Entry.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join([name, *map(str, first["loc"])])
        raise BundleError(f"{where}: {escape(place)}: {first['msg']}") from None
    if entry.dtype not in types:
        raise BundleError(f"{where}: {escape(name)}: dtype: must be {' or '.join(types)}; get it again")
    if any(size < 0 or size > 1 << 40 for size in entry.shape):
        raise BundleError(f"{where}: {escape(name)}: shape: sizes must be from 0 to 2^40")
    return entry
