"""Worker processes that end with the process that started them.

A supervisor that is killed cannot stop its workers. They would go on holding the port, the worker's name and the database,
and the service could not be started again.
"""

from __future__ import annotations

import os
import threading
import time

_POLL_SECONDS = 0.2
_watching = threading.Lock()


def exit_with_parent() -> None:
    """From now on, end this process at once when its parent is gone. Work is durable, so nothing is lost by it."""
    if not _watching.acquire(blocking=False):
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="dermis-parent", daemon=True).start()
