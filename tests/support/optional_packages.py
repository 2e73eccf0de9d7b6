"""Marks of tests that need a package which not every installation has."""

from __future__ import annotations

import pytest

from dermis.openvino_images import have_openvino

# `pytest.importorskip` would import openvino together with its usage reports, which `import_openvino` switches off.
needs_openvino = pytest.mark.skipif(not have_openvino(), reason="OpenVINO is not installed")
