"""Fit directions: from the generator's weights, its latents, its classes, or attributes of its images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from dermis.bundle.directions import Direction, Vector
from dermis.errors import DermisError, RequestError, install_command
from dermis.latents import z_for
from dermis.networks import Generator, one_hot

if TYPE_CHECKING:
    from torch import Tensor

Ws = NDArray[np.float32]
BATCH = 1024
MIN_IMAGES = 20  # images with and without an attribute that a hyperplane needs


def sample_w(generator: Generator, count: int, *, seed: int, labels: Sequence[int] | None = None) -> Ws:
    """Compute w of samples 0..count-1 of a seed, without truncation.

    Args:
        generator: The generator.
        count: Number of samples.
        seed: Their seed.
        labels: Class number of each sample; by default classes alternate.

    Returns:
        float32 [count, w_dim].
    """
    return np.concatenate([part for part, _ in _batches(generator, count, seed, labels)])


def style_weights(generator: Generator, layers: tuple[int, int]) -> NDArray[np.float64]:
    """Stack the affine maps from w to styles of some style vectors.

    ToRGB layers are left out, as in SeFa, because their styles do not change the features.

    Args:
        generator: The generator.
        layers: First and last + 1 of the style vectors.

    Returns:
        float64 [M, w_dim], with the gain of equalised layers.
    """
    convolutions = [layer for block in generator.synthesis.blocks for layer in block.layers]
    rows = [layer.affine.weight * layer.affine.weight_gain for layer in convolutions[layers[0] : layers[1]]]
    weights: NDArray[np.float64] = torch.cat(rows).detach().cpu().double().numpy()
    return weights


def oriented(vector: NDArray[np.floating[Any]]) -> Vector:
    """Scale a vector to length 1 and turn it so that its largest component is positive.

    The sign of an eigenvector is arbitrary; this rule makes it reproducible.
    """
    exact = np.asarray(vector, dtype=np.float64)
    exact = exact / np.linalg.norm(exact)
    turned: Vector = (exact * np.sign(exact[np.argmax(np.abs(exact))])).astype(np.float32)
    return turned


def sefa(generator: Generator, w: Ws, *, layers: tuple[int, int], count: int, prefix: str = "sefa") -> list[Direction]:
    """Fit the directions that change the styles of `layers` most: eigenvectors of A^T A.

    Closed-form factorisation (Shen and Zhou, arXiv 2007.06600, eq. 8). The rows of A are scaled to length 1 first, as its
    authors do, so that all channels count the same. The largest component of each direction is positive.

    Args:
        generator: The generator.
        w: Latents [N, w_dim], from which only the scale is measured.
        layers: First and last + 1 of the style vectors.
        count: Number of directions, by falling eigenvalue.
        prefix: Beginning of their names.
    """
    rows = style_weights(generator, layers)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(rows.T @ rows)
    total = values.sum()
    return [
        _named(f"{prefix}-{i + 1}", oriented(vectors[:, -1 - i]), layers, w, "sefa", share=values[-1 - i] / total)
        for i in range(min(count, len(values)))
    ]


def ganspace(
    generator: Generator, *, samples: int, seed: int, count: int, layers: tuple[int, int] | None = None
) -> list[Direction]:
    """Fit the principal components of w.

    GANSpace (Haerkoenen et al., arXiv 2004.02546) for StyleGAN. For a conditional generator the mean of each class is
    subtracted first, so that components are not differences of classes. Sums are in float64.

    Args:
        generator: The generator.
        samples: Number of latents.
        seed: Their seed.
        count: Number of directions, by falling variance.
        layers: First and last + 1 of the style vectors that the directions change; None for all.
    """
    width, classes = generator.config.w_dim, max(generator.config.c_dim, 1)
    number = np.zeros(classes)
    first = np.zeros((classes, width))
    second = np.zeros((width, width))
    for part, labels in _batches(generator, samples, seed, None):
        exact = part.astype(np.float64)
        second += exact.T @ exact
        for label in range(classes):
            first[label] += exact[labels == label].sum(axis=0)
            number[label] += (labels == label).sum()
    mean = first / number[:, None]
    covariance = (second - (mean * number[:, None]).T @ mean) / (samples - classes)
    values, vectors = np.linalg.eigh(covariance)
    total = values.sum()
    return [
        Direction(
            f"ganspace-{i + 1}",
            oriented(vectors[:, -1 - i]),
            layers or (0, generator.num_ws),
            float(np.sqrt(values[-1 - i])),
            "ganspace",
            {"share": float(values[-1 - i] / total)},
        )
        for i in range(min(count, len(values)))
    ]


def class_means(generator: Generator, class_names: Sequence[str], w: Ws, *, samples: int, seed: int) -> list[Direction]:
    """Compute a direction from the mean of each class to that of each later class, with the same z for all classes.

    Args:
        generator: A conditional generator.
        class_names: Names of its classes, for the names of the directions.
        w: Latents [N, w_dim], from which only the scale is measured.
        samples: Latents of each class.
        seed: Their seed.

    Raises:
        RequestError: The generator has fewer than two classes.
    """
    if generator.config.c_dim < 2:
        raise RequestError("method", "class-means needs a generator of two classes or more")
    means = [
        sample_w(generator, samples, seed=seed, labels=[label] * samples).astype(np.float64).mean(axis=0)
        for label in range(generator.config.c_dim)
    ]
    directions = []
    for a in range(len(means)):
        for b in range(a + 1, len(means)):
            difference = means[b] - means[a]
            length = float(np.linalg.norm(difference))
            name = f"{_slug(class_names[a])}-to-{_slug(class_names[b])}"
            vector = (difference / length).astype(np.float32)
            directions.append(
                _named(name, vector, (0, generator.num_ws), w, "class-means", distance=length / _deviation(w, vector))
            )
    return directions


def hyperplane(name: str, w: Ws, attribute: NDArray[np.bool_], *, layers: tuple[int, int], seed: int = 0) -> Direction:
    """Fit the normal of the plane that separates latents of images with an attribute from those without.

    InterFaceGAN (Shen et al., arXiv 1907.10786), by logistic regression with balanced classes. `facts` of the direction
    have the balanced accuracy on a fifth of the latents that was held out: near 0.5 the attribute is not linear in w, and the
    direction means nothing.

    Args:
        name: Name of the direction, which points to the attribute.
        w: Latents [N, w_dim] of the images.
        attribute: Whether each image has the attribute, [N].
        layers: First and last + 1 of the style vectors that the direction changes.
        seed: Seed of the split.

    Raises:
        RequestError: Fewer than 20 images have the attribute, or lack it.
        DermisError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import balanced_accuracy_score
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DermisError(f"attributes need scikit-learn ({error}); {install_command('edit')}") from error

    having = int(attribute.sum())
    if min(having, len(attribute) - having) < MIN_IMAGES:
        raise RequestError(
            "attributes",
            f"{name}: {having:,} of {len(attribute):,} images have it; at least {MIN_IMAGES} with and {MIN_IMAGES} without "
            "it are needed",
        )
    standard = (w - w.mean(axis=0)) / w.std(axis=0)
    parts = train_test_split(standard, attribute, test_size=0.2, random_state=seed, stratify=attribute)
    train, test, train_has, test_has = parts
    model = LogisticRegression(C=0.01, class_weight="balanced", max_iter=2000).fit(train, train_has)
    accuracy = float(balanced_accuracy_score(test_has, model.predict(test)))
    normal = model.coef_[0] / w.std(axis=0)
    vector = (normal / np.linalg.norm(normal)).astype(np.float32)
    return _named(name, vector, layers, w, "hyperplane", accuracy=accuracy, images=len(w), having=having)


def _batches(
    generator: Generator, count: int, seed: int, labels: Sequence[int] | None
) -> Iterator[tuple[Ws, NDArray[np.int64]]]:
    """Yield w [n, w_dim] and labels [n] in batches."""
    device = generator.mapping.w_avg.device
    classes = max(generator.config.c_dim, 1)
    every = np.arange(count) % classes if labels is None else np.asarray(labels)
    for start in range(0, count, BATCH):
        chosen = every[start : start + BATCH]
        z = torch.from_numpy(z_for(seed, range(start, start + len(chosen)), generator.config.z_dim)).to(device)
        c: Tensor | None = one_hot(chosen, generator.config.c_dim, device) if generator.config.c_dim else None
        with torch.inference_mode():
            yield generator.mapping(z, c)[:, 0].cpu().numpy(), chosen.astype(np.int64)


def _named(
    name: str, vector: NDArray[np.float32], layers: tuple[int, int], w: Ws, method: str, **facts: float
) -> Direction:
    exact = {key: float(value) for key, value in facts.items()}
    return Direction(name, vector, layers, _deviation(w, vector), method, exact)  # type: ignore[arg-type]


def _deviation(w: Ws, vector: NDArray[np.float32]) -> float:
    return float((w.astype(np.float64) @ vector).std())


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")
