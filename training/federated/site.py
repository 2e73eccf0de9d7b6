"""A site: the folder of images, the folder of state, and the device of one client of a federation."""

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
from training.classifier.data import SHARES, RealData, load_real
from training.data.images import ImageDataset, load_images
from training.data.sources import Source, read_source
from training.data.splits import split_by_patient
from training.options import check_options

CLASSIFIER_PARTS = "for which images are divided into " + ", ".join(f"{v:.0%} {name}" for name, v in SHARES.items())
_FLOWER_KEYS = ("partition-id", "num-partitions")  # which Flower adds in simulations


@dataclass(frozen=True)
class Site:
    """The options of one client. None of them is sent to the server.

    Attributes:
        validation: Share of the images, by patient, that only measures; 0 for none.
        seed_offset: Added to the federation's seed; None derives it from the data.
        threads: Threads of torch on a CPU; 0 for its default.
        require_secure_aggregation: Refuse to send an update that the server could read.
    """

    data: Path
    state: Path
    metadata: Path | None = None
    class_column: str | None = None
    cache: Path | None = None
    validation: float = 0.2
    seed_offset: int | None = None
    device: str = "auto"
    threads: int = 0
    require_secure_aggregation: bool = False

    def to_node_config(self) -> dict[str, bool | int | float | str]:
        """Return the options as a node configuration of Flower: names with dashes, paths as texts."""
        options = {name.replace("_", "-"): value for name, value in vars(self).items() if value is not None}
        return {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}


def parse_node_config(table: Mapping[str, Any]) -> Site:
    """Read a site from Flower's node configuration.

    Args:
        table: Values by name with dashes; empty texts are ignored.

    Raises:
        TrainingError: A key is unknown, a value has another type, or the folders are not named.
    """
    values = {key: value for key, value in table.items() if key not in _FLOWER_KEYS and value != ""}
    options = check_options(values, Site, "node-config: ", noun="key", dashes=True)
    if not table.get("data") or not table.get("state"):
        raise TrainingError("node-config: data and state must name folders of this site")
    site = Site(**options)
    if not 0 <= site.validation < 1:
        raise TrainingError(f"node-config: validation: {site.validation} is not a share from 0 to below 1")
    return site


def use_device(site: Site) -> torch.device:
    """Return the site's device, and set the number of threads."""
    if site.threads:
        torch.set_num_threads(site.threads)
    return resolve_device(site.device)


@dataclass(frozen=True)
class SiteImages:
    """The images of a site with the federation's classes, divided by patient.

    Attributes:
        validation: None if all images are trained on.
    """

    train: ImageDataset
    validation: ImageDataset | None


def site_seed(site: Site, seed: int, data: str) -> int:
    """Return the seed of a site's training. Two sites with the same seed would draw the same latents.

    Args:
        site: Its `seed_offset` is added to the seed.
        seed: The federation's seed.
        data: SHA-256 of the training images in hex, from which the offset follows if the site has none.
    """
    offset = int(data[:6], 16) if site.seed_offset is None else site.seed_offset
    return (seed + offset) % 2**31


@lru_cache(maxsize=16)
def site_images(site: Site, class_names: tuple[str, ...], binary: bool, resolution: int) -> SiteImages:
    """Read, divide and decode the images of a site. The division depends on the images only.

    Args:
        site: The site.
        class_names: Classes of the federation.
        binary: Map diagnoses to benign and malignant.
        resolution: Side in pixels.

    Raises:
        DataError: The images cannot be read, or have other classes.
    """
    source = _source(site, class_names, binary)
    if not site.validation:
        return SiteImages(_labelled(source, class_names, resolution, site.cache), None)
    parts = split_by_patient(source.records, {"train": 1 - site.validation, "validation": site.validation}).parts
    ids = {name: [r.id for r, part in zip(source.records, parts, strict=True) if part == name] for name in set(parts)}
    train, validation = (
        _labelled(source.select(ids[name]), class_names, resolution, site.cache) for name in ("train", "validation")
    )
    return SiteImages(train, validation)


@lru_cache(maxsize=16)
def site_classifier_data(site: Site, size: int) -> RealData:
    """Return a site's training, validation and test images for a classifier, divided by patient.

    Raises:
        TrainingError: The site has another share for `validation` than the default, which a classifier does not use.
        DataError: The images cannot be used.
    """
    if site.validation != Site.validation:
        raise TrainingError(
            f"validation: {site.validation:g}: has no effect on a classifier, {CLASSIFIER_PARTS}; omit it"
        )
    return load_real(
        site.data,
        size,
        metadata=site.metadata,
        class_column=site.class_column,
        cache=site.cache,
        keep_digests=True,  # each message is handled by a new process
        progress=False,
    )


def _source(site: Site, class_names: tuple[str, ...], binary: bool) -> Source:
    source = read_source(site.data, metadata=site.metadata, class_column=site.class_column, binary=binary)
    other_classes = sorted(set(source.class_names) - set(class_names))
    if other_classes:
        raise DataError(
            f"{site.data}: has images of the class {other_classes[0]}; this federation's classes are {', '.join(class_names)}"
        )
    return source


def _labelled(source: Source, class_names: tuple[str, ...], resolution: int, cache: Path | None) -> ImageDataset:
    """Load images with the federation's labels: a site that lacks a class must not number the other classes differently."""
    dataset = load_images(source, resolution, cache=cache, keep_digests=True, progress=False)
    labels = np.array([class_names.index(name) for name in dataset.class_names], dtype=np.int64)
    return replace(dataset, labels=labels[dataset.labels], class_names=class_names)
