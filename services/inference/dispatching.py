"""Batches of the calls of several callers: when a batch begins, and which calls are in it."""

from __future__ import annotations

import logging
import time
from typing import Any

import _bentoml_impl.server.app  # type: ignore[import-untyped]
from bentoml._internal.marshal.dispatcher import CorkDispatcher

logger = logging.getLogger("dermis.dispatching")


class BatchDispatcher(CorkDispatcher[Any, Any]):
    """BentoML's dispatcher with another rule: a batch begins as soon as the one before has ended and a call is waiting.

    Calls that arrive while a batch runs are the next one, so batches grow with the load. BentoML's own rule waits for further
    calls although the model is idle, makes a dozen small batches first to measure them, and looks every millisecond whether it
    may begin, which takes some percent of a processor while a batch runs.
    """

    async def controller(self) -> None:
        """Run batches until the task is cancelled."""
        while True:
            try:
                async with self._wake_event:
                    await self._wake_event.wait_for(self._queue.__len__)
                self._refuse_old_calls()
                batch = tuple(self._get_inputs())
                if batch:
                    self._sema.acquire()  # type: ignore[no-untyped-call]
                    await self.outbound_call(batch)
            except Exception:
                logger.exception("batch failed")

    def _refuse_old_calls(self) -> None:
        oldest = time.time() - self.max_latency
        while self._queue and self._queue[0].enqueue_time <= oldest:
            self._queue.popleft().future.cancel()


def use_batch_dispatcher() -> None:
    """Make BentoML use this dispatcher for the services of this process."""
    _bentoml_impl.server.app.CorkDispatcher = BatchDispatcher
