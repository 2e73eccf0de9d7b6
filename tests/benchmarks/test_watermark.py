"""Tests of the benchmark of watermarks: the threshold, and which real images are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.watermark import methods, needed_bits, real


def test_threshold_is_the_least_number_that_random_bits_seldom_reach() -> None:
    # Of 2^32 texts, 1,149,017 (0.027 %) agree in 26 bits or more, and 4,514,873 (0.105 %) in 25.
    assert needed_bits() == 26


def test_a_part_of_the_real_images_is_spread_over_all(tmp_path: Path) -> None:
    for index in range(9):
        Image.new("RGB", (8, 8), (20 * index, 0, 0)).save(tmp_path / f"{index}.jpg", quality=100)
    reds = np.stack(list(real(tmp_path, 8, 3)))[:, 0, 0, 0]
    assert np.abs(reds.astype(int) - [0, 60, 120]).max() <= 4 and len(list(real(tmp_path, 8, None))) == 9


@pytest.mark.full
def test_bits_are_read_from_marked_images_only() -> None:
    pytest.importorskip("imwatermark", reason="invisible-watermark is not installed")
    message = np.random.default_rng(0).integers(0, 2, 32, dtype=np.uint8)
    smooth = np.random.default_rng(1).integers(60, 200, (16, 16, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(smooth).resize((256, 256), Image.Resampling.BICUBIC))
    for embed, read in methods(message).values():
        agreeing = [int((read(each) == message.astype(bool)).sum()) for each in (embed(image), image)]
        assert agreeing[0] >= needed_bits() > agreeing[1]
