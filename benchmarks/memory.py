"""The memory of the processes of a service over time, and whether it grows."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import psutil  # type: ignore[import-untyped]
from scipy import stats

from benchmarks.cluster import Replica

MAX_GROWTH = 0.02
"""Growth of memory in an hour, as a part of it, that counts as none; more counts if the interval excludes 0."""
_BLOCKS = 12


@dataclass
class Growth:
    """Memory of one process in MB: means, and the slope of `pss` in MB/h with a 95 % interval; None with few samples.

    `pss` counts a page that several processes share in parts, `rss` counts it in each of them.
    """

    name: str
    samples: int
    rss: float
    pss: float
    slope: float | None = None
    low: float | None = None
    high: float | None = None

    def grows(self, part: float = MAX_GROWTH) -> bool:
        """Whether there is growth: the interval is above 0, and the slope is more than a part of the memory in an hour."""
        return self.slope is not None and (self.low or 0.0) > 0 and self.slope > part * self.pss


@dataclass
class Process:
    """The memory of one process of the service over time."""

    name: str
    times: list[float] = field(default_factory=list)
    rss: list[float] = field(default_factory=list)
    pss: list[float] = field(default_factory=list)

    def growth(self, begin: float, end: float) -> Growth | None:
        """Growth between two times; None if there is no sample."""
        times = np.array(self.times)
        chosen = (times >= begin) & (times <= end)
        if not chosen.any():
            return None
        rss, pss = np.array(self.rss)[chosen], np.array(self.pss)[chosen]
        growth = Growth(self.name, len(pss), float(rss.mean()), float(pss.mean()))
        if len(pss) >= 2 * _BLOCKS:
            # Neighbouring samples are alike, so the interval is that of the means of blocks.
            hours = [block.mean() / 3600 for block in np.array_split(times[chosen] - begin, _BLOCKS)]
            fit = stats.linregress(hours, [block.mean() for block in np.array_split(pss, _BLOCKS)])
            half = float(stats.t.ppf(0.975, _BLOCKS - 2) * fit.stderr)
            growth.slope, growth.low, growth.high = float(fit.slope), float(fit.slope) - half, float(fit.slope) + half
        return growth


class MemorySampler(threading.Thread):
    """Reads the memory of the processes of a replica at regular times."""

    def __init__(self, replica: Replica, pause: float) -> None:
        super().__init__(daemon=True)
        self._replica, self._pause = replica, pause
        self._ended = threading.Event()
        self._processes: dict[int, Process] = {}

    def run(self) -> None:
        """Sample until `stop`."""
        while not self._ended.wait(self._pause):
            now = time.time()
            for process in self._replica.processes():
                with suppress(psutil.Error):
                    if process.pid not in self._processes:
                        self._processes[process.pid] = Process(name_of(process))
                    sizes, known = process.memory_full_info(), self._processes[process.pid]
                    known.rss.append(sizes.rss / 1e6)
                    known.pss.append(sizes.pss / 1e6)
                    known.times.append(now)

    def stop(self) -> list[Process]:
        """End, and return the processes."""
        self._ended.set()
        self.join()
        return sorted(self._processes.values(), key=lambda process: process.name)


def name_of(process: psutil.Process) -> str:
    """The name of a process of the service, such as "Generator"."""
    line = process.cmdline()
    if "--service-name" in line:
        return str(line[line.index("--service-name") + 1])
    if "services.serve" in line:
        return "supervisor"
    if "services.gateway.decoding" in line:
        return "upload decoder"
    if "--multiprocessing-fork" in line:
        return "image measuring"
    if any("multiprocessing.resource_tracker" in each for each in line):
        return "resource tracker"
    return " ".join(line[-2:])[-40:]
