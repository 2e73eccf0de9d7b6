"""Read metrics.json of a bundle in any version as the present version.

Version 2, which `dermis evaluate` writes:

    format_version               2
    images, real_images          generated images, and real ones of --data
    holdout                      images, patients, without_ids, name, sha256; missing if no images were held out. without_ids
                                 are those of the patients that are images without an id; early versions have no such number
    noise_mode                   noise of the generated images
    ppl                          perceptual path length: distance, end, full, their errors, paths, classes
    spaces.NAME                  one feature space
        identity                 identity of the network's weights and of the resizing
        trained_discriminator    whether the discriminator used this space; null if not known
        comparisons.COMPARISON   numbers of one pair of image sets, by `COMPARISONS`
        other_noise.MODE         the comparisons of generated images with other noise
        classes.CLASS            the comparisons of one class
        copies                   authenticity, memorising, membership

Version 1 has no format_version. It has one space, with its numbers at the top and the Fréchet distance as "fid", and
compares the held-out images with the training images. `dermis train gan --metric` still writes its numbers in this form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Metrics = Mapping[str, Any]
FORMAT_VERSION = 2
COMPARISONS = ("generated_training", "generated_holdout", "training_holdout", "holdout_training")
"""Pairs of image sets by comparison: the first set takes the role of the generated images, the second is the real one. The
last pair is in version 1 only."""
_RENAMED = {"fid": "fd", "fid_interval": "fd_interval", "fid_bias": "fd_bias"}
_NUMBERS = (
    *("images", "real_images", *_RENAMED, "kid", "kid_std", "kid_interval", "precision", "recall"),
    *("density", "coverage", "expected_coverage", "alpha_precision", "beta_recall"),
)


def read_metrics(metrics: Metrics) -> dict[str, Any]:
    """Convert metrics of any version to version 2; without spaces if they are not of a known version."""
    spaces = metrics.get("spaces")
    if isinstance(spaces, Mapping):
        return dict(metrics)
    if not isinstance(metrics.get("extractor"), str):
        return {**metrics, "spaces": {}}
    held = metrics.get("holdout", {})
    copies = {key: metrics[key] for key in ("authenticity", "real_near_duplicates") if key in metrics}
    comparisons = {"generated_training": _numbers(metrics)}
    if held:
        reference = held["instead_of_generated"]
        comparisons["holdout_training"] = _numbers(reference)
        copies["memorising"] = held["test"]
        if "authenticity" in reference:
            copies["holdout_authenticity"] = reference["authenticity"]
    classes = metrics.get("classes", {})
    space = {
        "identity": metrics.get("extractor_identity"),
        "comparisons": comparisons,
        "classes": {name: {"generated_training": _numbers(part)} for name, part in classes.items()},
        "copies": copies,
    }
    moved = {"extractor", "extractor_identity", "classes", "holdout", "ppl", *_NUMBERS} - {"images", "real_images"}
    present = {key: value for key, value in metrics.items() if key not in moved and key not in copies}
    if held:
        present["holdout"] = {key: held[key] for key in ("images", "patients", "sha256") if key in held}
    if "ppl" in metrics:
        by_class = {name: part["ppl"] for name, part in classes.items() if "ppl" in part}
        present["ppl"] = {**metrics["ppl"], "classes": by_class}
    return {"noise_mode": "const", **present, "format_version": FORMAT_VERSION, "spaces": {metrics["extractor"]: space}}


def first_space(metrics: Metrics) -> tuple[str, dict[str, Any]]:
    """Name and numbers of the first space of metrics of version 2.

    Raises:
        KeyError: There are no spaces.
    """
    for name, space in metrics["spaces"].items():
        return name, space
    raise KeyError("spaces")


def discriminator_space(provenance: Metrics) -> str | None:
    """The feature space of the generator's discriminator; "" if it used none, and None if the provenance does not say."""
    training = provenance.get("training")
    configuration = training.get("configuration") if isinstance(training, Mapping) else None
    if not isinstance(configuration, Mapping):
        return None
    changes = training.get("changes", ()) if isinstance(training, Mapping) else ()
    before = [change.get("before", {}) for change in changes if isinstance(change, Mapping)]
    return "lite0" if any(options.get("projected") for options in (configuration, *before)) else ""


def _numbers(part: Metrics) -> dict[str, Any]:
    return {_RENAMED.get(key, key): part[key] for key in _NUMBERS if key in part}
