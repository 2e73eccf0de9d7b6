"""Classify images and save heat maps of what raises and what lowers the probability of the positive class.

Start a service first (`make serve`), then run

    python examples/classify_with_heat_map.py photo.jpg --out heat-maps

It needs only the package `dermis-client`. Without images it classifies a generated one. A heat map takes a few seconds.
Not a medical device: for research only.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dermis_client import DermisClient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", type=Path, help="PNG, JPEG or WebP files")
    parser.add_argument("--url", default="http://127.0.0.1:3000", help="address of the service")
    parser.add_argument("--out", type=Path, default=Path("heat-maps"), help="folder for the heat maps")
    parser.add_argument("--method", default="xrai", choices=["xrai", "integrated-gradients"])
    parser.add_argument("--threshold", default="default", help="name of one of the classifier's thresholds")
    args = parser.parse_args()

    with DermisClient(args.url) as client:
        images = args.images
        if not images:
            model = next(model for model in client.models.list() if model.default)
            images = client.images.generate({model.classes[-1]: 1}, seed=3).save(args.out)
        result = client.classifications.create(images, threshold=args.threshold, heat_map=args.method)

    for image in result:
        print(f"{image.name}: {image.class_name}, {result.positive_class} with probability {image.calibrated:.3f}")
    for path in result.save_heat_maps(args.out):
        print(f"heat map: {path}")
    print(result.notice)


if __name__ == "__main__":
    main()
