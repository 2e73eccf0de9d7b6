"""Generated images as one .npz file of pixels, which `numpy.load` reads without pickle and without decoding images.

The file is a zip archive of uncompressed members, each with its CRC-32. A program that only computes with the pixels receives
them faster than it would decode image files.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence

import numpy as np

from dermis.image_metadata import ImageOrigin, xmp_packet
from dermis.imaging import Images, as_rgb

MEDIA_TYPE = "application/x-npz"


def pixel_archive(images: Sequence[Images], labels: Sequence[int], metadata: bytes, origin: ImageOrigin) -> bytes:
    """Write a .npz file. The same arguments always give the same bytes.

    Its members are `images.npy` (uint8 [N, H, W, 3]), `labels.npy` (int64 [N]), `metadata.json`, and `images.xmp`: what image
    files contain of their origin, as a file beside the pixels, which have no place for it.

    Args:
        images: uint8 [H, W, 3] or [H, W, 1] of one size, at least one; grey is repeated as RGB.
        labels: Class number of each image.
        metadata: The bytes of `metadata.json`.
        origin: What the file says of its images.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        # ZipInfo has a fixed date; a name would get the present time.
        archive.writestr(zipfile.ZipInfo("metadata.json"), metadata)
        archive.writestr(zipfile.ZipInfo("images.xmp"), xmp_packet(origin))
        with archive.open(zipfile.ZipInfo("labels.npy"), "w") as member:
            np.lib.format.write_array(member, np.asarray(labels, np.int64), allow_pickle=False)
        with archive.open(zipfile.ZipInfo("images.npy"), "w", force_zip64=True) as member:
            height, width, _ = images[0].shape
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), height, width, 3)}
            np.lib.format.write_array_header_1_0(member, header)
            for image in images:  # one by one, because an array of all of them would be another copy
                member.write(np.ascontiguousarray(as_rgb(image[None])).data)
    return buffer.getvalue()
