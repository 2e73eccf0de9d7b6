"""From pixels to verdicts: a bundle's index together with the network that makes embeddings for it.

with Checker("bundles/demo") as checker:
    checker.check(images).authentic  # uint8 [H, W, 3] of any sizes
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from dermis.authenticity.index import Index, Nearest, find_index, open_index
from dermis.authenticity.verdict import Verdicts, verdicts_of
from dermis.bundle.index import IndexDescription
from dermis.classifier.preprocess import batch as squares
from dermis.errors import BundleError
from dermis.imaging import Images

if TYPE_CHECKING:
    from dermis.bundle import Bundle

CLASSIFIER = "classifier"
_BATCH = 32


class Embedder:
    """Images to features by the name of a feature space; "classifier" is that of a bundle or of a classifier's folder."""

    def __init__(
        self, name: str, classifier: Bundle | str | Path | None, *, device: str = "auto", threads: int | None = None
    ) -> None:
        self.name = name
        self._extract: Callable[[Images], NDArray[np.float32]]
        self._close: Callable[[], None] = lambda: None
        self.backend: str | None = None
        """What computes the features, if there are several implementations: verdicts may differ in the last bits."""
        if name == CLASSIFIER:
            from dermis.classifier.onnx_session import Classifier

            if classifier is None:
                raise BundleError("the feature space classifier needs a bundle with a classifier, or a classifier")
            session = Classifier(classifier, device=device, threads=threads)

            def extract(images: Images) -> NDArray[np.float32]:
                features = session.classify(images).features
                assert features is not None
                return features

            self._extract, self._close = extract, session.close
            self.identity, self.dim = f"classifier/{session.description.digest}", session.description.feature_dim
        else:
            from dermis.devices import resolve_device
            from dermis.features import feature_extractor

            extractor = feature_extractor(name, resolve_device(device))
            self._extract, self.identity, self.dim = extractor.extract, extractor.identity, extractor.dim
            self.backend = extractor.backend

    def embed(self, images: Sequence[Images] | Images, resolution: int) -> NDArray[np.float32]:
        """float32 [N, dim] of uint8 images [H, W, 3] of any sizes, each brought to a square of `resolution` px first."""
        rows = [
            self._extract(squares(images[start : start + _BATCH], resolution))
            for start in range(0, len(images), _BATCH)
        ]
        return np.concatenate(rows) if rows else np.empty((0, self.dim), np.float32)

    def close(self) -> None:
        """Stop its threads, where it has some."""
        self._close()


class Checker:
    """Checks images against the training set of a bundle, or of an index that stands alone.

    classifier: what makes the embeddings of an index that stands alone, if it is of the space "classifier". device and
    threads as for `Index` and `Classifier`. Safe to call from several threads. Raises BundleError if there is no index, or if
    it was built with other weights than are there.
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
        described = self.index.description
        if classifier is None and where.endswith("/authenticity"):
            classifier = where.removesuffix("/authenticity") if isinstance(source, str | Path) else source
        self._embedder = Embedder(described.extractor, classifier, device=device, threads=threads)
        if (self._embedder.identity, self._embedder.dim) != (described.extractor_identity, described.feature_dim):
            self.close()
            raise BundleError(
                f"{where}: was built with another {described.extractor} than is here; build it again: dermis index build"
            )

    @property
    def description(self) -> IndexDescription:
        return self.index.description

    @property
    def identity(self) -> Mapping[str, str]:
        """What decides verdicts, beside the images and the kind of machine."""
        from dermis.authenticity.index import import_faiss

        versions = {"authenticity": self.description.digest, "faiss": str(import_faiss().__version__)}
        backend = self._embedder.backend
        return versions if backend is None else {**versions, "features": backend}

    def embed(self, images: Sequence[Images] | Images) -> NDArray[np.float32]:
        """float32 [N, feature_dim] of uint8 images [H, W, 3] of any sizes, or of one array [N, H, W, 3]."""
        return self._embedder.embed(images, self.description.resolution)

    def nearest(self, images: Sequence[Images] | Images) -> Nearest:
        """The nearest training image of each; an image's result does not depend on the images beside it."""
        return self.index.nearest(self.embed(images))

    def check(self, images: Sequence[Images] | Images) -> Verdicts:
        """Verdicts on uint8 images [H, W, 3] of any sizes, or on one array [N, H, W, 3]."""
        return verdicts_of(self.nearest(images), self.description)

    def close(self) -> None:
        """Let go of the network."""
        self._embedder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
