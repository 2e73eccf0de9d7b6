"""Names and leases of workers, which show whose unfinished jobs another worker has to take over.

DBOS recovers the workflows of a process only when a process of the same name starts again. A worker therefore needs the same
name after a crash, and no two running processes may have the same name: the name contains a numbered slot, which a process
holds by a lock of the operating system that ends with it. If no process with this name starts again (for instance because the
machine no longer exists), another worker takes over when the lease in the jobs database has run out.
"""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dermis.files import try_lock
from services.jobs.table import JobTable

logger = logging.getLogger("dermis.jobs")


@contextmanager
def executor_slot(data_dir: Path, name: str | None = None) -> Iterator[str]:
    """Hold a worker name that no other running process on this machine holds.

    Args:
        data_dir: The data folder of the service, which gets the lock files.
        name: The name, if the operator has set one. Default: the host name and a slot number.
    """
    if name is not None:
        yield name
        return
    folder = data_dir.absolute() / "workers"
    folder.mkdir(parents=True, exist_ok=True)
    host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:100] or "worker"
    slot = 0
    while True:
        lock = try_lock(folder / f"{host}-{slot}.lock")
        if lock is not None:
            break
        slot += 1
    try:
        yield f"{host}-{slot}"
    finally:
        lock.release()


class Lease:
    """Renews the lease of this worker three times per lease period, and calls `sweep` as often, each in its own thread.

    Args:
        table: The jobs table.
        executor_id: The name of this worker.
        seconds: The length of the lease.
        works: Whether this process runs jobs; a gateway does not.
        sweep: Called with True if the leases of other workers show which of them are alive. It is called with False for
            one lease period after the database could not be reached, because no worker could renew its lease.
    """

    def __init__(
        self, table: JobTable, executor_id: str, seconds: float, *, works: bool, sweep: Callable[[bool], None]
    ) -> None:
        self._table = table
        self._executor_id = executor_id
        self._seconds = seconds
        self._works = works
        self._sweep = sweep
        self._stopped = threading.Event()
        self._trusted_from = float("-inf")
        # Two threads, because a sweep may wait for the database for a long time after it is back.
        self._threads = [
            threading.Thread(target=target, name=f"dermis-{name}", daemon=True)
            for name, target in (("lease", self._renew_repeatedly), ("sweep", self._sweep_repeatedly))
        ]

    def start(self) -> None:
        """Start both threads."""
        for thread in self._threads:
            thread.start()

    def _renew_repeatedly(self) -> None:
        pause = self._seconds / 3
        while not self._stopped.wait(pause):
            try:
                self._table.renew_lease(self._executor_id, self._seconds, works=self._works)
                pause = self._seconds / 3
            except Exception as error:  # an interruption of the database must not end this thread
                logger.warning("lease not renewed", extra={"error": str(error)})
                self._trusted_from = time.monotonic() + self._seconds
                pause = min(1.0, self._seconds / 3)

    def _sweep_repeatedly(self) -> None:
        while not self._stopped.wait(self._seconds / 3):
            try:
                self._sweep(time.monotonic() >= self._trusted_from)
            except Exception as error:
                logger.warning("sweep not finished", extra={"error": str(error)})

    def stop(self) -> None:
        """End the threads and the lease, so that other workers need not wait until it runs out."""
        self._stopped.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=5)
        with contextlib.suppress(Exception):
            self._table.drop_lease(self._executor_id)
