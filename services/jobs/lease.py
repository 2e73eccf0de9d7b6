"""Who is alive: a stable name for each worker process, a lease that it renews, and the taking over of dead workers' jobs.

DBOS recovers a process's workflows only when a process of the same name starts again. So a worker's name must come back
after a crash, and must never be borne by two live processes; and where the name does not come back (the machine is gone),
another worker has to take over. Hence a numbered slot under an operating system lock, which dies with its process, and a
lease in the jobs database, which runs out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from services.jobs.table import JobTable

logger = logging.getLogger("dermis.jobs")


@contextmanager
def executor_slot(data_dir: Path, name: str | None = None) -> Iterator[str]:
    """Hold a worker name that no other live process on this machine holds: `name`, or host name and slot number."""
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
        lock.close()  # and with it the lock


def try_lock(path: Path) -> IO[str] | None:
    """The file at `path` with a lock on it that ends with the process; None if another process has it."""
    file = path.open("a+", encoding="ascii")
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


class Lease:
    """Renews this worker's lease three times in its length, and calls `sweep` as often, each in a thread of its own.

    The argument of `sweep` says whether the leases of other workers show which of them are alive. It is False for the length
    of a lease after the database could not be reached, because no worker could renew its lease.
    """

    def __init__(self, table: JobTable, executor_id: str, seconds: float, sweep: Callable[[bool], None]) -> None:
        self._table = table
        self._executor_id = executor_id
        self._seconds = seconds
        self._sweep = sweep
        self._stopped = threading.Event()
        self._trusted_from = float("-inf")
        # Apart, as a sweep may wait for the database for long after it is back.
        self._threads = [
            threading.Thread(target=target, name=f"dermis-{name}", daemon=True)
            for name, target in (("lease", self._renew_for_ever), ("sweep", self._sweep_for_ever))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def _renew_for_ever(self) -> None:
        pause = self._seconds / 3
        while not self._stopped.wait(pause):
            try:
                self._table.renew_lease(self._executor_id, self._seconds)
                pause = self._seconds / 3
            except Exception as error:  # a database away for a while must not end the lease for ever
                logger.warning("lease not renewed", extra={"error": str(error)})
                self._trusted_from = time.monotonic() + self._seconds
                pause = min(1.0, self._seconds / 3)

    def _sweep_for_ever(self) -> None:
        while not self._stopped.wait(self._seconds / 3):
            try:
                self._sweep(time.monotonic() >= self._trusted_from)
            except Exception as error:
                logger.warning("sweep not finished", extra={"error": str(error)})

    def stop(self) -> None:
        """End the threads and give the lease up, so that others need not wait for it."""
        self._stopped.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=5)
        with contextlib.suppress(Exception):
            self._table.drop_lease(self._executor_id)
