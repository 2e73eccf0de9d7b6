"""Tensors as one of Flower's arrays and back, and what is refused on the way.

All tensors of a message travel as one file of safetensors. Flower fetches every array by requests of its own, and of a
generator's and a discriminator's several hundred most hold a few numbers: apart they take the better part of a minute.

What travels is float32, or 16 bits wide as float16 or bfloat16. float64 (single numbers), an optimizer's averages, and
values that float16 cannot hold, travel as they are. Whatever arrives is float32 again before anything is computed with it.
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
_EXACT = ("G_opt/", "D_opt/")  # 16 bits would spoil an optimizer's averages of squares
_PACKED = "safetensors"
_HEADER = 200  # bytes for each tensor's name, shape and place
_NARROW = {"fp16": torch.float16, "bf16": torch.bfloat16}


class RefusedError(TrainingError):
    """An update that must not reach the global model; the message says why."""


def pack(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors of any dtype under their names."""
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    return ArrayRecord({_PACKED: Array("uint8", (len(content),), _PACKED, content)})


def unpack(record: ArrayRecord, most_bytes: int | None = None) -> Tensors:
    """Undo `pack`. RefusedError if the record is something else, or larger than `most_bytes`."""
    array = record.get(_PACKED)
    if array is None or len(record) != 1:
        raise RefusedError("the tensors are not packed as one file of safetensors")
    if most_bytes is not None and len(array.data) > most_bytes:
        raise RefusedError(f"{len(array.data):,} bytes are more than the {most_bytes:,} that were asked for can take")
    try:
        return load(array.data)
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise RefusedError(f"the tensors cannot be read ({escape(error)})") from None


def encode(tensors: Mapping[str, Tensor], dtype: WireDtype = "fp32") -> ArrayRecord:
    """`pack` floating-point tensors, those that can be in the width of `dtype`."""
    if dtype == "fp32":
        return pack(tensors)
    return pack({name: _narrow(name, tensor, _NARROW[dtype]) for name, tensor in tensors.items()})


def decode(record: ArrayRecord, like: Mapping[str, Tensor]) -> Tensors:
    """Tensors of exactly the names and shapes of `like`, in its dtypes. RefusedError says what does not fit."""
    found = unpack(record, sum(8 * value.numel() + len(name) + _HEADER for name, value in like.items()) + _HEADER)
    if missing := like.keys() - found.keys():
        raise RefusedError(f"{min(missing)} is missing")
    if extra := found.keys() - like.keys():
        raise RefusedError(f"{min(extra)} was not asked for")
    for name, wanted in like.items():
        values = found[name]
        if values.shape != wanted.shape or not values.dtype.is_floating_point:
            raise RefusedError(
                f"{name} is {values.dtype} {list(values.shape)} and must be floating-point {list(wanted.shape)}"
            )
    return {name: found[name].to(wanted.dtype) for name, wanted in like.items()}


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """RefusedError names the first tensor with a value that is not finite."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise RefusedError(f"{name} has values that are not finite")


def changes(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> Tensors:
    """after - before, of the names of `after`."""
    return {name: value.detach().cpu() - before[name] for name, value in after.items()}


def _narrow(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype == torch.float64 or name.startswith(_EXACT):
        return tensor
    narrow = tensor.to(dtype)
    return narrow if bool(torch.isfinite(narrow).all()) else tensor
