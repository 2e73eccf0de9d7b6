"""Read a generated dataset with a torch DataLoader.

Start a service first (`make serve`), then run

    python examples/torch_dataloader.py --out lesions

It needs `dermis-client[torch]`. The dataset is downloaded if the folder does not have it yet. (With `download(extract=True)`,
torchvision's `ImageFolder("lesions/images")` reads the images as well.)
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dermis_client import DermisClient
from dermis_client.torch import SyntheticDataset
from torch.utils.data import DataLoader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:3000", help="address of the service")
    parser.add_argument("--out", type=Path, default=Path("lesions"), help="folder of the dataset")
    parser.add_argument("--count", type=int, default=50, help="images of each class")
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()

    if not (args.out / "images.zip").exists():
        with DermisClient(args.url) as client:
            model = next(model for model in client.models.list() if model.default)
            dataset = client.datasets.create(dict.fromkeys(model.classes, args.count), seed=7)
            dataset.wait(progress=True).download(args.out)

    loader = DataLoader(SyntheticDataset(args.out), batch_size=args.batch_size, shuffle=True)
    for images, labels in loader:
        print(f"images {tuple(images.shape)}, mean {images.mean():.3f}, labels {labels.tolist()}")


if __name__ == "__main__":
    main()
