"""Number of usable processors, their instructions, and names of devices. Imports no torch."""

from __future__ import annotations

import ctypes
import math
import os
import platform
from functools import lru_cache
from pathlib import Path

# By their names in Linux, the widest first. They decide the last bits of a result.
_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "sve2", "sve", "asimd")
_NATIVE_BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16")
# M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_THRESHOLD of glibc's malloc.h, in bytes. Early versions of glibc refuse more than
# 32 MiB for the last one, so it is set twice.
_MALLOC_OPTIONS = ((-1, (1 << 31) - 1), (-2, 64 << 20), (-3, 32 << 20), (-3, 1 << 30))


def without_torch(device: str) -> str:
    """The device of a library that is not torch: "cpu" in place of Apple and Intel GPUs, which only torch uses.

    Args:
        device: "auto" or a name of torch.
    """
    return "cpu" if device.partition(":")[0] in ("mps", "xpu") else device


def available_cpus() -> int:
    """Return the number of processors that this process can use, by its affinity mask and control group (version 2)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(count, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max", which means no quota
        return count


def cpu_identity() -> dict[str, str]:
    """Return what decides the last bits of a result on a CPU: the processor and its widest instructions."""
    name, flags = _processor()
    known = {"avx512f": "avx512_f", "asimd": "neon"}
    widest = next((flag for flag in _INSTRUCTIONS if flag in flags), "baseline")
    return {"device": "cpu", "processor": name, "instructions": known.get(widest, widest)}


def has_native_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 natively; False if this is not known."""
    _, flags = _processor()
    return any(flag in flags for flag in _NATIVE_BFLOAT16)


@lru_cache(maxsize=1)
def _processor() -> tuple[str, frozenset[str]]:
    """Return name and instruction flags from /proc/cpuinfo; on other systems the name alone."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            key, colon, value = line.partition(":")
            if colon:
                fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    flags = fields.get("flags", fields.get("Features", ""))
    return fields.get("model name") or platform.processor() or "unknown", frozenset(flags.split())


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for reuse, if the C library is glibc.

    By default glibc returns every large block to the kernel, and the next one costs a page fault for each 4 KB. Networks
    on the CPU allocate and free such blocks at every layer: training at 128 px took 2 to 6 times as long
    (docs/benchmarks-networks.md). The process then keeps its peak memory until it ends.

    Returns:
        Whether the C library took all settings.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl, macOS
        return False
    return all([mallopt(option, value) == 1 for option, value in _MALLOC_OPTIONS])  # noqa: C419 - set all of them
