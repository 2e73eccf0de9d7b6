"""Test of the benchmark of the exported generator: what it compares makes the same images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from optional_packages import needs_openvino
from tiny import make_bundle

pytest.importorskip("onnxscript", reason="onnxscript is not installed")


@pytest.mark.full
@needs_openvino
def test_benchmark_compares_methods_that_make_the_same_images(tmp_path: Path) -> None:
    from benchmarks.generator_onnx import methods

    functions, difference = methods(make_bundle(tmp_path / "tiny", noise_strength=0.1).location, 3)
    assert list(functions) == ["torch, eager", "ONNX Runtime", "OpenVINO"] and difference <= 1
    images = [np.asarray(function()).astype(int) for function in functions.values()]
    assert images[0].shape == (3, 16, 16, 3) and images[0].std() > 5
    assert all(np.abs(other - images[0]).max() <= 1 for other in images[1:])
