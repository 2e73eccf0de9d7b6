"""A logger of trainings that keeps its points in memory, in place of TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from training.loggers import Loggers


class KeptLogger:
    """Keeps curves, the names of pictures, and the options that were logged."""

    def __init__(self) -> None:
        self.points: list[tuple[dict[str, float], int]] = []
        self.options: dict[str, Any] = {}
        self.pictures: list[tuple[str, int]] = []
        self.closed = False

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.points.append((dict(values), step))

    def image(self, name: str, png: bytes, step: int) -> None:
        assert png.startswith(b"\x89PNG")
        self.pictures.append((name, step))

    def close(self) -> None:
        self.closed = True


def keep_curves(patch: pytest.MonkeyPatch, loop: str) -> KeptLogger:
    """Let the training loop of a module log to the logger that is returned, if it asks for TensorBoard."""
    kept = KeptLogger()

    def opened(names: Sequence[str], out: Path, step: int, options: Mapping[str, Any]) -> Loggers:
        kept.options.update(options)
        assert out.is_dir()
        return Loggers({"tensorboard": lambda: kept} if list(names) == ["tensorboard"] else {}, pytest.fail)

    patch.setattr(f"{loop}.open_loggers", opened)
    return kept
