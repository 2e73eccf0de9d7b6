"""Move generated images along a direction of the latent space, and save them as a strip: one row for each image.

Start a service first (`make serve`), then run

    python examples/edit_direction.py --direction sefa-2 --out strip.png

It needs only the package `dermis-client`. Without --direction it lists the directions of the model and takes the first.
`images.generate` and `datasets.create` accept the same edits: `edits={"sefa-2": -1.5}`.
"""

from __future__ import annotations

import argparse

from dermis_client import DermisClient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:3000", help="address of the service")
    parser.add_argument("--direction", help="name of a direction")
    parser.add_argument(
        "--strengths", type=float, nargs="+", default=[-3, -2, -1, 0, 1, 2, 3], help="standard deviations"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the images")
    parser.add_argument("--out", default="strip.png", help="file for the strip")
    args = parser.parse_args()

    with DermisClient(args.url) as client:
        model = next(model for model in client.models.list() if model.default)
        direction = args.direction
        if direction is None:
            directions = client.edits.directions()
            for item in directions:
                print(f"{item.name}: found by {item.method}, layers {item.layers[0]} to {item.layers[1] - 1}")
            direction = directions[0].name

        # One sample of each class: (class, seed, index).
        samples = [(name, args.seed, index) for index, name in enumerate(model.classes)]
        result = client.edits.create(samples=samples, sweep={"direction": direction, "strengths": args.strengths})

    result.strip().save(args.out)
    print(f"{args.out}: {len(samples)} samples at {len(args.strengths)} strengths of {direction}")


if __name__ == "__main__":
    main()
