"""How many processors there are to use. Imports no torch."""

from __future__ import annotations

import math
import os
from pathlib import Path


def available_cpus() -> int:
    """Processors that this process may use: its affinity mask, and the quota of its control group (version 2)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(count, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max": no quota
        return count
