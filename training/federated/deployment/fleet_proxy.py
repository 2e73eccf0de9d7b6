"""A proxy in front of Flower's server that forwards only the requests of clients (the fleet interface).

Flower serves clients, operators and its own processes on one port. Clients authenticate with their keys; the interface of
operators has no authentication and can start runs, which execute programs on the clients' machines. So Flower listens on
loopback, and this proxy listens on the public port.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from dermis.addresses import is_loopback_url

FLEET = "/v1/fleet"
_METHOD = re.compile("[a-z-]{1,64}")  # such as pull-messages
_MAX_BODY = 64 * 2**20  # Flower sends arrays in chunks of 5 MB
_DROPPED = {"host", "connection", "content-length", "transfer-encoding", "keep-alive"}


def fleet_proxy(upstream: str, certificate: str) -> Starlette:
    """Return the proxy as an ASGI application.

    Args:
        upstream: Address of Flower's server, https://host:port.
        certificate: PEM file of the authority that issued its certificate.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        context = ssl.create_default_context(cafile=certificate)
        through_proxy = not is_loopback_url(upstream)  # that of the environment
        async with httpx.AsyncClient(
            base_url=upstream, verify=context, timeout=120.0, trust_env=through_proxy
        ) as client:
            app.state.client = client
            yield

    async def forward(request: Request) -> Response:
        # Not request.url.path, which can depend on the header Host.
        method = request.path_params["method"]
        if not _METHOD.fullmatch(method):
            return PlainTextResponse("there is no such method", 404)
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > _MAX_BODY:
                return PlainTextResponse("the body is larger than any message of a client", 413)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _DROPPED}
        try:
            response = await request.app.state.client.post(f"{FLEET}/{method}", content=bytes(body), headers=headers)
        except httpx.TransportError:
            return PlainTextResponse("Flower's server does not respond", 502)
        kept = {name: value for name, value in response.headers.items() if name.lower() not in _DROPPED}
        return Response(
            response.content, response.status_code, {k: v for k, v in kept.items() if k != "content-encoding"}
        )

    async def healthy(request: Request) -> Response:
        try:
            await request.app.state.client.get("/")
        except httpx.TransportError:
            return PlainTextResponse("Flower's server does not respond", 503)
        return PlainTextResponse("ok")

    routes = [Route(f"{FLEET}/{{method}}", forward, methods=["POST"]), Route("/healthz", healthy)]
    return Starlette(routes=routes, lifespan=lifespan)
