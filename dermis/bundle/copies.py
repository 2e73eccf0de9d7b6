"""The folder of a copy detector, which copies.json describes.

    copies.json          the network, thresholds, measurements, SHA-256 of the others
    network.safetensors  weights of the network, as int8 with a float16 scale for each channel
    references.npy       uint8 [references, 3 dim / 2]: descriptors of the training images, 4 bits for each number

No file names an image, but like the index the descriptors tell anyone who has an image whether it is a training image.
The folder can be used by itself, or is part of a bundle as `copies/`. `docs/bundles.md` documents it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from dermis.bundle.folder import (
    DescriptorModel,
    FileRecord,
    Folder,
    PartFormat,
    check_listed,
    open_part,
    parse_descriptor,
    read_part,
    write_part,
)

COPIES_FORMAT = 2
DESCRIPTOR = "copies.json"
WEIGHTS = "network.safetensors"
REFERENCES = "references.npy"
KIND = "copy detector"
LEAST_THRESHOLD = 1e-3
"""Scores are divided by thresholds; with a smaller one every image is a copy."""


@dataclass(frozen=True)
class Thresholds:
    """Margins from which on an image goes on to the second pass, and from which on it is a copy."""

    first: tuple[float, float]
    """Of the whole image, and of the best seam of two joined images."""
    second: tuple[float, float, float]
    """Of whole and halves together, of a half on one side of the seam, and of an enlarged part."""


@dataclass(frozen=True)
class CopiesDescription:
    """A copy detector without its weights and references. `files` and `digest` are empty until it is written."""

    size: int
    """Side, px, to which images are resized first."""
    dim: int
    """Dimensions of a descriptor."""
    references: int
    """Number of training images that are recognised."""
    thresholds: Thresholds
    provenance: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    digest: str = ""
    """SHA-256 (hex) of copies.json. It identifies the whole detector."""


_Threshold = Annotated[float, Field(ge=LEAST_THRESHOLD, le=512)]


class _ThresholdFields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    first: Annotated[list[_Threshold], Field(min_length=2, max_length=2)]
    second: Annotated[list[_Threshold], Field(min_length=3, max_length=3)]


class _CopiesDescriptor(DescriptorModel):
    """The fields of copies.json."""

    size: int = Field(ge=32, le=512)
    dim: int = Field(ge=8, le=4096, multiple_of=4)
    references: int = Field(ge=1, le=1 << 31)
    thresholds: _ThresholdFields
    provenance: dict[str, Any]
    metrics: dict[str, Any]


def read_copies_files(location: str | Path) -> tuple[CopiesDescription, dict[str, bytes]]:
    """Read and verify the folder of a copy detector.

    Returns:
        The description, and the content of all files by name with copies.json among them.

    Raises:
        BundleError: A file is missing, changed or not listed, or copies.json is malformed.
    """
    return read_part(location, KIND, DESCRIPTOR, parse)


def open_copies_folder(location: str | Path) -> tuple[Folder, CopiesDescription, bytes]:
    """Open a copy detector in a folder or at an fsspec URL. The other files are verified when they are read.

    Returns:
        The folder, the description, and the bytes of copies.json.

    Raises:
        BundleError: copies.json is missing or malformed, or the folder has other files than it lists.
    """
    return open_part(location, KIND, DESCRIPTOR, parse)


def write_copies_folder(
    out: str | Path, description: CopiesDescription, weights: bytes, references: bytes, *, replace: bool = False
) -> CopiesDescription:
    """Write the folder of a copy detector and open it. The folder appears completely or not at all.

    Raises:
        BundleError: `out` exists and may not be replaced, or the folder cannot be written.
    """
    files = {WEIGHTS: weights, REFERENCES: references}
    write_part(out, KIND, DESCRIPTOR, COPIES_FORMAT, description, files, replace=replace)
    return open_copies_folder(out)[1]


def parse(text: bytes, where: str) -> CopiesDescription:
    """Parse copies.json.

    Args:
        text: The bytes of the file.
        where: Name of the file for errors.

    Raises:
        BundleError: The text is not a valid copies.json. The message names the field.
    """
    fields = parse_descriptor(text, where, COPIES_FORMAT, _CopiesDescriptor)
    check_listed(fields.records, (WEIGHTS, REFERENCES), where, KIND)
    return CopiesDescription(
        size=fields.size,
        dim=fields.dim,
        references=fields.references,
        thresholds=Thresholds(
            (fields.thresholds.first[0], fields.thresholds.first[1]),
            (fields.thresholds.second[0], fields.thresholds.second[1], fields.thresholds.second[2]),
        ),
        provenance=fields.provenance,
        metrics=fields.metrics,
        files=fields.records,
        digest=hashlib.sha256(text).hexdigest(),
    )


COPIES_PART = PartFormat("copies", DESCRIPTOR, parse, read_copies_files)
