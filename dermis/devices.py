"""Choose a device, and the arithmetic that is fast on it."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from dermis.cpus import has_native_bfloat16
from dermis.errors import DermisError


def resolve_device(device: str) -> torch.device:
    """Return a device by name.

    Args:
        device: "auto" (CUDA if present, otherwise the CPU), or a name of torch.

    Raises:
        DermisError: The device does not exist.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise DermisError(f'device: "{device}" is not a known device; use auto, cpu or cuda') from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise DermisError(f'device: "{device}" was requested, but torch finds no CUDA device; use cpu or auto')
    return resolved


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 if the device multiplies it natively, otherwise float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if has_native_bfloat16() else torch.float32


def describe_hardware(device: torch.device) -> str:
    """Describe a device in one line: the name of the GPU, or the processor and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"
