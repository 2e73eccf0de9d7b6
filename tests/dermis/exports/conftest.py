from __future__ import annotations

from pathlib import Path

import pytest

from painted_dataset import make
from tiny import make_bundle

CLASSES = ("benign", "malignant", "a b.c")


@pytest.fixture(scope="session")
def painted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 20 images whose pixels are (index, label, 7), in Parquet files. One class has no image."""
    folder = tmp_path_factory.mktemp("painted")
    bundle = make_bundle(folder / "bundle", classes=CLASSES)
    make(folder / "set", bundle, format="parquet", classes={"malignant": 11, "a b.c": 9})
    return folder / "set"
