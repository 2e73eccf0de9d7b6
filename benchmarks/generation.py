"""How fast the serving path draws images: `python -m benchmarks.generation [--json] [--bundle DIR]`.

The work is the 256 px "automatic" StyleGAN2-ADA configuration with random weights. Rates are compared within one run:
with the plain eager float32 network at its best batch size, and with the device's limit, i.e. the rate of a large
matrix product in the arithmetic that the device does fastest (bfloat16 where it has units for it). Rounds of all
three alternate and the best of each counts, so that another program's burst does not tilt the ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dermis.bundle import Bundle, load_generator, open_bundle
from dermis.devices import fast_dtype, resolve_device
from dermis.latents import z_for
from dermis.networks import Generator, GeneratorConfig, one_hot
from dermis.synthesizer import Synthesizer
from dermis.synthesizer.network import blocks_of, convolutions_of, to_uint8

CONFIG = GeneratorConfig(256, c_dim=2, mapping_layers=2, channel_base=16384)
DEMO = Path("bundles/demo")
EAGER_BATCHES = (1, 4, 8)
PRODUCT_SIZE = 2048
REQUIRED_RATIO, REQUIRED_FRACTION, ALLOWED_DIFFERENCE = 8.0, 0.4, 2.0


def random_generator() -> Generator:
    """Random weights; the RGB layers are turned down so that the images are not saturated."""
    torch.manual_seed(0)
    generator = Generator(CONFIG).eval().requires_grad_(False)
    for block in blocks_of(generator):
        block.torgb.weight.mul_(0.1)
        for layer in convolutions_of(block):
            layer.noise_strength.fill_(0.1)
    return generator


def synthesizer_of(generator: Generator, device: str) -> Synthesizer:
    names = tuple(f"class{i}" for i in range(generator.config.c_dim))
    bundle = Bundle("", "random", "0" * 64, generator.config, None, names, {}, {}, "", {})
    return Synthesizer(bundle, device=device, generator=generator)


def gflop_per_image(generator: Generator) -> float:
    """Floating-point operations / 1e9 of the 3x3 and 1x1 convolutions as the network defines them, nothing else."""
    macs = 0
    for block in blocks_of(generator):
        for layer in convolutions_of(block):
            macs += layer.weight.numel() * (layer.resolution // layer.up) ** 2
        macs += block.torgb.weight.numel() * block.conv1.resolution**2
    return 2 * macs / 1e9


def seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure_rates(generator: Generator, synthesizer: Synthesizer, device: torch.device, rounds: int) -> dict[str, Any]:
    """Best rates of the matrix product, the eager network and the serving path over alternating rounds."""
    dtype = fast_dtype(device)
    left, right = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device=device).to(dtype) for _ in range(2))
    eager = generator.to(device)
    count = 8 * synthesizer.preferred_batch

    def draw_eager(batch: int) -> torch.Tensor:
        z = torch.from_numpy(z_for(0, range(batch), CONFIG.z_dim)).to(device)
        with torch.inference_mode():
            img: torch.Tensor = eager(z, one_hot([0] * batch, 2, device), noise_mode="const", dtype=torch.float32)
            return img.cpu()

    jobs: dict[str, tuple[float, Callable[[], object]]] = {
        "limit": (2 * PRODUCT_SIZE**3 / 1e9 * 10, lambda: [left @ right for _ in range(10)]),
        "serving": (count, lambda: synthesizer.images([0] * count, range(count), [0] * count)),
    }
    for batch in EAGER_BATCHES:
        jobs[f"eager_{batch}"] = (batch, lambda batch=batch: draw_eager(batch))  # type: ignore[misc]
    rates = dict.fromkeys(jobs, 0.0)
    for turn in range(rounds + 1):  # the first round warms up
        for name, (work, run) in jobs.items():
            rate = work / seconds(run, device)
            rates[name] = max(rates[name], rate) if turn else 0.0
    return {
        "limit_arithmetic": str(dtype).removeprefix("torch."),
        "limit_gflop_per_second": rates["limit"],
        "eager_fp32_images_per_second": {str(batch): rates[f"eager_{batch}"] for batch in EAGER_BATCHES},
        "serving_images_per_second": rates["serving"],
    }


def mean_difference(generator: Generator, synthesizer: Synthesizer, per_class: int) -> float:
    """Mean absolute difference, in levels of 0 to 255, between the serving path and the float32 network on the CPU."""
    generator = generator.cpu()
    classes = max(generator.config.c_dim, 1)
    labels = [i % classes for i in range(per_class * classes)]
    served = synthesizer.images([0] * len(labels), range(len(labels)), labels)
    total = 0.0
    for i, label in enumerate(labels):
        z = torch.from_numpy(z_for(0, [i], generator.config.z_dim))
        with torch.inference_mode():
            exact = generator(z, one_hot([label], generator.config.c_dim), noise_mode="const", dtype=torch.float32)
        total += float(np.abs(served[i].astype(np.float32) - to_uint8(exact)[0].numpy().astype(np.float32)).mean())
    return total / len(labels)


def start_up(device: str) -> None:
    """What a fresh process pays until its first image, printed as JSON; the time of making weights is left out."""
    generator = random_generator()
    start = time.perf_counter()
    synthesizer = synthesizer_of(generator, device)
    ready = time.perf_counter()
    synthesizer.images([0], [0], [0])
    print(json.dumps({"ready": ready - start, "first_image": time.perf_counter() - ready}))


def measure_start_up(device: str) -> dict[str, Any]:
    """Cold: no cache of compiled code anywhere. Warm: a second process after it."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        command = [sys.executable, "-m", "benchmarks.generation", "--start-up", "--device", device]
        found = {}
        for name in ("cold", "warm"):
            output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
            found[name] = json.loads(output.splitlines()[-1])
    return found


def measure(device_name: str, bundle: Path | None, rounds: int) -> dict[str, Any]:
    device = resolve_device(device_name)
    generator = random_generator()
    synthesizer = synthesizer_of(generator, device_name)
    gflop = gflop_per_image(generator)
    rates = measure_rates(generator, synthesizer, device, rounds)
    serving = rates["serving_images_per_second"]
    differences = {"random": mean_difference(generator, synthesizer, 4)}
    if bundle is not None:
        opened = open_bundle(bundle)
        differences[opened.name] = mean_difference(
            load_generator(opened), Synthesizer(opened, device=device_name), per_class=8
        )
    ratio = serving / max(rates["eager_fp32_images_per_second"].values())
    fraction = serving * gflop / rates["limit_gflop_per_second"]
    return {
        "ratio_to_eager_fp32": ratio,
        "fraction_of_limit": fraction,
        "met": (ratio >= REQUIRED_RATIO or fraction >= REQUIRED_FRACTION)
        and max(differences.values()) <= ALLOWED_DIFFERENCE,
        "gflop_per_image": gflop,
        **rates,
        "mean_abs_difference_of_255": differences,
        "start_up_seconds": measure_start_up(device_name),
        "identity": dict(synthesizer.identity),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--bundle", type=Path, help=f"trained bundle to compare with fp32 ({DEMO} if it exists)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--start-up", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start_up:
        start_up(options.device)
        return
    bundle = options.bundle or (DEMO if DEMO.exists() else None)
    found = measure(options.device, bundle, options.rounds)
    if options.json:
        print(json.dumps(found))
        return
    best = max(found["eager_fp32_images_per_second"], key=found["eager_fp32_images_per_second"].get)
    rows = [
        ("matrix product, GFLOP/s", f"{found['limit_gflop_per_second']:.0f} ({found['limit_arithmetic']})"),
        ("GFLOP an image", f"{found['gflop_per_image']:.1f}"),
        *(
            (f"eager fp32, batch {batch}, images/s", f"{rate:.1f}" + (" (best)" if batch == best else ""))
            for batch, rate in found["eager_fp32_images_per_second"].items()
        ),
        ("serving, images/s", f"{found['serving_images_per_second']:.1f}"),
        ("times eager fp32", f"{found['ratio_to_eager_fp32']:.2f} (required {REQUIRED_RATIO:.0f}, or:)"),
        ("of the limit", f"{found['fraction_of_limit']:.0%} (required {REQUIRED_FRACTION:.0%})"),
        *(
            (f"mean difference from fp32, {name}", f"{value:.2f} / 255 (allowed {ALLOWED_DIFFERENCE:.0f})")
            for name, value in found["mean_abs_difference_of_255"].items()
        ),
        *(
            (f"{name} start, s", f"{times['ready']:.1f} until ready, {times['first_image']:.2f} first image")
            for name, times in found["start_up_seconds"].items()
        ),
        ("ran on", ", ".join(found["identity"].values())),
        ("met", "yes" if found["met"] else "NO"),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
