"""What an index of training embeddings is: authenticity.json, and the folder that it describes.

    authenticity.json   the feature space, how it is stored, counts, the real-to-real baseline, SHA-256 of the others
    index.faiss         the training images' embeddings
    radii.npy           float32 [vectors]: distance to the nearest other training image that is no near-duplicate
    held_out.npy        float32 [held_out, dim], optional: embeddings of real images that the generator never saw

It names no image: the order of the vectors in the index could identify images, but it is not recorded.
The folder stands alone or in a bundle as `authenticity/`. `docs/bundles.md` documents it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from dermis.errors import BundleError, quote
from dermis.folders import DescriptorModel, FileRecord, Folder, open_folder, parse_descriptor, write_folder

INDEX_FORMAT = 2
OLDEST_FORMAT = 1  # without `duplicates` and `exact_radii`
DESCRIPTOR = "authenticity.json"
INDEX, RADII, HELD_OUT = "index.faiss", "radii.npy", "held_out.npy"
PERCENTILES = tuple(range(0, 101))

Kind = Literal["flat", "ivf", "hnsw"]
Metric = Literal["cosine", "l2"]


@dataclass(frozen=True)
class Duplicates:
    """Training images that count as one image, so that neither is a neighbour of the other. Distances are in the index's space.

    Two images are near-duplicates if they are at most `same_distance` apart, or if they have nearly the same perceptual
    hash and are at most `copy_distance` apart.
    """

    images: int
    """Training images that have a near-duplicate."""
    groups: int
    """Groups that these images form."""
    largest: int
    """Images of the largest group; 0 if there is none."""
    distinct: int
    """Images that are left if every group of near-duplicates, patient and lesion counts once."""
    held_out: int
    """Held-out images at most `same_distance` from a training image."""
    typical_distance: float
    """Median distance of two training images."""
    same_distance: float
    copy_distance: float
    """99th percentile of the distances of re-compressed copies to their originals, bounded; 0 if no pixels were compared."""
    copy_median: float
    """Median distance of re-compressed copies to their originals."""
    copies: int
    """Training images of which a re-compressed copy was measured."""
    copies_nearer: float
    """Share of these copies whose distance to the nearest training image is below the first percentile of the radii."""


@dataclass(frozen=True)
class IndexDescription:
    """An index without its vectors. `files` and `digest` are known once it is written."""

    extractor: str
    """Name of the feature space: "classifier" (that of the bundle), or one of `dermis.features`."""
    extractor_identity: str
    """Changes with its weights and its resizing; an index is of no use with another one."""
    feature_dim: int
    """Of the embeddings as the extractor gives them."""
    dim: int
    """As they are stored, after the projection on principal components; feature_dim if there is none."""
    metric: Metric
    """cosine: embeddings are brought to length 1 first; distances are then Euclidean, sqrt(2 - 2 cos)."""
    kind: Kind
    resolution: int
    """Pixels to which every image is brought before the extractor: the generator's, for training images had no more."""
    vectors: int
    held_out: int
    explained: float
    """Share of the embeddings' variance that is stored."""
    radii: tuple[float, ...]
    """Percentiles 0, 1, ..., 100 of the training images' distances to their nearest other one: the real-to-real baseline.

    Near-duplicates do not count as others, nor do images of the same patient or lesion where these are known."""
    held_out_distances: tuple[float, ...]
    """The same of the held-out images' distances to their nearest training image; empty if there are none."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    duplicates: Duplicates | None = None
    """None in an index of format 1: its radii may be those of duplicates."""
    exact_radii: float | None = None
    """Share of the radii that an exact search confirms: 1 if it computed them all. None in an index of format 1."""
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    digest: str = ""
    """SHA-256 (hex) of authenticity.json: the identity of the whole index."""


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


class _Descriptor(DescriptorModel):
    """authenticity.json."""

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
    """A verified index and all its files by name, authenticity.json among them. Raises BundleError."""
    folder, described, text = open_index_folder(location)
    files = {name: folder.read(name, record) for name, record in described.files.items()}
    return described, {DESCRIPTOR: text, **files}


def open_index_folder(location: str | Path) -> tuple[Folder, IndexDescription, bytes]:
    """The folder (or fsspec URL), what it says of itself, and authenticity.json; other files are verified as they are read.

    Raises BundleError.
    """
    folder = open_folder(location, "index", DESCRIPTOR)
    text = folder.read_descriptor()
    described = parse(text, f"{folder.where}/{DESCRIPTOR}")
    folder.check_listing(described.files)
    return folder, described, text


def write_index_folder(
    out: str | Path, described: IndexDescription, files: Mapping[str, bytes], *, replace: bool = False
) -> IndexDescription:
    """Write an index's folder and open it again; it appears whole or not at all. Raises BundleError."""
    fields = asdict(described)
    del fields["files"], fields["digest"]
    _check(described, DESCRIPTOR)
    write_folder(Path(out), "index", DESCRIPTOR, {"format_version": INDEX_FORMAT, **fields}, files, replace=replace)
    return open_index_folder(out)[1]


def parse(text: bytes, where: str) -> IndexDescription:
    """authenticity.json as a description. BundleError, naming `where` and the field, if it is none."""
    fields = parse_descriptor(text, where, _format_of(text), _Descriptor)
    for name, value, kind in (("metric", fields.metric, Metric), ("kind", fields.kind, Kind)):
        if value not in get_args(kind):
            raise BundleError(f"{where}: {name}: {quote(value)} is none of {', '.join(get_args(kind))}")
    described = IndexDescription(
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
    _check(described, where)
    for name in (INDEX, RADII, *([HELD_OUT] if described.held_out else [])):
        if name not in described.files:
            raise BundleError(f"{where}: files does not list {name}; get the index again")
    return described


def _format_of(text: bytes) -> int:
    """The format by which a descriptor is read: the one that it names, if that is an older one that is still supported."""
    try:
        version = json.loads(text).get("format_version")
    except (ValueError, RecursionError, AttributeError):  # it is no descriptor, which its parser says
        return INDEX_FORMAT
    return version if type(version) is int and OLDEST_FORMAT <= version < INDEX_FORMAT else INDEX_FORMAT


def _check(described: IndexDescription, where: str) -> None:
    """BundleError if the fields contradict one another."""
    if described.duplicates is not None and described.duplicates.images > described.vectors:
        raise BundleError(f"{where}: duplicates: more images than vectors")
    if described.dim > described.feature_dim:
        raise BundleError(f"{where}: dim: {described.dim} is above feature_dim")
    wanted = {"radii": described.radii, **({"held_out_distances": described.held_out_distances})}
    for name, values in wanted.items():
        empty = name == "held_out_distances" and not described.held_out
        if len(values) != (0 if empty else len(PERCENTILES)):
            raise BundleError(f"{where}: {name}: must be the percentiles 0 to 100")
        if any(value < 0 for value in values) or list(values) != sorted(values):
            raise BundleError(f"{where}: {name}: must rise from at least 0")
