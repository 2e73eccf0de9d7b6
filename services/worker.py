"""`python -m services.worker PARENT ...`: one process of the service, started by `services.supervisor`.

It is BentoML's own worker, with the service's limits on connections and its TLS in front of the gateway. All further
arguments are those of `_bentoml_impl.worker.service`.
"""

from __future__ import annotations

import asyncio
import functools
import os
import sys
from pathlib import Path

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.parent_watchdog import exit_with_parent

_NICENESS = {"Classifier": 2, "Generator": 3}
_OTHER_NICENESS = 5
"""Where processors are scarce the gateway gets more of them than processes with models, so that lists, refusals and probes do
not wait for images. Classifications, which take a fraction of the time of an image, and images come before comparisons, most of
which are made for datasets. Each step is a factor of 1.25."""


def main() -> None:
    """Serve until a signal to stop or the end of the supervisor."""
    exit_with_parent(int(sys.argv.pop(1)))  # before the slow imports
    import bentoml._internal.log
    import uvicorn
    import uvicorn.protocols.http.auto
    from _bentoml_impl.worker import service  # type: ignore[import-untyped]

    from services import logs
    from services.settings import settings_of_process
    from services.supervisor import GATEWAY

    settings = settings_of_process()
    if settings.log_format == "json":  # else the lines that BentoML logs before the service is loaded would be text
        configure = functools.partial(logs.configure, settings.log_level, settings.log_format)
        bentoml._internal.log.configure_server_logging = configure

    # BentoML puts the working directory first, unless it is on the path already. Modules there must not hide ours.
    sys.path.append(str(Path.cwd()))
    name = sys.argv[sys.argv.index("--service-name") + 1]
    if name == GATEWAY:
        from services.connections import BoundedProtocol
        from services.tls import uvicorn_options

        uvicorn.protocols.http.auto.AutoHTTPProtocol = BoundedProtocol
        options = uvicorn_options(settings)
        uvicorn.Config = functools.partial(uvicorn.Config, **options)  # type: ignore[assignment, misc]
    else:
        os.nice(_NICENESS.get(name, _OTHER_NICENESS))
    service.main()


def cancel_timers_of_requests() -> None:
    """Replace BentoML's middleware for time limits by one that cancels its timer when a request ends.

    BentoML's own never cancels its timer, so every request stays in memory until the time limit.
    """
    from bentoml._internal.server.http import traffic

    traffic.TimeoutMiddleware = TimeLimit  # type: ignore[assignment, misc]


class TimeLimit:
    """ASGI middleware: status 504 for a request whose response has not begun after `timeout` seconds."""

    def __init__(self, app: ASGIApp, timeout: float) -> None:
        self._app = app
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        begun = False

        async def send_and_lift(message: Message) -> None:
            nonlocal begun
            begun = True
            if not limit.expired():
                limit.reschedule(None)  # a response has no time limit once it has begun
            await send(message)

        try:
            async with asyncio.timeout(self._timeout) as limit:
                await self._app(scope, receive, send_and_lift)
        except TimeoutError:
            if begun or not limit.expired():
                raise
            error = {"error": f"Not able to process the request in {self._timeout} seconds"}
            await JSONResponse(error, status_code=504)(scope, receive, send)


if __name__ == "__main__":
    main()
