"""Test of the benchmark of marks: every method writes the marks that it is named after."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny import make_bundle

pytest.importorskip("c2pa", reason="c2pa-python is not installed")


@pytest.mark.full
def test_benchmark_measures_files_with_and_without_marks(tmp_path: Path) -> None:
    from benchmarks.provenance import measure

    result = measure(make_bundle(tmp_path / "tiny").location, 4, 1)  # it verifies the signatures itself
    sizes = {row["method"]: row["bytes"] for row in result["rows"]}
    for kind in ("png", "jpeg", "webp"):
        assert sizes[f"{kind}, plain"] + 500 < sizes[f"{kind}, XMP"] < sizes[f"{kind}, XMP and C2PA"] - 1000
    assert all(row["images_per_second"] > 0 for row in result["rows"])
