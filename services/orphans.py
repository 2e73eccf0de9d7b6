"""Worker processes that end with the process that started them.

A supervisor that is killed cannot stop its workers. They would go on holding the port, the worker's name and the database,
and the service could not be started again.
"""

from __future__ import annotations

import os
import signal
import threading
import time

_POLL_SECONDS = 0.2
_watching = threading.Lock()


def exit_with_parent(parent: int | None = None) -> None:
    """From now on, end this process at once when its parent is gone. Work is durable, so nothing is lost by it.

    Args:
        parent: Process id of the parent, which may be gone already; by default the parent that the process has now.
    """
    if not _watching.acquire(blocking=False):
        return
    expected = os.getppid() if parent is None else parent

    def watch() -> None:
        while os.getppid() == expected:
            time.sleep(_POLL_SECONDS)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)  # with the processes that this one has started
        os._exit(1)

    threading.Thread(target=watch, name="dermis-parent", daemon=True).start()
