"""The address of the client and the scheme behind proxies: headers that only trusted proxies may set.

Each proxy appends the address that it received a request from to `X-Forwarded-For`. Whatever a client itself wrote there is
further to the left. The header is therefore read from the right, as far as the addresses are those of trusted proxies.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class ProxyMiddleware:
    """ASGI middleware that sets `client` and `scheme` of the scope from the headers of trusted proxies.

    Args:
        app: The application.
        trusted: Addresses and networks of the proxies.
    """

    def __init__(self, app: ASGIApp, trusted: Sequence[str]) -> None:
        self._app = app
        self._networks = [ipaddress.ip_network(entry) for entry in trusted]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = scope.get("client")
        peer = _address(client[0]) if scope["type"] == "http" and client else None
        if peer is not None and self._trusts(peer):
            scope["client"] = (str(self._client_of(peer, _values(scope, b"x-forwarded-for"))), 0)
            schemes = _values(scope, b"x-forwarded-proto")
            if schemes and schemes[-1].lower() in ("http", "https"):
                scope["scheme"] = schemes[-1].lower()
        await self._app(scope, receive, send)

    def _client_of(self, peer: _Address, forwarded: Sequence[str]) -> _Address:
        """The first address from the right that is not that of a trusted proxy."""
        address = peer
        for text in reversed(forwarded):
            before = _address(text)
            if before is None:  # no proxy writes that, so it is what the client wrote
                break
            address = before
            if not self._trusts(address):
                break
        return address

    def _trusts(self, address: _Address) -> bool:
        return any(address.version == network.version and address in network for network in self._networks)


def _values(scope: Scope, name: bytes) -> list[str]:
    """The values of a header that is a list separated by commas, in their order."""
    lines = [value.decode("latin-1") for key, value in scope["headers"] if key == name]
    return [part.strip() for line in lines for part in line.split(",")]


def _address(text: str) -> _Address | None:
    """The address in `1.2.3.4`, `1.2.3.4:80`, `::1` or `[::1]:80`, without a zone (`%eth0`); None for any other text."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])  # a zone can be any text, and would be in log and trail
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address  # a socket for IPv6 shows IPv4 addresses as ::ffff:1.2.3.4
