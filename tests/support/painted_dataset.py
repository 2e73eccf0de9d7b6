"""Datasets of painted images, whose pixels encode their index and label."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dermis.bundle import Bundle
from dermis.dataset.manifest import Manifest, finalize
from dermis.dataset.plan import DatasetPlan, plan
from dermis.dataset.request import DatasetRequest, classes_of
from dermis.dataset.shards import write_shard
from dermis.dataset.store import Store

IDENTITY = {"device": "test"}


def paint(indices: Sequence[int], labels: Sequence[int]) -> Any:
    """An image that encodes its index and label: (index, label, 7) in every pixel, 8 px."""
    images = np.zeros((len(indices), 8, 8, 3), np.uint8)
    images[..., 0] = np.array(indices)[:, None, None] % 256
    images[..., 1] = np.array(labels)[:, None, None]
    images[..., 2] = 7
    return images


def planned(bundle: Bundle, **changes: Any) -> DatasetPlan:
    request = DatasetRequest.model_validate({"classes": {"malignant": 11, "benign": 9}, "shard_size": 6, **changes})
    return plan(request, bundle.digest, classes_of(bundle))


def make(
    folder: Path | str, bundle: Bundle, *, order: Sequence[int] | None = None, batch: int = 32, **changes: Any
) -> Manifest:
    p, store = planned(bundle, **changes), Store(folder)
    for shard in range(p.shards) if order is None else order:
        write_shard(p, shard, paint, store, identity=IDENTITY, batch_size=batch)
    return finalize(p, store, bundle, IDENTITY)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
