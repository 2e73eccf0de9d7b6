"""Which sample is of which class and lies in which shard: a pure function of the request and the model's classes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dermis.dataset.request import DatasetRequest

BATCH = 32


@dataclass(frozen=True)
class Plan:
    """Samples 0 .. samples - 1, cut into shards of `request.shard_size` (the last may be smaller).

    `request.classes` stands in the order of `class_names`, so that the order in which a user named them makes no
    difference. A label is a position in `class_names`, which holds all classes of the model.
    """

    request: DatasetRequest
    bundle_digest: str
    class_names: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        """SHA-256 that tells this plan from every other."""
        facts = [self.request.model_dump(), self.bundle_digest, self.class_names]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def samples(self) -> int:
        return self.request.samples

    @property
    def shards(self) -> int:
        return -(-self.samples // self.request.shard_size)

    def shard(self, shard: int) -> range:
        """Indices of the samples in a shard."""
        if not 0 <= shard < self.shards:
            raise IndexError(f"shard {shard} of {self.shards}")
        start = shard * self.request.shard_size
        return range(start, min(start + self.request.shard_size, self.samples))

    def batches(self, shard: int, size: int = BATCH) -> list[range]:
        """A shard's indices in pieces of `size`; the last may be smaller."""
        indices = self.shard(shard)
        return [indices[start : start + size] for start in range(0, len(indices), size)]

    def counts(self, shard: int) -> list[int]:
        """Samples of each requested class in a shard, in the order of `request.classes`.

        Each differs by less than 1 from the class's share of the dataset, and over all shards they add up to the
        request. With the classes laid end to end on a line, a shard takes the integer points of a grid of step
        samples / shard_size; the grid's offset goes once through all multiples of 1 / (full shards), and the sum
        over these of floor(x + offset) is floor(x (full shards)): Hermite's identity.
        """
        size, full = self.request.shard_size, self.samples // self.request.shard_size
        totals = list(self.request.classes.values())
        ends = [sum(totals[: i + 1]) for i in range(len(totals))]
        if shard < full:
            # A stride near the golden section spreads the offsets, so that runs of shards are balanced too.
            offset = shard * _coprime_stride(full) % full
            ends = [(size * end * full + offset * self.samples) // (self.samples * full) for end in ends]
        else:
            ends = [end - size * end * full // self.samples for end in ends]
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def labels(self, shard: int) -> list[int]:
        """Label of each sample of a shard, the classes evenly interleaved."""
        counts = self.counts(shard)
        places = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
        labels = np.repeat([self.class_names.index(name) for name in self.request.classes], counts)
        return [int(label) for label in labels[np.argsort(places, kind="stable")]]


def plan(request: DatasetRequest, bundle_digest: str, class_names: Sequence[str]) -> Plan:
    """The plan of a request that `check_against` has accepted. `class_names`: the model's, in label order."""
    names = tuple(class_names)
    ordered = {name: request.classes[name] for name in sorted(request.classes, key=names.index)}
    return Plan(request.model_copy(update={"classes": ordered}), bundle_digest, names)


def sample_id(index: int) -> str:
    """The name of sample `index`, in the manner of ISIC."""
    return f"SYN_{index:08d}"


def _coprime_stride(number: int) -> int:
    stride = max(1, round(number * (math.sqrt(5) - 1) / 2))
    while math.gcd(stride, number) != 1:
        stride += 1
    return stride
