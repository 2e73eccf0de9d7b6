"""Tests of devices. Apple and Intel GPUs are not available where tests run: a mock makes torch find them."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dermis import devices
from dermis.cpus import without_torch
from dermis.devices import fast_dtype, resolve_device, to_float64
from dermis.errors import DermisError, TrainingError
from dermis.latents import z_for
from dermis.synthesizer import choice, torch_device
from dermis.synthesizer.backend import Backend
from dermis.synthesizer.torch_cpu import torch_backend
from dermis.synthesizer.torch_device import device_backend
from plain_synthesis import make_generator
from training.distributed import joined_ranks


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An Apple GPU and two Intel GPUs."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 2)
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda _: "Intel Arc")
    yield


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mps", r"finds no Apple GPU \(this build of torch has no support for it\); use cpu or auto"),
        ("xpu", "finds no Intel GPU; use cpu or auto"),
        ("xpu:1", "finds no Intel GPU"),
        ("cuda:1", "finds no CUDA device"),
        ("meta", "not a known device; use auto, cpu, cuda, mps or xpu"),
        ("abacus", "not a known device"),
    ],
)
def test_device_that_is_absent_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    for module in (torch.backends.mps, torch.xpu, torch.cuda):
        monkeypatch.setattr(module, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: False)
    with pytest.raises(DermisError, match=message):
        resolve_device(name)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")


def test_apple_and_intel_gpus_are_accepted_and_never_chosen_by_auto(
    gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    for name in ("mps", "xpu", "xpu:1"):
        device = resolve_device(name)
        assert device == torch.device(name) and fast_dtype(device) == torch.float32
        assert without_torch(name) == "cpu"
    assert without_torch("cuda:1") == "cuda:1" and without_torch("auto") == "auto"
    assert devices.describe_hardware(torch.device("xpu:1")) == "Intel Arc"
    assert devices.describe_hardware(torch.device("mps")).startswith("Apple GPU")
    with pytest.raises(DermisError, match="finds 2 of this kind only"):
        resolve_device("xpu:2")
    with pytest.raises(TrainingError, match="several processes train on cuda or cpu, not on mps"):
        next(iter([joined_ranks(torch.device("mps"), {"WORLD_SIZE": "2", "LOCAL_RANK": "0"}).__enter__()]))


def test_float64_is_computed_on_the_cpu_where_the_device_has_none() -> None:
    values = torch.tensor([0.1, 0.2])
    on_apple: Any = SimpleNamespace(device=SimpleNamespace(type="mps"), cpu=lambda: values)
    assert torch.equal(to_float64(on_apple), values.double())
    assert to_float64(values).dtype == torch.float64


def test_generator_on_another_device_gives_the_images_of_the_cpu(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = make_generator("conditional")
    asked: list[torch.device] = []

    def on_cpu(generator: Any, device: torch.device, dtype: torch.dtype) -> Backend:
        asked.append(device)
        assert dtype == torch.float32
        return device_backend(generator, torch.device("cpu"), dtype)

    monkeypatch.setattr(torch_device, "device_backend", on_cpu)
    loaded = choice.load_backend(lambda: generator, "0" * 64, "xpu:1", "auto", "auto", 1, None)
    assert asked == [torch.device("xpu:1")] and loaded.backend.workers == 1
    with pytest.raises(DermisError, match="openvino runs on the CPU only, not on mps"):
        choice.load_backend(lambda: generator, "0" * 64, "mps", "openvino", "auto", 1, None)
    expected, count = torch_backend(generator, torch.float32, 1), loaded.backend.micro_batch
    config = generator.config
    z = z_for(7, range(count), config.z_dim)
    c = np.eye(config.c_dim, dtype=np.float32)[[i % config.c_dim for i in range(count)]]
    w = loaded.backend.mapping(z, c)
    assert np.allclose(
        w, np.concatenate([expected.mapping(z[i : i + 1], c[i : i + 1]) for i in range(count)]), atol=1e-5
    )
    ws = np.repeat(w[:, None], config.num_ws, axis=1)
    noise = np.repeat(loaded.constant_noise, count, axis=0)
    images = loaded.backend.images(ws, noise)
    single = np.concatenate([expected.images(ws[i : i + 1], noise[i : i + 1]) for i in range(count)])
    assert images.std() > 10 and np.abs(images.astype(int) - single).max() <= 1
