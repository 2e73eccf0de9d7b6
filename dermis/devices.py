"""Choose a device, and the arithmetic that is fast on it."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from dermis.cpus import has_native_bfloat16
from dermis.errors import DermisError, escape

_KINDS = {"cuda": "CUDA device", "mps": "Apple GPU", "xpu": "Intel GPU"}


def resolve_device(device: str) -> torch.device:
    """Return a device by name.

    Args:
        device: "auto" (CUDA if present, otherwise the CPU), or a name of torch: "cpu", "cuda", "cuda:1", "mps" (Apple GPU),
            "xpu" or "xpu:1" (Intel GPU).

    Raises:
        DermisError: The device does not exist.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = torch.device("meta")
    if resolved.type not in ("cpu", *_KINDS):
        raise DermisError(f'device: "{escape(device)}" is not a known device; use auto, cpu, cuda, mps or xpu')
    present = _count(resolved.type)
    if present <= (resolved.index or 0):
        seen = f"finds {present} of this kind only" if present else f"finds no {_KINDS[resolved.type]}"
        raise DermisError(
            f'device: "{escape(device)}" was requested, but torch {seen}{_reason(resolved.type)}; use cpu or auto'
        )
    return resolved


def _count(kind: str) -> int:
    """Number of devices of a type of torch."""
    if kind == "cuda":
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "xpu":
        return torch.xpu.device_count() if torch.xpu.is_available() else 0
    return int(torch.backends.mps.is_available()) if kind == "mps" else 1


def _reason(kind: str) -> str:
    """Why there is no device of a type, if it is known."""
    if kind == "mps":
        built = torch.backends.mps.is_built()
        return " (macOS 14 or later is needed)" if built else " (this build of torch has no support for it)"
    return ""


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 if the device multiplies it natively, otherwise float32; float32 on Apple and Intel GPUs."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if device.type == "cpu" and has_native_bfloat16() else torch.float32


def to_float64(tensor: torch.Tensor) -> torch.Tensor:
    """Convert a tensor to float64; on the CPU if it is on an Apple GPU, which has no float64."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def describe_hardware(device: torch.device) -> str:
    """Describe a device in one line: the name of the GPU, or the processor and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "xpu":
        return torch.xpu.get_device_name(device)
    name = platform.processor() or platform.machine()
    if device.type == "mps":
        return f"Apple GPU ({name})"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    threads = torch.get_num_threads()
    return f"{name}, {threads} {'thread' if threads == 1 else 'threads'}"
