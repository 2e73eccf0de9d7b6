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


class Lease(threading.Thread):
    """Renews this worker's lease three times in its length, and calls `sweep` as often."""

    def __init__(self, table: JobTable, executor_id: str, seconds: float, sweep: Callable[[], None]) -> None:
        super().__init__(name="dermis-lease", daemon=True)
        self._table = table
        self._executor_id = executor_id
        self._seconds = seconds
        self._sweep = sweep
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(self._seconds / 3):
            try:
                self._table.renew_lease(self._executor_id, self._seconds)
                self._sweep()
            except Exception as error:  # a database away for a while must not end the lease for ever
                logger.warning("lease not renewed", extra={"error": str(error)})

    def stop(self) -> None:
        """End the thread and give the lease up, so that others need not wait for it."""
        self._stopped.set()
        if self.is_alive():
            self.join(timeout=10)
        with contextlib.suppress(Exception):
            self._table.drop_lease(self._executor_id)
