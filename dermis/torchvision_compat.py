"""Import torchvision, timm and torch-fidelity with any build of torch."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

_schemas: list[torch.library.Library] = []


def import_vision(name: str) -> ModuleType:
    """Import a library that imports torchvision.

    The import of a torchvision that was built for CUDA fails with a CPU build of torch, because its compiled operators are
    missing. dermis does not use them, so it is enough to declare the two operators that the import needs.
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
    _schemas.append(library)  # a Library is unregistered when it is garbage-collected
