"""Hashes of the files of a dataset with signed images that do not depend on the signatures, which differ each time.

| file | its canonical SHA-256 is that of |
| --- | --- |
| with images (zip, tar, Parquet) | the lines `<SHA-256 of the canonical image>  <file name>`, one for each image in order |
| preview.png | the canonical file (`dermis.provenance.canonical`) |
| croissant.json | the file with the canonical SHA-256 of each container in place of its own, and 0 as its size |

All other files have no signatures in them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class CanonicalHashes:
    """Hashes without the signatures of images.

    Attributes:
        files: Canonical SHA-256 (hex) by file, for files with signatures or their hashes in them.
        digest: SHA-256 of the manifest with these hashes (`Manifest.with_canonical`).
    """

    files: Mapping[str, str]
    digest: str


def listing_sha256(images: Iterable[tuple[str, str]]) -> str:
    """Return the canonical SHA-256 of a container from name and canonical SHA-256 of its images, in order."""
    digest = hashlib.sha256()
    for name, sha256 in images:
        digest.update(f"{sha256}  {name}\n".encode())
    return digest.hexdigest()


def canonical_croissant(data: bytes, containers: Mapping[str, str]) -> bytes:
    """Return croissant.json with these canonical hashes.

    Args:
        data: The file.
        containers: Canonical SHA-256 of containers by name.

    Raises:
        ValueError: It is no JSON with a list of files.
    """
    document = json.loads(data)
    try:
        for each in document["distribution"]:
            if each.get("name") in containers and "sha256" in each:
                each |= {"sha256": containers[each["name"]], "contentSize": "0 B"}
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"the list of files cannot be read ({error!r})") from None
    return json.dumps(document, ensure_ascii=False).encode()
