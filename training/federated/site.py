"""What a hospital decides for itself: where its images lie, where it keeps its state, on what it computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dermis.devices import resolve_device
from dermis.errors import DataError, TrainingError
from training.classifier.data import RealData, load_real
from training.data.images import ImageDataset, load_images
from training.data.sources import Source, read_source
from training.data.splits import split_by_patient

_KEYS = {
    "data", "metadata", "class-column", "state", "cache", "validation", "seed-offset", "device", "threads",
    "require-secure-aggregation",
}  # fmt: skip


@dataclass(frozen=True)
class Site:
    """One hospital. Nothing of this is ever sent."""

    data: Path
    state: Path
    metadata: Path | None = None
    class_column: str | None = None
    cache: Path | None = None
    validation: float = 0.2  # share of the images, by patient, that is measured with and not trained on; 0: none
    seed_offset: int | None = None  # added to the federation's seed; None: follows from the data
    device: str = "auto"
    threads: int = 0  # of torch on a CPU; 0: as many as it takes
    require_secure_aggregation: bool = False

    def to_node_config(self) -> dict[str, bool | int | float | str]:
        """As Flower's node_config has it."""
        given = {name.replace("_", "-"): value for name, value in vars(self).items() if value is not None}
        return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}


def parse_node_config(given: Mapping[str, Any]) -> Site:
    """From Flower's node_config. TrainingError if the data are not named, or a key is unknown."""
    unknown = sorted(given.keys() - _KEYS - {"partition-id", "num-partitions"})
    if unknown:
        raise TrainingError(f"node-config: {unknown[0]}: unknown key; known are {', '.join(sorted(_KEYS))}")
    if not given.get("data") or not given.get("state"):
        raise TrainingError("node-config: data and state must name folders of this hospital")
    values = {name.replace("-", "_"): value for name, value in given.items() if name in _KEYS and value != ""}
    for name in ("data", "state", "metadata", "cache"):
        if name in values:
            values[name] = Path(str(values[name]))
    site = Site(**values)
    if not 0 <= site.validation < 1:
        raise TrainingError(f"node-config: validation: {site.validation} is not a share from 0 to below 1")
    return site


def use_device(site: Site) -> torch.device:
    """The site's device, with the threads that it allows."""
    if site.threads:
        torch.set_num_threads(site.threads)
    return resolve_device(site.device)


@dataclass(frozen=True)
class SiteImages:
    """A hospital's images, of the federation's classes, divided by patient. `validation` is None if it keeps none."""

    train: ImageDataset
    validation: ImageDataset | None


def site_seed(site: Site, seed: int, data: str) -> int:
    """The seed of this hospital's training: two with the same would draw the same latents all along.

    `data` is the SHA-256 of its training images, from which the offset follows unless the site names one.
    """
    offset = int(data[:6], 16) if site.seed_offset is None else site.seed_offset
    return (seed + offset) % 2**31


@lru_cache(maxsize=16)
def site_images(site: Site, class_names: tuple[str, ...], binary: bool, resolution: int) -> SiteImages:
    """Read, divide and decode. The division follows from the data alone. DataError as of `load_images`."""
    source = _source(site, class_names, binary)
    if not site.validation:
        return SiteImages(_labelled(source, class_names, resolution, site.cache), None)
    parts = split_by_patient(source.records, {"train": 1 - site.validation, "validation": site.validation}).parts
    of = {name: [r.id for r, part in zip(source.records, parts, strict=True) if part == name] for name in set(parts)}
    train, validation = (
        _labelled(source.select(of[name]), class_names, resolution, site.cache) for name in ("train", "validation")
    )
    return SiteImages(train, validation)


@lru_cache(maxsize=16)
def site_classifier_data(site: Site, size: int) -> RealData:
    """Training, validation and test images of a classifier, by patient."""
    return load_real(
        site.data,
        size,
        metadata=site.metadata,
        class_column=site.class_column,
        cache=site.cache,
        progress=False,
    )


def _source(site: Site, class_names: tuple[str, ...], binary: bool) -> Source:
    source = read_source(site.data, metadata=site.metadata, class_column=site.class_column, binary=binary)
    foreign = sorted(set(source.class_names) - set(class_names))
    if foreign:
        raise DataError(
            f"{site.data}: has images of the class {foreign[0]}; this federation's classes are {', '.join(class_names)}"
        )
    return source


def _labelled(source: Source, class_names: tuple[str, ...], resolution: int, cache: Path | None) -> ImageDataset:
    """Labels are the federation's: a hospital that lacks a class must not number the others otherwise."""
    dataset = load_images(source, resolution, cache=cache, progress=False)
    of = np.array([class_names.index(name) for name in dataset.class_names], dtype=np.int64)
    return replace(dataset, labels=of[dataset.labels], class_names=class_names)
