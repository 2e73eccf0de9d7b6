"""Train a small generator on a folder of images, and generate images with its bundle.

    python examples/train_generator.py --data lesions/images --out runs/example

--data is any source that `dermis data` reads, such as a folder with one sub-folder for each class. The default is the
folder that sdk_sync.py downloads: enough to try the code, but train on real images for anything else. The defaults make a
network that is far too small and a training that is far too short for good images; `dermis train gan` has all options.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from dermis.bundle import open_bundle
from dermis.image_metadata import origin_of
from dermis.imaging import contact_sheet, encode
from dermis.synthesizer import Synthesizer
from training.data.images import load_images
from training.data.sources import read_source
from training.gan.config import base_config
from training.gan.loop import train
from training.gan.snapshot import GeneratorOrigin, write_snapshot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("lesions/images"), help="folder of training images")
    parser.add_argument("--out", type=Path, default=Path("runs/example"), help="folder of the run")
    parser.add_argument("--resolution", type=int, default=32, help="image side in pixels, a power of two")
    parser.add_argument("--kimg", type=float, default=2.0, help="thousands of images to show to the discriminator")
    parser.add_argument("--channels", type=int, default=64, help="most channels of a layer")
    args = parser.parse_args()
    device = torch.device("cpu")

    dataset = load_images(read_source(args.data), args.resolution)
    width = {"channel_base": args.channels * 16, "channel_max": args.channels, "z_dim": 64, "w_dim": 64}
    config = base_config("auto", args.resolution, len(dataset.class_names), total_kimg=args.kimg, batch=16, **width)
    origin = GeneratorOrigin(name="example", dataset_name=args.data.name, licence="unknown", attribution="")
    train(dataset, config, args.out, device=device, on_snapshot=write_snapshot(dataset, config, origin, device))

    bundle = open_bundle(args.out / "bundle")
    labels = [label for label in range(len(bundle.class_names)) for _ in range(8)]
    with Synthesizer(bundle, device="cpu") as synthesizer:
        images = synthesizer.images([0] * len(labels), range(len(labels)), labels)
    sheet = encode(contact_sheet(images, columns=8), origin=origin_of(bundle))
    (args.out / "generated.png").write_bytes(sheet)
    print(f"{args.out / 'bundle'}: {bundle.name}@{bundle.digest[:12]}; images in {args.out / 'generated.png'}")


if __name__ == "__main__":
    main()
