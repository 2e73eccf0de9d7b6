"""Choose the backend for a machine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dermis.cpus import available_cpus, has_native_bfloat16
from dermis.errors import DermisError
from dermis.network_config import GeneratorConfig
from dermis.synthesizer.backend import Backend, Float

if TYPE_CHECKING:
    import torch

    from dermis.networks import Generator

log = logging.getLogger(__name__)

BACKENDS = ("auto", "openvino", "torch")
DTYPES = ("auto", "bfloat16", "float32")
# Without any of these there is no CUDA device, and torch need not be imported to ask it.
_CUDA_DEVICES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")
_NO_OPENVINO = (ImportError, OSError, RuntimeError)  # not installed, or its build does not work on this machine


@dataclass(frozen=True)
class LoadedBackend:
    """A generator that is ready to run, with the properties that the synthesizer needs (see `openvino_cpu.Stages`)."""

    backend: Backend
    config: GeneratorConfig
    w_avg: Float
    constant_noise: Float
    resolutions: tuple[int, ...]


def load_backend(
    load: Callable[[], Generator],
    digest: str,
    device: str,
    backend: str,
    dtype: str,
    threads: int | None,
    cache: Path | None,
) -> LoadedBackend:
    """Load the requested backend; with "auto" the fastest that works on this machine.

    On a CPU that is OpenVINO, in bfloat16 if the processor multiplies it natively and else in float32, or torch if OpenVINO
    does not work. On a GPU it is torch. With a converted generator in `cache`, `load` is not called and torch not imported.

    Raises:
        DermisError: Device, backend or dtype is unknown or not available on this machine.
    """
    if backend not in BACKENDS:
        raise DermisError(f'backend: "{backend}" is none of {", ".join(BACKENDS)}')
    if dtype not in DTYPES:
        raise DermisError(f'dtype: "{dtype}" is none of {", ".join(DTYPES)}')
    cpus = available_cpus() if threads is None else threads
    if cpus < 1:
        raise DermisError(f"threads: must be at least 1; got {cpus}")
    bfloat16 = has_native_bfloat16() if dtype == "auto" else dtype == "bfloat16"
    if (
        cache is not None
        and backend != "torch"
        and _is_cpu(device)
        and (loaded := _from_cache(cache, digest, bfloat16, cpus))
    ):
        return loaded
    return _from_network(load(), digest, device, backend, dtype, cpus, cache)


def _is_cpu(device: str) -> bool:
    return device == "cpu" or (device == "auto" and not any(Path(name).exists() for name in _CUDA_DEVICES))


def _from_cache(cache: Path, digest: str, bfloat16: bool, threads: int) -> LoadedBackend | None:
    try:
        from dermis.synthesizer.model_cache import read_stages
        from dermis.synthesizer.openvino_cpu import compile_stages

        stages = read_stages(cache, digest)
        if stages is None:
            return None
        compiled = compile_stages(stages, bfloat16=bfloat16, threads=threads)
    except _NO_OPENVINO:
        return None  # converting the network reports what is wrong
    return LoadedBackend(compiled, stages.config, stages.w_avg, stages.constant_noise, stages.resolutions)


def _from_network(
    generator: Generator, digest: str, device: str, backend: str, dtype: str, threads: int, cache: Path | None
) -> LoadedBackend:
    from dermis.synthesizer.network import constant_noise, noise_resolutions

    compiled = _build(generator, digest, device, backend, dtype, threads, cache)
    w_avg: Float = generator.mapping.w_avg.detach().cpu().numpy().copy()
    noise: Float = constant_noise(generator).cpu().numpy()
    return LoadedBackend(compiled, generator.config, w_avg, noise, tuple(noise_resolutions(generator)))


def _build(
    generator: Generator, digest: str, device: str, backend: str, dtype: str, threads: int, cache: Path | None
) -> Backend:
    from dermis.devices import resolve_device

    resolved = resolve_device(device)
    arithmetic = _dtype(resolved, dtype)
    if resolved.type != "cpu":
        if backend == "openvino":
            raise DermisError(f"backend: openvino runs on the CPU only, not on {resolved}; use torch or auto")
        if resolved.type != "cuda":
            from dermis.synthesizer.torch_device import device_backend

            return device_backend(generator, resolved, arithmetic)
        from dermis.synthesizer.cuda import cuda_backend

        return cuda_backend(generator, resolved, arithmetic, threads)
    if backend != "torch":
        try:
            from dermis.synthesizer.model_cache import write_stages
            from dermis.synthesizer.openvino_cpu import compile_stages, convert

            stages = convert(generator)
            compiled = compile_stages(stages, bfloat16="bfloat16" in str(arithmetic), threads=threads)
            if cache is not None:
                write_stages(cache, digest, stages)
            return compiled
        except _NO_OPENVINO as error:
            if backend == "openvino":
                raise DermisError(
                    f"backend: openvino does not work on this machine ({error}); pip install openvino, or use auto or torch"
                ) from error
            log.warning(
                "OpenVINO does not work on this machine; torch is used, at about two thirds of the speed: %s", error
            )
    from dermis.synthesizer.torch_cpu import torch_backend

    return torch_backend(generator, arithmetic, threads)


def _dtype(device: torch.device, dtype: str) -> torch.dtype:
    import torch

    from dermis.devices import fast_dtype

    return fast_dtype(device) if dtype == "auto" else {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
