"""How fast the serving path draws images: `python -m benchmarks.generation [--json] [--resolution N] [--bundle DIR]`.

The work is the "automatic" StyleGAN2-ADA configuration of the resolution, 256 px unless told otherwise, with random
weights. Rates are compared within one run: with the plain eager float32 network at its best batch size, and with the
device's limit, i.e. the rate of a large matrix product in the arithmetic that the device does fastest (bfloat16 where
it has units for it). Rounds of all of them alternate and the best of each counts, so that another program's burst does
not tilt the ratio.
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

from dermis.bundle import Bundle, load_generator, open_bundle, write_bundle
from dermis.devices import fast_dtype, resolve_device
from dermis.latents import z_for
from dermis.networks import Generator, GeneratorConfig, one_hot
from dermis.synthesizer import Synthesizer
from dermis.synthesizer.network import to_uint8

DEMO = Path("bundles/demo")
EAGER_BATCHES = (1, 2, 4, 8)
PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}
REQUIRED_RATIO, ALLOWED_DIFFERENCE = 8.0, 2.0
REQUIRED_FRACTION = {"bfloat16": 0.4, "float16": 0.4, "float32": 0.6}  # of the limit in this arithmetic


@dataclass(frozen=True)
class Target:
    """What is measured on what."""

    bundle: Bundle
    generator: Generator  # float32, on the CPU
    device: str
    backend: str
    dtype: str  # of the convolutions: auto, bfloat16 or float32

    def synthesizer(self) -> Synthesizer:
        return Synthesizer(
            self.bundle, device=self.device, backend=self.backend, dtype=self.dtype, generator=self.generator
        )


def automatic_config(resolution: int) -> GeneratorConfig:
    """The official automatic configuration: half the channels below 512 px, two mapping layers; two classes."""
    return GeneratorConfig(resolution, c_dim=2, mapping_layers=2, channel_base=32768 if resolution >= 512 else 16384)


def random_generator(config: GeneratorConfig) -> Generator:
    """Random weights; the RGB layers are turned down so that the images are not saturated."""
    torch.manual_seed(0)
    generator = Generator(config).eval().requires_grad_(False)
    for block in generator.synthesis.blocks:
        block.torgb.weight.mul_(0.1)
        for layer in block.layers:
            layer.noise_strength.fill_(0.1)
    return generator


def random_bundle(out: Path, config: GeneratorConfig) -> Bundle:
    """A real bundle in a folder, so that starting up includes reading and verifying it."""
    return write_bundle(
        out,
        name="random",
        generator=random_generator(config),
        class_names=(),
        provenance={"dataset": "none: random weights"},
        model_card="# Random weights\n\nFor measuring speed only.\n",
    )


def gflop_per_image(generator: Generator) -> float:
    """Floating-point operations / 1e9 of the 3x3 and 1x1 convolutions as the network defines them, nothing else."""
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
    """Best rates of the matrix product, the eager network and the serving path over alternating rounds."""
    dtype = fast_dtype(device) if target.dtype == "auto" else getattr(torch, target.dtype)
    size = PRODUCT_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    transposed = right.t()  # the other layout: which one a library likes better is not known beforehand
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
    jobs: dict[str, tuple[float, int, Callable[[], object]]] = {  # work, repetitions a round, what runs
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
    """What a fresh process does until its first image; prints the seconds as JSON."""
    start = time.perf_counter()
    synthesizer = Synthesizer(open_bundle(bundle), device=device, backend=backend, dtype=dtype, cache=cache)
    ready = time.perf_counter()
    synthesizer.images([0], [0], [0])
    print(json.dumps({"ready": ready - start, "first_image": time.perf_counter() - ready}))


def measure_start_up(target: Target) -> dict[str, dict[str, float]]:
    """Cold: nothing converted or compiled on disk. Warm: a second process after it. "total" includes Python and its imports."""
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        command = [sys.executable, "-m", "benchmarks.generation", "--start-up", "--bundle", target.bundle.location]
        command += ["--device", target.device, "--backend", target.backend, "--dtype", target.dtype]
        command += ["--cache", f"{cache}/generators"]
        for name in ("cold", "warm"):
            start = time.perf_counter()
            output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[name] = {"total": time.perf_counter() - start, **json.loads(output.splitlines()[-1])}
    return found


def measure(target: Target, device: torch.device, rounds: int) -> dict[str, Any]:
    """Everything about one generator; see `main` for the names."""
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


def table(found: dict[str, Any]) -> list[tuple[str, str]]:
    eager = found["eager_fp32_images_per_second"]
    best = max(eager, key=eager.get)
    return [
        ("generator", f"{found['bundle']}, {found['resolution']} px, {found['gflop_per_image']:.1f} GFLOP an image"),
        ("ran on", f"{found['backend']}, {found['dtype']}, {found['processor']} ({found['cpus']} CPUs)"),
        ("versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items())),
        ("matrix product, GFLOP/s", f"{found['limit_gflop_per_second']:.0f} ({found['limit_arithmetic']})"),
        *(
            (f"eager fp32, batch {batch}, images/s", f"{rate:.1f}" + (" (best)" if batch == best else ""))
            for batch, rate in eager.items()
        ),
        (
            "serving, images/s",
            f"{found['images_per_second']:.1f} (with constant noise {found['const_noise_images_per_second']:.1f}); "
            f"one image alone in {found['one_image_seconds']:.3f} s",
        ),
        ("times eager fp32", f"{found['ratio_to_eager_fp32']:.2f} (required {REQUIRED_RATIO:.0f}, or:)"),
        ("of the limit", f"{found['fraction_of_limit']:.0%} (required {found['required_fraction']:.0%})"),
        ("mean difference from fp32", f"{found['mean_abs_diff']:.2f} / 255 (allowed {ALLOWED_DIFFERENCE:.0f})"),
        *(
            (
                f"{name} start, s",
                f"{times['total']:.1f} (of it bundle and compilation {times['ready']:.1f}, "
                f"first image {times['first_image']:.2f})",
            )
            for name, times in found["start_up_seconds"].items()
        ),
        ("met", "yes" if found["met"] else "NO"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--resolution", type=int, default=256, help="of the network with random weights")
    parser.add_argument(
        "--bundle", help=f"a trained bundle, measured as well and reported as `trained` ({DEMO} if it exists)"
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
        found = measure(target, device, options.rounds)
    trained = options.bundle or (str(DEMO) if DEMO.exists() else None)
    if trained is not None:
        bundle = open_bundle(trained)
        target = Target(bundle, load_generator(bundle), options.device, options.backend, options.dtype)
        found["trained"] = measure(target, device, options.rounds)
    if options.json:
        print(json.dumps(found))
        return
    for result in [found, *([found["trained"]] if "trained" in found else [])]:
        rows = table(result)
        width = max(len(name) for name, _ in rows)
        print("\n".join(f"{name:<{width}}  {value}" for name, value in rows), end="\n\n")


if __name__ == "__main__":
    main()
