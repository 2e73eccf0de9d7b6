"""The folder of an encoder, which encoder.json describes.

    encoder.json         the network, the generator that it belongs to, how it was trained, SHA-256 of the others
    encoder.safetensors  weights and the basis of the latents, as float16

The folder can be used by itself, or is part of a bundle as `encoder/`. `docs/bundles.md` documents it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

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
from dermis.errors import BundleError

ENCODER_FORMAT = 1
DESCRIPTOR = "encoder.json"
WEIGHTS = "encoder.safetensors"


@dataclass(frozen=True)
class EncoderDescription:
    """An encoder without its weights. `files` and `digest` are empty until it is written."""

    backbone: str
    """The network: "small", or timm:MODEL."""
    size: int
    """Side, px, to which images are resized first."""
    components: int
    """Number of principal components of the generator's w that span the encoder's latents."""
    num_ws: int
    w_dim: int
    generator: str
    """SHA-256 (hex) of the generator.safetensors that it was trained for. It cannot be used with another generator."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    digest: str = ""
    """SHA-256 (hex) of encoder.json. It identifies the whole encoder."""


class _EncoderDescriptor(DescriptorModel):
    """The fields of encoder.json."""

    backbone: str = Field(pattern=r"^(small|timm:[A-Za-z0-9_.-]{1,100})$")
    size: int = Field(ge=16, le=1024)
    components: int = Field(ge=1, le=1 << 12)
    num_ws: int = Field(ge=1, le=64)
    w_dim: int = Field(ge=1, le=1 << 14)
    generator: str = Field(pattern=r"^[0-9a-f]{64}$")
    provenance: dict[str, Any]
    metrics: dict[str, Any]


def read_encoder_files(location: str | Path) -> tuple[EncoderDescription, dict[str, bytes]]:
    """Read and verify an encoder's folder.

    Returns:
        The description, and the content of all files by name with encoder.json among them.

    Raises:
        BundleError: A file is missing, changed or not listed, or encoder.json is malformed.
    """
    return read_part(location, "encoder", DESCRIPTOR, parse)


def open_encoder_folder(location: str | Path) -> tuple[Folder, EncoderDescription, bytes]:
    """Open an encoder in a folder or at an fsspec URL. The weights are verified when they are read.

    Returns:
        The folder, the description, and the bytes of encoder.json.

    Raises:
        BundleError: encoder.json is missing or malformed, or the folder has other files than it lists.
    """
    return open_part(location, "encoder", DESCRIPTOR, parse)


def write_encoder_folder(
    out: str | Path, description: EncoderDescription, weights: bytes, *, replace: bool = False
) -> EncoderDescription:
    """Write an encoder's folder and open it. The folder appears completely or not at all.

    Raises:
        BundleError: `out` exists and may not be replaced, or the folder cannot be written.
    """
    write_part(out, "encoder", DESCRIPTOR, ENCODER_FORMAT, description, {WEIGHTS: weights}, replace=replace)
    return open_encoder_folder(out)[1]


def parse(text: bytes, where: str) -> EncoderDescription:
    """Parse encoder.json.

    Args:
        text: The bytes of the file.
        where: Name of the file for errors.

    Raises:
        BundleError: The text is not a valid encoder.json. The message names the field.
    """
    fields = parse_descriptor(text, where, ENCODER_FORMAT, _EncoderDescriptor)
    if fields.components > fields.w_dim:
        raise BundleError(f"{where}: components: {fields.components} are more than w has dimensions")
    check_listed(fields.records, (WEIGHTS,), where, "encoder")
    return EncoderDescription(
        backbone=fields.backbone,
        size=fields.size,
        components=fields.components,
        num_ws=fields.num_ws,
        w_dim=fields.w_dim,
        generator=fields.generator,
        provenance=fields.provenance,
        metrics=fields.metrics,
        files=fields.records,
        digest=hashlib.sha256(text).hexdigest(),
    )


ENCODER_PART = PartFormat("encoder", DESCRIPTOR, parse, read_encoder_files)
