"""All numbers of an evaluation, as the JSON that a bundle's metrics.json holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dermis.errors import DataError
from dermis.metrics import frechet_distance, kernel_distance
from dermis.metrics.alpha import alpha_precision, authentic, beta_recall, near_duplicates, same_distance
from dermis.metrics.density import density_coverage, expected_coverage
from dermis.metrics.fidelity import precision_recall
from dermis.metrics.intervals import frechet_interval, kernel_interval
from dermis.metrics.memorisation import memorisation_test
from dermis.metrics.path_length import path_length

Features = NDArray[np.float32]
Selection = Literal["all", "fast"]
FEWEST = 10  # images of a set: below, neighbourhoods and covariances say nothing
REPLICATES = 200


def compare(real: Features, generated: Features, selection: Selection = "all") -> dict[str, Any]:
    """Metrics of generated features [M, dim] against real ones [N, dim]; "fast" leaves the sample-level ones out.

    Raises DataError if either set has fewer than FEWEST images.
    """
    if min(len(real), len(generated)) < FEWEST:
        raise DataError(f"{len(real)} real and {len(generated)} generated images are too few; give {FEWEST} or more")
    fid = frechet_distance(real, generated)
    kid, kid_std = kernel_distance(real, generated)
    fid_interval = frechet_interval(real, generated, fid, REPLICATES)
    kid_interval = kernel_interval(real, generated, kid, REPLICATES)
    precision, recall = precision_recall(real, generated)
    metrics: dict[str, Any] = {
        "images": len(generated),
        "real_images": len(real),
        "fid": fid,
        "fid_interval": [fid_interval.low, fid_interval.high],
        "fid_bias": fid_interval.bias,
        "kid": kid,
        "kid_std": kid_std,
        "kid_interval": [kid_interval.low, kid_interval.high],
        "precision": precision,
        "recall": recall,
    }
    if selection == "all":
        density, coverage = density_coverage(real, generated)
        metrics |= {
            "density": density,
            "coverage": coverage,
            "expected_coverage": expected_coverage(len(real), len(generated)),
            "alpha_precision": alpha_precision(real, generated).integrated,
            "beta_recall": beta_recall(real, generated).integrated,
            "authenticity": float(authentic(real, generated, same=same_distance(real)).mean()),
            "real_near_duplicates": int(near_duplicates(real).sum()),
        }
    return metrics


def compare_holdout(
    real: Features,
    holdout: Features,
    generated: Features,
    selection: Selection = "all",
    groups: Sequence[str] | None = None,
) -> dict[str, Any]:
    """What held-out real images [H, dim] score in the generator's place, and the test for memorising the real ones.

    `groups` are the patients of the real images, then of the held-out ones: whole patients are permuted in the test.
    """
    test = memorisation_test(generated, real, holdout, groups=groups)
    return {
        "images": len(holdout),
        "patients": None if groups is None else len(set(groups[len(real) :])),
        "instead_of_generated": compare(real, holdout, selection),
        "test": asdict(test),
    }


def path_lengths_by_class(
    lengths: Mapping[str, NDArray[np.float64]], labels: NDArray[np.int64], class_names: tuple[str, ...], distance: str
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """PPL of raw lengths [N] by sampling ("end", "full"), overall and of every class, each with its standard error."""

    def summary(chosen: NDArray[np.bool_]) -> dict[str, Any]:
        found: dict[str, Any] = {"distance": distance}
        for sampling, values in lengths.items():
            ppl = path_length(values[chosen])
            found |= {sampling: ppl.mean, f"{sampling}_error": ppl.standard_error, "paths": ppl.paths}
        return found

    everything = np.ones(len(labels), dtype=bool)
    return summary(everything), {
        name: summary(labels == k) for k, name in enumerate(class_names) if np.sum(labels == k) >= FEWEST
    }
