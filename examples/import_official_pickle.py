"""Make a bundle from an official StyleGAN2-ADA (PyTorch) pickle, without executing anything in the pickle.

    python examples/import_official_pickle.py network-snapshot-000120.pkl bundles/mine --classes benign malignant

`dermis bundle import` does the same and writes a fuller model card. The service serves the bundle with
`DERMIS_BUNDLES=bundles/mine make serve`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dermis.bundle import write_bundle
from dermis.image_metadata import origin_of
from dermis.imaging import contact_sheet, encode
from dermis.official.convert import read_official
from dermis.synthesizer import Synthesizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="official .pkl file")
    parser.add_argument("out", type=Path, help="folder of the new bundle")
    parser.add_argument("--name", default="imported", help="name of the bundle")
    parser.add_argument("--classes", nargs="*", default=[], help="names of the labels 0, 1, ...")
    parser.add_argument("--licence", default="unknown", help="licence of the weights")
    parser.add_argument("--preview", type=Path, help="write a sheet of images here")
    args = parser.parse_args()

    checkpoint = read_official(args.checkpoint)  # in a separate process with limits of time and memory
    source = {"format": "StyleGAN2-ADA (PyTorch) pickle", "file": args.checkpoint.name, "sha256": checkpoint.sha256}
    bundle = write_bundle(
        args.out,
        name=args.name,
        generator=checkpoint.generator,
        discriminator=checkpoint.discriminator,  # None if it has another architecture
        class_names=args.classes,
        provenance={"source": source, "licence": args.licence, "attribution": ""},
        model_card=f"# {args.name}\n\nImported from `{args.checkpoint.name}`. Licence: {args.licence}.\n",
    )
    print(f"{args.out}: {bundle.name}@{bundle.digest}, classes {', '.join(bundle.class_names) or 'none'}")

    if args.preview:
        classes = max(len(bundle.class_names), 1)
        with Synthesizer(bundle, device="cpu") as synthesizer:
            images = synthesizer.images([0] * 4 * classes, range(4 * classes), [i // 4 for i in range(4 * classes)])
        args.preview.write_bytes(encode(contact_sheet(images, columns=4), origin=origin_of(bundle)))
        print(f"{args.preview}: images of the first 4 latents of each class")


if __name__ == "__main__":
    main()
