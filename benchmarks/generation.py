"""Speed of the serving path: `python -m benchmarks.generation [--json] [--resolution N] [--bundle DIR]`.

The network is the "automatic" StyleGAN2-ADA configuration of the resolution (default 256 px) with random weights. Rates are
compared within one run: with the plain eager float32 network at its best batch size, and with the device's limit, which is
the rate of a large matrix product in the device's fastest arithmetic (bfloat16 if it has units for it). Rounds of all of
them alternate and the best of each counts, so that short activity of other programs does not distort the ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import DEMO
from dermis.bundle import Bundle, load_generator, open_bundle, write_bundle
from dermis.devices import fast_dtype, resolve_device
from dermis.latents import z_for
from dermis.networks import Generator, GeneratorConfig, one_hot
from dermis.synthesizer import Synthesizer
from dermis.synthesizer.network import to_uint8

EAGER_BATCHES = (1, 2, 4, 8)
PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}
REQUIRED_RATIO, ALLOWED_DIFFERENCE = 8.0, 2.0
REQUIRED_FRACTION = {"bfloat16": 0.4, "float16": 0.4, "float32": 0.6}  # required share of the limit of each arithmetic


@dataclass(frozen=True)
class Target:
    """A generator and its options."""

    bundle: Bundle
    generator: Generator  # float32, on the CPU
    device: str
    backend: str
    dtype: str  # arithmetic of the convolutions: auto, bfloat16 or float32

    def synthesizer(self) -> Synthesizer:
        return Synthesizer(
            self.bundle, device=self.device, backend=self.backend, dtype=self.dtype, generator=self.generator
        )


def automatic_config(resolution: int) -> GeneratorConfig:
    """The official automatic configuration (half the channels below 512 px, two mapping layers) with two classes."""
    return GeneratorConfig(resolution, c_dim=2, mapping_layers=2, channel_base=32768 if resolution >= 512 else 16384)


def random_generator(config: GeneratorConfig) -> Generator:
    """A generator with random weights. Those of the RGB layers are reduced so that images are not saturated."""
    torch.manual_seed(0)
    generator = Generator(config).eval().requires_grad_(False)
    for block in generator.synthesis.blocks:
        block.torgb.weight.mul_(0.1)
        for layer in block.layers:
            layer.noise_strength.fill_(0.1)
    return generator


def random_bundle(out: Path, config: GeneratorConfig) -> Bundle:
    """Write a bundle to a folder, so that the start includes reading and verifying it."""
    return write_bundle(
        out,
        name="random",
        generator=random_generator(config),
        class_names=(),
        provenance={"dataset": "none: random weights"},
        model_card="# Random weights\n\nFor measuring speed only.\n",
    )


def gflop_per_image(generator: Generator) -> float:
    """Floating-point operations / 1e9 of the 3x3 and 1x1 convolutions of the network, and nothing else."""
    macs = 0
    for block in generator.synthesis.blocks:
        for layer in block.layers:
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


def measure_rates(target: Target, synthesizer: Synthesizer, device: torch.device, rounds: int) -> dict[str, Any]:
    """Best rates of the matrix product, the eager network and the serving path in alternating rounds."""
    dtype = fast_dtype(device) if target.dtype == "auto" else getattr(torch, target.dtype)
    size = PRODUCT_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    transposed = right.t()  # the other layout; which one is faster depends on the library
    config = target.generator.config
    eager = target.generator.to(device)
    count = 8 * synthesizer.preferred_batch

    def draw_eager(batch: int) -> torch.Tensor:
        z = torch.from_numpy(z_for(0, range(batch), config.z_dim)).to(device)
        with torch.inference_mode():
            c = one_hot([0] * batch, config.c_dim, device)
            img: torch.Tensor = eager(z, c, noise_mode="const", dtype=torch.float32)
            return img.cpu()

    product = 2 * size**3 / 1e9
    jobs: dict[str, tuple[float, int, Callable[[], object]]] = {  # amount of work, repetitions in a round, function
        "limit": (product, 5, lambda: left @ right),
        "limit_transposed": (product, 5, lambda: left @ transposed),
        "serving": (count, 1, lambda: synthesizer.images([0] * count, range(count), [0] * count)),
        "const": (count, 1, lambda: synthesizer.images([0] * count, range(count), [0] * count, noise_mode="const")),
        "one": (1, 3, lambda: synthesizer.images([0], [0], [0])),
    }
    for batch in EAGER_BATCHES:
        jobs[f"eager_{batch}"] = (batch, 2, lambda batch=batch: draw_eager(batch))  # type: ignore[misc]
    rates = dict.fromkeys(jobs, 0.0)
    for turn in range(rounds + 1):  # the first round warms up
        for name, (work, repetitions, run) in jobs.items():
            rate = max(work / seconds(run, device) for _ in range(repetitions))
            rates[name] = max(rates[name], rate) if turn else 0.0
    target.generator.cpu()
    return {
        "images_per_second": rates["serving"],
        "const_noise_images_per_second": rates["const"],
        "one_image_seconds": 1 / rates["one"],
        "eager_fp32_images_per_second": {str(batch): rates[f"eager_{batch}"] for batch in EAGER_BATCHES},
        "limit_gflop_per_second": max(rates["limit"], rates["limit_transposed"]),
        "limit_arithmetic": str(dtype).removeprefix("torch."),
    }


def mean_difference(generator: Generator, synthesizer: Synthesizer, per_class: int) -> float:
    """Mean absolute difference, in levels of 0 to 255, between the serving path and the float32 network on the CPU."""
    classes = max(generator.config.c_dim, 1)
    labels = [i % classes for i in range(per_class * classes)]
    served = synthesizer.images([0] * len(labels), range(len(labels)), labels, noise_mode="const")
    total = 0.0
    for i, label in enumerate(labels):
        z = torch.from_numpy(z_for(0, [i], generator.config.z_dim))
        with torch.inference_mode():
            exact = generator(z, one_hot([label], generator.config.c_dim), noise_mode="const", dtype=torch.float32)
        total += float(np.abs(served[i].astype(np.float32) - to_uint8(exact)[0].numpy().astype(np.float32)).mean())
    return total / len(labels)


def start_up(bundle: str, device: str, backend: str, dtype: str, cache: Path) -> None:
    """Start a synthesizer in a new process up to its first image, and print the seconds as JSON."""
    start = time.perf_counter()
    synthesizer = Synthesizer(open_bundle(bundle), device=device, backend=backend, dtype=dtype, cache=cache)
    ready = time.perf_counter()
    synthesizer.images([0], [0], [0])
    print(json.dumps({"ready": ready - start, "first_image": time.perf_counter() - ready}))


def measure_start_up(target: Target) -> dict[str, dict[str, float]]:
    """Seconds of a cold start (nothing converted or compiled on disk) and of a second, warm one; "total" includes imports."""
    times = {}
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        command = [sys.executable, "-m", "benchmarks.generation", "--start-up", "--bundle", target.bundle.location]
        command += ["--device", target.device, "--backend", target.backend, "--dtype", target.dtype]
        command += ["--cache", f"{cache}/generators"]
        for name in ("cold", "warm"):
            start = time.perf_counter()
            output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            times[name] = {"total": time.perf_counter() - start, **json.loads(output.splitlines()[-1])}
    return times


def measure(target: Target, device: torch.device, rounds: int) -> dict[str, Any]:
    """Measure one generator."""
    with target.synthesizer() as synthesizer:
        rates = measure_rates(target, synthesizer, device, rounds)
        difference = mean_difference(target.generator, synthesizer, per_class=8)
        identity = dict(synthesizer.identity)
    gflop = gflop_per_image(target.generator)
    ratio = rates["images_per_second"] / max(rates["eager_fp32_images_per_second"].values())
    fraction = rates["images_per_second"] * gflop / rates["limit_gflop_per_second"]
    required = REQUIRED_FRACTION[rates["limit_arithmetic"]]
    speeds = ratio >= REQUIRED_RATIO or fraction >= required
    return {
        "ratio_to_eager_fp32": ratio,
        "fraction_of_limit": fraction,
        "required_fraction": required,
        "mean_abs_diff": difference,
        "met": speeds and difference <= ALLOWED_DIFFERENCE,
        **rates,
        "gflop_per_image": gflop,
        "resolution": target.generator.config.img_resolution,
        "bundle": target.bundle.name,
        "start_up_seconds": measure_start_up(target),
        "device": identity.pop("device"),
        "backend": identity.pop("backend"),
        "dtype": identity.pop("dtype"),
        "processor": identity.pop("processor"),
        "cpus": os.cpu_count(),
        "versions": {"python": platform.python_version(), **identity},
    }


def table(result: dict[str, Any]) -> list[tuple[str, str]]:
    eager = result["eager_fp32_images_per_second"]
    best = max(eager, key=eager.get)
    return [
        (
            "generator",
            f"{result['bundle']}, {result['resolution']} px, {result['gflop_per_image']:.1f} GFLOP per image",
        ),
        ("machine", f"{result['backend']}, {result['dtype']}, {result['processor']} ({result['cpus']} CPUs)"),
        ("versions", ", ".join(f"{name} {version}" for name, version in result["versions"].items())),
        ("matrix product, GFLOP/s", f"{result['limit_gflop_per_second']:.0f} ({result['limit_arithmetic']})"),
        *(
            (f"eager fp32, batch {batch}, images/s", f"{rate:.1f}" + (" (best)" if batch == best else ""))
            for batch, rate in eager.items()
        ),
        (
            "serving, images/s",
            f"{result['images_per_second']:.1f} (with constant noise {result['const_noise_images_per_second']:.1f}); "
            f"a single image takes {result['one_image_seconds']:.3f} s",
        ),
        ("times eager fp32", f"{result['ratio_to_eager_fp32']:.2f} (required: {REQUIRED_RATIO:.0f}, or the next row)"),
        ("fraction of the limit", f"{result['fraction_of_limit']:.0%} (required: {result['required_fraction']:.0%})"),
        ("mean difference from fp32", f"{result['mean_abs_diff']:.2f} / 255 (allowed {ALLOWED_DIFFERENCE:.0f})"),
        *(
            (
                f"{name} start, s",
                f"{times['total']:.1f} (bundle and compilation {times['ready']:.1f}, "
                f"first image {times['first_image']:.2f})",
            )
            for name, times in result["start_up_seconds"].items()
        ),
        ("met", "yes" if result["met"] else "NO"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--resolution", type=int, default=256, help="of the network with random weights")
    parser.add_argument(
        "--bundle", help=f"a trained bundle, which is also measured and reported as `trained` ({DEMO} if it exists)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--backend", default="auto", help="auto, openvino or torch")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32: of the network and of the limit")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    parser.add_argument("--start-up", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start_up:
        start_up(options.bundle, options.device, options.backend, options.dtype, Path(options.cache))
        return
    device = resolve_device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        bundle = random_bundle(Path(folder) / "random", automatic_config(options.resolution))
        target = Target(bundle, load_generator(bundle), options.device, options.backend, options.dtype)
        result = measure(target, device, options.rounds)
    trained = options.bundle or (str(DEMO) if DEMO.exists() else None)
    if trained is not None:
        bundle = open_bundle(trained)
        target = Target(bundle, load_generator(bundle), options.device, options.backend, options.dtype)
        result["trained"] = measure(target, device, options.rounds)
    if options.json:
        print(json.dumps(result))
        return
    for each in [result, *([result["trained"]] if "trained" in result else [])]:
        rows = table(each)
        width = max(len(name) for name, _ in rows)
        print("\n".join(f"{name:<{width}}  {value}" for name, value in rows), end="\n\n")


if __name__ == "__main__":
    main()
