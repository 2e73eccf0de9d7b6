"""Speed of training a generator: `python -m benchmarks.training [--json] [--resolution N ...] [--device cpu]`.

A full training step of the "automatic" StyleGAN2-ADA configuration on random images is measured: generator and
discriminator, path length every 4 steps and R1 every 16, augmentation at p = 0.2, optimizers and the average. Of 16 steps 12
are plain, 3 have path length and 1 has both; one of each kind is timed, and they are weighted by these numbers.

Within one run, the default of `dermis train gan` on this device ("ours") is compared with the plain network (eager, float32,
torch's default layout), in alternating rounds of which the median counts, and with the device's limit, which is the rate of
a large matrix product in its fastest arithmetic. On a CPU the batch is smaller than the automatic one, because the official
code was measured with this size (`--batch` changes it).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.generation import PRODUCT_SIZE, seconds
from dermis import networks
from dermis.cpus import keep_freed_memory
from dermis.devices import describe_hardware, fast_dtype, resolve_device
from dermis.networks import one_hot
from training.data.images import ImageDataset
from training.gan.batches import Batch
from training.gan.config import GanConfig, base_config
from training.gan.loss import Phases
from training.gan.state import GanState, new_state
from training.gan.step import training_step

RESOLUTIONS = (64, 128, 256)
CPU_BATCH = {64: 8, 128: 8, 256: 4}
STRENGTH = 0.2  # strength p of the augmentation
REQUIRED_RATIO, REQUIRED_SECONDS_PER_KIMG = 2.5, {256: 5.0}
# Reported speed of the official code: images/s of G main and D main alone on another 2-core CPU; sec/kimg on one V100.
OFFICIAL_CPU = {64: 0.68, 128: 0.44, 256: 0.29}
OFFICIAL_V100 = {128: (12.8, 13.7), 256: (21.6, 24.2)}
KINDS = {"main": 1, "path length": 4, "both": 16}  # kinds of steps, each with a position at which it is due
WEIGHTS = {"main": 12, "path length": 3, "both": 1}


@dataclass
class Variant:
    """A way of training the same networks."""

    config: GanConfig
    state: GanState
    phases: Phases
    layout: torch.memory_format

    def step(self, kind: str, dataset: ImageDataset, batch: Batch) -> None:
        self.state.progress.step = KINDS[kind]
        with feature_layout(self.layout):
            training_step(self.state, self.phases, dataset, batch, self.config)


@contextmanager
def feature_layout(layout: torch.memory_format) -> Iterator[None]:
    before, networks.LAYOUT = networks.LAYOUT, layout
    try:
        yield
    finally:
        networks.LAYOUT = before


def variant(config: GanConfig, device: torch.device, *, plain: bool, compiled: bool) -> Variant:
    """Make a variant. All of them have the same seed, and so the same weights."""
    config = replace(config, precision="fp32") if plain else config
    state = new_state(config, device)
    state.adaptive.p, state.adaptive.target = STRENGTH, None
    phases = state.phases(config, compiled=compiled and not plain)
    return Variant(config, state, phases, torch.contiguous_format if plain else networks.LAYOUT)


def random_data(config: GanConfig, device: torch.device) -> tuple[ImageDataset, Batch]:
    """A dataset and a batch of blurred noise, on which interpolation works as on images, with alternating labels."""
    count, size = config.batch, config.resolution
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear").mul(255).byte()
    array, labels = images.permute(0, 2, 3, 1).contiguous(), np.arange(count) % 2
    dataset = ImageDataset(array.numpy(), labels, ("a", "b"), tuple(map(str, range(count))), "0" * 64)
    return dataset, Batch(array.to(device), labels)


def measure(config: GanConfig, device: torch.device, rounds: int, compiled: bool) -> dict[str, Any]:
    """Measure one resolution; `table` explains the numbers."""
    dataset, batch = random_data(config, device)
    variants = {
        "eager_fp32": variant(config, device, plain=True, compiled=False),
        "ours": variant(config, device, plain=False, compiled=compiled),
    }
    error = gradient_errors(variants["eager_fp32"], variants["ours"], batch)
    work: dict[str, float] = {}
    times: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in KINDS} for name in variants}
    limit = 0.0
    for turn in range(rounds + 1):  # the first round warms up, compiles and counts operations
        for kind in KINDS:
            for name, each in variants.items():
                run = partial(each.step, kind, dataset, batch)
                if turn:
                    times[name][kind].append(seconds(run, device))
                elif name == "eager_fp32":
                    work[kind] = flops(run)
                else:
                    run()
        limit = max(limit, product_rate(device))
    medians = {name: {kind: statistics.median(taken) for kind, taken in kinds.items()} for name, kinds in times.items()}
    step = {name: _cycle(kinds) for name, kinds in medians.items()}
    return {
        "resolution": config.resolution,
        "batch": config.batch,
        "precision": config.precision,
        "compiled": compiled,
        "ratio_to_eager_fp32": step["eager_fp32"] / step["ours"],
        "ratio_of_main_phases": medians["eager_fp32"]["main"] / medians["ours"]["main"],
        "images_per_second": config.batch / step["ours"],
        "seconds_per_kimg": 1000 * step["ours"] / config.batch,
        "eager_fp32_images_per_second": config.batch / step["eager_fp32"],
        "main_phases_images_per_second": config.batch / medians["ours"]["main"],
        "seconds": medians,
        "gflop_per_step": _cycle(work) / 1e9,
        "limit_gflop_per_second": limit,
        "fraction_of_limit": _cycle(work) / 1e9 / step["ours"] / limit,
        "gradient_error": error,
    }


def _cycle(kinds: Mapping[str, float]) -> float:
    """The mean over steps of all kinds, weighted as in 16 steps."""
    return sum(WEIGHTS[kind] * value for kind, value in kinds.items()) / sum(WEIGHTS.values())


def flops(run: Callable[[], None]) -> float:
    """Floating-point operations of the convolutions and matrix products in `run`, including gradients."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def product_rate(device: torch.device) -> float:
    """GFLOP/s of a large matrix product in the device's fastest arithmetic, the better of two layouts."""
    size, dtype = PRODUCT_SIZE[device.type], fast_dtype(device)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    transposed = right.t()
    times = [seconds(partial(torch.matmul, left, other), device) for other in [right, transposed] * 3]
    return 2 * size**3 / min(times) / 1e9


def gradient_errors(exact: Variant, ours: Variant, batch: Batch) -> dict[str, float]:
    """|g - g'| / |g| for the gradients of main phases, g in plain float32, g' in the variant, over the weights of a network.

    There is no augmentation, because its random numbers depend on the layout.
    """
    device, n = exact.state.pl_mean.device, len(batch.labels)
    z, c = torch.randn(n, exact.config.z_dim, device=device), one_hot(batch.labels, exact.config.c_dim, device)
    real = batch.images.permute(0, 3, 1, 2).float() / 127.5 - 1
    by_network: dict[str, list[torch.Tensor]] = {"G": [], "D": []}
    for each in (exact, ours):
        state, phases = each.state, each.phases
        runs = (
            ("G", state.G, partial(phases.generator_main, z, c, 0.0, real)),
            ("D", state.D, partial(phases.discriminator_main, real, c, z, c, 0.0)),
        )
        with feature_layout(each.layout):
            for name, network, run in runs:
                torch.manual_seed(1)
                run()
                gradients = [x.grad.flatten() for x in network.parameters() if x.grad is not None]
                by_network[name].append(torch.cat(gradients))
                state.G.zero_grad(set_to_none=True)
                state.D.zero_grad(set_to_none=True)
    return {name: float((a - b).norm() / a.norm()) for name, (a, b) in by_network.items()}


def table(result: dict[str, Any], device: torch.device) -> list[tuple[str, str]]:
    resolution = result["resolution"]
    options = f"batch {result['batch']}, {result['precision']}{', compiled' if result['compiled'] else ''}"
    rows = [
        (f"{resolution} px", options),
        ("eager fp32, images/s", f"{result['eager_fp32_images_per_second']:.2f}"),
        ("ours, images/s", f"{result['images_per_second']:.2f} ({result['seconds_per_kimg']:.1f} sec/kimg)"),
        ("times eager fp32", f"{result['ratio_to_eager_fp32']:.2f} (required {REQUIRED_RATIO})"),
        (
            "fraction of the limit",
            f"{result['fraction_of_limit']:.0%} of {result['limit_gflop_per_second']:.0f} GFLOP/s",
        ),
        *(
            (f"step, {kind}, s", f"{result['seconds']['eager_fp32'][kind]:.3f} / {result['seconds']['ours'][kind]:.3f}")
            for kind in KINDS
        ),
        ("error of gradients", ", ".join(f"{name} {error:.1%}" for name, error in result["gradient_error"].items())),
    ]
    if device.type == "cuda" and resolution in OFFICIAL_V100:
        low, high = OFFICIAL_V100[resolution]
        rows.append(("official, one V100", f"{low} to {high} sec/kimg"))
    elif device.type == "cpu" and resolution in OFFICIAL_CPU:
        ours = result["main_phases_images_per_second"]
        official = f"{OFFICIAL_CPU[resolution]} reported for the official code on another 2-core CPU"
        rows.append(("G and D main alone, images/s", f"{ours:.2f} ({official})"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    parser.add_argument("--resolution", type=int, nargs="+", default=RESOLUTIONS)
    parser.add_argument("--batch", type=int, help="default: the automatic one on a GPU, 8 (256 px: 4) on a CPU")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--no-compile", action="store_true", help="ours without torch.compile")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    keep_freed_memory()  # `dermis train gan` calls it too
    device = resolve_device(options.device)
    precision = "bf16" if fast_dtype(device) == torch.bfloat16 else "fp32"
    results = []
    for resolution in options.resolution:
        batch = options.batch or (CPU_BATCH.get(resolution, 4) if device.type == "cpu" else None)
        config = base_config("auto", resolution, 2, batch=batch, precision=precision)
        results.append(measure(config, device, options.rounds, compiled=not options.no_compile))
        if not options.json:
            rows = table(results[-1], device)
            width = max(len(name) for name, _ in rows)
            print("\n".join(f"{name:<{width}}  {value}" for name, value in rows), end="\n\n", flush=True)
    if options.json:
        machine = {"device": describe_hardware(device), "cpus": os.cpu_count(), "torch": torch.__version__}
        ratios = {str(each["resolution"]): each["ratio_to_eager_fp32"] for each in results}
        print(
            json.dumps({"ratio_to_eager_fp32": ratios, **machine, "python": platform.python_version(), "at": results})
        )


if __name__ == "__main__":
    main()
