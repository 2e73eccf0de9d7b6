"""Whose images are protected together: those of one patient, as far as the table names patients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.data.images import ImageDataset
from training.data.splits import group_of

KINDS = ("patient", "lesion", "image")


@dataclass(frozen=True)
class PrivacyUnits:
    """Groups of images, each of which is protected as a whole.

    Attributes:
        names: A name of every unit, which does not depend on the other units.
        images: Indices of the images of every unit.
        kinds: Number of units of each of `KINDS`.
    """

    names: tuple[str, ...]
    images: tuple[NDArray[np.int64], ...]
    kinds: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def unit(self) -> str:
        """In a word or two: "patient", or "patient or lesion or image" if not all images have a patient."""
        return " or ".join(kind for kind in KINDS if self.kinds[kind])

    @property
    def default_delta(self) -> float:
        """A tenth of one divided by the number of units."""
        return 1 / (10 * len(self))


def units_of(dataset: ImageDataset) -> PrivacyUnits:
    """The images of a patient are one unit. An image without a patient belongs to its lesion, otherwise it is alone.

    Units are in the order of their names.
    """
    records = dataset.records
    groups = group_of(records) if records else [f"image {name}" for name in dataset.ids]
    kinds: dict[str, str] = {}
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
        kind = "image"
        if records:
            kind = "patient" if records[i].patient_id else "lesion" if records[i].lesion_id else "image"
        kinds[group] = min(kinds.get(group, kind), kind, key=KINDS.index)
    names = tuple(sorted(members))
    counts = Counter(kinds.values())
    return PrivacyUnits(
        names,
        tuple(np.array(members[name], dtype=np.int64) for name in names),
        {kind: counts[kind] for kind in KINDS},
    )
