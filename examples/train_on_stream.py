"""Train a classifier on a stream of generated images, without a dataset on disk.

Start a service first (`make serve`), then run

    python examples/train_on_stream.py --samples 2000 --out classifier.pt

It needs `dermis-client[torch]`. The images are generated while the model trains, and each epoch has new ones. The last
line is the accuracy on generated images that it was not trained on. Whether it recognises real lesions can be measured on real
images alone: `dermis experiment` does it (docs/experiments.md).
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from dermis_client import DermisClient
from dermis_client.torch import SyntheticIterable
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader


def small_network(classes: int) -> nn.Module:
    """A small convolutional network; replace it by a model of timm or torchvision."""
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:3000", help="address of the service")
    parser.add_argument("--samples", type=int, default=2000, help="images of an epoch, half of them of each class")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1, help="processes that fetch and decode images")
    parser.add_argument("--out", type=Path, default=Path("classifier.pt"))
    args = parser.parse_args()

    client = partial(DermisClient, args.url)
    with client() as connection:
        classes = next(model for model in connection.models.list() if model.default).classes
    stream = SyntheticIterable(dict.fromkeys(classes, 1), samples=args.samples, seed=1, client=client)
    loader = DataLoader(stream, batch_size=args.batch_size, num_workers=args.workers)

    network = small_network(len(classes))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    network.train()
    for epoch in range(args.epochs):
        stream.set_epoch(epoch)
        for step, (images, labels) in enumerate(loader):
            loss = cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if step % 20 == 0:
                print(f"epoch {epoch}, step {step}: loss {loss.item():.3f}")
    torch.save({"classes": list(classes), "weights": network.state_dict()}, args.out)

    stream.set_epoch(args.epochs)
    network.eval()
    with torch.inference_mode():
        right = sum(int((network(images).argmax(1) == labels).sum()) for images, labels in loader)
    print(f"{args.out}: {right / args.samples:.1%} of {args.samples} new generated images are classified as requested")


if __name__ == "__main__":
    main()
