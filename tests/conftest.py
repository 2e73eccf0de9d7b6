"""Fixtures of several test files."""

from __future__ import annotations

import pytest

from dermis.bundle import Bundle
from tiny import make_bundle


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny")
