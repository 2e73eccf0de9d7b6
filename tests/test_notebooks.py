"""Tests of the notebooks of examples/: their committed outputs, and that they run against a real service."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.components import free_port
from launched_service import ROOT, Launched
from notebooks import EXAMPLES, execute, printed

NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
EXPECTED = {
    "explore_and_edit": ("24 directions", "calibrated probability", "Not a medical device", "authentic"),
    "make_and_look": ("demo: 128 px", "Counter({'benign': 60, 'malignant': 60})", "120 of 120", "[measured]"),
    "train_on_it": ("300 images (3, 128, 128)", "epoch 5: loss", "of 100 new generated images", "64 images, 1"),
}


def test_all_notebooks_are_expected_and_in_the_list() -> None:
    assert {path.stem for path in NOTEBOOKS} == set(EXPECTED)
    assert all(f"({path.name})" in (EXAMPLES / "README.md").read_text() for path in NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook_has_small_outputs_of_every_cell_in_order(path: Path) -> None:
    text = path.read_text()
    assert len(text) < 1_000_000
    code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = json.dumps([cell["outputs"] for cell in code])
    assert "error" not in {output["output_type"] for cell in code for output in cell["outputs"]}
    assert not re.search(r"/(home|root|tmp|work|Users)/|src=\\\\*\"(?!data:)", outputs)
    assert all(words in outputs for words in EXPECTED[path.stem])


@pytest.mark.full
def test_notebooks_run_against_a_real_service(launch: Callable[..., Launched], tmp_path: Path) -> None:
    pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    port = free_port()
    service = launch(str(ROOT / "bundles" / "demo"), port)
    service.wait_until(service.ready)
    for path in NOTEBOOKS:
        folder = tmp_path / path.stem
        folder.mkdir()
        text = printed(execute(path, f"http://127.0.0.1:{port}", folder))
        for words in EXPECTED[path.stem]:
            assert words in text, f"{path.name} does not print {words!r}:\n{text[:5000]}"
