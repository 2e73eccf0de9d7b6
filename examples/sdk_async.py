"""Generate several datasets at the same time with the asynchronous SDK.

Start a service first (`make serve`), then run

    python examples/sdk_async.py --out synthetic --datasets 2

It needs only the package `dermis-client`. The datasets are in the folders synthetic-1, synthetic-2, ... afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from dermis_client import AsyncDermisClient


async def generate(client: AsyncDermisClient, classes: dict[str, int], seed: int, folder: Path) -> str:
    """Create one dataset, print its progress, and download it into `folder`."""
    dataset = await client.datasets.create(classes, seed=seed)
    async for event in dataset.events():
        progress = event.dataset.progress
        print(f"{folder}: {event.dataset.state}, {progress.samples_done} of {progress.samples_total} images")
    dataset = await dataset.wait()  # raises DatasetFailed with the reason if there is no result
    download = await dataset.download(folder, extract=True)
    return f"{download.images} images in {download.folder}"


async def run(args: argparse.Namespace) -> None:
    async with AsyncDermisClient(args.url) as client, asyncio.TaskGroup() as group:
        model = next(model for model in await client.models.list() if model.default)
        classes = dict.fromkeys(model.classes, args.count)
        tasks = [
            group.create_task(generate(client, classes, seed, Path(f"{args.out}-{seed}")))
            for seed in range(1, args.datasets + 1)
        ]
    for task in tasks:
        print(task.result())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:3000", help="address of the service")
    parser.add_argument("--out", default="synthetic", help="beginning of the folders' names")
    parser.add_argument("--datasets", type=int, default=2, help="number of datasets; dataset i has the seed i")
    parser.add_argument("--count", type=int, default=50, help="images of each class in each dataset")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
