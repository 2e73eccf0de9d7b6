"""Tensors as Flower's arrays and back, and what is refused on the way.

What travels is float32, or 16 bits wide as float16 or bfloat16. float64 (single numbers), an optimizer's averages, and
values that float16 cannot hold, travel as they are. Whatever arrives is float32 again before anything is computed with it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from dermis.errors import TrainingError
from training.federated.config import WireDtype

Tensors = dict[str, Tensor]
_EXACT = ("G_opt/", "D_opt/")  # 16 bits would spoil an optimizer's averages of squares
_KNOWN = {"float32", "float64", "float16", "uint16"}  # uint16 holds the bits of bfloat16


class RefusedError(TrainingError):
    """An update that must not reach the global model; the message says why."""


def encode(tensors: Mapping[str, Tensor], dtype: WireDtype = "fp32") -> ArrayRecord:
    """Arrays under the same names."""
    record = ArrayRecord()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        if dtype == "fp32" or value.dtype == torch.float64 or name.startswith(_EXACT):
            array = value.numpy()
        elif dtype == "bf16":
            array = value.bfloat16().view(torch.uint16).numpy()
        else:
            half = value.half()
            array = half.numpy() if bool(torch.isfinite(half).all()) else value.numpy()
        record[name] = Array(np.array(array))  # a copy: training goes on while Flower sends
    return record


def decode(record: ArrayRecord, like: Mapping[str, Tensor]) -> Tensors:
    """Tensors of exactly the names and shapes of `like`, in its dtypes. RefusedError says what does not fit."""
    if missing := like.keys() - record.keys():
        raise RefusedError(f"{min(missing)} is missing")
    if extra := record.keys() - like.keys():
        raise RefusedError(f"{min(extra)} was not asked for")
    found: Tensors = {}
    for name, wanted in like.items():
        array = record[name]
        # What the label says, before anything is decoded: a large array in a small one's place costs memory.
        if tuple(array.shape) != tuple(wanted.shape) or array.dtype not in _KNOWN:
            raise RefusedError(
                f"{name} is {array.dtype} {list(array.shape)} and must be a number format of ours {list(wanted.shape)}"
            )
        try:
            values = torch.from_numpy(array.numpy().copy())
        except (ValueError, TypeError, EOFError, OSError) as error:
            raise RefusedError(f"{name} cannot be read ({error})") from None
        if values.dtype == torch.uint16:
            values = values.view(torch.bfloat16)
        if values.shape != wanted.shape or not values.dtype.is_floating_point:
            raise RefusedError(f"{name} is not what it is labelled as")
        found[name] = values.to(wanted.dtype)
    return found


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """RefusedError names the first tensor with a value that is not finite."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise RefusedError(f"{name} has values that are not finite")


def changes(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> Tensors:
    """after - before, of the names of `after`."""
    return {name: value.detach().cpu() - before[name] for name, value in after.items()}
