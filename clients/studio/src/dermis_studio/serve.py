"""The studio on its own, for a service at another address."""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI
from starlette.responses import RedirectResponse

from dermis_studio.app import create_site
from dermis_studio.logs import configure_json
from dermis_studio.service import Service
from dermis_studio.site import is_local

logger = logging.getLogger("dermis.studio")

PREFIX = "/studio"


def create_app(service: Service, hosts: frozenset[str]) -> FastAPI:
    """Make an application with the studio at /studio, to which / leads."""
    site = create_site(service, PREFIX, check_origin=True, hosts=hosts)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await site.start()
        try:
            yield
        finally:
            await site.stop()

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_route("/", lambda request: RedirectResponse(f"{PREFIX}/"))
    app.mount("/", _Whole(site))
    return app


class _Whole:
    """An application that is mounted at / and gets the whole path."""

    def __init__(self, site: object) -> None:
        self._site = site

    async def __call__(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        await self._site({**scope, "root_path": ""}, receive, send)  # type: ignore[operator]


def run(
    url: str,
    *,
    host: str = "127.0.0.1",
    port: int = 3080,
    hosts: frozenset[str] = frozenset(),
    allow_plain_http: bool = False,
    public_url: str | None = None,
    json_log: bool = False,
) -> None:
    """Run the studio until a signal stops it.

    Args:
        url: Address of the service.
        host: Address to listen on.
        port: Port to listen on.
        hosts: Host names under which the studio answers, in addition to those of this machine.
        allow_plain_http: Whether keys may be sent over http:// to another machine.
        public_url: Address of the service in links for readers and in code to copy, if `url` is not the one for others.
        json_log: Whether to log JSON in place of text: also the messages at the start.
    """
    if json_log:
        configure_json()
    if not is_local(host):
        _warn(f"keys of visitors cross the network unencrypted; put a proxy that ends TLS in front of {host}", json_log)
    if public_url is None and is_local(urlsplit(url).hostname or "") and (hosts or not is_local(host)):
        _warn(
            f"links for readers of studies begin with {url}, which leads others to their own machine; name the address of the "
            "service for them with --public-url",
            json_log,
        )
    app = create_app(Service(url, allow_plain_http=allow_plain_http, public_url=public_url), hosts | {host})
    place = f"http://{host}:{port}{PREFIX}/"
    if json_log:
        logger.info("the studio for %s is at %s", url, place)
        uvicorn.run(app, host=host, port=port, log_level="warning", log_config=None, timeout_graceful_shutdown=3)
    else:
        print(f"The studio for {url} is at {place} (Ctrl-C stops it)", flush=True)
        uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=3)


def _warn(text: str, json_log: bool) -> None:
    if json_log:
        logger.warning(text)
    else:
        print(f"dermis studio: {text}", file=sys.stderr)
