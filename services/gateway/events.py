"""The progress of a dataset as server-sent events (WHATWG HTML, section 9.2)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from services.errors import DatabaseUnavailableError
from services.gateway.dependencies import Context
from services.gateway.schemas.datasets import dataset_of
from services.jobs.table import Job
from services.problems import ProblemError

POLL_SECONDS = 0.5
HEARTBEAT_SECONDS = 15.0
CHECK_SECONDS = 5.0


class EventStream(StreamingResponse):
    """A response with server-sent events.

    Args:
        events: The events.
        release: Called at the end of the response, also if the client has gone before the first event: an iterator that was
            never started runs no code of its own at its end.
    """

    def __init__(self, events: AsyncIterator[str], release: Callable[[], None]) -> None:
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._release()


async def progress_events(
    context: Context, job: Job, check_access: Callable[[], Awaitable[object]]
) -> AsyncIterator[str]:
    """Yield the events of one dataset: `progress` at every change, and at the end one named succeeded, failed or cancelled.

    A client that connects again with Last-Event-ID needs no earlier events, because every event contains the whole state.

    Args:
        context: The context of the routes.
        job: The dataset.
        check_access: Called every few seconds. The stream ends when it raises a ProblemError: the credentials have ended.
    """
    checked = time.monotonic()
    try:
        shown: tuple[object, ...] | None = None
        read: tuple[object, ...] | None = None
        sent = time.monotonic()
        current: Job | None = job
        while current is not None:
            state = (current.state, current.samples_done, current.shards_done, current.images_per_second)
            if not current.active:
                yield _event(current.state, current, context.jobs.expires_at(current))
                return
            if state != shown:
                yield ("retry: 2000\n" if shown is None else "") + _event("progress", current, None)
                shown, sent = state, time.monotonic()
            elif time.monotonic() - sent >= HEARTBEAT_SECONDS:
                yield ": heartbeat\n\n"
                sent = time.monotonic()
            if context.stopping.is_set():
                return  # the client connects again, to the process that is running then
            await asyncio.sleep(POLL_SECONDS)
            with suppress(DatabaseUnavailableError):  # the stream continues when the database can be reached again
                if time.monotonic() - checked >= CHECK_SECONDS:
                    await check_access()
                    checked = time.monotonic()
                progress = await asyncio.to_thread(context.jobs.progress, job.id)
                if progress != read:
                    current = await asyncio.to_thread(context.jobs.get, job.tenant, job.id)
                    read = progress
    except ProblemError:
        return


def _event(name: str, job: Job, expires_at: float | None) -> str:
    # The JSON of pydantic has no line breaks, so it is one line of data.
    body = dataset_of(job, expires_at).model_dump_json(by_alias=True)
    return f"event: {name}\nid: {job.samples_done}\ndata: {body}\n\n"
