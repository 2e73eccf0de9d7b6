"""Measure the images of reports in a process of its own.

An image takes many small steps of NumPy, which would keep the interpreter of the gateway busy and delay its other calls: under
a mixed load with small datasets they took a third of its time.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray

from dermis.report.appearance import Appearance, appearances
from services.parent_watchdog import exit_with_parent

logger = logging.getLogger("dermis.jobs")


class AppearanceProcess:
    """`dermis.report.appearance.appearances` in another process. It can be called in several threads.

    The process starts at the first call, and at the next one after it has ended.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: ProcessPoolExecutor | None = None

    def __call__(self, images: NDArray[np.uint8]) -> list[Appearance]:
        """Measure RGB images uint8 [N, H, W, 3]. If the process cannot be used, they are measured in this one."""
        pool = None
        try:
            with self._lock:
                if self._pool is None:
                    # A copy of this process (fork) would contain its threads' locks.
                    self._pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=exit_with_parent)
                pool = self._pool
            return pool.submit(appearances, images).result()
        except (BrokenProcessPool, OSError, NotImplementedError) as error:  # the last two without POSIX semaphores
            logger.warning("no process measures images", extra={"error": str(error)})
            with self._lock:
                if self._pool is pool:
                    self._pool = None
            return appearances(images)

    def close(self) -> None:
        """End the process. Calls that wait raise CancelledError."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)
