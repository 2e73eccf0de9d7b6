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
from contextlib import suppress
from dataclasses import asdict, dataclass
from queue import Empty, SimpleQueue
from typing import TextIO

from services.audit.trail import AuditTable, Entry, Event
from services.errors import DatabaseUnavailableError

logger = logging.getLogger("dermis.audit")

_MAX_BATCH = 200  # new entries in a transaction
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

    def close(self, last: Sequence[Event] = ()) -> None:
        """Write everything that waits, and end the thread. What cannot be written is in the log.

        Args:
            last: Events that are written last.
        """
        with self._lock:
            thread, self._thread = self._thread, None
            if thread is not None:
                self._pending += len(last)
                for event in last:
                    self._queue.put(_Waiting(event, None))
                self._queue.put(None)
        if thread is not None:
            thread.join()
        self.table.close()

    async def write(self, event: Event) -> None:
        """Append an event, and return once it is stored. While the database cannot be reached, this takes one attempt.

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
        with self._lock:  # nothing comes after the None of `close`
            if self._thread is None:
                raise DatabaseUnavailableError("the service is stopping")
            self._pending += 1
            self._queue.put(waiting)

    def _run(self) -> None:
        kept: list[_Waiting] = []
        stopping = False
        while not stopping:
            batch, stopping = self._next(kept)
            kept, error = self._store(batch)
            if isinstance(error, DatabaseUnavailableError) and not stopping:
                # Those that came during the attempt do not wait for another one, and a stop does not wait for theirs.
                late, ended = self._take(self._queue.qsize())
                kept += self._not_stored(late, error)
                if ended:
                    self._queue.put(None)  # for the next batch, which is the last one
        for _ in range(_ATTEMPTS_AT_STOP):
            if not kept:
                return
            time.sleep(_RETRY_SECONDS)
            kept, _error = self._store(kept)
        for each in kept:
            log_lost(each.event)

    def _store(self, batch: Sequence[_Waiting]) -> tuple[list[_Waiting], Exception | None]:
        """Append events. If that fails, those that nobody waits for are returned, and the error."""
        if not batch:
            return [], None
        try:
            entries = self.table.append([each.event for each in batch])
        except Exception as error:  # also those of a damaged trail: the thread must go on
            reason = str(error).partition("\n")[0]
            logger.warning("audit entries not written", extra={"number": len(batch), "error": reason})
            return self._not_stored(batch, error), error
        self._print(entries)
        self._report(batch, None)
        return [], None

    def _not_stored(self, batch: Sequence[_Waiting], error: Exception) -> list[_Waiting]:
        """Report events to those who wait for them, and return the others."""
        self._report([each for each in batch if each.done is not None], error)
        return [each for each in batch if each.done is None]

    def _next(self, kept: Sequence[_Waiting]) -> tuple[list[_Waiting], bool]:
        """The events of the next transaction, and whether the thread ends after it."""
        try:
            first = self._queue.get(timeout=_RETRY_SECONDS if kept else None)
        except Empty:
            return list(kept), False
        if first is None:
            return list(kept), True
        new, stopping = self._take(_MAX_BATCH - 1)
        return [*kept, first, *new], stopping

    def _take(self, most: int) -> tuple[list[_Waiting], bool]:
        """Take events that wait, and whether the thread ends after them."""
        taken: list[_Waiting] = []
        with suppress(Empty):
            while len(taken) < most:
                waiting = self._queue.get_nowait()
                if waiting is None:
                    return taken, True
                taken.append(waiting)
        return taken, False

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


def log_lost(event: Event) -> None:
    """Log an event that is not in the trail."""
    logger.error("audit entry lost", extra={"entry": json.dumps(asdict(event))})


def _resolve(stored: asyncio.Future[None], error: Exception | None) -> None:
    if stored.done():  # the request was cancelled
        return
    if error is None:
        stored.set_result(None)
    else:
        stored.set_exception(error)
