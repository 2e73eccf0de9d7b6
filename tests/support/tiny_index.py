"""A tiny bundle with a classifier, directions and an index of given training images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dermis.authenticity.build import build_index, write_index
from dermis.authenticity.checker import Embedder
from dermis.bundle import Bundle, amend_bundle
from dermis.bundle.directions import Direction
from dermis.directions.fit import oriented
from dermis.imaging import Images
from tiny import make_bundle
from tiny_classifier import make_classifier


def noise(count: int, seed: int = 0) -> Images:
    """Random images, uint8 [count, 12, 12, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, 12, 12, 3), dtype=np.uint8)


def make_complete_bundle(root: Path, training: Images, *, name: str = "tiny", held_out: Images | None = None) -> Bundle:
    """Its index is of uint8 `training` [N, R, R, 3] in the classifier's feature space, exact."""
    make_classifier(root / "c")
    directions = [
        Direction(f"axis-{k}", oriented(np.eye(16, dtype=np.float32)[k]), (0, 6), 1.0 + k, "sefa") for k in range(3)
    ]
    bundle = amend_bundle(make_bundle(root / name, name=name), parts={"classifier": root / "c"}, directions=directions)
    embedder = Embedder("classifier", bundle, device="cpu", threads=1)
    resolution = training.shape[1]
    features = embedder.embed(training, resolution)
    others = None if held_out is None else embedder.embed(held_out, resolution)
    embedder.close()
    built = build_index(
        features,
        held_out=others,
        extractor="classifier",
        extractor_identity=embedder.identity,
        resolution=resolution,
        dim=None,
        storage="float",
    )
    write_index(root / "i", built)
    return amend_bundle(bundle, parts={"authenticity": root / "i"})


def make_complete_and_plain_bundle(root: Path, training: int = 60) -> tuple[Bundle, str]:
    """A bundle `tiny` with all parts, of `noise(training)`; and DERMIS_BUNDLES for it and a bundle `plain` without."""
    complete = make_complete_bundle(root / "complete", noise(training))
    plain = make_bundle(root / "plain", name="plain")
    return complete, f"{complete.location},{plain.location}"
