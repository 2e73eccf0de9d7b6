"""Load a dataset with the code in its own card, without a network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def card_snippets(folder: Path) -> list[str]:
    """The Python code of README.md, block by block."""
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


def load_by_card(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Run each snippet of the card in the dataset's folder; yields what it calls `dataset`."""
    datasets = pytest.importorskip("datasets", reason="the library datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    monkeypatch.chdir(folder)
    for number, code in enumerate(card_snippets(folder)):
        if "import webdataset" in code:
            pytest.importorskip("webdataset", reason="the library webdataset is not installed")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache / str(number)))
        names: dict[str, Any] = {}
        exec(code, names)
        yield names["dataset"]
