"""Cost of metadata (XMP) and signed manifests (C2PA): `python -m benchmarks.provenance [--json] [--bundle B] [--count N]`.

Images of the bundle are encoded on one core without metadata, with XMP, and with XMP and a manifest that is signed by a key on
P-256. The methods take turns, and each rate is the median of the rounds, because other work on the machine changes its speed.
The generator is measured in the same rounds on one core: the last column is the share of its time that marking adds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from benchmarks import DEMO
from benchmarks.signers import make_signer
from dermis.bundle import open_bundle
from dermis.cpus import cpu_identity
from dermis.image_metadata import origin_of
from dermis.imaging import ImageFormat, encode
from dermis.provenance.c2pa import ImageSigner, ImageVerifier
from dermis.synthesizer import Synthesizer


def measure(location: str, count: int, rounds: int) -> dict[str, Any]:
    """Measure all formats with `count` images of a bundle."""
    bundle = open_bundle(location)
    labels = [index % max(1, len(bundle.class_names)) for index in range(count)]
    with tempfile.TemporaryDirectory() as folder, Synthesizer(bundle, device="cpu", threads=1) as synthesizer:
        own = make_signer(Path(folder) / "signer")
        signer, verifier = ImageSigner(own.certificate, own.key), ImageVerifier([own.authority])

        def generate() -> Any:
            return synthesizer.images([0] * count, range(count), labels)

        images = generate()
        origins = [origin_of(bundle).of_sample(0, index) for index in range(count)]
        sizes: dict[str, int] = {}

        def encoded(kind: ImageFormat, xmp: bool, signed: bool) -> Callable[[], list[bytes]]:
            def run() -> list[bytes]:
                files = []
                for image, origin in zip(images, origins, strict=True):
                    data = encode(image, kind, origin=origin if xmp else None)
                    files.append(signer.sign(data, kind, origin) if signed else data)
                return files

            return run

        methods: dict[str, Callable[[], Any]] = {"generator": generate}
        for kind in get_args(ImageFormat):
            for name, xmp, signed in (("plain", False, False), ("XMP", True, False), ("XMP and C2PA", True, True)):
                methods[f"{kind}, {name}"] = encoded(kind, xmp, signed)
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        for number in range(rounds + 1):
            for name, method in methods.items():
                start = time.perf_counter()
                files = method()
                if number:
                    seconds[name].append(time.perf_counter() - start)
                elif name != "generator":
                    sizes[name] = round(sum(map(len, files)) / count)
                    states = {verifier.verify(data).state for data in files[:5]}
                    if states != {"signed" if "C2PA" in name else "unsigned"}:
                        raise SystemExit(f"{name}: the images are {states}")
    per_image = {name: statistics.median(values) / count for name, values in seconds.items()}
    rows = [
        {
            "method": name,
            "images_per_second": 1 / value,
            "bytes": sizes.get(name),
            "added_share_of_generator": None
            if name == "generator"
            else (value - per_image[f"{name.partition(',')[0]}, plain"]) / per_image["generator"],
        }
        for name, value in per_image.items()
    ]
    return {
        "processor": cpu_identity(),
        "bundle": bundle.name,
        "resolution": len(images[0]),
        "images": count,
        "rows": rows,
    }


def main() -> None:
    """Measure and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default=str(DEMO))
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_args()
    result = measure(arguments.bundle, arguments.count, arguments.rounds)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['bundle']}, {result['resolution']} px, one core of {result['processor']['processor']}")
    for row in result["rows"]:
        share = row["added_share_of_generator"]
        more = "" if share is None else f"  {row['bytes']:7,} bytes  {share:6.1%} of the generator's time added"
        print(f"{row['method']:20} {row['images_per_second']:9,.1f} images/s{more}")


if __name__ == "__main__":
    main()
