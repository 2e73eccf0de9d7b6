"""Detect that the caller of a request has closed the connection, so that long work can be cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from contextvars import ContextVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_disconnected: ContextVar[threading.Event | None] = ContextVar("dermis_caller_disconnected", default=None)


class CallerDisconnectedError(Exception):
    """The caller has closed the connection."""


def check_caller() -> None:
    """Raise CallerDisconnectedError if the caller of the request that this thread or task works on has closed the connection.

    It never raises outside of requests that `CallerMiddleware` handles.
    """
    disconnected = _disconnected.get()
    if disconnected is not None and disconnected.is_set():
        raise CallerDisconnectedError


class CallerMiddleware:
    """ASGI middleware that detects when the caller of a request closes the connection, for `check_caller` in its work."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        disconnected = threading.Event()
        token = _disconnected.set(disconnected)
        watch: asyncio.Task[None] | None = None
        messages: asyncio.Queue[Message] = asyncio.Queue()

        async def wait_for_end() -> None:
            message = await receive()
            while message["type"] != "http.disconnect":
                message = await receive()
            disconnected.set()
            messages.put_nowait(message)

        async def receive_and_watch() -> Message:
            nonlocal watch
            if watch is not None:
                return await messages.get()  # the only further message is the disconnect
            message = await receive()
            if message["type"] == "http.disconnect":
                disconnected.set()
            elif not message.get("more_body", False):
                watch = asyncio.create_task(wait_for_end())
            return message

        try:
            await self._app(scope, receive_and_watch, send)
        finally:
            _disconnected.reset(token)
            if watch is not None:
                watch.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watch
