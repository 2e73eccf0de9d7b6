"""Tensors to Flower's arrays and back, with checks of names, shapes, dtypes and sizes.

All tensors of a message are sent as one array, a safetensors file. Flower fetches every array with separate requests, and
a generator and a discriminator have several hundred tensors, most with a few numbers: sent one by one they take up to a
minute.

Values are sent as float32, or with 16 bits as float16 or bfloat16. float64 tensors (single numbers), the averages of an
optimizer, and values beyond the range of float16 are sent unchanged. Received values are converted to float32 before
anything is computed with them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from flwr.app import Array, ArrayRecord
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dermis.errors import TrainingError, escape
from training.federated.config import WireDtype

Tensors = dict[str, Tensor]
_EXACT = ("G_opt/", "D_opt/")  # 16 bits are too few for an optimizer's averages of squares
_PACKED = "safetensors"
_HEADER = 200  # bytes of a safetensors header for the dtype, shape and offsets of a tensor
_NARROW = {"fp16": torch.float16, "bf16": torch.bfloat16}


class RefusedError(TrainingError):
    """A message that must not change the global model; the text says why."""


def pack(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Serialize named tensors of any dtype to one array."""
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    return ArrayRecord({_PACKED: Array("uint8", (len(content),), _PACKED, content)})


def unpack(record: ArrayRecord, max_bytes: int | None = None) -> Tensors:
    """Read tensors that `pack` serialized.

    Args:
        record: The record that was received.
        max_bytes: Largest accepted size; None for no limit.

    Raises:
        RefusedError: The record has another form, or is larger than `max_bytes`.
    """
    array = record.get(_PACKED)
    if array is None or len(record) != 1:
        raise RefusedError("the tensors are not packed as one file of safetensors")
    if max_bytes is not None and len(array.data) > max_bytes:
        raise RefusedError(
            f"{len(array.data):,} bytes are more than the {max_bytes:,} bytes that the requested tensors can need"
        )
    try:
        return load(array.data)
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise RefusedError(f"the tensors cannot be read ({escape(error)})") from None


def encode(tensors: Mapping[str, Tensor], dtype: WireDtype = "fp32") -> ArrayRecord:
    """Serialize floating-point tensors, converted to `dtype` where their values allow it."""
    if dtype == "fp32":
        return pack(tensors)
    return pack({name: _narrow(name, tensor, _NARROW[dtype]) for name, tensor in tensors.items()})


def decode(record: ArrayRecord, like: Mapping[str, Tensor]) -> Tensors:
    """Read tensors with exactly the names and shapes of `like`.

    Returns:
        The tensors, in the dtypes of `like`.

    Raises:
        RefusedError: Names, shapes, dtypes or the size differ; the text says which.
    """
    received = unpack(record, sum(8 * value.numel() + len(name) + _HEADER for name, value in like.items()) + _HEADER)
    if missing := like.keys() - received.keys():
        raise RefusedError(f"{min(missing)} is missing")
    if extra := received.keys() - like.keys():
        raise RefusedError(f"{min(extra)} was not requested")
    for name, expected in like.items():
        values = received[name]
        if values.shape != expected.shape or not values.dtype.is_floating_point:
            raise RefusedError(
                f"{name} is {values.dtype} {list(values.shape)} and must be floating-point {list(expected.shape)}"
            )
    return {name: received[name].to(expected.dtype) for name, expected in like.items()}


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise RefusedError with the name of the first tensor that has a value that is not finite."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise RefusedError(f"{name} has values that are not finite")


def changes(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> Tensors:
    """Return `after - before` for the names of `after`, on the CPU."""
    return {name: value.detach().cpu() - before[name] for name, value in after.items()}


def _narrow(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype == torch.float64 or name.startswith(_EXACT):
        return tensor
    narrow = tensor.to(dtype)
    return narrow if bool(torch.isfinite(narrow).all()) else tensor
