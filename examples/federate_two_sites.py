"""Train one generator at two sites: each trains on its own images, and only weights are exchanged and averaged.

    python examples/federate_two_sites.py --sites synthetic-1/images synthetic-2/images --out runs/federation

Everything runs in this process, without a network, with the same code as a real federation (docs/federated.md). The
defaults are the folders that sdk_async.py downloads; give a folder of real images for each site instead.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dermis.bundle import open_bundle
from training.federated.config import FederationConfig
from training.federated.server.record import read_rounds
from training.federated.simulation.simulate import simulate
from training.federated.site import Site


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folders = [Path("synthetic-1/images"), Path("synthetic-2/images")]
    parser.add_argument("--sites", type=Path, nargs=2, default=folders, help="folder of images of each site")
    parser.add_argument("--out", type=Path, default=Path("runs/federation"), help="folder of the federation")
    parser.add_argument("--rounds", type=int, default=3, help="exchanges of weights")
    parser.add_argument("--iterations", type=int, default=10, help="training steps of each site in a round")
    parser.add_argument("--resolution", type=int, default=16, help="image side in pixels, a power of two")
    args = parser.parse_args()

    federation = FederationConfig(
        name="federation",
        rounds=args.rounds,
        iterations=args.iterations,
        clients=2,
        min_clients=2,
        resolution=args.resolution,
        options="batch=8 channel_base=512 channel_max=32 z_dim=32 w_dim=32",  # of GanConfig
        evaluate_rounds=0,  # do not measure: 1 measures with each site's validation images after every round
    )
    # `state` stays at the site: its optimizer and its random numbers.
    sites = [Site(data, args.out / f"site-{i}", device="cpu") for i, data in enumerate(args.sites, 1)]
    simulate(federation, sites, args.out, on_progress=print)

    for line in read_rounds(args.out):
        print(
            f"round {line['round']}: {len(line['members'])} sites, {line['bytes_up'] / 1e6:.1f} MB sent to the server"
        )
    bundle = open_bundle(args.out / "bundle")
    print(f"{args.out / 'bundle'}: {bundle.name}@{bundle.digest[:12]}")


if __name__ == "__main__":
    main()
