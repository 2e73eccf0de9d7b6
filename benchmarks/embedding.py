"""Speed of embedding real images: `python -m benchmarks.embedding [--json] [--images FOLDER] [--extractor E] [--count N]`.

The path that `dermis evaluate`, `index build` and `data leaks` take from image files to features, beside the one that they
took before: files decoded one after another in the same thread, then torch, 32 images at a time. Both are measured in one run,
taking turns, so that other work on the machine falls on both. Without a folder of images, JPEG files are drawn.
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
from dermis.cpus import available_cpus
from dermis.features import FeatureExtractor, feature_extractor
from training.data.embedding import ahead, embed_array, progress_bar
from training.data.images import square

IMAGES = Path("../shared/data/dermoscopy/images")
COUNT = 300
SIDE = 224
ROUNDS = 3
_BATCH = 32

Floats = NDArray[np.float32]


def files_of(folder: Path | None, count: int) -> tuple[list[bytes], str]:
    """Encoded images, evenly chosen, and where they are from."""
    paths = [] if folder is None or not folder.is_dir() else sorted(path for path in folder.iterdir() if path.is_file())
    if paths:
        chosen = np.unique(np.linspace(0, len(paths) - 1, min(count, len(paths))).round().astype(int))
        return [paths[i].read_bytes() for i in chosen], folder.name if folder is not None else ""
    return [drawn(seed) for seed in range(count)], "drawn, 600 x 450 px"


def drawn(seed: int) -> bytes:
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
    """Decoding and network take turns."""
    return extractor.over(
        np.stack([square(data, SIDE) for data in files[start : start + _BATCH]])
        for start in range(0, len(files), _BATCH)
    )


def now(files: list[bytes], extractor: FeatureExtractor) -> Floats:
    """Decoding in threads ahead of the network."""
    parts: list[Floats] = []
    waiting: list[NDArray[np.uint8]] = []
    with progress_bar(len(files), "embedding", disable=True) as bar:
        for image in ahead(lambda data: square(data, SIDE), files):
            waiting.append(image)
            if len(waiting) == 64:
                parts.append(embed_array(np.stack(waiting), extractor.extract, bar))
                waiting.clear()
        if waiting:
            parts.append(embed_array(np.stack(waiting), extractor.extract, bar))
    return np.concatenate(parts)


def run(folder: Path | None, extractor: str, count: int, rounds: int) -> dict[str, Any]:
    """Images a second of both paths, the median of `rounds`, and how far their features are apart."""
    files, source = files_of(folder, count)
    new = feature_extractor(extractor)
    with patch.object(dermis.features, "have_openvino", lambda: False):
        old = feature_extractor(extractor)
    paths: dict[str, Callable[[], Floats]] = {"before": lambda: before(files, old), "now": lambda: now(files, new)}
    features = {name: path() for name, path in paths.items()}  # warms up
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(rounds):
        for name, path in paths.items():
            start = time.perf_counter()
            path()
            seconds[name].append(time.perf_counter() - start)
    apart = np.linalg.norm(features["now"] - features["before"], axis=1) / np.linalg.norm(features["before"], axis=1)
    ratios = [old_time / new_time for old_time, new_time in zip(seconds["before"], seconds["now"], strict=True)]
    return {
        "cores": available_cpus(),
        "images": len(files),
        "source": source,
        "extractor": extractor,
        "backends": {"before": old.backend, "now": new.backend},
        "images_per_second": {name: len(files) / float(np.median(times)) for name, times in seconds.items()},
        "times_as_fast": float(np.median(ratios)),
        "rounds": [round(ratio, 2) for ratio in ratios],
        "largest_difference": float(apart.max()),
    }


def main() -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder of image files")
    parser.add_argument("--extractor", default="lite0")
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    document = run(arguments.images, arguments.extractor, arguments.count, arguments.rounds)
    if arguments.json:
        print(json.dumps(document, indent=2))
        return
    print(f"{document['images']} images ({document['source']}), {document['extractor']}, {document['cores']} cores")
    print(f"{'':<8}{'by':<22}{'images/s':>9}")
    for name in ("before", "now"):
        print(f"{name:<8}{document['backends'][name]:<22}{document['images_per_second'][name]:>9.1f}")
    print(f"{document['times_as_fast']:.1f} times as fast (rounds: {', '.join(map(str, document['rounds']))})")
    print(f"largest difference of a feature vector: {document['largest_difference']:.1e} of its length")


if __name__ == "__main__":
    main()
