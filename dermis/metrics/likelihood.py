"""Feature Likelihood Divergence (Jiralerspong et al., arXiv 2302.04440): fidelity, variety and novelty in one number.

The generated images define a density: a mixture of isotropic Gaussians, one around each generated feature y_j, each with its
own variance,

    p(x) = 1/M sum_j N(x; y_j, v_j I)

The variances maximise the likelihood of the training images. The result is the likelihood of held-out images. A generated
image that copies a training image gets a tiny variance, so that it adds nothing to the likelihood of held-out images around
it. Generated images far from all real ones, and kinds of real images that are not generated, reduce the likelihood as well.
In dim dimensions,

    FLD = 100/dim (mean over held-out x of -log p(x))  -  the same for real images instead of generated ones (the reference)

The reference is one half of the training images, with variances fitted to the other half; the variances of the generated
images are fitted to as many. Both are done with each half in turn, and averaged. So 0 means as good as other real images;
larger values are worse. The generalisation gap is the FLD of the training images less that of the held-out ones: the
further below 0, the better the density explains the training images than unseen ones. It is also below 0 for a generator that
does not copy, because the variances were fitted to the training images: compare it with the gap of the reference.

Features are first normalised to mean 0 and standard deviation 1 of the training images in every dimension. There are three
differences from the published program: both mixtures have the same number of Gaussians (fewer make everything less likely),
variances are fitted by expectation maximisation (Dempster et al. 1977) and not by a few steps of gradient ascent, and they
are at least `MIN_VARIANCE`. So compare numbers only with numbers of this program.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dermis.metrics.neighbours import Features, squared_distances

# Also the largest number of images to which the Gaussians are fitted. The memory is that of MAX_GAUSSIANS^2 float32 numbers.
MAX_GAUSSIANS = 10_000
MIN_VARIANCE = 1e-4  # a hundredth of a standard deviation. Copies would have 0, which has no logarithm
_STEPS = 100
_TOLERANCE = 1e-4  # nats for each dimension: a hundredth of a unit of FLD
_ROWS = 512

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class FeatureLikelihood:
    """Result of FLD.

    `fld` is the divergence on held-out images; `gap` and `reference_gap` are the generalisation gaps of the generated images
    and of the reference. Each mixture has `gaussians` Gaussians.
    """

    fld: float
    gap: float
    reference_gap: float
    gaussians: int


def feature_likelihood(
    training: Features, held_out: Features, generated: Features, *, seed: int = 0
) -> FeatureLikelihood:
    """Compute the FLD of generated features [M, dim] with training [N, dim] and held-out images [H, dim].

    Both mixtures have min(M, N // 2) Gaussians. Generated images and halves of the training images are drawn at random.

    Raises:
        ValueError: There are fewer than 2 training images, or a set is empty.
    """
    if len(training) < 2 or not len(held_out) or not len(generated):
        raise ValueError(
            f"{len(training)} training, {len(held_out)} held-out, {len(generated)} generated images: too few"
        )
    mean = training.mean(axis=0, dtype=np.float64)
    deviation = training.std(axis=0, dtype=np.float64)
    deviation[deviation < 1e-6 * max(float(deviation.max()), 1e-30)] = 1.0  # constant in all training images
    rng = np.random.default_rng(seed)
    real = ((training - mean) / deviation)[rng.permutation(len(training))[: 2 * MAX_GAUSSIANS]]
    shuffled = ((generated - mean) / deviation)[rng.permutation(len(generated))]
    test = (held_out - mean) / deviation

    half = len(real) // 2
    count = min(len(shuffled), half)
    costs = []
    for own, other in ((real[:half], real[half:]), (real[half:], real[:half])):
        for centres in (shuffled[:count], other[:count]):
            squared = _squared(own, centres)
            variances = fit_variances(squared, shuffled.shape[1])
            costs.append([_cost(values, variances, shuffled.shape[1]) for values in (_squared(test, centres), squared)])
    on_test, on_train = np.mean(costs[0::2], axis=0).tolist()
    reference_test, reference_train = np.mean(costs[1::2], axis=0).tolist()
    return FeatureLikelihood(on_test - reference_test, on_train - on_test, reference_train - reference_test, count)


def fit_variances(squared: Floats, dim: int) -> NDArray[np.float64]:
    """Fit the variances [M] that maximise the likelihood of images, from their squared distances [N, M] to the means.

    By expectation maximisation, first with one variance for all Gaussians, then with one for each. A Gaussian to which no
    image belongs keeps the common one.
    """
    variances = np.full(squared.shape[1], max(float(squared.min(axis=1).mean()) / dim, MIN_VARIANCE))
    for shared in (True, False):
        before = np.inf
        for _ in range(_STEPS):
            cost, belonging, spread = _expectation(squared, variances, dim)
            if shared:
                variances[:] = max(spread.sum() / (dim * len(squared)), MIN_VARIANCE)
            else:
                used = belonging > 1e-6
                variances[used] = np.maximum(spread[used] / (dim * belonging[used]), MIN_VARIANCE)
            if before - cost < _TOLERANCE:
                break
            before = cost
    return variances


def _expectation(
    squared: Floats, variances: NDArray[np.float64], dim: int
) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean of -log p for each dimension, the images that belong to each Gaussian [M], and their spread [M]."""
    belonging, spread, cost = np.zeros(squared.shape[1]), np.zeros(squared.shape[1]), 0.0
    for start in range(0, len(squared), _ROWS):
        part = squared[start : start + _ROWS]
        logs = _log_densities(part, variances, dim)
        total = _log_sum(logs)
        cost -= float(total.sum())
        share = np.exp(logs - total[:, None])
        belonging += share.sum(axis=0)
        spread += (share * part).sum(axis=0)
    return cost / (len(squared) * dim), belonging, spread


def _cost(squared: Floats, variances: NDArray[np.float64], dim: int) -> float:
    """Compute 100/dim times the mean of -log p over images, from their squared distances [N, M] to the means."""
    parts = (squared[start : start + _ROWS] for start in range(0, len(squared), _ROWS))
    logs = np.concatenate([_log_sum(_log_densities(part, variances, dim)) for part in parts])
    return float(-100 / dim * logs.mean(dtype=np.float64))


def _log_densities(squared: Floats, variances: NDArray[np.float64], dim: int) -> NDArray[np.float64]:
    """Compute log (1/M N(x_i; y_j, v_j I)), [N, M]."""
    constant = -dim / 2 * np.log(2 * np.pi * variances) - np.log(len(variances))
    return np.asarray(squared * (-0.5 / variances) + constant)


def _log_sum(logs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute log sum_j exp(logs_ij), [N]."""
    greatest = logs.max(axis=1)
    return np.asarray(greatest + np.log(np.exp(logs - greatest[:, None]).sum(axis=1)))


def _squared(images: Features, centres: Features) -> Floats:
    return np.concatenate([part.float().numpy() for _, part in squared_distances(images, centres)])
