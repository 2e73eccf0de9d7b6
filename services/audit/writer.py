"""Append entries to the audit trail from requests.

One thread writes. Entries of requests at the same moment share a transaction.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from queue import Empty, SimpleQueue
from typing import TextIO

from services.audit.trail import AuditTable, Entry, Event
from services.errors import DatabaseUnavailableError

logger = logging.getLogger("dermis.audit")

_MAX_BATCH = 200
_MAX_PENDING = 1000  # entries that may wait at one time without their requests waiting too
_RETRY_SECONDS = 1.0
_ATTEMPTS_AT_STOP = 2


@dataclass(frozen=True)
class _Waiting:
    """An event to be written; `done` is called in the thread, with the error if it could not be written."""

    event: Event
    done: Callable[[Exception | None], None] | None


class AuditWriter:
    """Writes events in a thread of its own. Use it on one event loop.

    Args:
        table: The trail.
        lines: Where each entry is also written as a line of JSON, such as stdout; None for nowhere.
    """

    def __init__(self, table: AuditTable, lines: TextIO | None = None) -> None:
        self.table = table
        self._lines = lines
        self._queue: SimpleQueue[_Waiting | None] = SimpleQueue()
        self._pending = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread. The tables must exist."""
        self._thread = threading.Thread(target=self._run, name="dermis-audit", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write everything that waits, and end the thread."""
        if self._thread is not None:
            thread, self._thread = self._thread, None
            self._queue.put(None)
            thread.join()
        self.table.close()

    async def write(self, event: Event) -> None:
        """Append an event, and return once it is stored.

        Raises:
            Exception: It was not stored, because the database cannot be reached or the trail was damaged.
        """
        loop = asyncio.get_running_loop()
        stored: asyncio.Future[None] = loop.create_future()

        def done(error: Exception | None) -> None:
            loop.call_soon_threadsafe(_resolve, stored, error)

        self._put(_Waiting(event, done))
        await stored

    async def write_later(self, event: Event) -> None:
        """Append an event without waiting for it, unless many wait already.

        An event that cannot be written is tried again every second, and at the stop of the service.
        """
        if self._pending >= _MAX_PENDING:
            await self.write(event)
        else:
            self._put(_Waiting(event, None))

    def _put(self, waiting: _Waiting) -> None:
        if self._thread is None:
            raise DatabaseUnavailableError("the service is stopping")
        with self._lock:
            self._pending += 1
        self._queue.put(waiting)

    def _run(self) -> None:
        kept: list[_Waiting] = []
        stopping = False
        while not stopping:
            batch, stopping = self._next(kept)
            kept = self._store(batch)
        for _ in range(_ATTEMPTS_AT_STOP):
            if not kept:
                return
            time.sleep(_RETRY_SECONDS)
            kept = self._store(kept)
        for each in kept:
            logger.error("audit entry lost", extra={"entry": json.dumps(asdict(each.event))})

    def _store(self, batch: Sequence[_Waiting]) -> list[_Waiting]:
        """Append events; those that nobody waits for and that could not be written are returned."""
        if not batch:
            return []
        try:
            entries = self.table.append([each.event for each in batch])
        except Exception as error:  # also those of a damaged trail: the thread must go on
            reason = str(error).partition("\n")[0]
            logger.warning("audit entries not written", extra={"number": len(batch), "error": reason})
            self._report([each for each in batch if each.done is not None], error)
            return [each for each in batch if each.done is None]
        self._print(entries)
        self._report(batch, None)
        return []

    def _next(self, kept: Sequence[_Waiting]) -> tuple[list[_Waiting], bool]:
        """The events of the next transaction, and whether the thread ends after it."""
        batch = list(kept)
        try:
            waiting = self._queue.get(timeout=_RETRY_SECONDS if kept else None)
            while waiting is not None:
                batch.append(waiting)
                if len(batch) >= _MAX_BATCH:
                    return batch, False
                waiting = self._queue.get_nowait()
        except Empty:
            return batch, False
        return batch, True

    def _report(self, batch: Sequence[_Waiting], error: Exception | None) -> None:
        with self._lock:
            self._pending -= len(batch)
        for each in batch:
            if each.done is not None:
                each.done(error)

    def _print(self, entries: Sequence[Entry]) -> None:
        if self._lines is None:
            return
        try:
            self._lines.write("".join(f"{json.dumps({'audit': entry.document()})}\n" for entry in entries))
            self._lines.flush()
        except (OSError, ValueError) as error:  # the trail is in the database; nobody reads the other end of the pipe
            logger.warning("audit lines not printed", extra={"error": str(error)})
            self._lines = None


def _resolve(stored: asyncio.Future[None], error: Exception | None) -> None:
    if stored.done():  # the request was cancelled
        return
    if error is None:
        stored.set_result(None)
    else:
        stored.set_exception(error)
