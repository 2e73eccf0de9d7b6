"""Batches of the calls of several callers: when a batch begins, and which rows of which calls are in it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import _bentoml_impl.server.app  # type: ignore[import-untyped]
from bentoml._internal.marshal.dispatcher import CorkDispatcher, Job

from services import metrics
from services.callers import caller_has_disconnected, leave_request, when_caller_disconnects

logger = logging.getLogger("dermis.dispatching")

_BATCH_SECONDS = 0.25
_OLDEST_SHARE, _AGED_SHARE = 0.25, 0.5  # of the rows of a batch, for the oldest call
_AGED = 0.25  # of the time after which a call is refused: then the oldest call has the larger share
_LEAST_ROUNDS = 4  # in which the device is busy, for each batch: shorter ones lose more time than they save
_FILLED_ROUNDS = 2  # to which parts of large calls fill a batch that completes a small one, which is soon answered then
_NEW_WEIGHT = 0.3  # of the last batch, in the mean time of a row


class BatchDispatcher(CorkDispatcher[Any, Any]):
    """BentoML's dispatcher with other rules.

    A batch begins as soon as the one before has ended and a call is waiting. Calls that arrive while a batch runs are the next
    one, so batches grow with the load. BentoML's own rule waits for further calls although the model is idle, makes a dozen
    small batches first to measure them, and looks every millisecond whether it may begin, which takes some percent of a
    processor while a batch runs.

    Calls whose callers have disconnected leave the queue, so that nobody waits for results that nobody reads.

    Calls that do not fit in one batch share it (`shares`): those for a few images do not wait for shards before them. Where
    `busy_rows` is known, batches are kept short: on a processor a batch of 64 images takes seconds.
    """

    busy_rows: ClassVar[int | None] = None
    """Rows that keep the whole device busy: no batch is kept shorter than that. None: batches may have the maximum size."""
    _seconds_per_row: ClassVar[float | None] = None

    @classmethod
    def keep_busy(cls, rows: int) -> None:
        """Keep batches short, but not shorter than these rows, which a model needs to keep the whole device busy."""
        cls.busy_rows = max(cls.busy_rows or 1, rows)

    @classmethod
    def measure(cls, results: Sequence[Any], seconds: float) -> None:
        """Learn how long a batch takes in the model, without the time in which other methods use the device.

        Args:
            results: One for each row. A text is the reason why there is none, which takes no time.
            seconds: The time.
        """
        if cls.busy_rows is None or len(results) < cls.busy_rows:
            return  # a part of the device was idle
        if any(isinstance(result, str) for result in results):
            return
        known, new = cls._seconds_per_row, seconds / len(results)
        cls._seconds_per_row = new if known is None else known + _NEW_WEIGHT * (new - known)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Of calls whose rest waits: the future and the rows of the whole call.
        self._wholes: WeakKeyDictionary[asyncio.Future[Any], tuple[asyncio.Future[Any], int]] = WeakKeyDictionary()

    async def inbound_call(self, data: Any) -> Any:
        """Wait for the results of a call; there are none if its caller disconnects before they are computed."""
        future: asyncio.Future[Any] = self._loop.create_future()
        when_caller_disconnects(future.cancel)
        self._queue.append(Job(time.time(), data, future))
        async with self._wake_event:
            self._wake_event.notify_all()
        try:
            return await future
        except asyncio.CancelledError:
            if not caller_has_disconnected():
                raise
            logger.info("call dropped because its caller has disconnected", extra={"rows": self.get_batch_size(data)})
            return []

    async def controller(self) -> None:
        """Run batches until the task is cancelled."""
        leave_request()  # the first call has started this task, which is for the calls of all callers
        while True:
            try:
                async with self._wake_event:
                    await self._wake_event.wait_for(self._queue.__len__)
                self._refuse_old_calls()
                batch = self._next_batch()
                if batch:
                    self._sema.acquire()  # type: ignore[no-untyped-call]
                    await self.outbound_call(batch)
                    for _ in range(2):  # the rest of a call is cancelled in the second round after a part has failed
                        await asyncio.sleep(0)
            except Exception:
                logger.exception("batch failed")

    def _next_batch(self) -> tuple[Any, ...]:
        """Take rows of the waiting calls. Those that have rows left wait again, with the time at which they came."""
        calls = sorted((job for job in self._queue if not self._is_done(job)), key=lambda job: job.enqueue_time)
        remaining = [self.get_batch_size(job.data) for job in calls]
        wholes = [self._wholes.get(job.future, (job.future, size)) for job, size in zip(calls, remaining, strict=True)]
        aged = calls and calls[0].enqueue_time <= time.time() - _AGED * self.max_latency
        most = self._most_rows()
        filled = most if self.busy_rows is None else min(most, _FILLED_ROUNDS * self.busy_rows)
        sizes = [size for _, size in wholes]
        rows = shares(sizes, remaining, most, filled, _AGED_SHARE if aged else _OLDEST_SHARE)
        batch, waiting = [], []
        for job, whole, size, taken in zip(calls, wholes, remaining, rows, strict=True):
            if taken == size:
                batch.append(job)
            elif taken:
                first, second = self.split_job(job, [0, taken, size])
                job.future.add_done_callback(partial(_cancel, second.future))  # if the first part fails
                self._wholes[second.future] = whole
                batch.append(first)
                waiting.append(second)
            else:
                waiting.append(job)
        self._queue.clear()
        self._queue.extend(waiting)
        return tuple(batch)

    def _is_done(self, job: Job[Any, Any]) -> bool:
        """Whether a call has ended, or the whole of which it is the rest. The end of the whole takes a while to reach it."""
        whole, _ = self._wholes.get(job.future, (job.future, 0))
        return job.future.done() or whole.done()

    def _most_rows(self) -> int:
        if self.busy_rows is None or not self._seconds_per_row:
            return self.max_batch_size
        rounds = int(_BATCH_SECONDS / self._seconds_per_row / self.busy_rows)
        return min(self.max_batch_size, max(_LEAST_ROUNDS, rounds) * self.busy_rows)

    def _refuse_old_calls(self) -> None:
        oldest = time.time() - self.max_latency
        for job in self._queue:
            if job.enqueue_time <= oldest:
                job.future.cancel()


def measured_batch(service: str, rows: int, compute: Callable[[], list[Any]]) -> list[Any]:
    """Compute the results of the rows of a batch of a service. The dispatcher and the metrics get its size and time."""
    metrics.observe_batch(service, rows)
    began = time.perf_counter()
    results = compute()
    BatchDispatcher.measure(results, time.perf_counter() - began)
    return results


def _cancel(rest: asyncio.Future[Any], _whole: asyncio.Future[Any]) -> None:
    rest.cancel()


def shares(sizes: Sequence[int], remaining: Sequence[int], most: int, filled: int, oldest: float) -> list[int]:
    """Divide the rows of a batch among calls.

    The oldest call has a share of the rows, so none waits forever. Of the other rows, small calls have all that they need
    before larger ones, so a person who waits for one image does not wait for a dataset. The order is by the size of the whole
    call: by its remaining rows, shards of datasets that have few left would delay calls for some images.

    Args:
        sizes: Rows of each call, the oldest first.
        remaining: Those of them that are not computed yet.
        most: Rows of the batch.
        filled: Rows to which parts of calls fill a batch that completes a call of at most `most` rows.
        oldest: Share of the rows for the oldest call.
    """
    taken = [0] * len(sizes)
    if sizes:
        taken[0] = min(remaining[0], max(1, int(oldest * most)))
    completes = False
    for number in sorted(range(len(sizes)), key=sizes.__getitem__):
        rest = remaining[number] - taken[number]
        free = most - sum(taken)
        if completes and rest > free:
            free = max(0, min(most, filled) - sum(taken))
        taken[number] += min(rest, free)
        if rest > free:
            break
        completes |= sizes[number] <= most
    return taken


def use_batch_dispatcher() -> None:
    """Make BentoML use this dispatcher for the services of this process."""
    _bentoml_impl.server.app.CorkDispatcher = BatchDispatcher
