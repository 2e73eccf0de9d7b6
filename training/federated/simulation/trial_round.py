"""A trial round on generated images, with the real networks and batches, but without patients' data or a network."""

from __future__ import annotations

import csv
import resource
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dermis.imaging import encode
from training.federated.config import FederationConfig, classifier_config, gan_config
from training.federated.server.record import read_rounds
from training.federated.simulation.simulate import simulate
from training.federated.site import Site, use_device

_MIN_IMAGES = 40


@dataclass(frozen=True)
class TrialRound:
    """Measurements of a trial round.

    Attributes:
        memory_bytes: Largest resident memory of this process so far.
        bytes_down: Received by a client in a round.
        bytes_up: Sent by a client in a round.
    """

    seconds_per_step: float
    memory_bytes: int
    bytes_down: int
    bytes_up: int


def trial_round(federation: FederationConfig, device: str, threads: int = 0) -> TrialRound:
    """Run one training step of a single client on generated images.

    Args:
        federation: Options.
        device: auto, cpu, cuda, mps or xpu.
        threads: Threads of torch on a CPU; 0 for its default.

    Raises:
        DermisError: As in a real round.
    """
    use_device(Site(Path(), Path(), device=device, threads=threads))
    cpu = use_device(Site(Path(), Path(), device="cpu"))
    batch = gan_config(federation, cpu).batch if federation.task == "gan" else classifier_config(federation).batch
    single = replace(
        federation,
        rounds=1,
        iterations=1,
        clients=1,
        min_clients=1,
        attempts=1,
        strategy="fedavg",
        strategy_options="",
        secure_aggregation=False,
        dp_noise=0.0,
        evaluate_rounds=0,
        start=federation.start if federation.task == "classifier" else "",
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root / "data", max(_MIN_IMAGES, 3 * batch), federation.resolution, federation.class_names)
        site = Site(root / "data", root / "state", seed_offset=0, device=device, threads=threads)
        if federation.task == "gan":
            site = replace(site, validation=0.0)
        start = time.monotonic()
        simulate(single, [site], root / "out")
        line = read_rounds(root / "out")[-1]
        seconds = next(iter(line["members"].values())).get("seconds", time.monotonic() - start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return TrialRound(seconds, peak, line["bytes_down"], line["bytes_up"])


def write_images(folder: Path, count: int, size: int, class_names: tuple[str, ...]) -> None:
    """Write generated images of dark spots on a light ground, and their CSV file."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    y, x = np.mgrid[:size, :size] / size - 0.5
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("isic_id", "patient_id", "target"))
        for i in range(count):
            radius, tone = rng.uniform(0.15, 0.4), rng.uniform(30, 120)
            spot = (np.hypot(y, x) < radius)[..., None]
            image = rng.normal(190, 20, 3) - spot * tone + rng.normal(0, 8, (size, size, 3))
            name = f"generated_{i:05d}"
            (folder / "images" / f"{name}.png").write_bytes(encode(image.clip(0, 255).astype(np.uint8)))
            writer.writerow((name, f"nobody_{i:05d}", class_names[i % len(class_names)]))
