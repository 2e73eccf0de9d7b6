"""Embeddings of images in the feature space of a classifier, and a map of them in three dimensions.

Features are those of the pooled last convolutional layer (`dermis.classifier`, without torch). The map is t-SNE (van der
Maaten and Hinton 2008) by openTSNE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dermis.classifier.preprocess import to_input
from dermis.errors import DataError, DermisError, install_command
from dermis.explain.nearest import unit
from dermis.image_metadata import ImageOrigin
from dermis.imaging import Images

if TYPE_CHECKING:
    from dermis.classifier.onnx_session import Classifier

REAL, GENERATED = "real", "generated"
PRINCIPAL = 50  # largest number of dimensions for t-SNE
PERPLEXITY = 30.0
ITERATIONS = (250, 500)  # with early exaggeration, and without
THUMBNAIL = 48
_CHUNK = 64  # images in memory at a time
_MIN_POINTS = 5  # least number of points for t-SNE


@dataclass(frozen=True)
class Item:
    """Metadata of an image. class_name, source, part and group (patient or lesion) are "" if unknown.

    kind is "real", "generated", or the name of another set of images, such as "projected". A generated image has the
    latent (seed, index) and the generator's class number `label`.
    """

    id: str
    kind: str
    class_name: str = ""
    source: str = ""
    part: str = ""
    group: str = ""
    seed: int | None = None
    index: int | None = None
    label: int | None = None


@dataclass(frozen=True)
class Embedded:
    """Features and probabilities of N images, in the order of `items`."""

    items: tuple[Item, ...]
    features: NDArray[np.float32]
    """[N, D]: the pooled last convolutional layer."""
    calibrated: NDArray[np.float64]
    """[N]: calibrated probability of the positive class."""
    thumbnails: Images
    """uint8 [N, T, T, 3]: the largest centred square of each image."""

    def __len__(self) -> int:
        return len(self.items)

    def select(self, rows: NDArray[np.int64]) -> Embedded:
        """Return some of the images, in the order of `rows`."""
        items = tuple(self.items[i] for i in rows)
        return Embedded(items, self.features[rows], self.calibrated[rows], self.thumbnails[rows])


def embed(
    classifier: Classifier,
    pictures: Iterable[tuple[Item, Images]],
    *,
    thumbnail: int = THUMBNAIL,
    done: Callable[[int], object] = lambda count: None,
) -> Embedded:
    """Compute features and probabilities of images, of which a few are in memory at a time.

    Args:
        classifier: The classifier.
        pictures: Metadata and pixels, uint8 [H, W, 3] of any size, of each image.
        thumbnail: Side of the thumbnails in px.
        done: Called with the number of images after each part.

    Raises:
        DataError: There is no image, or two images have the same id.
    """
    size = classifier.description.input.size
    items: list[Item] = []
    features, calibrated, thumbnails = [], [], []
    waiting: list[Images] = []

    def flush() -> None:
        scores = classifier.classify(np.stack([to_input(image, size) for image in waiting]))
        features.append(scores.features)
        calibrated.append(scores.calibrated)
        thumbnails.append(np.stack([to_input(image, thumbnail) for image in waiting]))
        done(len(waiting))
        waiting.clear()

    for item, image in pictures:
        items.append(item)
        waiting.append(image)
        if len(waiting) == _CHUNK:
            flush()
    if waiting:
        flush()
    if not items:
        raise DataError("there is no image to embed")
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise DataError(f"{item.id}: is the id of two images; give them different ids")
        seen.add(item.id)
    return Embedded(tuple(items), np.concatenate(features), np.concatenate(calibrated), np.concatenate(thumbnails))


def origin_of_items(items: Sequence[Item]) -> ImageOrigin | None:
    """The origin of a sheet that shows these images; None if none of them is generated."""
    sources = sorted({item.source for item in items if item.kind == GENERATED})
    if not sources:
        return None
    all_generated = all(item.kind == GENERATED for item in items)
    return ImageOrigin(
        ", ".join(sources), source_type="trainedAlgorithmicMedia" if all_generated else "compositeSynthetic"
    )


def map_in_3d(
    features: NDArray[np.float32],
    *,
    seed: int = 0,
    perplexity: float = PERPLEXITY,
    iterations: tuple[int, int] = ITERATIONS,
    done: Callable[[int], object] = lambda count: None,
) -> NDArray[np.float32]:
    """Compute a map by t-SNE.

    Rows are scaled to length 1 first, so that a small distance means a large cosine, and reduced to 50 principal
    components. Fewer than five points are placed by their principal components. It runs on one core, so that the same input
    and seed give the same positions.

    Args:
        features: Features [N, D].
        seed: Seed of t-SNE.
        perplexity: Perplexity; it is reduced to (N - 1) / 3 if it is larger.
        iterations: Iterations with early exaggeration, and without.
        done: Called with the number of iterations since the last call.

    Returns:
        Positions [N, 3], centred, with the farthest at distance 1.

    Raises:
        DataError: The perplexity is not above 1.
        DermisError: openTSNE is not installed.
    """
    if not perplexity > 1:
        raise DataError(f"perplexity: {perplexity:g} must be above 1")
    principal = _principal(unit(features), PRINCIPAL)
    start = _columns(principal, 3)
    if len(start) < _MIN_POINTS:
        return _centred(start)
    tsne = open_tsne()
    spread = float(start[:, 0].std()) or 1.0
    every = 10

    def on_iterations(iteration: int, error: float, embedding: Any) -> None:
        done(every)

    # Equal points (copies of one image) would stay in the same position.
    jitter = np.random.default_rng(seed).normal(scale=1e-6, size=start.shape)
    positions = tsne.TSNE(
        n_components=3,
        perplexity=min(perplexity, (len(start) - 1) / 3),
        early_exaggeration_iter=iterations[0],
        n_iter=iterations[1],
        initialization=start / spread * 1e-4 + jitter,
        neighbors="exact",
        negative_gradient_method="bh",  # the interpolation of FIt-SNE supports at most two dimensions
        n_jobs=1,
        random_state=seed,
        callbacks=on_iterations,
        callbacks_every_iters=every,
    ).fit(principal)
    return _centred(np.asarray(positions, np.float64))


def open_tsne() -> Any:
    """Import openTSNE.

    Raises:
        DermisError: It is not installed.
    """
    try:
        import openTSNE
    except ImportError as error:
        raise DermisError(f"embeddings need openTSNE ({error}); {install_command('explain')}") from error
    return openTSNE


def _principal(x: NDArray[np.float64], most: int) -> NDArray[np.float64]:
    """Return at most `most` principal components of rows [N, D], the largest first, with fixed signs."""
    x = x - x.mean(axis=0)
    if len(x) >= x.shape[1]:
        values, vectors = np.linalg.eigh(x.T @ x)
        axes = vectors[:, np.argsort(values)[::-1][:most]]
    else:
        axes = np.linalg.svd(x, full_matrices=False)[2][:most].T
    largest = axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])]
    components: NDArray[np.float64] = x @ (axes * np.where(largest < 0, -1.0, 1.0))
    return components


def _columns(x: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Return the first `count` columns of x, with zeros for missing ones."""
    return np.pad(x[:, :count], ((0, 0), (0, max(0, count - x.shape[1]))))


def _centred(x: NDArray[np.float64]) -> NDArray[np.float32]:
    x = x - x.mean(axis=0)
    farthest = float(np.linalg.norm(x, axis=1).max())
    return (x / (farthest or 1.0)).astype(np.float32)
