"""Where images lie in the space of a classifier's last convolutional layer, and a map of it in three dimensions.

features = the pooled last layer of `dermis.classifier`, no torch needed; the map is t-SNE (van der Maaten and Hinton 2008)
by openTSNE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dermis.classifier.preprocess import to_input
from dermis.errors import DataError, DermisError, install_command
from dermis.explain.nearest import unit
from dermis.imaging import Images

if TYPE_CHECKING:
    from dermis.classifier.onnx_session import Classifier

REAL, GENERATED = "real", "generated"
PRINCIPAL = 50  # dimensions that t-SNE sees at most
PERPLEXITY = 30.0
ITERATIONS = (250, 500)  # with early exaggeration, and without
THUMBNAIL = 48
_CHUNK = 64  # images in memory at a time
_FEWEST = 5  # points that t-SNE can spread


@dataclass(frozen=True)
class Item:
    """What is known of an image. class_name, source, part and group (patient or lesion) are "" where unknown.

    kind is "real", "generated", or whatever another set of images is called ("projected"). A generated one was drawn from
    the latent (seed, index) as the generator's class number `label`.
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
    """N images as a classifier sees them, in order of `items`."""

    items: tuple[Item, ...]
    features: NDArray[np.float32]
    """[N, D], pooled last convolutional layer."""
    calibrated: NDArray[np.float64]
    """[N], probability of the positive class."""
    thumbnails: Images
    """uint8 [N, T, T, 3], the largest centred square of each."""

    def __len__(self) -> int:
        return len(self.items)

    def select(self, rows: NDArray[np.int64]) -> Embedded:
        """Some of them, in the order of `rows`."""
        items = tuple(self.items[i] for i in rows)
        return Embedded(items, self.features[rows], self.calibrated[rows], self.thumbnails[rows])


def embed(
    classifier: Classifier,
    pictures: Iterable[tuple[Item, Images]],
    *,
    thumbnail: int = THUMBNAIL,
    done: Callable[[int], object] = lambda count: None,
) -> Embedded:
    """Run a classifier over images uint8 [H, W, 3], a few in memory at a time; `done(n)` is called after n more.

    DataError if there is none, or an id comes twice.
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
            raise DataError(f"{item.id}: is the id of two images; name them apart")
        seen.add(item.id)
    return Embedded(tuple(items), np.concatenate(features), np.concatenate(calibrated), np.concatenate(thumbnails))


def map_in_3d(
    features: NDArray[np.float32],
    *,
    seed: int = 0,
    perplexity: float = PERPLEXITY,
    iterations: tuple[int, int] = ITERATIONS,
    done: Callable[[int], object] = lambda count: None,
) -> NDArray[np.float32]:
    """t-SNE positions [N, 3] of features [N, D], centred, the farthest at distance 1 from the middle.

    Rows are scaled to length 1 first, so that near means a large cosine, and reduced to their 50 principal components.
    The perplexity is at most (N - 1) / 3, which t-SNE needs; fewer than five points lie on their principal components.
    It runs on one core, where the same input and seed give the same positions. `done(n)` is called after n more iterations.
    """
    if not perplexity > 1:
        raise DataError(f"perplexity: {perplexity:g} must be above 1")
    principal = _principal(unit(features), PRINCIPAL)
    start = _columns(principal, 3)
    if len(start) < _FEWEST:
        return _centred(start)
    tsne = open_tsne()
    spread = float(start[:, 0].std()) or 1.0
    every = 10

    def tell(iteration: int, error: float, embedding: Any) -> None:
        done(every)

    # Few distinct points (copies of one image) would fall on one another and never part again.
    jitter = np.random.default_rng(seed).normal(scale=1e-6, size=start.shape)
    found = tsne.TSNE(
        n_components=3,
        perplexity=min(perplexity, (len(start) - 1) / 3),
        early_exaggeration_iter=iterations[0],
        n_iter=iterations[1],
        initialization=start / spread * 1e-4 + jitter,
        neighbors="exact",
        negative_gradient_method="bh",  # the interpolation of FIt-SNE has two dimensions at most
        n_jobs=1,
        random_state=seed,
        callbacks=tell,
        callbacks_every_iters=every,
    ).fit(principal)
    return _centred(np.asarray(found, np.float64))


def open_tsne() -> Any:
    """The module openTSNE. DermisError if it is not installed."""
    try:
        import openTSNE
    except ImportError as error:
        raise DermisError(f"embeddings need openTSNE ({error}); {install_command('explain')}") from error
    return openTSNE


def _principal(x: NDArray[np.float64], most: int) -> NDArray[np.float64]:
    """Principal components [N, at most `most`] of rows [N, D], the largest first, signs fixed."""
    x = x - x.mean(axis=0)
    if len(x) >= x.shape[1]:
        values, vectors = np.linalg.eigh(x.T @ x)
        axes = vectors[:, np.argsort(values)[::-1][:most]]
    else:
        axes = np.linalg.svd(x, full_matrices=False)[2][:most].T
    largest = axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])]
    found: NDArray[np.float64] = x @ (axes * np.where(largest < 0, -1.0, 1.0))
    return found


def _columns(x: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """The first columns of x, with zeros for those that it does not have."""
    return np.pad(x[:, :count], ((0, 0), (0, max(0, count - x.shape[1]))))


def _centred(x: NDArray[np.float64]) -> NDArray[np.float32]:
    x = x - x.mean(axis=0)
    farthest = float(np.linalg.norm(x, axis=1).max())
    return (x / (farthest or 1.0)).astype(np.float32)
