"""The folder of statistics of real images, which reference.json describes.

    reference.json          what was counted in each class, the feature space, SHA-256 of the other file
    statistics.safetensors  optional: for each class, mean, covariance and cells of the features

The report of a dataset compares the generated images with these numbers. No file holds an image or the features of an
image: every number is of images of at least `MINIMUM_GROUP` patients, and counts are rounded to multiples of `COUNT_STEP`.
The folder can be used by itself, or is part of a bundle as `reference/`. `docs/bundles.md` documents it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from dermis.bundle.folder import (
    DescriptorModel,
    FileRecord,
    PartFormat,
    open_folder,
    parse_descriptor,
    read_part,
    write_part,
)
from dermis.errors import BundleError
from dermis.tensor_files import read_vectors

REFERENCE_FORMAT = 1
DESCRIPTOR = "reference.json"
STATISTICS = "statistics.safetensors"
MINIMUM_GROUP = 50
"""Least number of patients, or of lesions or images whose patient is not known, of every mean, covariance, cell and share."""
COUNT_STEP = 5
MAX_CELLS = 32
_MAX_STATISTICS_BYTES = 64 << 20

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class FeatureSpace:
    """The features of the statistics: the first components of the embeddings in the bundle's index."""

    index: str
    """SHA-256 (hex) of the authenticity.json of that index. Features of another index cannot be compared."""
    dim: int


@dataclass(frozen=True)
class BaselineSample:
    """Real images that the generator was not trained on, compared with the statistics as a dataset is."""

    images: int
    fd: float
    coverage: float
    typical: float | None = None
    """Share at most `typical_distance` from the mean; None in a reference that was made before this was measured."""


@dataclass(frozen=True)
class ClassReference:
    """Statistics of the real images of one class. Counts are multiples of `COUNT_STEP`."""

    images: int
    patients: int | None
    """Number of known patients (or lesions); None if no image names one."""
    artefacts: Mapping[str, int]
    """Number of images that show each artefact."""
    skin_tones: Mapping[str, int]
    """Number of images in each class of skin tone."""
    skin_tone_median: float
    """Median of the individual typology angle, degrees."""
    cells: tuple[int, ...] = ()
    """Number of images in each cell of the features; empty without features."""
    typical_distance: float | None = None
    """95th percentile of the Mahalanobis distances of these images."""
    baseline: tuple[BaselineSample, ...] = ()
    """Samples of held-out images, by size; empty if there were none."""


@dataclass(frozen=True)
class ReferenceDescription:
    """Statistics of real images without those of their features. `files` and `digest` are empty until it is written."""

    resolution: int
    """Side, px, to which the images were resized: that of the generator."""
    classes: Mapping[str, ClassReference]
    suppressed: tuple[str, ...]
    """Classes with images of fewer than `MINIMUM_GROUP` patients, of which there are no statistics."""
    thresholds: Mapping[str, float]
    """Score from which on an artefact counts as present."""
    space: FeatureSpace | None = None
    """None without statistics of features."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    digest: str = ""
    """SHA-256 (hex) of reference.json. It identifies the whole reference."""


@dataclass(frozen=True)
class ClassFeatures:
    """Statistics of the features of one class."""

    mean: Vectors
    covariance: Vectors
    """[dim, dim]."""
    cells: Vectors
    """Centres [cells, dim]: means of the features in each cell."""


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _Space(_Part):
    index: str = Field(pattern=r"^[0-9a-f]{64}$")
    dim: int = Field(ge=1, le=1024)


class _Baseline(_Part):
    images: int = Field(ge=2)
    fd: float
    coverage: float = Field(ge=0, le=1)
    typical: float | None = Field(None, ge=0, le=1)


class _Class(_Part):
    images: int = Field(ge=MINIMUM_GROUP)
    patients: int | None = Field(ge=0)
    artefacts: dict[str, int]
    skin_tones: dict[str, int]
    skin_tone_median: float = Field(ge=-90, le=90)
    cells: list[int] = Field(max_length=MAX_CELLS)
    typical_distance: float | None = Field(gt=0)
    baseline: list[_Baseline]


class _ReferenceDescriptor(DescriptorModel):
    """The fields of reference.json."""

    resolution: int = Field(ge=8, le=4096)
    classes: dict[str, _Class]
    suppressed: list[str]
    thresholds: dict[str, float]
    space: _Space | None
    provenance: dict[str, Any]


def read_reference_files(location: str | Path) -> tuple[ReferenceDescription, dict[str, bytes]]:
    """Read and verify the folder of a reference.

    Returns:
        The description, and the content of all files by name with reference.json among them.

    Raises:
        BundleError: A file is missing, changed or not listed, or reference.json is malformed.
    """
    return read_part(location, "reference", DESCRIPTOR, parse)


def write_reference_folder(
    out: str | Path,
    description: ReferenceDescription,
    features: Mapping[str, ClassFeatures],
    *,
    replace: bool = False,
) -> ReferenceDescription:
    """Write the folder of a reference and open it. The folder appears completely or not at all.

    Args:
        out: Path of the folder.
        description: The statistics. Its `files` and `digest` are ignored.
        features: Statistics of the features by class; empty if `description.space` is None.
        replace: Whether an existing reference at `out` is replaced.

    Raises:
        BundleError: `out` exists and may not be replaced, or the folder cannot be written.
    """
    import safetensors.numpy

    files: dict[str, bytes] = {}
    if description.space is not None:
        upper = np.triu_indices(description.space.dim)
        tensors: dict[str, NDArray[Any]] = {}
        for label, name in enumerate(sorted(features)):
            tensors[f"{label}.mean"] = features[name].mean.astype(np.float32)
            tensors[f"{label}.covariance"] = features[name].covariance[upper].astype(np.float32)
            tensors[f"{label}.cells"] = features[name].cells.astype(np.float32)
        files[STATISTICS] = safetensors.numpy.save(tensors)
    write_part(out, "reference", DESCRIPTOR, REFERENCE_FORMAT, description, files, replace=replace)
    return read_reference_files(out)[0]


def parse(text: bytes, where: str) -> ReferenceDescription:
    """Parse reference.json.

    Args:
        text: The bytes of the file.
        where: Name of the file for errors.

    Raises:
        BundleError: The text is not a valid reference.json. The message names the field.
    """
    fields = parse_descriptor(text, where, REFERENCE_FORMAT, _ReferenceDescriptor)
    classes = {name: _class(name, document, where) for name, document in sorted(fields.classes.items())}
    if (fields.space is not None) != (STATISTICS in fields.records):
        raise BundleError(f"{where}: files and space do not agree on {STATISTICS}; make the reference again")
    for name, reference in classes.items():
        if (fields.space is not None) != bool(reference.cells):
            raise BundleError(f"{where}: classes.{name}.cells: must be there if and only if there is a space")
        if fields.space is not None and reference.typical_distance is None:
            raise BundleError(f"{where}: classes.{name}.typical_distance: must be a number, because there is a space")
    return ReferenceDescription(
        resolution=fields.resolution,
        classes=classes,
        suppressed=tuple(fields.suppressed),
        thresholds=fields.thresholds,
        space=None if fields.space is None else FeatureSpace(fields.space.index, fields.space.dim),
        provenance=fields.provenance,
        files=fields.records,
        digest=hashlib.sha256(text).hexdigest(),
    )


def _class(name: str, document: _Class, where: str) -> ClassReference:
    """Check the numbers of one class."""
    counts = {"artefacts": document.artefacts, "skin_tones": document.skin_tones}
    for field_name, by_name in counts.items():
        if any(not 0 <= count <= document.images + COUNT_STEP for count in by_name.values()):
            raise BundleError(f"{where}: classes.{name}.{field_name}: must be from 0 to the number of images")
    if any(count < MINIMUM_GROUP for count in document.cells):
        raise BundleError(f"{where}: classes.{name}.cells: must be at least {MINIMUM_GROUP} each")
    return ClassReference(
        images=document.images,
        patients=document.patients,
        artefacts=document.artefacts,
        skin_tones=document.skin_tones,
        skin_tone_median=document.skin_tone_median,
        cells=tuple(document.cells),
        typical_distance=document.typical_distance,
        baseline=tuple(BaselineSample(**each.model_dump()) for each in document.baseline),
    )


def read_features(location: str | Path, description: ReferenceDescription) -> dict[str, ClassFeatures]:
    """Read the statistics of the features by class from the folder at `location`. Empty if there are none.

    Raises:
        BundleError: The file is missing, was changed, or does not fit the description.
    """
    if description.space is None:
        return {}
    folder = open_folder(location, "reference", DESCRIPTOR)
    where = f"{folder.where}/{STATISTICS}"
    tensors = read_vectors(folder.read(STATISTICS, description.files[STATISTICS], limit=_MAX_STATISTICS_BYTES), where)
    dim = description.space.dim
    upper = np.triu_indices(dim)
    features: dict[str, ClassFeatures] = {}
    for label, (name, reference) in enumerate(sorted(description.classes.items())):
        shapes = {"mean": (dim,), "covariance": (len(upper[0]),), "cells": (len(reference.cells), dim)}
        values: dict[str, Vectors] = {}
        for key, shape in shapes.items():
            value = tensors.get(f"{label}.{key}")
            if value is None or value.shape != shape or not np.isfinite(value).all():
                raise BundleError(f"{where}: {label}.{key}: must be finite numbers of shape {shape}")
            values[key] = value.astype(np.float32)
        covariance = np.zeros((dim, dim), np.float32)
        covariance[upper] = values["covariance"]
        covariance.T[upper] = values["covariance"]
        if not np.trace(covariance) > 0:
            raise BundleError(f"{where}: {label}.covariance: the variances must not all be 0")
        features[name] = ClassFeatures(values["mean"], covariance, values["cells"])
    return features


REFERENCE_PART = PartFormat("reference", DESCRIPTOR, parse, read_reference_files)
