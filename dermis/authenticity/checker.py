"""Verdicts on images: a bundle's index together with the network that computes embeddings for it.

with Checker("bundles/demo") as checker:
    checker.check(images).authentic  # uint8 [H, W, 3] of any sizes
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from dermis.authenticity.copy_detector import CopyDetector
from dermis.authenticity.index import Index, Nearest, find_index, open_index
from dermis.authenticity.verdict import SAME_SHARE, Verdicts, verdicts_of
from dermis.bundle import has_part
from dermis.bundle.copies import COPIES_PART
from dermis.bundle.index import IndexDescription
from dermis.classifier.preprocess import batch as squares
from dermis.errors import BundleError
from dermis.imaging import Images

if TYPE_CHECKING:
    from dermis.bundle import Bundle
    from dermis.classifier.fast_features import FastFeatures

CLASSIFIER = "classifier"
_BATCH = 32


class Embedder:
    """Computes features of images in a feature space.

    Args:
        name: Name of the feature space. "classifier" is that of `classifier`.
        classifier: A bundle with a classifier, or the folder of a classifier or of a bundle.
        device: "auto", "cpu" or a CUDA device.
        threads: CPU cores to use; None for all that this process can use.

    Raises:
        BundleError: The feature space needs a classifier and there is none.
    """

    def __init__(
        self, name: str, classifier: Bundle | str | Path | None, *, device: str = "auto", threads: int | None = None
    ) -> None:
        self.name = name
        self._extract: Callable[[Images], NDArray[np.float32]]
        self._close: Callable[[], None] = lambda: None
        self.backend: str | None = None
        """The implementation that computes the features, if there are several. Verdicts can differ in the last bits."""
        self._open_fast: Callable[[], FastFeatures | None] = lambda: None
        if name == CLASSIFIER:
            from dermis.classifier.fast_features import fast_features
            from dermis.classifier.onnx_session import Classifier

            if classifier is None:
                raise BundleError("the feature space classifier needs a bundle with a classifier, or a classifier")
            session = Classifier(classifier, device=device, threads=threads)

            def extract(images: Images) -> NDArray[np.float32]:
                features = session.classify(images).features
                assert features is not None
                return features

            self._extract, self._close = extract, session.close
            self._open_fast = partial(fast_features, classifier, session, threads)
            self._size = session.description.input.size
            self.identity, self.dim = f"classifier/{session.description.digest}", session.description.feature_dim
        else:
            from dermis.devices import resolve_device
            from dermis.features import feature_extractor

            extractor = feature_extractor(name, resolve_device(device))
            self._extract, self.identity, self.dim = extractor.extract, extractor.identity, extractor.dim
            self.backend = extractor.backend

    def embed(self, images: Sequence[Images] | Images, resolution: int) -> NDArray[np.float32]:
        """Compute features.

        Args:
            images: uint8 images [H, W, 3] of any sizes, or one array [N, H, W, 3].
            resolution: Side in px of the square to which each image is cropped and resized first.

        Returns:
            float32 [N, dim].
        """
        rows = [
            self._extract(squares(images[start : start + _BATCH], resolution))
            for start in range(0, len(images), _BATCH)
        ]
        return np.concatenate(rows) if rows else np.empty((0, self.dim), np.float32)

    @cached_property
    def _fast(self) -> FastFeatures | None:
        return self._open_fast()  # compiled at the first use, as most programs need float32 only

    @property
    def is_fast(self) -> bool:
        """Whether `embed_fast` can be used."""
        return self._fast is not None

    def embed_fast(self, inputs: Images) -> NDArray[np.float32]:
        """Compute features float32 [N, dim] of images uint8 [N, R, R, 3] in bfloat16, in about half the time."""
        assert self._fast is not None
        parts = (inputs[start : start + _BATCH] for start in range(0, len(inputs), _BATCH))
        rows = [self._fast(squares(part, self._size)) for part in parts]
        return np.concatenate(rows) if rows else np.empty((0, self.dim), np.float32)

    def close(self) -> None:
        """Stop the threads of the network."""
        self._close()


class Checker:
    """Compares images with a training set. Safe to call from several threads.

    Args:
        source: A bundle, or the folder or fsspec URL of a bundle or of an index.
        classifier: The classifier that computes embeddings, for an index outside of a bundle in the space "classifier".
        device: "auto", "cpu" or a CUDA device.
        threads: CPU cores to use; None for all that this process can use.

    Raises:
        BundleError: There is no index, or it was built with other weights than those of the extractor.
    """

    def __init__(
        self,
        source: Bundle | str | Path,
        *,
        classifier: Bundle | str | Path | None = None,
        device: str = "auto",
        threads: int | None = None,
    ) -> None:
        where = find_index(source)
        self.index: Index = open_index(source, device=device, threads=threads)
        self.copies: CopyDetector | None = None
        """The copy detector of the bundle."""
        description = self.index.description
        if classifier is None and where.endswith("/authenticity"):
            classifier = where.removesuffix("/authenticity") if isinstance(source, str | Path) else source
        self._embedder = Embedder(description.extractor, classifier, device=device, threads=threads)
        if (self._embedder.identity, self._embedder.dim) != (description.extractor_identity, description.feature_dim):
            self.close()
            raise BundleError(
                f"{where}: was built with other weights of the extractor {description.extractor} than the present ones; "
                "build it again: dermis index build"
            )
        bundle = where.removesuffix("/authenticity")
        if isinstance(source, str | Path):
            has_copies = bundle != where and has_part(bundle, COPIES_PART)
        else:
            has_copies = source.copies is not None
        if has_copies:
            self.copies = CopyDetector(
                bundle if isinstance(source, str | Path) else source, device=device, threads=threads
            )

    @property
    def description(self) -> IndexDescription:
        """The description of the index."""
        return self.index.description

    @property
    def identity(self) -> Mapping[str, str]:
        """Index, extractor and libraries: verdicts depend on these, the images and the kind of machine."""
        from dermis.authenticity.index import import_faiss

        versions = {"authenticity": self.description.digest, "faiss": str(import_faiss().__version__)}
        if self._embedder.is_fast:
            versions["distant_images"] = "bfloat16"
        backend = self._embedder.backend
        if self.copies is not None:
            versions |= self.copies.identity
        return versions if backend is None else {**versions, "features": backend}

    def embed(self, images: Sequence[Images] | Images) -> NDArray[np.float32]:
        """Compute features float32 [N, feature_dim] of uint8 images [H, W, 3] of any sizes, or of an array [N, H, W, 3]."""
        return self._embedder.embed(images, self.description.resolution)

    def nearest(
        self, images: Sequence[Images] | Images, *, exact_below: float = math.inf, detect_copies: bool = True
    ) -> Nearest:
        """Find the nearest training image of each image, and score the images with the copy detector if there is one.

        The result of an image does not depend on the other images.

        Args:
            images: uint8 images [H, W, 3] of any sizes, or an array [N, H, W, 3].
            exact_below: Distance up to which results are exact. Images that are clearly more distant may be measured in
                bfloat16, in half the time: their distances and embeddings are then rounded.
            detect_copies: Whether the copy detector is used.
        """
        inputs = squares(images, self.description.resolution)
        nearest = self._nearest(inputs, exact_below)
        if self.copies is None or not detect_copies:
            return nearest
        return replace(nearest, copy_scores=self.copies.scores(inputs))

    def _nearest(self, inputs: Images, exact_below: float) -> Nearest:
        duplicates = self.description.duplicates
        if not math.isfinite(exact_below) or duplicates is None or not len(inputs) or not self._embedder.is_fast:
            return self.index.nearest(self.embed(inputs))
        rounded = self.index.nearest(self._embedder.embed_fast(inputs))
        near = np.flatnonzero(rounded.distances < exact_below + SAME_SHARE * duplicates.typical_distance)
        if not len(near):
            return rounded
        exact = self.index.nearest(self.embed(inputs[near]))
        for field in ("distances", "radii", "embeddings", "neighbours"):
            getattr(rounded, field)[near] = getattr(exact, field)
        return rounded

    def check(self, images: Sequence[Images] | Images) -> Verdicts:
        """Return verdicts on uint8 images [H, W, 3] of any sizes, or on an array [N, H, W, 3]."""
        return verdicts_of(self.nearest(images), self.description)

    def close(self) -> None:
        """Stop the threads of the network."""
        self._embedder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
