"""Measurements of speed: matrix products, copies, training steps, kernels."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.generation import automatic_config, random_bundle, seconds
from benchmarks.training import STRENGTH, random_data
from dermis.bundle import load_generator
from dermis.networks import fir2d, fir_filter
from training.distributed import Ranks
from training.gan.batches import batches
from training.gan.config import GanConfig, base_config
from training.gan.state import new_state
from training.gan.step import training_step

CYCLE = 16  # steps in which all phases have run, in the proportions of a long run
SLOWEST = 20


def matrix_rates(device: torch.device, tiny: bool, only: str | None = None) -> dict[str, float]:
    """GFLOP/s of a large matrix product in each arithmetic."""
    size = 256 if tiny else 8192
    names = ["bfloat16"] if only else ["bfloat16", "float16", "float32"]
    rates = {}
    for name in names:
        left, right = (torch.randn(size, size, device=device).to(getattr(torch, name)) for _ in range(2))
        rates[name] = _rate(left, right, device)
    if device.type == "cuda" and not only:
        left, right = (torch.randn(size, size, device=device) for _ in range(2))
        before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
        rates["float32 inputs in TF32"] = _rate(left, right, device)
        torch.backends.cuda.matmul.allow_tf32 = before
    return rates


def _rate(left: Tensor, right: Tensor, device: torch.device) -> float:
    """GFLOP/s in the better of two layouts, from the mean of ten products, because a GPU raises its clock slowly."""
    times = []
    for other in (right, right.t(), right, right.t()):
        times.append(seconds(lambda other=other: [left @ other for _ in range(10)], device) / 10)  # type: ignore[misc]
    return 2 * len(left) ** 3 / min(times) / 1e9


def transfers(device: torch.device, tiny: bool) -> dict[str, float]:
    """GB/s of copies on the device (bytes read and written), and between device and host."""
    count = 2**16 if tiny else 2**28
    rates = {}
    inside, target = (torch.zeros(count, dtype=torch.float32, device=device) for _ in range(2))
    inside.copy_(target)
    rates["copy on the device"] = 8 * count / min(seconds(lambda: target.copy_(inside), device) for _ in range(3)) / 1e9
    if device.type != "cuda":
        return rates
    part = inside[: count // 8]
    for name, host in (
        ("pageable memory", torch.zeros(count // 8)),
        ("pinned memory", torch.zeros(count // 8).pin_memory()),
    ):
        up = min(seconds(partial(part.copy_, host), device) for _ in range(3))
        down = min(seconds(partial(host.copy_, part), device) for _ in range(3))
        rates[f"copy to the device, {name}"] = count / 2 / up / 1e9
        rates[f"copy to the host, {name}"] = count / 2 / down / 1e9
    return rates


def training_speed(config: GanConfig, device: torch.device, compiled: bool, least_seconds: float) -> dict[str, float]:
    """Seconds for a thousand images over whole cycles of 16 steps, on random images that are read as in a run.

    Steps before the first timed cycle compile and warm up; their time is reported separately. Cycles are repeated for at least
    `least_seconds`.
    """
    dataset, _ = random_data(config, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    state = new_state(config, device)
    state.adaptive.p, state.adaptive.target = STRENGTH, None
    phases = state.phases(config, compiled=compiled)
    real = batches(dataset, config, 0, Ranks(device=device))

    def steps(count: int) -> None:
        for _ in range(count):
            training_step(state, phases, dataset, next(real), config)

    try:
        first = seconds(lambda: steps(1 if least_seconds == 0 else CYCLE + 1), device)
        cycles: list[float] = []
        while not cycles or sum(cycles) < least_seconds:
            cycles.append(seconds(lambda: steps(CYCLE), device))
    finally:
        real.close()
    result = {
        "seconds_per_kimg": 1000 * statistics.median(cycles) / (CYCLE * config.batch),
        "first_steps_seconds": first,
        "cycles": len(cycles),
    }
    if device.type == "cuda":
        result["peak_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return result


def filter_times(device: torch.device, tiny: bool) -> dict[str, float]:
    """Milliseconds of the low-pass filter after an upsampled feature map, in several implementations.

    The filter has few operations, so a good kernel takes little more than the time to read and write the map once.
    """
    n, channels, size = (1, 4, 16) if tiny else (16, 64, 256)
    dtype = torch.float32 if tiny else torch.bfloat16
    filter_ = fir_filter().to(device)
    x = torch.randn(n, channels, size + 1, size + 1, device=device).to(dtype)
    last = x.contiguous(memory_format=torch.channels_last)

    def shifted(x: Tensor) -> Tensor:
        """Both passes of the separable filter as sums of four shifted maps."""
        taps = [0.25, 0.75, 0.75, 0.25]  # includes the gain of 4 of both passes together
        x = F.pad(x, (1, 1, 1, 1))
        x = sum(x[..., k : x.shape[-1] - 3 + k] * tap for k, tap in enumerate(taps))  # type: ignore[assignment]
        return sum(x[:, :, k : x.shape[2] - 3 + k] * tap for k, tap in enumerate(taps))  # type: ignore[return-value]

    def depthwise(x: Tensor) -> Tensor:
        return fir2d(x, filter_, padding=1, gain=4.0)

    implementations: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "depthwise convolution, channels last": (depthwise, last),
        "depthwise convolution, channels first": (depthwise, x),
        "sums of shifted maps": (shifted, last),
    }
    if not tiny:
        implementations["sums of shifted maps, compiled"] = (torch.compile(shifted, dynamic=False), last)
    times = {}
    with torch.no_grad():
        exact = depthwise(x).float()
        for name, (apply, example) in implementations.items():
            difference = (apply(example).float() - exact).abs().max().item()
            if difference > 0.1:
                raise AssertionError(f"{name}: the result differs by {difference}")
            ten = partial(_repeat, 10, apply, example)
            times[name] = 1000 * min(seconds(ten, device) for _ in range(3)) / 10
        if device.type == "cuda":
            times["a copy of the map, for comparison"] = 1000 * min(seconds(last.clone, device) for _ in range(10))
    return times


def _repeat(count: int, apply: Callable[[Tensor], Tensor], example: Tensor) -> list[Tensor]:
    return [apply(example) for _ in range(count)]


def profile_generation(device: torch.device, tiny: bool) -> list[dict[str, Any]]:
    """The slowest kernels in a few batches of the serving path."""
    from dermis.synthesizer import Synthesizer

    with tempfile.TemporaryDirectory() as folder:
        bundle = random_bundle(Path(folder) / "random", automatic_config(32 if tiny else 256))
        options: dict[str, Any] = {"device": str(device), "generator": load_generator(bundle)}
        with Synthesizer(bundle, backend="torch" if tiny else "auto", **options) as synthesizer:
            count = synthesizer.micro_batch
            ws = synthesizer.ws([0] * count, range(count), [0] * count)
            # Called in this thread, because the profiler does not see the synthesizer's own threads.
            draw, noise = synthesizer._backend.images, synthesizer._fixed_noise["const"]
            draw(ws, noise)
            return _slowest(lambda: [draw(ws, noise) for _ in range(1 if tiny else 10)], device)


def profile_training(device: torch.device, tiny: bool) -> list[dict[str, Any]]:
    """The slowest kernels in a few eager training steps; compiled ones would have no names."""
    small: dict[str, Any] = {"channel_base": 256, "channel_max": 16, "batch": 4} if tiny else {}
    config = base_config("auto", 16 if tiny else 256, 2, precision="fp32" if tiny else "bf16", **small)
    dataset, batch = random_data(config, device)
    state = new_state(config, device)
    state.adaptive.p, state.adaptive.target = STRENGTH, None
    phases = state.phases(config)

    def steps() -> None:
        for _ in range(1 if tiny else 4):
            training_step(state, phases, dataset, batch, config)

    steps()
    return _slowest(steps, device)


def _slowest(run: Callable[[], object], device: torch.device) -> list[dict[str, Any]]:
    cuda = device.type == "cuda"
    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        run()
        if cuda:
            torch.cuda.synchronize(device)
    wall = time.perf_counter() - start
    rows = profiler.key_averages()
    cost = "self_device_time_total" if cuda else "self_cpu_time_total"
    ranked = sorted(rows, key=lambda row: -getattr(row, cost))[:SLOWEST]
    return [{"kernel": "wall time, with profiling", "ms": round(1000 * wall, 2), "calls": 1}] + [
        {"kernel": row.key[:120], "ms": round(getattr(row, cost) / 1000, 3), "calls": row.count} for row in ranked
    ]
