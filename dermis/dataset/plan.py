"""The plan of a dataset: class and shard of every sample, as a pure function of the request and the model's classes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from dermis.bundle.classifier import ClassifierDescription
from dermis.bundle.index import IndexDescription
from dermis.dataset.request import DatasetRequest, classes_of
from dermis.image_metadata import ImageOrigin, origin_of

if TYPE_CHECKING:
    from dermis.bundle import Bundle

BATCH = 32
FORMAT_VERSION = 2
"""Format of the datasets that are made. In format 1 images have no metadata of their origin; it is still read, continued and
repeated."""
_STRIDE = 1 << 34  # MAX_TRIES of them cover all indices of latents


@dataclass(frozen=True)
class DatasetPlan:
    """Samples 0 .. samples - 1, cut into shards of `request.shard_size` (the last can be smaller).

    `request.classes` is in the order of `class_names`, so that the order of a user's request makes no difference. A label
    is a position in `class_names`, which has all classes of the model.
    """

    request: DatasetRequest
    bundle_digest: str
    class_names: tuple[str, ...]
    classifier: ClassifierDescription | None = None
    """The classifier of the bundle. The bundle's digest covers it, so the digest of the plan does not repeat it."""
    authenticity: IndexDescription | None = None
    """The index of the bundle, which the bundle's digest covers as well."""
    has_copy_detector: bool = False
    """Whether the bundle has a copy detector, which its digest covers as well."""
    generator: ImageOrigin | None = None
    """What all images of the bundle have in common in their metadata; the bundle's digest covers it."""
    format_version: int = FORMAT_VERSION
    """Format of the dataset. The digest of the plan does not depend on it; the records of shards and the manifest have it."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 that identifies the plan."""
        fields = [self.request.model_dump(), self.bundle_digest, self.class_names]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    @property
    def samples(self) -> int:
        return self.request.samples

    @property
    def scored(self) -> bool:
        """Whether the classifier scores every image."""
        options = self.request.classifier
        return self.classifier is not None and (options is None or options.score)

    @property
    def filtered(self) -> bool:
        """Whether images can be rejected because of their probability."""
        return self.scored and self.request.classifier is not None and self.request.classifier.filters

    @property
    def gated(self) -> bool:
        """Whether every image is compared with the training images."""
        return self.authenticity is not None and self.request.privacy is not None

    @property
    def detects_copies(self) -> bool:
        """Whether images that the copy detector takes for copies fail the gate."""
        return (
            self.gated and self.has_copy_detector and bool(self.request.privacy and self.request.privacy.detect_copies)
        )

    def origin(self, index: int | None = None) -> ImageOrigin | None:
        """What the metadata of an image says of its origin; None in format 1, whose images have none.

        Args:
            index: Index of the latent of the image; None for a sheet of several.
        """
        if self.format_version < 2:
            return None
        generator = self.generator or ImageOrigin(self.request.model, self.bundle_digest)
        return generator.of_sample(self.request.seed, index, self.request.moves)

    @property
    def shards(self) -> int:
        return -(-self.samples // self.request.shard_size)

    def shard(self, shard: int) -> range:
        """Return the indices of the samples in a shard.

        Raises:
            IndexError: There is no such shard.
        """
        if not 0 <= shard < self.shards:
            raise IndexError(f"shard {shard} of {self.shards}")
        start = shard * self.request.shard_size
        return range(start, min(start + self.request.shard_size, self.samples))

    def batches(self, shard: int, size: int = BATCH) -> list[range]:
        """Split the indices of a shard into batches of `size`; the last one can be smaller."""
        indices = self.shard(shard)
        return [indices[start : start + size] for start in range(0, len(indices), size)]

    def counts(self, shard: int) -> list[int]:
        """Count the samples of each requested class in a shard, in the order of `request.classes`.

        Each count differs by less than 1 from the class's share of the dataset, and the counts of all shards add up to
        the request. The first i classes together get floor(shard_size * end_i / samples + offset / full) samples of a full
        shard, where end_i is their number of samples in the dataset. The offsets of the full shards are 0 ... full - 1, once
        each, so by Hermite's identity the counts of all full shards add up to floor(full * shard_size * end_i / samples).
        The last shard gets the rest.
        """
        size, full = self.request.shard_size, self.samples // self.request.shard_size
        totals = list(self.request.classes.values())
        ends = [sum(totals[: i + 1]) for i in range(len(totals))]
        if shard < full:
            # A stride near the golden ratio times the number of shards distributes the offsets evenly, so that consecutive
            # shards are balanced too.
            offset = shard * _coprime_stride(full) % full
            ends = [(size * end * full + offset * self.samples) // (self.samples * full) for end in ends]
        else:
            ends = [end - size * end * full // self.samples for end in ends]
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def labels(self, shard: int) -> list[int]:
        """Return the label of each sample of a shard. Classes are evenly interleaved."""
        counts = self.counts(shard)
        places = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
        labels = np.repeat([self.class_names.index(name) for name in self.request.classes], counts)
        return [int(label) for label in labels[np.argsort(places, kind="stable")]]


def plan_for(request: DatasetRequest, bundle: Bundle, format_version: int = FORMAT_VERSION) -> DatasetPlan:
    """Plan a request that `check_against` has accepted for this bundle.

    Args:
        request: The request.
        bundle: The bundle that generates the images.
        format_version: Format of the dataset; an earlier one to continue or repeat a dataset of it.
    """
    planned = plan(
        request,
        bundle.digest,
        classes_of(bundle),
        bundle.classifier,
        bundle.authenticity,
        has_copy_detector=bundle.copies is not None,
    )
    return replace(planned, generator=origin_of(bundle), format_version=format_version)


def plan(
    request: DatasetRequest,
    bundle_digest: str,
    class_names: Sequence[str],
    classifier: ClassifierDescription | None = None,
    authenticity: IndexDescription | None = None,
    has_copy_detector: bool = False,
) -> DatasetPlan:
    """Plan a request from the properties of a bundle.

    Args:
        request: The request.
        bundle_digest: SHA-256 (hex) of bundle.json.
        class_names: Class names of the model, in the order of the labels.
        classifier: The classifier of the bundle, if images are scored or filtered.
        authenticity: The index of the bundle, if the request has a gate.
        has_copy_detector: Whether the bundle has a copy detector.
    """
    names = tuple(class_names)
    ordered = {name: request.classes[name] for name in sorted(request.classes, key=names.index)}
    ordered_request = request.model_copy(update={"classes": ordered})
    return DatasetPlan(ordered_request, bundle_digest, names, classifier, authenticity, has_copy_detector)


def request_in_words(plan: DatasetPlan) -> str:
    """Describe a request in one or a few sentences."""
    request = plan.request
    classes = ", ".join(f"{count:,} of {name}" for name, count in request.classes.items())
    words = [
        f"{plan.samples:,} images: {classes}, from seed {request.seed}, with truncation {request.truncation_psi:g} and "
        f"{ {'random': 'random', 'const': 'constant', 'none': 'no'}[request.noise_mode] } noise."
    ]
    if request.edits:
        edits = ", ".join(f"{edit.direction} by {edit.strength:g}" for edit in request.edits)
        words.append(f"Every latent was moved along {edits}.")
    options = request.classifier
    if options is not None and options.filters:
        rules = ["whose class the classifier confirms"] if options.keep == "agreeing" else []
        if options.min_probability > 0 or options.max_probability < 1:
            rules.append(f"with a probability from {options.min_probability:g} to {options.max_probability:g}")
        words.append(f"Only images {' and '.join(rules)} were to be kept, from up to {options.tries} latents each.")
    if request.privacy is None:
        words.append("No gate against copies of training images.")
    else:
        gate = (
            "authentic"
            if request.privacy.gate == "authentic"
            else f"distance percentile {request.privacy.percentile:g}"
        )
        if plan.detects_copies:
            gate += ", and no changed copy according to the copy detector"
        outcome = {"resample": "replaced", "drop": "left out", "flag": "flagged"}[request.privacy.on_reject]
        words.append(f"A gate against copies of training images ({gate}); images that it rejects were to be {outcome}.")
    return " ".join(words)


def latent_index(index: int, attempt: int) -> int:
    """Return the index of the latent of sample `index` in attempt 0, 1, ... No two samples share a latent."""
    return index + attempt * _STRIDE


def sample_id(index: int) -> str:
    """Return the name of sample `index`, in the style of ISIC."""
    return f"SYN_{index:08d}"


def _coprime_stride(number: int) -> int:
    stride = max(1, round(number * (math.sqrt(5) - 1) / 2))
    while math.gcd(stride, number) != 1:
        stride += 1
    return stride
