"""The folder of an index of training images, which authenticity.json describes.

    authenticity.json   the feature space, how it is stored, counts, the real-to-real baseline, SHA-256 of the others
    index.faiss         embeddings of the training images
    radii.npy           float32 [vectors]: distance to the nearest other training image that is not a near-duplicate
    held_out.npy        float32 [held_out, dim], optional: embeddings of real images that the generator never saw

No file names an image. The order of the vectors could identify images, but it is not recorded.
The folder can be used by itself, or is part of a bundle as `authenticity/`. `docs/bundles.md` documents it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

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
from dermis.errors import BundleError, quote

INDEX_FORMAT = 2
OLDEST_FORMAT = 1  # without `duplicates` and `exact_radii`
DESCRIPTOR = "authenticity.json"
INDEX, RADII, HELD_OUT = "index.faiss", "radii.npy", "held_out.npy"
PERCENTILES = tuple(range(0, 101))

Kind = Literal["flat", "ivf", "hnsw"]
Metric = Literal["cosine", "l2"]


@dataclass(frozen=True)
class Duplicates:
    """Near-duplicates among the training images. They count as one image: none is a neighbour of another.

    Two images are near-duplicates if they are at most `same_distance` apart, or if they have nearly the same perceptual
    hash and are at most `copy_distance` apart. Distances are in the space of the index.
    """

    images: int
    """Training images that have a near-duplicate."""
    groups: int
    """Groups that these images form."""
    largest: int
    """Images of the largest group; 0 if there is none."""
    distinct: int
    """Number of images if every group of near-duplicates, of one patient and of one lesion counts once."""
    held_out: int
    """Held-out images at most `same_distance` from a training image."""
    typical_distance: float
    """Median distance of two training images."""
    same_distance: float
    copy_distance: float
    """99th percentile of the distances of re-compressed copies to their originals, bounded. 0 if no pixels were compared."""
    copy_median: float
    """Median distance of re-compressed copies to their originals."""
    copies: int
    """Training images for which a re-compressed copy was measured."""
    copies_nearer: float
    """Share of these copies that are nearer to a training image than the first percentile of the radii."""


@dataclass(frozen=True)
class IndexDescription:
    """An index without its vectors. `files` and `digest` are empty until it is written."""

    extractor: str
    """Name of the feature space: "classifier" (the bundle's classifier), or a feature space of `dermis.features`."""
    extractor_identity: str
    """Changes with the weights and the resizing of the extractor. The index cannot be used with another extractor."""
    feature_dim: int
    """Dimensions of the extractor's embeddings."""
    dim: int
    """Dimensions of the stored embeddings: after the projection on principal components, or feature_dim without one."""
    metric: Metric
    """cosine: embeddings are scaled to length 1 first; distances are then Euclidean, sqrt(2 - 2 cos)."""
    kind: Kind
    resolution: int
    """Side, px, to which every image is resized before the extractor: that of the training images of the generator."""
    vectors: int
    held_out: int
    explained: float
    """Share of the embeddings' variance that the stored embeddings keep."""
    radii: tuple[float, ...]
    """Percentiles 0, 1, ..., 100 of the radii of the training images: the real-to-real baseline.

    Near-duplicates do not count as other images, nor do images of the same patient or lesion where these are known."""
    held_out_distances: tuple[float, ...]
    """The same percentiles for held-out images and their nearest training image; empty without held-out images."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    duplicates: Duplicates | None = None
    """None in an index of format 1, whose radii can be distances to duplicates."""
    exact_radii: float | None = None
    """Share of the radii that an exact search confirms: 1 if exact search computed all. None in an index of format 1."""
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    digest: str = ""
    """SHA-256 (hex) of authenticity.json. It identifies the whole index."""


class _Duplicates(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    images: int = Field(ge=0)
    groups: int = Field(ge=0)
    largest: int = Field(ge=0)
    distinct: int = Field(ge=2)
    held_out: int = Field(ge=0)
    typical_distance: float = Field(gt=0)
    same_distance: float = Field(ge=0)
    copy_distance: float = Field(ge=0)
    copy_median: float = Field(ge=0)
    copies: int = Field(ge=0)
    copies_nearer: float = Field(ge=0, le=1)


class _IndexDescriptor(DescriptorModel):
    """The fields of authenticity.json."""

    extractor: str = Field(pattern=r"^[ -~]{1,200}$")
    extractor_identity: str = Field(pattern=r"^[ -~]{1,400}$")
    feature_dim: int = Field(ge=1, le=1 << 16)
    dim: int = Field(ge=1, le=1 << 16)
    metric: str
    kind: str
    resolution: int = Field(ge=8, le=4096)
    vectors: int = Field(ge=2)
    held_out: int = Field(ge=0)
    explained: float = Field(ge=0, le=1)
    radii: list[float]
    held_out_distances: list[float]
    provenance: dict[str, Any]
    duplicates: _Duplicates | None = None
    exact_radii: float | None = Field(None, ge=0, le=1)


def read_index_files(location: str | Path) -> tuple[IndexDescription, dict[str, bytes]]:
    """Read and verify an index's folder.

    Returns:
        The description, and the content of all files by name with authenticity.json among them.

    Raises:
        BundleError: A file is missing, changed or not listed, or authenticity.json is malformed.
    """
    return read_part(location, "index", DESCRIPTOR, parse)


def open_index_folder(location: str | Path) -> tuple[Folder, IndexDescription, bytes]:
    """Open an index in a folder or at an fsspec URL. The other files are verified when they are read.

    Returns:
        The folder, the description, and the bytes of authenticity.json.

    Raises:
        BundleError: authenticity.json is missing or malformed, or the folder has other files than it lists.
    """
    return open_part(location, "index", DESCRIPTOR, parse)


def write_index_folder(
    out: str | Path, description: IndexDescription, files: Mapping[str, bytes], *, replace: bool = False
) -> IndexDescription:
    """Write an index's folder and open it. The folder appears completely or not at all.

    Raises:
        BundleError: `out` exists and may not be replaced, the description is not valid, or the folder cannot be written.
    """
    _check(description, DESCRIPTOR)
    write_part(out, "index", DESCRIPTOR, INDEX_FORMAT, description, files, replace=replace)
    return open_index_folder(out)[1]


def parse(text: bytes, where: str) -> IndexDescription:
    """Parse authenticity.json.

    Args:
        text: The bytes of the file.
        where: Name of the file for errors.

    Raises:
        BundleError: The text is not a valid authenticity.json. The message names the field.
    """
    fields = parse_descriptor(text, where, _format_of(text), _IndexDescriptor)
    for name, value, kind in (("metric", fields.metric, Metric), ("kind", fields.kind, Kind)):
        if value not in get_args(kind):
            raise BundleError(f"{where}: {name}: {quote(value)} is none of {', '.join(get_args(kind))}")
    description = IndexDescription(
        extractor=fields.extractor,
        extractor_identity=fields.extractor_identity,
        feature_dim=fields.feature_dim,
        dim=fields.dim,
        metric="cosine" if fields.metric == "cosine" else "l2",
        kind=next(kind for kind in get_args(Kind) if kind == fields.kind),
        resolution=fields.resolution,
        vectors=fields.vectors,
        held_out=fields.held_out,
        explained=fields.explained,
        radii=tuple(fields.radii),
        held_out_distances=tuple(fields.held_out_distances),
        provenance=fields.provenance,
        duplicates=None if fields.duplicates is None else Duplicates(**fields.duplicates.model_dump()),
        exact_radii=fields.exact_radii,
        files=fields.records,
        digest=hashlib.sha256(text).hexdigest(),
    )
    _check(description, where)
    names = (INDEX, RADII, *([HELD_OUT] if description.held_out else []))
    check_listed(description.files, names, where, "index")
    return description


def _format_of(text: bytes) -> int:
    """Return the format version that the text names if it is an older, supported one; otherwise the newest."""
    try:
        version = json.loads(text).get("format_version")
    except (ValueError, RecursionError, AttributeError):  # not a descriptor: parsing it reports why
        return INDEX_FORMAT
    return version if type(version) is int and OLDEST_FORMAT <= version < INDEX_FORMAT else INDEX_FORMAT


def _check(description: IndexDescription, where: str) -> None:
    """Raise BundleError if fields contradict each other."""
    if description.duplicates is not None and description.duplicates.images > description.vectors:
        raise BundleError(f"{where}: duplicates: more images than vectors")
    if description.dim > description.feature_dim:
        raise BundleError(f"{where}: dim: {description.dim} is above feature_dim")
    percentiles = {"radii": description.radii, "held_out_distances": description.held_out_distances}
    for name, values in percentiles.items():
        empty = name == "held_out_distances" and not description.held_out
        if len(values) != (0 if empty else len(PERCENTILES)):
            raise BundleError(f"{where}: {name}: must be the percentiles 0 to 100")
        if any(value < 0 for value in values) or list(values) != sorted(values):
            raise BundleError(f"{where}: {name}: must rise from at least 0")


INDEX_PART = PartFormat("authenticity", DESCRIPTOR, parse, read_index_files)
