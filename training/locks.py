"""Locks of files that several trainings can make."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dermis.errors import TrainingError
from dermis.files import try_lock

NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}  # some cluster file systems have none
_POLL_SECONDS = 1.0


@contextmanager
def one_process(file: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Let one process at a time run the block, which makes a file. The others wait, and must look again if it exists.

    The kernel releases the lock when a process ends, however it ends.

    Args:
        file: The file. Its folder must exist.
        on_wait: Called once if another process has the lock.

    Raises:
        TrainingError: The file cannot be locked.
    """
    path, waiting = file.with_suffix(".lock"), False
    try:
        while (lock := try_lock(path)) is None:
            if not waiting:
                on_wait()
            waiting = True
            time.sleep(_POLL_SECONDS)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise TrainingError(f"{path}: cannot be locked ({error.strerror})") from None
        yield
        return
    try:
        yield
        path.unlink(missing_ok=True)  # the file exists now, so a process that locks this or a new file does nothing
    finally:
        lock.release()
