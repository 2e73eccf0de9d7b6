"""Measure the images of reports in processes of their own.

An image takes many small steps of NumPy, which would keep the interpreter of the gateway busy and delay its other calls: under
a mixed load with small datasets they took a third of its time. For the same reason threads of one process do not help: these
steps hold the interpreter's lock. Of a dataset of 12 images it is half of all processor time.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray

from dermis.cpus import available_cpus
from dermis.report.appearance import MAX_THREADS, Appearance, appearance, appearances, lower_priority
from services import logs
from services.parent_watchdog import exit_with_parent

logger = logging.getLogger("dermis.jobs")


class AppearanceProcesses:
    """`dermis.report.appearance.appearances` in other processes. It can be called in several threads.

    The processes start at the first call, and at the next one after one of them has ended.

    Args:
        count: Number of processes; default: one for each processor, at most `MAX_THREADS`.
        log: Least severe level and format of the log of these processes; default: they do not configure it.
    """

    def __init__(self, count: int | None = None, log: tuple[str, logs.Format] | None = None) -> None:
        self._log = log
        self._count = count or min(MAX_THREADS, available_cpus())
        self._lock = threading.Lock()
        self._pool: ProcessPoolExecutor | None = None

    def __call__(self, images: NDArray[np.uint8]) -> list[Appearance]:
        """Measure RGB images uint8 [N, H, W, 3]. If the processes cannot be used, they are measured in this one."""
        pool = None
        try:
            with self._lock:
                if self._pool is None:
                    # A copy of this process (fork) would contain its threads' locks.
                    self._pool = ProcessPoolExecutor(
                        self._count, get_context("spawn"), initializer=_start, initargs=(self._log,)
                    )
                pool = self._pool
            parts = [part for part in np.array_split(images, self._count) if len(part)]
            return [each for measured in pool.map(_measure, parts) for each in measured]
        except (BrokenProcessPool, OSError, NotImplementedError) as error:  # the last two without POSIX semaphores
            logger.warning("no process measures images", extra={"error": str(error)})
            with self._lock:
                if self._pool is pool:
                    self._pool = None
            return appearances(images)

    def close(self) -> None:
        """End the processes. Calls that wait raise CancelledError."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _start(log: tuple[str, logs.Format] | None) -> None:
    if log is not None:
        logs.configure(*log)
    exit_with_parent()
    lower_priority()


def _measure(images: NDArray[np.uint8]) -> list[Appearance]:
    return [appearance(image) for image in images]
