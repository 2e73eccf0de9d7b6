"""Tests of the archive of pixels: NumPy reads it, and so does the client without NumPy."""

from __future__ import annotations

import io

import numpy as np
import pytest
from dermis_client.pixels import read_pixels

from dermis.image_metadata import ImageOrigin, xmp_packet
from dermis.pixel_archive import pixel_archive

ORIGIN = ImageOrigin("tiny", "d" * 64, licence="CC0-1.0", seed=7)
METADATA = (
    b'{"model": {"name": "tiny", "digest": "d"}, "data": [{"class": "\xc3\xa4", "seed": 7, "index": 5}, '
    b'{"class": "b", "seed": 7, "index": 6}]}'
)


@pytest.mark.parametrize("channels", [1, 3])
def test_archive_has_the_pixels_labels_and_origin(channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 5, channels), np.uint8)
    content = pixel_archive(list(images), [1, 0], METADATA, ORIGIN)
    assert content == pixel_archive(list(images), [1, 0], METADATA, ORIGIN)
    expected = np.broadcast_to(images, (2, 4, 5, 3))
    archive = np.load(io.BytesIO(content), allow_pickle=False)
    assert archive["images"].dtype == np.uint8 and np.array_equal(archive["images"], expected)
    assert archive["labels"].dtype == np.int64 and archive["labels"].tolist() == [1, 0]
    assert archive["metadata.json"] == METADATA and archive["images.xmp"] == xmp_packet(ORIGIN)
    read = read_pixels(content)
    assert np.array_equal(read.array, expected) and (read.width, read.height, len(read)) == (5, 4, 2)
    assert [(item.class_name, item.seed, item.index) for item in read.data] == [("ä", 7, 5), ("b", 7, 6)]
    image = read.image(-1)
    assert np.array_equal(np.asarray(image), expected[1]) and b"trainedAlgorithmicMedia" in image.info["xmp"]
    with pytest.raises(IndexError):
        read.image(2)
