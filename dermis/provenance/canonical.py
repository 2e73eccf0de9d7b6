"""The canonical file of a signed image: the same file without its C2PA manifest.

Signing puts a manifest into the file and changes nothing else: a chunk `caBX` of PNG, segments APP11 of JPEG, or a chunk
`C2PA` of WebP. Signatures differ each time, canonical files do not: hashes that are to be reproducible are those of canonical
files. No package is needed for them.
"""

from __future__ import annotations

import hashlib
import struct

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_APP11, _START_OF_SCAN = 0xEB, 0xDA


def canonical(data: bytes) -> bytes:
    """Return the file without its C2PA manifest; the same bytes if it has none, or is no PNG, JPEG or WebP."""
    try:
        if data.startswith(_PNG):
            return _canonical_png(data)
        if data.startswith(_JPEG):
            return _canonical_jpeg(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _canonical_webp(data)
    except (struct.error, IndexError):  # it ends in the middle of a chunk
        pass
    return data


def canonical_sha256(data: bytes) -> str:
    """SHA-256 (hex) of the canonical file."""
    return hashlib.sha256(canonical(data)).hexdigest()


def _canonical_png(data: bytes) -> bytes:
    kept, start = [data[: len(_PNG)]], len(_PNG)
    while start < len(data):
        (size,) = struct.unpack_from(">I", data, start)
        end = start + 12 + size
        if data[start + 4 : start + 8] != b"caBX":
            kept.append(data[start:end])
        start = end
    return b"".join(kept)


def _canonical_jpeg(data: bytes) -> bytes:
    kept, start = [data[:2]], 2
    while data[start] == 0xFF and data[start + 1] != _START_OF_SCAN:
        (size,) = struct.unpack_from(">H", data, start + 2)
        end = start + 2 + size
        if not (data[start + 1] == _APP11 and data[start + 4 : start + 6] == b"JP"):
            kept.append(data[start:end])
        start = end
    return b"".join([*kept, data[start:]])


def _canonical_webp(data: bytes) -> bytes:
    kept, start = [b"WEBP"], 12
    while start < len(data):
        (size,) = struct.unpack_from("<I", data, start + 4)
        end = start + 8 + size + size % 2
        if data[start : start + 4] != b"C2PA":
            kept.append(data[start:end])
        start = end
    body = b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body
