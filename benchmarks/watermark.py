"""An imperceptible mark in generated images: `python -m benchmarks.watermark --data DIR [--bundle BUNDLE] [--json FILE]`.

Embeds 32 bits with the methods of the package invisible-watermark (DWT-DCT, DWT-DCT-SVD) into generated images and measures
how many are still detected after changes, how many real images are taken for marked ones, what embedding costs, and what it
changes: PSNR, the Frechet distance to real images in the space lite0, and the probability of the bundle's classifier.

The package is no dependency of dermis. It refuses images below 256 x 256 px, so its methods are called directly.
`--enlarge 256` enlarges all images first, as if the generator made larger ones. Each number is printed, and the file of
`--json` written again, as soon as it is measured, so an interrupted run leaves what it has. Install the package:
`pip install --no-deps invisible-watermark pywavelets opencv-python-headless`.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dermis.bundle import Bundle, open_bundle
from dermis.imaging import Images

BITS = 32
FALSE_POSITIVES = 1e-3  # of images whose bits are random; it decides how many bits must agree
_BICUBIC = Image.Resampling.BICUBIC

Change = Callable[[Images], Images]
Read = Callable[[Images], NDArray[np.bool_]]


def _compressed(kind: str, quality: int) -> Change:
    def change(image: Images) -> Images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, kind, quality=quality)
        return np.asarray(Image.open(buffer).convert("RGB"))

    return change


def _resized(factor: float) -> Change:
    def change(image: Images) -> Images:
        side = len(image)
        other = round(side * factor)
        return np.asarray(Image.fromarray(image).resize((other, other), _BICUBIC).resize((side, side), _BICUBIC))

    return change


def _cropped(share: float) -> Change:
    def change(image: Images) -> Images:
        side = len(image)
        border = (1 - share) / 2 * side
        box = (border, border, side - border, side - border)
        return np.asarray(Image.fromarray(image).resize((side, side), _BICUBIC, box=box))

    return change


CHANGES: Mapping[str, Change] = {
    "none (PNG)": lambda image: image,
    "JPEG 95": _compressed("JPEG", 95),
    "JPEG 75": _compressed("JPEG", 75),
    "JPEG 50": _compressed("JPEG", 50),
    "WebP 75": _compressed("WEBP", 75),
    "resized to half and back": _resized(0.5),
    "resized to 1.75 and back": _resized(1.75),
    "cropped to 90 % and resized": _cropped(0.9),
    "cut by 2 px at the left and the top": lambda image: image[2:, 2:],
}


def methods(message: NDArray[np.uint8]) -> dict[str, tuple[Change, Read]]:
    """Embedding and reading of each method, for RGB images."""
    from imwatermark.dwtDctSvd import EmbedDwtDctSvd
    from imwatermark.maxDct import EmbedMaxDct

    def pair(kind: Any) -> tuple[Change, Read]:
        def embed(image: Images) -> Images:
            marked = kind(list(map(int, message)), BITS).encode(np.ascontiguousarray(image[..., ::-1]))
            return np.ascontiguousarray(marked[..., ::-1])

        def read(image: Images) -> NDArray[np.bool_]:
            bits: NDArray[np.bool_] = kind([], BITS).decode(np.ascontiguousarray(image[..., ::-1]))
            return bits

        return embed, read

    return {"dwtDct": pair(EmbedMaxDct), "dwtDctSvd": pair(EmbedDwtDctSvd)}


def needed_bits() -> int:
    """The least number of agreeing bits that random bits reach in at most `FALSE_POSITIVES` of images."""
    from scipy.stats import binom

    return int(next(k for k in range(BITS + 1) if binom.sf(k - 1, BITS, 0.5) <= FALSE_POSITIVES))


def generated(bundle: Bundle, count: int) -> Images:
    """Images of the bundle, its classes in turn."""
    from dermis.synthesizer import Synthesizer

    classes = max(len(bundle.class_names), 1)
    with Synthesizer(bundle, device="cpu") as synthesizer:
        parts = []
        for start in range(0, count, 64):
            indices = list(range(start, min(start + 64, count)))
            parts.append(synthesizer.images([0] * len(indices), indices, [index % classes for index in indices]))
    return np.concatenate(parts)


def real(folder: Path, size: int, count: int | None) -> Iterator[Images]:
    """Read real images at a size; with `count`, as many at equal distances in the order of names."""
    from dermis.image_reading import read_training_image

    files = sorted(folder.rglob("*.jpg"))
    if count is not None and count < len(files):
        files = [files[position * len(files) // count] for position in range(count)]
    for path in files:
        yield read_training_image(path.read_bytes(), size=size)


def enlarged(images: Images, size: int) -> Images:
    """Resize square images [N, H, W, 3]."""
    return np.stack([np.asarray(Image.fromarray(image).resize((size, size), _BICUBIC)) for image in images])


def measure(
    bundle: Bundle, images: Images, photographs: Images, few: int, report: Callable[[Mapping[str, Any]], None]
) -> dict[str, Any]:
    """Measure all methods.

    Args:
        bundle: The bundle, whose classifier is asked.
        images: Generated images.
        photographs: Real images.
        few: Number of generated images for detection after changes.
        report: Called with all results so far after each part.
    """
    from dermis.classifier.onnx_session import Classifier
    from dermis.features import feature_extractor
    from dermis.frechet import frechet_of_moments

    message = _message(bundle)
    extractor, limit = feature_extractor("lite0"), needed_bits()

    def moments(pictures: Images) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        batches = (pictures[start : start + 64] for start in range(0, len(pictures), 64))
        features = extractor.over(batches).astype(np.float64)
        return features.mean(0), np.cov(features, rowvar=False)

    def detected(pictures: Any, read: Read) -> float:
        return float(np.mean([int((read(each) == message.astype(bool)).sum()) >= limit for each in pictures]))

    result: dict[str, Any] = {
        "resolution": len(images[0]),
        "generated": len(images),
        "changed": few,
        "real": len(photographs),
        "bits": BITS,
        "needed_bits": limit,
        "methods": {},
    }
    marked_by: dict[str, Images] = {}
    for name, (embed, read) in methods(message).items():
        method: dict[str, Any] = {"detected": {}}
        result["methods"][name] = method
        started = time.perf_counter()
        marked = marked_by[name] = np.stack([embed(image) for image in images])
        method["embedded_per_second"] = len(images) / (time.perf_counter() - started)
        error = ((marked.astype(np.float64) - images) ** 2).mean((1, 2, 3))
        method["psnr"] = float(np.mean(10 * np.log10(255**2 / np.maximum(error, 1e-9))))
        report(result)
        for change, apply in CHANGES.items():
            method["detected"][change] = detected((apply(image) for image in marked[:few]), read)
            report(result)
        method["false_positives_unmarked"] = detected(images[:few], read)
        method["false_positives"] = detected(photographs, read)
        report(result)
    of_real, of_plain = moments(photographs), moments(images)
    result["fd_unmarked"] = frechet_of_moments(*of_real, *of_plain)
    with Classifier(bundle, device="cpu") as classifier:
        before = classifier.classify(images, features=False).calibrated
        threshold = classifier.description.threshold("default")
        for name, marked in marked_by.items():
            after = classifier.classify(marked, features=False).calibrated
            of_marked = moments(marked)
            result["methods"][name] |= {
                "fd": frechet_of_moments(*of_real, *of_marked),
                "fd_to_unmarked": frechet_of_moments(*of_plain, *of_marked),
                "probability_change": float(np.abs(after - before).mean()),
                "other_class": float(((after >= threshold) != (before >= threshold)).mean()),
            }
            report(result)
    return result


def false_positives(bundle: Bundle, photographs: Iterable[Images]) -> tuple[dict[str, int], int]:
    """The number of real images in which each method detects the mark of a bundle, and the number of images."""
    message, limit, total = _message(bundle).astype(bool), needed_bits(), 0
    ways = methods(_message(bundle))
    found = dict.fromkeys(ways, 0)
    for image in photographs:
        total += 1
        for name, (_, read) in ways.items():
            found[name] += int((read(image) == message).sum()) >= limit
    return found, total


def _message(bundle: Bundle) -> NDArray[np.uint8]:
    return np.unpackbits(np.frombuffer(bytes.fromhex(bundle.digest[:8]), np.uint8))


def table(result: Mapping[str, Any]) -> str:
    """The result in Markdown."""
    measured = result["methods"]
    rows = [["", *measured], ["---"] * (len(measured) + 1)]
    for change in CHANGES:
        rows.append(
            [f"detected, change: {change}", *(f"{method['detected'][change]:.1%}" for method in measured.values())]
        )
    for label, key, form in (
        (f"false positives, {result['real']:,} real images", "false_positives", ".2%"),
        ("false positives, unmarked generated images", "false_positives_unmarked", ".2%"),
        ("PSNR in dB", "psnr", ".1f"),
        (f"FD to real images in lite0 (unmarked: {result['fd_unmarked']:.2f})", "fd", ".2f"),
        ("FD between marked and unmarked images", "fd_to_unmarked", ".2f"),
        ("mean change of the classifier's probability", "probability_change", ".4f"),
        ("images whose predicted class changes", "other_class", ".2%"),
        ("images embedded per second", "embedded_per_second", ".0f"),
    ):
        rows.append([label, *(format(method[key], form) for method in measured.values())])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    """Measure, print the table, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of real images")
    parser.add_argument("--bundle", default="demo")
    parser.add_argument("--count", type=int, default=2000, help="generated images")
    parser.add_argument("--few", type=int, default=500, help="generated images for detection after changes")
    parser.add_argument("--real", type=int, help="real images; default: all")
    parser.add_argument("--enlarge", type=int, help="side to which all images are enlarged first")
    parser.add_argument("--only-false-positives", action="store_true", help="measure nothing else")
    parser.add_argument(
        "--size", type=int, help="with --only-false-positives: side of the real images; default: the bundle's"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    bundle = open_bundle(arguments.bundle)
    size = bundle.generator.img_resolution
    if arguments.only_false_positives:
        size = arguments.size or size
        counts, total = false_positives(bundle, real(arguments.data, size, arguments.real))
        for name, count in counts.items():
            print(f"{name}: {count} of {total:,} real images of {size} px")
        return
    images, photographs = generated(bundle, arguments.count), np.stack(list(real(arguments.data, size, arguments.real)))
    if arguments.enlarge is not None:
        images, photographs = enlarged(images, arguments.enlarge), enlarged(photographs, arguments.enlarge)

    shown: set[str] = set()

    def report(so_far: Mapping[str, Any]) -> None:
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(so_far, indent=2) + "\n")
        for name, method in so_far["methods"].items():
            for label, value in ({**method, "detected": None} | method["detected"]).items():
                if value is not None and (line := f"{name}, {label}: {value:.4g}") not in shown:
                    shown.add(line)
                    print(f"{time.perf_counter() - started:6.0f} s  {line}", flush=True)

    started = time.perf_counter()
    result = measure(bundle, images, photographs, arguments.few, report)
    print(table(result))
    print(f"{result['needed_bits']} of {BITS} bits must agree; {result['resolution']} px")


if __name__ == "__main__":
    main()
