"""Read a generated dataset with a torch DataLoader.

Start a service first (`make serve`), then run

    python examples/torch_dataloader.py --out lesions

It needs `dermis-client` and torch. The dataset is downloaded if the folder does not have it yet. Its images are read from
images/CLASS, and its labels from metadata.csv. (torchvision's `ImageFolder("lesions/images")` reads the images as well.)
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from dermis_client import DermisClient
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class SyntheticLesions(Dataset[tuple[Tensor, int]]):
    """Images float32 [3, H, W] in [0, 1] with their labels, of an extracted dataset in the format imagefolder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with (folder / "metadata.csv").open(newline="") as file:
            self.rows = list(csv.DictReader(file))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        row = self.rows[place]
        with Image.open(self.folder / row["file_name"]) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB")))
        return pixels.permute(2, 0, 1) / 255, int(row["label"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:3000", help="address of the service")
    parser.add_argument("--out", type=Path, default=Path("lesions"), help="folder of the dataset")
    parser.add_argument("--count", type=int, default=50, help="images of each class")
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()

    if not (args.out / "images").exists():
        with DermisClient(args.url) as client:
            model = next(model for model in client.models.list() if model.default)
            dataset = client.datasets.create(dict.fromkeys(model.classes, args.count), seed=7)
            dataset.wait(progress=True).download(args.out, extract=True)

    loader = DataLoader(SyntheticLesions(args.out), batch_size=args.batch_size, shuffle=True)
    for images, labels in loader:
        print(f"images {tuple(images.shape)}, mean {images.mean():.3f}, labels {labels.tolist()}")


if __name__ == "__main__":
    main()
