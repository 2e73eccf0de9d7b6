"""What the map of embeddings reveals about who is in the training set: `python -m benchmarks.map_privacy --data DIR`.

Someone has real images and learns where each of them is on the map, by an upload. Some are training images, the others are
not. The table has the AUC of telling them apart (1 is certainty, 0.5 is chance) by two kinds of map: one with the position of
every training image, as DERMIS_TRAINING_MAP=positions shows it, of which the distance to the nearest one is used; and the map
of `/v1/embeddings` with numbers of training images in cubes, of which the number in the image's own cube is used.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dermis.authenticity.checker import Checker
from dermis.authenticity.training_map import TrainingMap, training_map
from dermis.authenticity.transformations import compress
from dermis.image_reading import read_image
from dermis.imaging import Images
from dermis.metrics.classification import auc

STEP = 0.01  # the default of DERMIS_AUTHENTICITY_DISTANCE_STEP
_SAME = 0.03  # distance below which an image is in the index; other images are far more distant
_UNUSED = np.random.default_rng(0)

Floats = NDArray[np.float64]


def rounded(positions: NDArray[np.float32]) -> Floats:
    """Return positions as the service sends them."""
    return np.round(positions.astype(np.float64) / STEP) * STEP


def nearest_published(placed: Floats, published: Floats) -> Floats:
    """Return the distance of each position [N, 3] to the nearest of the published ones [M, 3]."""
    return np.array([np.linalg.norm(published - position, axis=1).min() for position in placed])


def images_in_cube(placed: Floats, known: TrainingMap) -> Floats:
    """Return the published number of training images in the cube of each position [N, 3]; 0 if it is left out."""
    counts = {tuple(np.floor(cube / known.side)): count for cube, count in zip(known.cubes, known.counts, strict=True)}
    return np.array([counts.get(tuple(np.floor(position / known.side)), 0) for position in placed], np.float64)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Place the images and tell them apart."""
    paths = sorted(arguments.data.glob("*.jpg"))
    chosen = np.random.default_rng(0).permutation(len(paths))[: arguments.count]
    images = [read_image(paths[number].read_bytes()) for number in chosen]
    files: dict[str, Sequence[Images]] = {
        "the exact file": images,
        "saved again as JPEG of quality 75": [compress(image, _UNUSED, 75) for image in images],
        "saved again as JPEG of quality 50": [compress(image, _UNUSED, 50) for image in images],
    }
    rows: dict[str, dict[str, float]] = {}
    with Checker(arguments.bundle, device="cpu", threads=arguments.threads) as checker:
        known = training_map(checker.index)
        published = rounded(known.positions)
        labels = np.zeros(0, np.int64)
        for name, changed in files.items():
            nearest = checker.nearest(changed, detect_copies=False)
            if not len(labels):  # of the exact files
                labels = (nearest.distances < _SAME).astype(np.int64)
            placed = rounded(known.project(nearest.embeddings)[:, :3])
            rows[name] = {
                "positions": float(auc(labels, -nearest_published(placed, published))[0]),
                "cubes": float(auc(labels, images_in_cube(placed, known))[0]),
            }
    return {"training images": int(labels.sum()), "other images": int((labels == 0).sum()), "auc": rows}


def main() -> None:
    """Print the table of docs/privacy.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="bundles/demo")
    parser.add_argument("--data", type=Path, required=True, help="folder of real images, some of them training images")
    parser.add_argument("--count", type=int, default=1200, help="number of images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    document = measure(arguments)
    if arguments.json:
        print(json.dumps(document, indent=2))
        return
    print(f"{document['training images']} training images, {document['other images']} others\n")
    print("| uploaded image | map with positions | map with numbers in cubes |\n| --- | --- | --- |")
    for name, row in document["auc"].items():
        print(f"| {name} | {row['positions']:.2f} | {row['cubes']:.2f} |")


if __name__ == "__main__":
    main()
