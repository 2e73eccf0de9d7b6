"""Speed of projection: `python -m benchmarks.projection [--json] [--bundle B] [--images DIR] [--distance NAME]`.

The official schedule (1,000 steps in w from the mean, float32, one image at a time) is compared with those of dermis, on the
same images and in the same distance: the official schedule with many images at once, the short schedule from the mean, and
the short one from the encoder. The official one takes about a minute per image on a CPU, so it is measured only on
`--official` images, and quality is compared on these. All steps of a schedule take the same time, so a rate does not depend
on the images. Without --images, generated images of the bundle are projected. These are easier, so use them only for speed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dermis.bundle import Bundle, load_generator, open_bundle
from dermis.cpus import available_cpus
from dermis.devices import describe_hardware, resolve_device
from dermis.errors import DermisError
from dermis.imaging import Images
from dermis.projection.encoder import load_encoder
from dermis.projection.perceptual import Perceptual, perceptual
from dermis.projection.projector import ImageProjector, Target
from dermis.projection.result import Projection
from dermis.projection.schedule import FAST, OFFICIAL, Schedule

BUNDLE = Path("bundles/demo")
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def targets_of(bundle: Bundle, folder: Path | None, count: int) -> list[Images]:
    """Real images, evenly chosen from a folder, or generated ones."""
    size = bundle.generator.img_resolution
    if folder is None:
        from dermis.synthesizer import Synthesizer

        with Synthesizer(bundle) as synthesizer:
            classes = max(bundle.generator.c_dim, 1)
            return list(synthesizer.images([99] * count, range(count), [i % classes for i in range(count)]))
    from dermis.image_reading import read_image

    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    chosen = [files[i] for i in np.linspace(0, len(files) - 1, count).round().astype(int)]
    return [read_image(path.read_bytes(), size=size) for path in chosen]


def lpips_or_none(device: str) -> Perceptual | None:
    """LPIPS on VGG16, or None if its weights are not available."""
    try:
        return perceptual("vgg16", resolve_device(device))
    except DermisError:
        return None


def mean_distance(
    distance: Perceptual, images: Sequence[Images], projections: Sequence[Projection], device: str
) -> float:
    """Mean distance between images and their projections."""
    rows = [
        distance.embed(torch.from_numpy(np.stack(group)).permute(0, 3, 1, 2).float().to(resolve_device(device)))
        for group in (images, [each.image for each in projections])
    ]
    return float((rows[0] - rows[1]).square().sum(dim=1).mean())


def measure(
    name: str,
    projector: ImageProjector,
    schedule: Schedule,
    images: Sequence[Images],
    shared: int,
    lpips: Perceptual | None,
    device: str,
) -> dict[str, Any]:
    """Measure the speed of one schedule on all of `images`, and its quality on the first `shared` of them."""
    list(projector.project([Target(images[0])], replace(schedule, steps=3)))  # compiles and allocates
    start = time.perf_counter()
    by_number = dict(projector.project([Target(image) for image in images], schedule))
    seconds = time.perf_counter() - start
    projections = [by_number[number] for number in range(shared)]
    return {
        "name": name,
        "images": len(images),
        "steps": schedule.steps,
        "space": schedule.space,
        "start": schedule.start,
        "seconds_per_image": seconds / len(images),
        "distance": float(np.mean([each.distance for each in projections])),
        "pixel_error": float(np.mean([each.pixel_error for each in projections])),
        "lpips": None if lpips is None else mean_distance(lpips, images[:shared], projections, device),
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all measurements, the official schedule first."""
    bundle = open_bundle(arguments.bundle)
    generator = load_generator(bundle)
    images = targets_of(bundle, arguments.images, max(arguments.count, arguments.official))
    few = images[: arguments.official]
    encoder = load_encoder(bundle, device=arguments.device)
    common: dict[str, Any] = {"distance": arguments.distance, "device": arguments.device, "generator": generator}
    one = ImageProjector(bundle, **common, batch_size=1, dtype="float32")
    many = ImageProjector(bundle, **common, encode=encoder)
    shared, lpips = len(few), lpips_or_none(arguments.device)
    rows = [
        measure("official, one at a time", one, OFFICIAL, few, shared, lpips, arguments.device),
        measure(f"official, {many.batch_size} at once", many, OFFICIAL, images, shared, lpips, arguments.device),
        measure("fast from the mean", many, FAST, images, shared, lpips, arguments.device),
    ]
    if encoder is not None:
        for steps in (100, 50):
            schedule = replace(FAST, start="encoder", steps=steps)
            rows.append(
                measure(f"fast from the encoder, {steps}", many, schedule, images, shared, lpips, arguments.device)
            )
    official = rows[0]
    for row in rows:
        row["ratio"] = official["seconds_per_image"] / row["seconds_per_image"]
    good = [row for row in rows[1:] if row["distance"] <= official["distance"]]
    return {
        "bundle": f"{bundle.name}@{bundle.digest[:12]}",
        "resolution": bundle.generator.img_resolution,
        "hardware": describe_hardware(resolve_device(arguments.device)),
        "cores": available_cpus(),
        "distance": arguments.distance,
        "real_images": arguments.images is not None,
        "ways": rows,
        "ratio_to_official_schedule": max((row["ratio"] for row in good), default=None),
    }


def main() -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--images", type=Path, help="folder of real images")
    parser.add_argument("--count", type=int, default=16, help="number of images for the faster schedules")
    parser.add_argument("--official", type=int, default=4, help="number of images for the official schedule")
    parser.add_argument("--distance", default="lite0", help="lite0 or vgg16")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    document = run(arguments)
    if arguments.json:
        print(json.dumps(document, indent=2))
        return
    kind = "real" if document["real_images"] else "generated"
    print(f"{document['bundle']}, {document['resolution']} px, {kind} images, {document['hardware']}")
    print(f"{'':<30}{'s/image':>9}{'ratio':>7}{document['distance']:>9}{'pixels':>8}{'LPIPS':>8}")
    for row in document["ways"]:
        lpips_text = "-" if row["lpips"] is None else f"{row['lpips']:.3f}"
        print(
            f"{row['name']:<30}{row['seconds_per_image']:>9.2f}{row['ratio']:>7.1f}{row['distance']:>9.3f}"
            f"{row['pixel_error']:>8.1f}{lpips_text:>8}"
        )
    ratio = document["ratio_to_official_schedule"]
    print(f"ratio_to_official_schedule at equal or better distance: {'none' if ratio is None else f'{ratio:.1f}'}")


if __name__ == "__main__":
    main()
