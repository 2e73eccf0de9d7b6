"""The parts of the run, each in a process of its own: `python -m benchmarks.gpu.measure PART --out DIR [--tiny]`."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import DEMO
from benchmarks.generation import automatic_config, gflop_per_image, mean_difference, random_bundle, seconds
from benchmarks.gpu.results import PROJECTED_IMAGES, TARGETS, Results
from benchmarks.gpu.speed import matrix_rates, training_speed, transfers
from dermis.bundle import Bundle, load_generator, open_bundle
from dermis.cpus import available_cpus
from dermis.devices import resolve_device
from dermis.errors import DermisError
from dermis.networks import GeneratorConfig
from training.gan.config import GanConfig, base_config

TINY = GeneratorConfig(16, c_dim=2, z_dim=16, w_dim=16, mapping_layers=2, channel_base=256, channel_max=16)
TEST_FILES = ("tests/test_cuda.py",)
# A generator whose bundle has 16 MB, and its discriminator.
PROJECTED: dict[str, Any] = {
    "projected": True, "batch": 64, "channel_base": 8192, "channel_max": 256, "z_dim": 256, "w_dim": 256,
    "projected_mbstd": True, "moments_weight": 6.0, "class_moments_weight": 0.5,
}  # fmt: skip


def tests(results: Results) -> None:
    """Run the tests that need CUDA, and write each outcome immediately. Without CUDA all are skipped."""
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", "-vv", "-rs", "--durations=15"]
    outcomes: dict[str, list[str]] = {"PASSED": [], "FAILED": [], "SKIPPED": [], "ERROR": []}
    with subprocess.Popen([*command, *TEST_FILES], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:  # tests/test_cuda.py::test_name[case] PASSED   [ 10%]
            print(line, end="", file=sys.stderr, flush=True)
            parts = line.split()
            if len(parts) > 1 and "::" in parts[0] and parts[1] in outcomes:
                name = parts[0].partition("::")[2]
                outcomes[parts[1]].append(name)
                results.note(f"test {name}", parts[1].lower())
    for outcome, names in outcomes.items():
        bound = {"at_most": 0.0} if outcome in ("FAILED", "ERROR") else {}
        results.number(f"tests, {outcome.lower()}", len(names), "tests", **bound)
    if not any(outcomes.values()):
        raise RuntimeError(f"pytest has run no test: status {run.returncode}")


def machine(results: Results) -> None:
    """Versions, and the limits of the device: matrix products and copies."""
    versions = {"torch": torch.__version__, "python": sys.version.split()[0], "numpy": np.__version__}
    if results.device.type == "cuda":
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}  # type: ignore[no-untyped-call]
    results.note("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))
    results.number("CPU cores", available_cpus(), "cores")
    for name, rate in matrix_rates(results.device, results.tiny).items():
        results.number(f"matrix product, {name}", rate / 1e3, "TFLOP/s")
    for name, rate in transfers(results.device, results.tiny).items():
        results.number(name, rate, "GB/s")


def generation(results: Results) -> None:
    """The serving path: images/s, and the share of the measured limit of bfloat16."""
    limit = matrix_rates(results.device, results.tiny, only="bfloat16")["bfloat16"]
    for config in [TINY] if results.tiny else [automatic_config(256), automatic_config(128)]:
        _generation_of(results, config, limit)


def _generation_of(results: Results, config: GeneratorConfig, limit: float) -> None:
    from dermis.synthesizer import Synthesizer

    size = config.img_resolution
    with tempfile.TemporaryDirectory() as folder:
        bundle = random_bundle(Path(folder) / "random", config)
        generator = load_generator(bundle)
        start = time.perf_counter()
        backend = "torch" if results.tiny else "auto"
        with Synthesizer(bundle, device=str(results.device), backend=backend, generator=generator) as synthesizer:
            ready: dict[str, Any] = dict(synthesizer.identity)
            results.number(f"generator ready, {size} px", time.perf_counter() - start, "s", **ready)
            count = synthesizer.preferred_batch * (2 if results.tiny else 16)

            def draw(images: int, noise: str) -> Callable[[], object]:
                return lambda: synthesizer.images([0] * images, range(images), [0] * images, noise_mode=noise)  # type: ignore[arg-type]

            for noise in ("const", "random"):
                draw(synthesizer.preferred_batch, noise)()
                rate = count / min(seconds(draw(count, noise), results.device) for _ in range(1 if results.tiny else 3))
                results.number(
                    f"generation, {size} px, {noise} noise", rate, "images/s", backend=synthesizer.identity["backend"]
                )
                share = rate * gflop_per_image(generator) / limit
                target = {"at_least": TARGETS["share_of_bf16_limit"]} if size == 256 else {}
                results.number(f"generation, {size} px, {noise} noise, share of the limit", share, "", **target)
            one = min(seconds(draw(1, "const"), results.device) for _ in range(3))
            results.number(f"one image alone, {size} px", 1000 * one, "ms")
            difference = mean_difference(generator, synthesizer, per_class=1 if results.tiny else 4)
            results.number(f"difference from float32, {size} px", difference, "of 255 levels", at_most=2.0)


def training(results: Results) -> None:
    """The automatic StyleGAN2 configuration, eager and compiled; at 256 px first."""
    precision = "fp32" if results.tiny else "bf16"
    for size in (16,) if results.tiny else (256, 128):
        small = {"channel_base": 256, "channel_max": 16, "batch": 4} if results.tiny else {}
        config = base_config("auto", size, 2, precision=precision, **small)
        for compiled in (False,) if results.tiny else (False, True):
            target = {"at_most": TARGETS["training_256_seconds_per_kimg"]} if size == 256 and compiled else {}
            _training_of(results, "StyleGAN2", config, compiled, target)


def projected_training(results: Results) -> None:
    """Training with the projected discriminator."""
    try:
        from dermis.features import lite0_state

        lite0_state()
    except (ImportError, DermisError) as error:
        results.note("training, projected", f"skipped: the backbone's weights are missing ({error})")
        return
    for size in (16,) if results.tiny else (256, 128):
        small = {"channel_base": 256, "channel_max": 16, "batch": 4} if results.tiny else {}
        config = base_config("auto", size, 2, precision="fp32" if results.tiny else "bf16", **(PROJECTED | small))
        for compiled in (False,) if results.tiny else (False, True):
            _training_of(results, "projected", config, compiled, {})


def _training_of(results: Results, kind: str, config: GanConfig, compiled: bool, target: dict[str, float]) -> None:
    speed = training_speed(config, results.device, compiled, least_seconds=0 if results.tiny else 6)
    name = f"training, {kind}, {config.resolution} px, batch {config.batch}, {'compiled' if compiled else 'eager'}"
    results.number(name, speed.pop("seconds_per_kimg"), "s/kimg", **target, precision=config.precision, **speed)


def projection(results: Results) -> None:
    """Rates of the official and the fast schedule, from a few steps of each, and the time that 12,000 images would take."""
    from dermis.projection.projector import ImageProjector, Target
    from dermis.projection.schedule import FAST, OFFICIAL

    with tempfile.TemporaryDirectory() as folder:
        bundles: list[tuple[str, Bundle]] = []
        if results.tiny:
            bundles.append(("tiny", random_bundle(Path(folder) / "tiny", TINY)))
        else:
            bundles.append(("256 px", random_bundle(Path(folder) / "256", automatic_config(256))))
            bundles += [("demo", open_bundle(DEMO))] if DEMO.exists() else []
        for name, bundle in bundles:
            for batch in (2,) if results.tiny else (32, 128):
                projector = ImageProjector(bundle, distance="lite0", device=str(results.device), batch_size=batch)
                size = bundle.generator.img_resolution
                rng = np.random.default_rng(0)
                targets = [Target(rng.integers(0, 256, (size, size, 3), dtype=np.uint8), 0) for _ in range(batch)]
                for label, schedule in (("official", OFFICIAL), ("fast", FAST)):
                    steps = 2 if results.tiny else 40
                    short = replace(schedule, steps=steps, patience=None)
                    list(projector.project(targets, replace(short, steps=min(steps, 3))))
                    elapsed = seconds(lambda: list(projector.project(targets, short)), results.device)  # noqa: B023
                    rate = batch / (elapsed / steps * schedule.steps)
                    what = f"projection, {name}, {label} schedule ({schedule.steps} steps), {batch} at once"
                    results.number(what, rate, "images/s", milliseconds_a_step=1000 * elapsed / steps)
                    hours = PROJECTED_IMAGES / rate / 3600
                    target = {"at_most": TARGETS["projection_hours"]} if batch == 128 else {}
                    results.number(f"{what}, {PROJECTED_IMAGES:,} images", hours, "h", **target)


def classification(results: Results) -> None:
    """The demo's classifier, served by ONNX Runtime and as a torch network."""
    from dermis.classifier.onnx_session import Classifier, find_classifier
    from dermis.classifier.torch_network import load_torch_classifier

    if not DEMO.exists():
        results.note("classification", f"skipped: {DEMO} does not exist")
        return
    description, location = find_classifier(str(DEMO))
    size, count = description.input.size, 8 if results.tiny else 1024
    inputs = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    with Classifier(location, device="cpu" if results.tiny else "auto") as classifier:
        classifier.logits(inputs[:8])
        elapsed = min(
            seconds(lambda: classifier.logits(inputs), results.device) for _ in range(1 if results.tiny else 3)
        )
        runs_on = f"ONNX Runtime on {'the GPU' if classifier.device == 'cuda' else f'{available_cpus()} CPU cores'}"
        results.number(f"classification, {size} px, {runs_on}", count / elapsed, "images/s")
        served = classifier.logits(inputs[:8])
    network = load_torch_classifier(location).to(results.device).eval()
    images = torch.from_numpy(inputs).to(results.device).permute(0, 3, 1, 2).float()

    def by_torch() -> torch.Tensor:
        with torch.inference_mode(), torch.autocast(results.device.type, torch.bfloat16, enabled=not results.tiny):
            return torch.cat([network(part)[0].float() for part in torch.split(images, 256)])

    logits = by_torch()[:8].cpu().numpy()
    elapsed = min(seconds(by_torch, results.device) for _ in range(1 if results.tiny else 3))
    results.number(f"classification, {size} px, torch on the device", count / elapsed, "images/s")
    results.number("largest difference of logits", float(np.abs(logits - served).max()), "", bfloat16=not results.tiny)


def features(results: Results) -> None:
    """Features for an evaluation, in the space whose weights are in a Python package."""
    from dermis.features import feature_extractor

    try:
        extractor = feature_extractor("lite0", results.device)
    except (ImportError, DermisError) as error:
        results.note("features", f"skipped: {error}")
        return
    batch = 4 if results.tiny else 256
    images = np.random.default_rng(0).integers(0, 256, (batch, 224, 224, 3), dtype=np.uint8)
    extractor.extract(images)
    elapsed = min(seconds(lambda: extractor.extract(images), results.device) for _ in range(1 if results.tiny else 5))
    results.number("features, lite0, 224 px", batch / elapsed, "images/s", runs=extractor.backend)


def look_up(results: Results) -> None:
    """Nearest training images with FAISS: the demo's index, and a large index on the GPU if FAISS supports it."""
    from dermis.authenticity.index import import_faiss, open_index

    try:
        faiss = import_faiss()
    except DermisError as error:
        results.note("look-up", f"skipped: {error}")
        return
    if DEMO.exists():
        index = open_index(str(DEMO))
        count = 100 if results.tiny else 40_000
        rows = np.random.default_rng(0).standard_normal((count, index.description.feature_dim), dtype=np.float32)
        index.nearest(rows[:100])
        results.number(
            "look-up in the demo's index", count / seconds(lambda: index.nearest(rows), results.device), "/s"
        )
    if not (hasattr(faiss, "get_num_gpus") and faiss.get_num_gpus()):
        results.note("look-up on the GPU", "skipped: this FAISS does not support a GPU")
        return
    from benchmarks.authenticity import DIM, clustered
    from dermis.authenticity.build import new_index
    from dermis.authenticity.index import on_device, search

    built = new_index("ivf", DIM, "8bit", 1_000_000)
    built.train(clustered(200_000, seed=1))
    built.add(clustered(1_000_000, seed=2))
    queries = clustered(10_000, seed=3)
    for name, each in (("GPU", on_device(built, "cuda")), ("CPU", built)):
        search(each, queries[:100], 1, available_cpus())
        elapsed = seconds(lambda each=each: search(each, queries, 1, available_cpus()), results.device)  # type: ignore[misc]
        results.number(f"look-up in a million vectors (ivf, 8 bits), {name}", len(queries) / elapsed, "/s")


def kernels(results: Results) -> None:
    """The slowest kernels of generation and training, and implementations of the low-pass filter."""
    from benchmarks.gpu.speed import filter_times, profile_generation, profile_training

    for name, milliseconds in filter_times(results.device, results.tiny).items():
        results.number(f"low-pass filter, {name}", milliseconds, "ms")
    for name, rows in (
        ("generation", profile_generation(results.device, results.tiny)),
        ("training", profile_training(results.device, results.tiny)),
    ):
        results.note(f"slowest kernels, {name}", f"{len(rows) - 1} are listed", kernels=rows)


PARTS: dict[str, Callable[[Results], None]] = {
    "tests": tests,
    "machine": machine,
    "generation": generation,
    "training": training,
    "projected-training": projected_training,
    "projection": projection,
    "classification": classification,
    "features": features,
    "look-up": look_up,
    "kernels": kernels,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    device = torch.device("cpu") if options.tiny else resolve_device("auto")
    PARTS[options.part](Results(options.out, options.part, device, options.tiny))


if __name__ == "__main__":
    main()
