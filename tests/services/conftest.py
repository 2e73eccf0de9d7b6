"""Fixtures of the tests in this folder."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _small_reports(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Reports of datasets measure 12 images and not 200, which take 30 ms each. Processes of their own are not affected."""
    if "launch" not in request.fixturenames and "replica" not in request.fixturenames:
        monkeypatch.setattr("dermis.report.sample.SAMPLE", 12)
