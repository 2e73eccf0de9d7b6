"""Which sample is of which class and lies in which shard: a pure function of the request and the model's classes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from dermis.bundle.classifier import ClassifierDescription
from dermis.bundle.index import IndexDescription
from dermis.dataset.request import DatasetRequest, classes_of

if TYPE_CHECKING:
    from dermis.bundle import Bundle

BATCH = 32
_STRIDE = 1 << 34  # MAX_TRIES of them fill the indices that latents may have


@dataclass(frozen=True)
class Plan:
    """Samples 0 .. samples - 1, cut into shards of `request.shard_size` (the last may be smaller).

    `request.classes` stands in the order of `class_names`, so that the order in which a user named them makes no
    difference. A label is a position in `class_names`, which holds all classes of the model.
    """

    request: DatasetRequest
    bundle_digest: str
    class_names: tuple[str, ...]
    classifier: ClassifierDescription | None = None
    """The bundle's. It is in the bundle's digest, so it is not in that of the plan."""
    authenticity: IndexDescription | None = None
    """The bundle's, likewise."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 that tells this plan from every other."""
        facts = [self.request.model_dump(), self.bundle_digest, self.class_names]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def samples(self) -> int:
        return self.request.samples

    @property
    def scored(self) -> bool:
        """Whether every image gets a probability by the classifier."""
        options = self.request.classifier
        return self.classifier is not None and (options is None or options.score)

    @property
    def filtered(self) -> bool:
        """Whether images may be rejected for their probability."""
        return self.scored and self.request.classifier is not None and self.request.classifier.filters

    @property
    def gated(self) -> bool:
        """Whether every image is compared with the training images."""
        return self.authenticity is not None and self.request.privacy is not None

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


def plan_for(request: DatasetRequest, bundle: Bundle) -> Plan:
    """The plan of a request that `check_against` has accepted for this bundle."""
    return plan(request, bundle.digest, classes_of(bundle), bundle.classifier, bundle.authenticity)


def plan(
    request: DatasetRequest,
    bundle_digest: str,
    class_names: Sequence[str],
    classifier: ClassifierDescription | None = None,
    authenticity: IndexDescription | None = None,
) -> Plan:
    """The plan of a request from what it depends on. `class_names`: the model's, in label order."""
    names = tuple(class_names)
    ordered = {name: request.classes[name] for name in sorted(request.classes, key=names.index)}
    return Plan(request.model_copy(update={"classes": ordered}), bundle_digest, names, classifier, authenticity)


def latent_index(index: int, attempt: int) -> int:
    """Index of the latent that sample `index` has in its attempt 0, 1, ...: no two samples ever share one."""
    return index + attempt * _STRIDE


def sample_id(index: int) -> str:
    """The name of sample `index`, in the manner of ISIC."""
    return f"SYN_{index:08d}"


def _coprime_stride(number: int) -> int:
    stride = max(1, round(number * (math.sqrt(5) - 1) / 2))
    while math.gcd(stride, number) != 1:
        stride += 1
    return stride
