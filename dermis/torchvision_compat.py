"""Import torchvision, timm and torch-fidelity beside any build of torch."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

_schemas: list[torch.library.Library] = []


def import_vision(name: str) -> ModuleType:
    """importlib.import_module(name) for a library that imports torchvision.

    A torchvision built for CUDA fails to import beside a CPU torch, because its compiled operators are missing. None
    of ours are used from it, so declaring the two operators that its import looks for is enough.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        _declare_operators()
    return importlib.import_module(name)


def _declare_operators() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
    _schemas.append(library)  # a Library unregisters when it is collected
