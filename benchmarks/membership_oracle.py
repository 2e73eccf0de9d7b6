"""Membership inference by many uploads to /v1/authenticity: `python -m benchmarks.membership_oracle --data DIR ...`.

An attacker has a changed copy (JPEG of quality 50) of each of N training images and N other images. It uploads further changed
copies of this copy and combines the answers: their mean, their minimum, or a logistic regression on their quantiles and on the
share of authentic answers, fitted to the other images. The tables have the AUC of the best of the three at each number of
uploads of an image and at each rounding of distances, with and without repeating the answer on similar images. Lightly changed
copies vary the answer as little as possible; evading copies are turned, cropped, squeezed or distorted just so much that few of
them are recognised as copies.

The answers are computed as in the service (`services.gateway.compared`), each image by a tenant of its own.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from dermis.authenticity.checker import Checker
from dermis.authenticity.transformations import compress, resized
from dermis.classifier.preprocess import to_input
from dermis.image_reading import read_image
from dermis.imaging import Images
from dermis.metrics.classification import auc
from dermis.perceptual_hash import Hashes, fingerprints, turned_and_mirrored
from dermis.privacy.classifiers import cross_validated
from services.gateway.compared import SAME_BITS, ComparedImages
from services.jobs.table import JobTable

_DAY = 86_400.0
STEPS = (0.01, 0.05, 0.1, 0.25)
COUNTS = (1, 10, 60, 100)
_BICUBIC = Image.Resampling.BICUBIC
_FLOOR = 0.02  # of distances in logarithms
_UNUSED = np.random.default_rng(0)

Change = Callable[[Images, np.random.Generator], Images]
Floats = NDArray[np.float64]


def lightly(image: Images, rng: np.random.Generator) -> Images:
    """Crop to at least 94 %, and blur, relight, add noise or compress a little; every second time mirrored."""
    side = len(image)
    if rng.random() < 0.5:
        image = image[:, ::-1]
    kept = rng.uniform(0.94, 1) * side
    left, top = rng.uniform(0, side - kept, 2)
    picture = _cut(_picture(image), (left, top, left + kept, top + kept), side)
    if rng.random() < 0.5:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.8)))
    values = np.asarray(picture).astype(np.float32) * rng.uniform(0.95, 1.05)
    values += rng.normal(0, rng.uniform(0, 3), values.shape).astype(np.float32)
    changed: Images = np.clip(values + 0.5, 0, 255).astype(np.uint8)
    return compress(changed, rng, int(rng.integers(60, 100))) if rng.random() < 0.7 else changed


def evading(image: Images, rng: np.random.Generator) -> Images:
    """Crop at a corner, turn by 3 to 12 degrees, squeeze or distort; every second time mirrored."""
    side = len(image)
    if rng.random() < 0.5:
        image = image[:, ::-1]
    picture, kind = _picture(image), rng.integers(0, 4)
    if kind == 0:
        kept = rng.uniform(0.82, 0.94) * side
        left, top = rng.choice([0.0, side - kept], 2)
        return np.asarray(_cut(picture, (left, top, left + kept, top + kept), side))
    if kind == 1:
        angle = rng.uniform(3, 12) * rng.choice([-1, 1])
        radians = np.deg2rad(abs(angle))
        border = (side - side / (np.cos(radians) + np.sin(radians))) / 2
        box = (border, border, side - border, side - border)
        return np.asarray(_cut(picture.rotate(angle, _BICUBIC), box, side))
    if kind == 2:
        width = rng.uniform(0.82, 0.93) * side
        left = rng.choice([0.0, side - width])
        box = (left, 0.0, left + width, side) if rng.random() < 0.5 else (0.0, left, side, left + width)
        return np.asarray(_cut(picture, box, side))
    moved = rng.uniform(0, 0.1, 8) * side
    corners = (*moved[:3], *(side - moved[3:7]), moved[7])  # top left, bottom left, bottom right, top right
    return np.asarray(picture.transform((side, side), Image.Transform.QUAD, corners, _BICUBIC))


CHANGES: Mapping[str, Change] = {"lightly changed": lightly, "evading": evading}


def _picture(image: Images) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image))


def _cut(picture: Image.Image, box: tuple[float, float, float, float], side: int) -> Image.Image:
    return picture.resize((side, side), _BICUBIC, box=box)


@dataclass(frozen=True)
class Answers:
    """What the index answers on Q copies of N images, training images first. Distances and radii are [N, Q]."""

    distances: Floats
    radii: Floats
    marks: Hashes
    """Fingerprints [N, Q, 4]."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """1 for training images, 0 for others."""
        count = len(self.distances)
        return (np.arange(count) < count // 2).astype(np.int64)


def ask(checker: Checker, images: Sequence[Images], change: Change | None, uploads: int) -> Answers:
    """Compare changed copies of images.

    Args:
        checker: The index.
        images: Copies that the attacker has.
        change: Makes another copy; None if there is only one upload.
        uploads: Number of copies of each image; the first is the image itself.
    """
    distances, radii, marks = [], [], []
    for number, image in enumerate(images):
        rng = np.random.default_rng([1, number])
        square = to_input(image, checker.description.resolution)
        copies = [square]
        if change is not None:
            copies += [change(square, rng) for _ in range(uploads - 1)]
        nearest = checker.index.nearest(checker.embed(np.stack(copies)))
        distances.append(nearest.distances.astype(np.float64))
        radii.append(nearest.radii.astype(np.float64))
        marks.append(fingerprints(copies))
    return Answers(np.stack(distances), np.stack(radii), np.stack(marks))


def repeated(answers: Answers) -> Answers:
    """Return the answers of a service that repeats its answer on similar images, each image by a tenant of its own."""
    distances, radii = np.empty_like(answers.distances), np.empty_like(answers.radii)
    rows = zip(answers.marks, answers.distances.astype(np.float32), answers.radii.astype(np.float32), strict=True)
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/jobs.db"
        table = JobTable(url)
        table.open()
        kept = ComparedImages(url, _DAY, answers.marks.shape[1])
        for number, row in enumerate(rows):
            given = kept.answer((f"tenant-{number}", "index"), *row)
            distances[number], radii[number] = given.distances, given.radii
        kept.close()
        table.close()
    return Answers(distances, radii, answers.marks)


def best_auc(answers: Answers, uploads: int, step: float) -> float:
    """AUC of the best attack on the first uploads of each image, with distances rounded to multiples of `step`."""
    distances = np.round(answers.distances[:, :uploads] / step) * step
    authentic = (answers.distances > answers.radii)[:, :uploads].astype(np.float64)
    quantiles = np.quantile(distances, [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1], axis=1).T
    columns = [
        *quantiles.T,
        *np.log(quantiles + _FLOOR).T,
        *(distances.mean(axis=1), distances.std(axis=1), authentic.mean(axis=1), distances[:, 0], authentic[:, 0]),
    ]
    learned = cross_validated(np.stack(columns, axis=1), answers.labels, np.arange(len(distances)), seed=0)
    scores = (-distances.mean(axis=1), -distances.min(axis=1), learned)
    return max(float(auc(answers.labels, score)[0]) for score in scores)


def recognised(answers: Answers) -> float:
    """Share of the further copies whose fingerprint resembles that of the first copy."""
    positions = turned_and_mirrored(answers.marks[:, 0])  # [N, 8, 4]
    differing = np.bitwise_count(positions[:, :, None] ^ answers.marks[:, None, 1:]).sum(axis=3).min(axis=1)
    return float((differing <= SAME_BITS).mean())


def confused(images: Sequence[Images]) -> float:
    """Share of the pairs of different images whose fingerprints resemble each other."""
    marks = fingerprints(images)
    pairs = 0
    for number, positions in enumerate(turned_and_mirrored(marks)):
        differing = np.bitwise_count(marks[number + 1 :, None] ^ positions).sum(axis=2).min(axis=1)
        pairs += int((differing <= SAME_BITS).sum())
    return pairs / (len(marks) * (len(marks) - 1) / 2)


def single_uploads(checker: Checker, images: Sequence[Images]) -> dict[str, float]:
    """AUC of one upload of each image, by how the file was changed."""
    half = [resized(image, (image.shape[1] // 2, image.shape[0] // 2)) for image in images]
    files = {
        "the exact file": images,
        "saved again as JPEG of quality 90": [compress(image, _UNUSED, 90) for image in images],
        "saved again as JPEG of quality 75": [compress(image, _UNUSED, 75) for image in images],
        "mirrored": [image[:, ::-1] for image in images],
        "saved again as JPEG of quality 50": [compress(image, _UNUSED, 50) for image in images],
        "at half size, as JPEG of quality 30": [compress(image, _UNUSED, 30) for image in half],
    }
    results = {}
    for name, changed in files.items():
        answers = ask(checker, changed, None, 1)
        results[name] = float(auc(answers.labels, -answers.distances[:, 0])[0])
    return results


def read_images(data: Path, table: Path, count: int) -> list[Images]:
    """Read images drawn at random from a table of the training or of other images."""
    with table.open() as file:
        names = [row["isic_id"] for row in csv.DictReader(file)]
    chosen = np.random.default_rng(0).permutation(len(names))[:count]
    return [read_image((data / f"{names[number]}.jpg").read_bytes()) for number in chosen]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all attacks."""
    images = [
        image
        for table in (arguments.members, arguments.non_members)
        for image in read_images(arguments.data, table, arguments.count)
    ]
    copies = [compress(image, _UNUSED, 50) for image in images]
    uploads = max(COUNTS)
    with Checker(arguments.bundle, device="cpu", threads=arguments.threads) as checker:
        document: dict[str, Any] = {"images": len(images), "single": single_uploads(checker, images), "attacks": {}}
        squares = [to_input(image, checker.description.resolution) for image in images]
        document["confused"] = confused(squares)
        for name, change in CHANGES.items():
            answers = ask(checker, copies, change, uploads)
            protected = repeated(answers)
            document["attacks"][name] = {
                "recognised": recognised(answers),
                "answers": float(np.mean([len(np.unique(row)) for row in protected.distances])),
                "alone": {step: {n: best_auc(answers, n, step) for n in COUNTS} for step in STEPS},
                "repeated": {step: {n: best_auc(protected, n, step) for n in COUNTS} for step in STEPS},
            }
    return document


def main() -> None:
    """Print the tables of docs/privacy.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="bundles/demo")
    parser.add_argument("--data", type=Path, required=True, help="folder of the images, named ISIC_ID.jpg")
    parser.add_argument("--members", type=Path, required=True, help="CSV of the training images")
    parser.add_argument("--non-members", type=Path, required=True, help="CSV of other images")
    parser.add_argument("--count", type=int, default=500, help="number of images of each kind")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    document = measure(arguments)
    if arguments.json:
        print(json.dumps(document, indent=2))
        return
    print("| uploaded image | AUC |\n| --- | --- |")
    for name, value in document["single"].items():
        print(f"| {name} | {value:.2f} |")
    print(f"\npairs of different images that are confused: {document['confused']:.2g}")
    for name, attack in document["attacks"].items():
        print(f"\n{name}: {attack['recognised']:.1%} recognised, {attack['answers']:.1f} different answers\n")
        print("| rounding | answers | " + " | ".join(f"{count} uploads" for count in COUNTS) + " |")
        print("| --- " * (2 + len(COUNTS)) + "|")
        for step in STEPS:
            for kind in ("alone", "repeated"):
                cells = " | ".join(f"{value:.2f}" for value in attack[kind][step].values())
                print(f"| {step:g} | {kind} | {cells} |")


if __name__ == "__main__":
    main()
