"""Refuse requests that a web page of another site can make a browser send: other host names, changes from other origins.

A browser runs pages of any site on the machine or in the network where the service listens. By DNS rebinding such a page
reaches the service under a host name of its own, which the browser treats as the same origin. The `Host` header is therefore
compared with the host names of the service. A form or script of another site can send a request without reading the response.
Requests that change something are therefore refused if the browser says that they come from another origin. Programs other
than browsers send neither `Origin` nor `Sec-Fetch-Site`.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from services.gateway.problems import problem_response
from services.problems import ProblemError
from services.settings import Settings

# Orchestrators send probes to the address of the pod or the container; the responses contain nothing private.
PROBES = frozenset({"/livez", "/readyz", "/healthz"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::([0-9]{1,5}))?")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_MAX_SHOWN = 100


@dataclass(frozen=True)
class Authority:
    """Host and port of a URL, a `Host` header or an entry of DERMIS_TRUSTED_HOSTS."""

    host: str  # lower case; an IPv6 address has no brackets
    port: int | None


def parse_authority(text: str) -> Authority | None:
    """Parse `name`, `name:port`, `1.2.3.4:port` or `[::1]:port`; None for any other text."""
    parts = _AUTHORITY.fullmatch(text)
    if parts is None or (parts[2] is not None and int(parts[2]) > 65535):
        return None
    host = parts[1].lower().strip("[]").removesuffix(".")
    address = _address(host)  # one spelling for each IPv6 address
    port = None if parts[2] is None else int(parts[2])
    return Authority(str(address or host), port) if host else None


class TrustedHosts:
    """The names and addresses under which the service answers."""

    def __init__(self, settings: Settings) -> None:
        self._any = "*" in settings.trusted_hosts
        listening = _address(settings.host.strip("[]"))
        self._any_address = listening is not None and listening.is_unspecified
        entries = [settings.host, *settings.trusted_hosts]
        if listening is None or not listening.is_loopback:
            entries.append(socket.gethostname())
        self._suffixes = tuple(entry[1:].lower() for entry in entries if entry.startswith("*."))
        self._exact = {
            parse_authority(f"[{entry}]" if entry.count(":") > 1 and not entry.startswith("[") else entry)
            for entry in entries
            if not entry.startswith("*")
        }

    def allows(self, authority: Authority) -> bool:
        """Whether a request with this `Host` is answered.

        The port is compared only if the setting names one: a forwarded port can have another number, and DNS rebinding needs
        another host name.
        """
        if self._any or authority.host == "localhost":
            return True
        address = _address(authority.host)
        if address is not None and (address.is_loopback or self._any_address):
            return True  # DNS rebinding needs a host name: a page cannot have a numeric address as its own name
        if authority in self._exact or Authority(authority.host, None) in self._exact:
            return True
        return authority.host.endswith(self._suffixes) if self._suffixes else False


class OriginMiddleware:
    """ASGI middleware: status 421 for requests under other host names, 403 for changes by pages of another origin."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._hosts = TrustedHosts(settings)
        self._origins = settings.cors_origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in PROBES:
            try:
                authority = self._check_host(scope)
                if scope["method"] not in SAFE_METHODS:
                    self._check_origin(scope, authority)
            except ProblemError as error:
                response = problem_response(Request(scope), error.kind, error.detail, headers=error.headers)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check_host(self, scope: Scope) -> Authority:
        values = _values(scope, b"host")
        authority = parse_authority(values[0]) if len(values) == 1 else None
        if authority is None:
            raise ProblemError("bad-request", "send one Host header with a host name or address and, if needed, a port")
        if not self._hosts.allows(authority):
            raise ProblemError(
                "untrusted-host",
                f"this service does not answer as {authority.host[:_MAX_SHOWN]}; if that is one of its names, ask its "
                "operator to add it to DERMIS_TRUSTED_HOSTS",
            )
        return authority

    def _check_origin(self, scope: Scope, host: Authority) -> None:
        origins = _values(scope, b"origin")
        if "*" in self._origins or (len(origins) == 1 and origins[0] in self._origins):
            return
        sites = {value.lower() for value in _values(scope, b"sec-fetch-site")}
        if (origins and not _is_same(origins, host)) or not sites <= {"same-origin", "none"}:
            shown = origins[0][:_MAX_SHOWN] if origins else "another site"
            raise ProblemError(
                "cross-origin",
                f"a page of {shown} cannot change anything here; the operator of the service can allow its origin in "
                "DERMIS_CORS_ORIGINS",
            )


def _is_same(origins: Sequence[str], host: Authority) -> bool:
    """Whether there is one `Origin` and it names the host that the request was sent to.

    The scheme is used for the default port only: behind a proxy that ends TLS, the service receives http and the browser uses
    https.
    """
    try:
        (origin,) = map(urlsplit, origins)
    except ValueError:
        return False
    authority = parse_authority(origin.netloc)
    default = _DEFAULT_PORTS.get(origin.scheme)
    if authority is None or default is None:  # such as "null" of a sandboxed page or a local file
        return False
    return authority.host == host.host and (authority.port or default) == (host.port or default)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1").strip() for key, value in scope["headers"] if key == name]
