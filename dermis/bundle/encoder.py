"""What an encoder is: encoder.json, and the folder that it describes.

    encoder.json         the network, the generator that it is for, how it was trained, SHA-256 of the others
    encoder.safetensors  its weights and the basis of the latents that it gives, as float16

The folder stands alone or in a bundle as `encoder/`. `docs/bundles.md` documents it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from dermis.errors import BundleError
from dermis.folders import DescriptorModel, FileRecord, Folder, open_folder, parse_descriptor, write_folder

ENCODER_FORMAT = 1
DESCRIPTOR = "encoder.json"
WEIGHTS = "encoder.safetensors"


@dataclass(frozen=True)
class EncoderDescription:
    """An encoder without its weights. `files` and `digest` are known once it is written."""

    backbone: str
    """"small", or timm:MODEL."""
    size: int
    """Pixels to which images are brought first."""
    components: int
    """Dimensions of w that it moves in, the principal components of the generator's latents."""
    num_ws: int
    w_dim: int
    generator: str
    """SHA-256 (hex) of the generator.safetensors that it was trained for: to another one its latents mean nothing."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    digest: str = ""
    """SHA-256 (hex) of encoder.json: the identity of the whole encoder."""


class _Descriptor(DescriptorModel):
    """encoder.json."""

    backbone: str = Field(pattern=r"^(small|timm:[A-Za-z0-9_.-]{1,100})$")
    size: int = Field(ge=16, le=1024)
    components: int = Field(ge=1, le=1 << 12)
    num_ws: int = Field(ge=1, le=64)
    w_dim: int = Field(ge=1, le=1 << 14)
    generator: str = Field(pattern=r"^[0-9a-f]{64}$")
    provenance: dict[str, Any]
    metrics: dict[str, Any]


def read_encoder_files(location: str | Path) -> tuple[EncoderDescription, dict[str, bytes]]:
    """A verified encoder and all its files by name, encoder.json among them. Raises BundleError."""
    folder, described, text = open_encoder_folder(location)
    files = {name: folder.read(name, record) for name, record in described.files.items()}
    return described, {DESCRIPTOR: text, **files}


def open_encoder_folder(location: str | Path) -> tuple[Folder, EncoderDescription, bytes]:
    """The folder (or fsspec URL), what it says of itself, and encoder.json; weights are verified as they are read.

    Raises BundleError.
    """
    folder = open_folder(location, "encoder", DESCRIPTOR)
    text = folder.read_descriptor()
    described = parse(text, f"{folder.where}/{DESCRIPTOR}")
    folder.check_listing(described.files)
    return folder, described, text


def write_encoder_folder(
    out: str | Path, described: EncoderDescription, weights: bytes, *, replace: bool = False
) -> EncoderDescription:
    """Write an encoder's folder and open it again; it appears whole or not at all. Raises BundleError."""
    fields = asdict(described)
    del fields["files"], fields["digest"]
    fields["format_version"] = ENCODER_FORMAT
    write_folder(Path(out), "encoder", DESCRIPTOR, fields, {WEIGHTS: weights}, replace=replace)
    return open_encoder_folder(out)[1]


def parse(text: bytes, where: str) -> EncoderDescription:
    """encoder.json as a description. BundleError, naming `where` and the field, if it is none."""
    found = parse_descriptor(text, where, ENCODER_FORMAT, _Descriptor)
    if found.components > found.w_dim:
        raise BundleError(f"{where}: components: {found.components} are more than w has dimensions")
    if WEIGHTS not in found.records:
        raise BundleError(f"{where}: files does not list {WEIGHTS}; get the encoder again")
    return EncoderDescription(
        backbone=found.backbone,
        size=found.size,
        components=found.components,
        num_ws=found.num_ws,
        w_dim=found.w_dim,
        generator=found.generator,
        provenance=found.provenance,
        metrics=found.metrics,
        files=found.records,
        digest=hashlib.sha256(text).hexdigest(),
    )
