"""Concept sets for TCAV: images that show an artefact, and others of the same sources and classes that do not.

Without that match a set of framed images would mostly be a set of old melanomas, and its direction one of these.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.data.artefacts import NAMES, Artefacts
from training.data.sources import Record

FEWEST = 20


@dataclass(frozen=True)
class ConceptRecords:
    """Records that show the artefact `name`, and counter-sets, each with as many of every source and class."""

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
    """Sets of `size` images or, of a rare artefact, as many as there are; and why other artefacts are left out.

    A counter-set is drawn without replacement from images in which the detector finds nothing of the artefact. Images whose
    source and class have too few of these are left out.
    """
    found, left_out = [], []
    for name in names:
        rng = np.random.default_rng([seed, NAMES.index(name)])
        having: dict[tuple[str, str], list[Record]] = defaultdict(list)
        lacking: dict[tuple[str, str], list[Record]] = defaultdict(list)
        for record, scores in zip(records, artefacts, strict=True):
            group = record.row.get("source", ""), record.class_name
            (having if name in scores.found else lacking)[group].append(record)
        shown = [(group, i) for group in sorted(having) for i in range(min(len(having[group]), len(lacking[group])))]
        if len(shown) < FEWEST:
            left_out.append(
                f"{name}: {len(shown)} images show it that have others to compare with; {FEWEST} are needed"
            )
            continue
        chosen = [shown[i] for i in sorted(rng.permutation(len(shown))[:size])]
        number: dict[tuple[str, str], int] = defaultdict(int)
        for group, _ in chosen:
            number[group] += 1
        sets = []
        for _ in range(counters):
            drawn = [
                lacking[group][i]
                for group, count in sorted(number.items())
                for i in rng.permutation(len(lacking[group]))[:count]
            ]
            sets.append(tuple(drawn))
        found.append(ConceptRecords(name, tuple(having[group][i] for group, i in chosen), tuple(sets)))
    return found, left_out
