"""Which backend a machine gets."""

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
# Where one of these is missing there is no CUDA device, and torch need not be asked.
_CUDA_DEVICES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")
_NO_OPENVINO = (ImportError, OSError, RuntimeError)  # not installed, or no build of it works on this machine


@dataclass(frozen=True)
class Ready:
    """A generator ready to draw: its backend, and what the synthesizer needs to know of it (see `openvino_cpu.Stages`)."""

    backend: Backend
    config: GeneratorConfig
    w_avg: Float
    constant_noise: Float
    resolutions: tuple[int, ...]


def make_ready(
    load: Callable[[], Generator],
    digest: str,
    device: str,
    backend: str,
    dtype: str,
    threads: int | None,
    cache: Path | None,
) -> Ready:
    """The backend asked for; with "auto" the fastest that is installed. DermisError where it cannot be had.

    On a CPU that is OpenVINO, in bfloat16 where the processor multiplies it natively and in float32 elsewhere, or
    torch if OpenVINO is missing. On CUDA it is torch. A converted generator in `cache` spares `load` and torch.
    """
    if backend not in BACKENDS:
        raise DermisError(f'backend: "{backend}" is none of {", ".join(BACKENDS)}')
    if dtype not in DTYPES:
        raise DermisError(f'dtype: "{dtype}" is none of {", ".join(DTYPES)}')
    cpus = available_cpus() if threads is None else threads
    if cpus < 1:
        raise DermisError(f"threads: must be at least 1; got {cpus}")
    bfloat16 = has_native_bfloat16() if dtype == "auto" else dtype == "bfloat16"
    if cache is not None and backend != "torch" and _is_cpu(device) and (ready := _kept(cache, digest, bfloat16, cpus)):
        return ready
    return _made(load(), digest, device, backend, dtype, cpus, cache)


def _is_cpu(device: str) -> bool:
    return device == "cpu" or (device == "auto" and not any(Path(name).exists() for name in _CUDA_DEVICES))


def _kept(cache: Path, digest: str, bfloat16: bool, threads: int) -> Ready | None:
    try:
        from dermis.synthesizer.model_cache import read_stages
        from dermis.synthesizer.openvino_cpu import compile_stages

        stages = read_stages(cache, digest)
        if stages is None:
            return None
        compiled = compile_stages(stages, bfloat16=bfloat16, threads=threads)
    except _NO_OPENVINO:
        return None  # what is wrong is said where the network is converted
    return Ready(compiled, stages.config, stages.w_avg, stages.constant_noise, stages.resolutions)


def _made(
    generator: Generator, digest: str, device: str, backend: str, dtype: str, threads: int, cache: Path | None
) -> Ready:
    from dermis.synthesizer.network import constant_noise, noise_resolutions

    built = _build(generator, digest, device, backend, dtype, threads, cache)
    w_avg: Float = generator.mapping.w_avg.detach().cpu().numpy().copy()
    noise: Float = constant_noise(generator).cpu().numpy()
    return Ready(built, generator.config, w_avg, noise, tuple(noise_resolutions(generator)))


def _build(
    generator: Generator, digest: str, device: str, backend: str, dtype: str, threads: int, cache: Path | None
) -> Backend:
    from dermis.devices import resolve_device

    resolved = resolve_device(device)
    arithmetic = _dtype(resolved, dtype)
    if resolved.type != "cpu":
        if backend == "openvino":
            raise DermisError(f"backend: openvino runs on the CPU only, not on {resolved}; use torch or auto")
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
                    f"backend: openvino does not work here ({error}); pip install openvino, or use auto or torch"
                ) from error
            log.warning("OpenVINO does not work here, drawing with torch at about two thirds of the speed: %s", error)
    from dermis.synthesizer.torch_cpu import torch_backend

    return torch_backend(generator, arithmetic, threads)


def _dtype(device: torch.device, dtype: str) -> torch.dtype:
    import torch

    from dermis.devices import fast_dtype

    return fast_dtype(device) if dtype == "auto" else {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
