"""Fixtures of the tests of commands."""

from __future__ import annotations

import pytest

from painter import Painter


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> type[Painter]:
    monkeypatch.setattr("dermis.synthesizer.Synthesizer", Painter)
    monkeypatch.setattr(Painter, "drawn", 0)
    return Painter
