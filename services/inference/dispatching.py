"""Batches of the calls of several callers: when a batch begins, and which rows of which calls are in it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import _bentoml_impl.server.app  # type: ignore[import-untyped]
from bentoml._internal.marshal.dispatcher import CorkDispatcher

logger = logging.getLogger("dermis.dispatching")

_BATCH_SECONDS = 0.25
_NEW_RATE = 0.3  # the weight of the last batch in the rate


class BatchDispatcher(CorkDispatcher[Any, Any]):
    """BentoML's dispatcher with other rules.

    A batch begins as soon as the one before has ended and a call is waiting. Calls that arrive while a batch runs are the next
    one, so batches grow with the load. BentoML's own rule waits for further calls although the model is idle, makes a dozen
    small batches first to measure them, and looks every millisecond whether it may begin, which takes some percent of a
    processor while a batch runs.

    Calls that do not fit in one batch share it: each has the same number of rows, as long as it has so many. So a call for one
    image is in the next batch, although shards of datasets with many images came before. Where `busy_rows` is known, batches
    are kept short, so that the next one is not far: on a processor a batch of 64 images takes seconds.
    """

    busy_rows: int | None = None
    """Rows that keep the whole device busy: no batch is kept shorter than that. None: batches may have the maximum size."""

    _rows_per_second: float | None = None

    async def controller(self) -> None:
        """Run batches until the task is cancelled."""
        while True:
            try:
                async with self._wake_event:
                    await self._wake_event.wait_for(self._queue.__len__)
                self._refuse_old_calls()
                batch = self._next_batch()
                if batch:
                    began = time.perf_counter()
                    self._sema.acquire()  # type: ignore[no-untyped-call]
                    await self.outbound_call(batch)
                    self._measure(sum(self.get_batch_size(job.data) for job in batch), time.perf_counter() - began)
            except Exception:
                logger.exception("batch failed")

    def _next_batch(self) -> tuple[Any, ...]:
        """Take rows of the waiting calls, which stay in the queue with the others."""
        calls = list(self._queue)
        sizes = [self.get_batch_size(job.data) for job in calls]
        batch, remaining = [], []
        for job, size, taken in zip(calls, sizes, shares(sizes, self._most_rows()), strict=True):
            if taken == size:
                batch.append(job)
            elif taken:
                first, second = self.split_job(job, [0, taken, size])
                batch.append(first)
                remaining.append(second)
            else:
                remaining.append(job)
        self._queue.clear()
        self._queue.extend(remaining)
        return tuple(batch)

    def _most_rows(self) -> int:
        if self.busy_rows is None or self._rows_per_second is None:
            return self.max_batch_size
        rows = int(self._rows_per_second * _BATCH_SECONDS)
        return min(self.max_batch_size, max(1, rows // self.busy_rows) * self.busy_rows)

    def _measure(self, rows: int, seconds: float) -> None:
        if self.busy_rows is None or rows < self.busy_rows or seconds <= 0:
            return  # a part of the device was idle
        rate = rows / seconds
        known = self._rows_per_second
        self._rows_per_second = rate if known is None else known + _NEW_RATE * (rate - known)

    def _refuse_old_calls(self) -> None:
        oldest = time.time() - self.max_latency
        while self._queue and self._queue[0].enqueue_time <= oldest:
            self._queue.popleft().future.cancel()


def shares(sizes: Sequence[int], most: int) -> list[int]:
    """Divide the rows of a batch among calls: the same number for each, as far as it has so many; the oldest have the rest.

    Args:
        sizes: Rows of each call, the oldest first.
        most: Rows of the batch.
    """
    taken = [0] * len(sizes)
    while (free := most - sum(taken)) > 0 and (open_calls := [n for n, size in enumerate(sizes) if taken[n] < size]):
        share = max(1, free // len(open_calls))
        for number in open_calls[:free]:
            taken[number] += min(share, sizes[number] - taken[number])
    return taken


def use_batch_dispatcher() -> None:
    """Make BentoML use this dispatcher for the services of this process."""
    _bentoml_impl.server.app.CorkDispatcher = BatchDispatcher
