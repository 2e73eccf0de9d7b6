"""Generate a dataset with the SDK: create it, wait for it, download it, verify it.

Start a service first (`make serve`), then run

    python examples/sdk_sync.py --out lesions

It needs only the package `dermis-client`. The images are in lesions/images/CLASS afterwards, and lesions-grid.png
shows a few more images that were generated directly.
"""

from __future__ import annotations

import argparse

from dermis_client import DermisClient, verify


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:3000", help="address of the service")
    parser.add_argument("--out", default="lesions", help="folder for the dataset")
    parser.add_argument("--count", type=int, default=50, help="images of each class")
    parser.add_argument("--seed", type=int, default=7, help="the same seed gives the same images")
    args = parser.parse_args()

    with DermisClient(args.url) as client:
        model = next(model for model in client.models.list() if model.default)
        print(f"model {model.name}: {model.resolution} px, classes {', '.join(model.classes)}")

        # A dataset is a job: `create` returns at once, `wait` until all images are there.
        dataset = client.datasets.create(dict.fromkeys(model.classes, args.count), seed=args.seed)
        dataset = dataset.wait(progress=True)
        download = dataset.download(args.out, extract=True, progress=True)
        print(f"{download.images} images in {download.folder}")

        # A few images at once, without a job.
        result = client.images.generate(dict.fromkeys(model.classes, 4), seed=args.seed)
        result.grid(columns=4).save(f"{args.out}-grid.png")

    # The manifest in the folder lists the SHA-256 of every file, so a copy can be verified without the service.
    report = verify(args.out)
    print("every file is intact" if report else f"changed: {report.changed}, missing: {report.missing}")


if __name__ == "__main__":
    main()
