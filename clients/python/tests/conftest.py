"""Fixtures of the SDK's tests: a fake gateway that follows the HTTP contract, and short pauses."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "src")]

from dermis_client import _retry  # noqa: E402
from dermis_client.resources import dataset_flows  # noqa: E402
from fake_gateway import FakeGateway  # noqa: E402


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_retry, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(_retry, "MAX_DELAY", 0.02)
    monkeypatch.setattr(dataset_flows, "DELETE_PAUSE", 0.01)
    for name in ("DERMIS_BASE_URL", "DERMIS_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    with FakeGateway() as fake:
        yield fake
