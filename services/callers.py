"""Detect that the caller of a request has closed the connection, so that long work can be cancelled."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from contextvars import ContextVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_WATCH_AFTER_SECONDS = 0.1
"""Of a request that was answered before, nothing is left to cancel, and a task that waits for its caller costs more than it."""

CALLER_GONE = "the call was cancelled because its caller has disconnected"


class CallerDisconnectedError(Exception):
    """The caller has closed the connection."""


class _Caller:
    """The caller of one request. Threads may read `disconnected`; all else happens on the event loop."""

    def __init__(self) -> None:
        self.disconnected = False
        self._callbacks: list[Callable[[], object]] = []

    def when_disconnected(self, callback: Callable[[], object]) -> None:
        if self.disconnected:
            callback()
        else:
            self._callbacks.append(callback)

    def disconnect(self) -> None:
        self.disconnected = True
        callbacks = self._callbacks
        self.forget_callbacks()
        for callback in callbacks:
            callback()

    def forget_callbacks(self) -> None:
        """Tasks that a request started can outlive it, with its context. They must not keep its results in memory."""
        self._callbacks = []


_caller: ContextVar[_Caller | None] = ContextVar("dermis_caller", default=None)


def caller_has_disconnected() -> bool:
    """Whether the caller of the request that this thread or task works on has closed the connection.

    It is False outside of requests that `CallerMiddleware` handles.
    """
    caller = _caller.get()
    return caller is not None and caller.disconnected


def check_caller() -> None:
    """Raise CallerDisconnectedError if `caller_has_disconnected`."""
    if caller_has_disconnected():
        raise CallerDisconnectedError


def when_caller_disconnects(callback: Callable[[], object]) -> None:
    """Call `callback` on the event loop once `caller_has_disconnected`, if that is before the end of the request.

    Use it on the event loop. A caller that leaves is noticed a tenth of a second after the begin of the request or later.
    """
    caller = _caller.get()
    if caller is not None:
        caller.when_disconnected(callback)


def leave_request() -> None:
    """Let the running task work for no caller: a task that a request has started has the context of that request."""
    _caller.set(None)


async def wait_for_disconnect(receive: Receive) -> Message:
    """Return the message that the caller has closed the connection. The body must have been read."""
    message = await receive()
    while message["type"] != "http.disconnect":
        message = await receive()
    return message


class CallerMiddleware:
    """ASGI middleware that detects when the caller of a request closes the connection, for the functions of this module."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        caller = _Caller()
        token = _caller.set(caller)
        timer: asyncio.TimerHandle | None = None
        watch: asyncio.Task[Message] | None = None

        async def wait_for_end() -> Message:
            message = await wait_for_disconnect(receive)
            caller.disconnect()
            return message

        def start() -> None:
            nonlocal watch
            if watch is None:
                watch = asyncio.create_task(wait_for_end())

        async def receive_and_watch() -> Message:
            nonlocal timer
            if timer is not None:  # the only further message is the disconnect
                start()
                assert watch is not None
                return await asyncio.shield(watch)
            message = await receive()
            if message["type"] == "http.disconnect":
                caller.disconnect()
            elif not message.get("more_body", False):
                timer = asyncio.get_running_loop().call_later(_WATCH_AFTER_SECONDS, start)
            return message

        try:
            await self._app(scope, receive_and_watch, send)
        except asyncio.CancelledError:  # such as at a time limit: nobody waits for what a thread still computes
            caller.disconnect()
            raise
        finally:
            _caller.reset(token)
            caller.forget_callbacks()
            if timer is not None:
                timer.cancel()
            if watch is not None:
                watch.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watch
