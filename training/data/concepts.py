"""Concept sets for TCAV: images that show an artefact, and others of the same sources and classes that do not.

Without matched sources and classes, a set of framed images would mostly consist of old melanomas, and its direction would be
that of old melanomas.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dermis.artefacts import NAMES, Artefacts
from training.data.attributes import value_of
from training.data.sources import Record

MIN_IMAGES = 20


@dataclass(frozen=True)
class ConceptRecords:
    """Records that show an artefact, and counter-sets with the same numbers of records of each source and class."""

    name: str
    shown: tuple[Record, ...]
    counters: tuple[tuple[Record, ...], ...]


def mine_concepts(
    records: Sequence[Record],
    artefacts: Sequence[Artefacts],
    *,
    names: Sequence[str] = NAMES,
    size: int = 40,
    counters: int = 12,
    seed: int = 0,
) -> tuple[list[ConceptRecords], list[str]]:
    """Choose the images of concept sets at random.

    A counter-set is drawn without replacement from images in which the detector does not find the artefact. Images whose source
    and class have too few of these are left out.

    Args:
        records: The images.
        artefacts: Scores of each image.
        names: The artefacts.
        size: Number of images of a set, or fewer for a rare artefact.
        counters: Number of counter-sets.
        seed: Seed of the random numbers.

    Returns:
        The sets, and a message with the reason for each artefact without a set.
    """
    concepts, left_out = [], []
    for name in names:
        rng = np.random.default_rng([seed, NAMES.index(name)])
        positives: dict[tuple[str, str], list[Record]] = defaultdict(list)
        negatives: dict[tuple[str, str], list[Record]] = defaultdict(list)
        for record, scores in zip(records, artefacts, strict=True):
            group = value_of(record.row, "source").casefold(), record.class_name
            (positives if name in scores.present else negatives)[group].append(record)
        shown = [
            (group, i) for group in sorted(positives) for i in range(min(len(positives[group]), len(negatives[group])))
        ]
        if len(shown) < MIN_IMAGES:
            left_out.append(
                f"{name}: {len(shown)} images show it and can be matched with images that do not; {MIN_IMAGES} are needed"
            )
            continue
        chosen = [shown[i] for i in sorted(rng.permutation(len(shown))[:size])]
        number: dict[tuple[str, str], int] = defaultdict(int)
        for group, _ in chosen:
            number[group] += 1
        sets = []
        for _ in range(counters):
            counter_set = [
                negatives[group][i]
                for group, count in sorted(number.items())
                for i in rng.permutation(len(negatives[group]))[:count]
            ]
            sets.append(tuple(counter_set))
        concepts.append(ConceptRecords(name, tuple(positives[group][i] for group, i in chosen), tuple(sets)))
    return concepts, left_out
