"""Fixtures that several test files use."""

from __future__ import annotations

from pathlib import Path

import pytest

from dermis.bundle import Bundle
from launched_service import launch  # noqa: F401  a fixture
from tiny import make_bundle


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def timm_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxscript", reason="the export needs onnxscript")
    from timm_classifier import make_timm_classifier

    return make_timm_classifier(tmp_path_factory.mktemp("classifiers") / "timm")
