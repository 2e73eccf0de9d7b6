"""Classifiers of members and non-members, cross-validated by patient.

A score that was fitted to other patients still depends on their labels: which images are members decides what all others are
compared with. So a test that permutes labels must fit again for each permutation, or it rejects too often (the deviation of an
area under the curve is about 1.3 times that of fixed scores). `CrossValidatedRidge` is linear in the labels, and fits thousands
of permutations at once. `cross_validated` is a logistic regression, for scores that no such test uses.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dermis.metrics.classification import Floats, Labels

_FOLDS = 5
_PENALTY = 0.01
_RIDGE = 4 * _PENALTY  # as strong: the curvature of the logistic loss is a quarter of that of the squared error


def standardised(features: Floats) -> Floats:
    """Scale each column to mean 0 and deviation 1; a constant column becomes 0."""
    spread = features.std(axis=0)
    x: Floats = (features - features.mean(axis=0)) / np.where(spread > 1e-12, spread, 1.0)
    return x


class CrossValidatedRidge:
    """Ridge regressions of labels on features, each image scored by that of the other four folds.

    Folds are of whole patients and, like the penalty, were chosen without labels. So if patients are members at random, labels
    with their scores are a random draw from all assignments with theirs. The intercept is left out of the score: that of the
    other folds is high where a fold's own labels are low.
    """

    def __init__(self, features: Floats, patients: NDArray[np.int64], *, seed: int) -> None:
        """Prepare everything that does not depend on labels.

        Args:
            features: [N, columns].
            patients: Patient of each row.
            seed: Seed of the folds.
        """
        self._x = standardised(features)
        names, group = np.unique(patients, return_inverse=True)
        folds = (np.random.default_rng(seed).permutation(len(names)) % _FOLDS)[group]
        self._tests = [rows for rows in (np.flatnonzero(folds == fold) for fold in range(_FOLDS)) if len(rows)]
        self._means, self._inverses = [], []
        for test in self._tests:
            train = np.delete(self._x, test, axis=0)
            mean = train.mean(axis=0)
            covariance = (train - mean).T @ (train - mean) / len(train)
            self._means.append(mean)
            self._inverses.append(np.linalg.inv(covariance + _RIDGE * np.eye(len(mean))))

    def scores(self, labels: Floats) -> Floats:
        """Return the scores [R, N] of all images for each row of labels [R, N], which are 0 or 1."""
        signs = 2 * labels - 1
        sums = [signs[:, test] @ self._x[test] for test in self._tests]
        totals = [signs[:, test].sum(axis=1, keepdims=True) for test in self._tests]
        values = np.empty_like(signs)
        for test, own, total, mean, inverse in zip(self._tests, sums, totals, self._means, self._inverses, strict=True):
            count = signs.shape[1] - len(test)
            covariance = (sum(sums) - own - (sum(totals) - total) * mean) / count
            values[:, test] = covariance @ inverse @ self._x[test].T
        return values


def cross_validated(features: Floats, labels: Labels, patients: NDArray[np.int64], *, seed: int) -> Floats:
    """Score each image by a logistic regression that was fitted to other patients.

    Five folds of whole patients, with members and non-members in equal proportions; both classes have equal weight, and the
    squared coefficients of standardised features are penalised.

    Args:
        features: [N, columns].
        labels: 0 or 1, [N].
        patients: Patient of each row.
        seed: Seed of the folds.

    Returns:
        Log odds of label 1, [N].
    """
    x = standardised(features)
    folds = _folds(labels, patients, seed)
    values = np.zeros(len(labels))
    for fold in range(_FOLDS):
        test = folds == fold
        if not test.any():
            continue
        coefficients = fit_logistic(x[~test], labels[~test])
        values[test] = x[test] @ coefficients[1:] + coefficients[0]
    return values


def _folds(labels: Labels, patients: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    rng = np.random.default_rng(seed)
    fold_of_patient = np.zeros(patients.max() + 1, np.int64)
    for label in (0, 1):
        names = rng.permutation(np.unique(patients[labels == label]))
        fold_of_patient[names] = np.arange(len(names)) % _FOLDS
    return np.asarray(fold_of_patient[patients])


def fit_logistic(x: Floats, labels: Labels, penalty: float = _PENALTY) -> Floats:
    """Fit a logistic regression with balanced classes; return the intercept and the coefficients, [1 + columns]."""
    from scipy.optimize import minimize

    weights = np.where(labels == 1, 0.5 / max(labels.sum(), 1), 0.5 / max((1 - labels).sum(), 1))
    signs = 2.0 * labels - 1

    def loss(coefficients: Floats) -> tuple[float, Floats]:
        margins = signs * (x @ coefficients[1:] + coefficients[0])
        slopes = -weights * signs / (1 + np.exp(np.clip(margins, -500, 500)))
        value = weights @ np.logaddexp(0, -margins) + penalty / 2 * coefficients[1:] @ coefficients[1:]
        return float(value), np.concatenate([[slopes.sum()], x.T @ slopes + penalty * coefficients[1:]])

    result = minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 200})
    fitted: Floats = result.x
    return fitted
