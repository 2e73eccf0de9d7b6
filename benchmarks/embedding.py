"""Speed of embedding real images: `python -m benchmarks.embedding [--json] [--images FOLDER] [--extractor E ...] [--count N]`.

The path of `dermis evaluate`, `index build` and `data leaks` from image files to features ("now") is compared with an earlier
one ("before"), which decodes files one after another in the same thread and runs torch on 32 images at a time. Both are
measured in one run, alternately, so that other work on the machine affects both. Without a folder of images, synthetic JPEG
files are used. `--extractor` can be repeated. The differences between the features of both paths are printed, and with
`--bfloat16` those of a third path, which computes in bfloat16.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

import dermis.features
import dermis.features_openvino
from dermis.cpus import available_cpus
from dermis.features import FeatureExtractor, feature_extractor
from dermis.image_reading import read_training_image
from training.data.embedding import embed_array, progress_bar
from training.data.images import in_threads

IMAGES = Path("../shared/data/dermoscopy/images")
COUNT = 300
SIDE = 224
ROUNDS = 3
_BATCH = 32

Floats = NDArray[np.float32]


def files_of(folder: Path | None, count: int) -> tuple[list[bytes], str]:
    """Encoded images, evenly chosen from the folder, and their source in words."""
    paths = [] if folder is None or not folder.is_dir() else sorted(path for path in folder.iterdir() if path.is_file())
    if paths:
        chosen = np.unique(np.linspace(0, len(paths) - 1, min(count, len(paths))).round().astype(int))
        return [paths[i].read_bytes() for i in chosen], folder.name if folder is not None else ""
    return [synthetic_jpeg(seed) for seed in range(count)], "synthetic, 600 x 450 px"


def synthetic_jpeg(seed: int) -> bytes:
    """A JPEG file with a dark disc on noise."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:450, :600]
    disc = np.hypot(y - 225 + rng.integers(-40, 40), x - 300 + rng.integers(-40, 40)) < rng.integers(60, 160)
    image = rng.normal(190, 12, (450, 600, 3)) - 90 * disc[..., None]
    file = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def before(files: list[bytes], extractor: FeatureExtractor) -> Floats:
    """Decode a batch, then run the network, in one thread."""
    return extractor.over(
        np.stack([read_training_image(data, SIDE) for data in files[start : start + _BATCH]])
        for start in range(0, len(files), _BATCH)
    )


def now(files: list[bytes], extractor: FeatureExtractor) -> Floats:
    """Decode in threads while the network runs."""
    parts: list[Floats] = []
    waiting: list[NDArray[np.uint8]] = []
    with progress_bar(len(files), "embedding", disable=True) as bar:
        for image in in_threads(lambda data: read_training_image(data, SIDE), files):
            waiting.append(image)
            if len(waiting) == 64:
                parts.append(embed_array(np.stack(waiting), extractor.extract, bar))
                waiting.clear()
        if waiting:
            parts.append(embed_array(np.stack(waiting), extractor.extract, bar))
    return np.concatenate(parts)


def bfloat16(files: list[bytes], extractor: FeatureExtractor) -> Floats:
    """The path `now` in bfloat16, which is compiled at the first call."""
    with patch.object(dermis.features_openvino, "PRECISION", "bf16"):
        return now(files, extractor)


def agreement(features: Floats, reference: Floats) -> dict[str, float]:
    """Differences between features of the same images, and the Fréchet distance between the two sets."""
    lengths = np.linalg.norm(reference, axis=1)
    cosines = (features * reference).sum(axis=1) / (np.linalg.norm(features, axis=1) * lengths)
    return {
        "largest_difference": float((np.linalg.norm(features - reference, axis=1) / lengths).max()),
        "smallest_cosine": float(cosines.min()),
        "frechet_distance": _frechet_distance(features, reference),
    }


def _frechet_distance(x: Floats, y: Floats) -> float:
    """Fréchet distance of two sets of N features, by the singular values of an [N, N] matrix, as N is small here."""
    first, second = ((z - z.mean(axis=0)).astype(np.float64) / (len(z) - 1) ** 0.5 for z in (x, y))
    shared = np.linalg.svd(first @ second.T, compute_uv=False).sum()
    between = np.square(x.mean(axis=0, dtype=np.float64) - y.mean(axis=0, dtype=np.float64)).sum()
    return float(between + np.square(first).sum() + np.square(second).sum() - 2 * shared)


def run(folder: Path | None, extractor: str, count: int, rounds: int, *, with_bfloat16: bool = False) -> dict[str, Any]:
    """Measure images/s of each path (median of `rounds`), and the differences of features from the earlier path."""
    files, source = files_of(folder, count)
    new = feature_extractor(extractor)
    with patch.object(dermis.features, "have_openvino", lambda: False):
        old = feature_extractor(extractor)
    paths: dict[str, Callable[[], Floats]] = {"before": lambda: before(files, old), "now": lambda: now(files, new)}
    backends = {"before": old.backend, "now": new.backend}
    if with_bfloat16:
        third = feature_extractor(extractor)
        paths["bfloat16"] = lambda: bfloat16(files, third)
        backends["bfloat16"] = third.backend
    features = {name: path() for name, path in paths.items()}  # warms up
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(rounds):
        for name, path in paths.items():
            start = time.perf_counter()
            path()
            seconds[name].append(time.perf_counter() - start)
    ratios = {name: [old_s / s for old_s, s in zip(seconds["before"], seconds[name], strict=True)] for name in paths}
    return {
        "cores": available_cpus(),
        "images": len(files),
        "source": source,
        "extractor": new.name,
        "backends": backends,
        "images_per_second": {name: len(files) / float(np.median(times)) for name, times in seconds.items()},
        "times_as_fast": {name: float(np.median(ratios[name])) for name in paths},
        "rounds": {name: [round(ratio, 2) for ratio in ratios[name]] for name in paths},
        "agreement": {name: agreement(features[name], features["before"]) for name in paths if name != "before"},
    }


def main() -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder of image files")
    parser.add_argument("--extractor", action="append", help="default: lite0; can be repeated")
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--bfloat16", action="store_true", help="also in bfloat16, if the processor has it")
    arguments = parser.parse_args()
    documents = []
    for name in arguments.extractor or ["lite0"]:
        document = run(arguments.images, name, arguments.count, arguments.rounds, with_bfloat16=arguments.bfloat16)
        documents.append(document)
        if not arguments.json:
            show(document)
    if arguments.json:
        print(json.dumps(documents, indent=2))


def show(document: dict[str, Any]) -> None:
    """Print the measurements of one feature space as text."""
    print(f"{document['images']} images ({document['source']}), {document['extractor']}, {document['cores']} cores")
    print(f"{'':<10}{'by':<22}{'images/s':>9}  times as fast")
    for name, backend in document["backends"].items():
        rounds = ", ".join(map(str, document["rounds"][name]))
        rate, ratio = document["images_per_second"][name], document["times_as_fast"][name]
        print(f"{name:<10}{backend:<22}{rate:>9.1f}  {ratio:.1f} (rounds: {rounds})")
    for name, difference in document["agreement"].items():
        print(
            f"{name}: features differ by at most {difference['largest_difference']:.1e} of their length, smallest cosine "
            f"{difference['smallest_cosine']:.7f}, Fréchet distance {difference['frechet_distance']:.4f}"
        )


if __name__ == "__main__":
    main()
