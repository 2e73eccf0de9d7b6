"""End a worker process when the process that started it has ended.

A supervisor that is killed cannot stop its workers. They would keep the port, the name of the worker and the database, and the
service could not be started again.
"""

from __future__ import annotations

import os
import signal
import threading
import time

_POLL_SECONDS = 0.2
_watching = threading.Lock()


def exit_with_parent(parent: int | None = None) -> None:
    """Watch the parent from now on, and end this process at once when it has ended. Work is durable, so nothing is lost.

    Args:
        parent: Process id of the parent, which may have ended already; by default the current parent.
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
