"""Which backend a machine gets."""

from __future__ import annotations

import logging

import torch

from dermis.cpus import available_cpus
from dermis.devices import fast_dtype, resolve_device
from dermis.errors import DermisError
from dermis.networks import Generator
from dermis.synthesizer.backend import Backend

log = logging.getLogger(__name__)

BACKENDS = ("auto", "openvino", "torch")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def make_backend(generator: Generator, device: str, backend: str, dtype: str, threads: int | None) -> Backend:
    """The backend asked for; with "auto" the fastest that is installed. DermisError where it cannot be had.

    On a CPU that is OpenVINO, in bfloat16 where the processor multiplies it natively and in float32 elsewhere, or
    torch if OpenVINO is missing. On CUDA it is torch.
    """
    resolved = resolve_device(device)
    if backend not in BACKENDS:
        raise DermisError(f'backend: "{backend}" is none of {", ".join(BACKENDS)}')
    if dtype != "auto" and dtype not in DTYPES:
        raise DermisError(f'dtype: "{dtype}" is none of auto, {", ".join(DTYPES)}')
    arithmetic = fast_dtype(resolved) if dtype == "auto" else DTYPES[dtype]
    if resolved.type != "cpu":
        if backend == "openvino":
            raise DermisError(f"backend: openvino runs on the CPU only, not on {resolved}; use torch or auto")
        from dermis.synthesizer.cuda import cuda_backend

        return cuda_backend(generator, resolved, arithmetic)
    cpus = available_cpus() if threads is None else threads
    if cpus < 1:
        raise DermisError(f"threads: must be at least 1; got {cpus}")
    if backend != "torch":
        try:
            from dermis.synthesizer.openvino_cpu import openvino_backend

            return openvino_backend(generator, arithmetic, cpus)
        except (ImportError, OSError, RuntimeError) as error:  # not installed, or no build of it works on this machine
            if backend == "openvino":
                raise DermisError(
                    f'backend: openvino does not work here ({error}); pip install "dermis[cpu]", or use auto or torch'
                ) from error
            log.warning("OpenVINO does not work here, drawing with torch at about two thirds of the speed: %s", error)
    from dermis.synthesizer.torch_cpu import torch_backend

    return torch_backend(generator, arithmetic, cpus)
