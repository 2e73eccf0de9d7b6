"""Send one message to a URL that a user chose, without letting it reach what the user cannot reach.

The host name is resolved once. All of its addresses must be public or allowed by the operator, and the connection is opened to
the address that was checked, so a name that changes its address (DNS rebinding) gains nothing. Redirects are not followed, the
answer is not read, and nothing of it but the status is kept.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import re
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

from dermis import __version__

MAX_URL = 500
# Four times the number of messages that are sent at one time for one tenant: look-ups can take longer than `_SECONDS`.
_RESOLVERS = 16
_SECONDS = 15.0
# `is_global` knows only the addresses that were special when the version of Python was made, and takes all others for public.
_PUBLIC_IPV6 = ipaddress.ip_network(
    "2000::/3"
)  # all that is assigned; others lead to private IPv4 addresses, or nowhere
_NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        (
            "192.0.0.0/24",  # protocol assignments, with a metadata service
            "192.88.99.0/24",  # relays to IPv6
            "2001::/23",  # protocol assignments, with Teredo
            "2002::/16",  # 6to4, which leads to IPv4 addresses
            "3fff::/20",  # documentation
            "168.63.129.16/32",  # the metadata service of Azure
        ),
    )
)
# Labels of host names, and the last labels of what is an IPv4 address for browsers and resolvers.
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_LOOPBACK = (ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("::1"))
# One text for names that do not exist and for names of internal machines: otherwise it would show which of these there are.
_NO_ADDRESS = "the host has no address, or one that is not public"

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class UrlRefusedError(Exception):
    """The service sends nothing to this URL; the message says why."""


@dataclass(frozen=True)
class Allowed:
    """Receivers that the operator allows beyond public addresses with https (DERMIS_WEBHOOK_HOSTS)."""

    names: frozenset[str]
    networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]

    @classmethod
    def of(cls, entries: Sequence[str]) -> Self:
        """The hosts and networks of the setting."""
        names, networks = set(), []
        for entry in entries:
            try:
                networks.append(ipaddress.ip_network(entry))
            except ValueError:
                names.add(_name_of(entry))
        return cls(frozenset(names), tuple(networks))

    def has_address(self, address: _Address) -> bool:
        """Whether an address is in one of the networks."""
        return any(address.version == network.version and address in network for network in self.networks)

    def has_host(self, host: str) -> bool:
        """Whether a host, a name or an address, is allowed itself."""
        address = _parse(host)
        return self.has_name(host) or (address is not None and self.has_address(address))

    def has_name(self, host: str) -> bool:
        """Whether a host is one of the names, with or without a dot at its end."""
        return _name_of(host) in self.names


def check_url(url: str, allowed: Allowed) -> str:
    """The host of a URL that messages may be sent to, as far as the URL itself shows.

    Raises:
        UrlRefusedError: Nothing is sent to it.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        httpx.URL(url)
    except (ValueError, httpx.InvalidURL):
        raise UrlRefusedError("it is not a URL") from None
    if len(url) > MAX_URL or not url.isascii() or not url.isprintable() or " " in url:
        raise UrlRefusedError(f"use at most {MAX_URL} visible ASCII characters")
    if not host or parts.scheme not in ("https", "http") or port == 0:
        raise UrlRefusedError("use a URL that begins with https://")
    if parts.username is not None or parts.fragment:
        raise UrlRefusedError("leave out user name, password and fragment")
    if parts.scheme == "http" and not allowed.has_host(host):
        raise UrlRefusedError("use https; the operator can allow plain http to a host in DERMIS_WEBHOOK_HOSTS")
    address = _parse(host)
    if address is not None and not _may_connect(host, address, allowed):
        raise UrlRefusedError("its address is not public; the operator can allow it in DERMIS_WEBHOOK_HOSTS")
    if address is None and not allowed.has_name(host):
        _check_name(_name_of(host), allowed)
    return host


def _check_name(name: str, allowed: Allowed) -> None:
    """Refuse names that cannot be those of a public host, as far as they show it without a look-up.

    Raises:
        UrlRefusedError: The name is not one that a public host can have.
    """
    labels = name.split(".")
    if not all(map(_LABEL.fullmatch, labels)):
        raise UrlRefusedError("its host is not a name, such as receiver.example.org")
    if _NUMBER.fullmatch(labels[-1]):  # `127.1`, `2130706433` and `0x7f.1` are addresses for many programs
        raise UrlRefusedError("its host is a number; write an IPv4 address as four decimal numbers")
    if labels[-1] == "localhost" and not any(map(allowed.has_address, _LOOPBACK)):
        raise UrlRefusedError("its host is this machine; the operator can allow it in DERMIS_WEBHOOK_HOSTS")


def signature(secret: str, message_id: str, timestamp: int, body: str) -> str:
    """The header `webhook-signature` of Standard Webhooks."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    digest = hmac.new(key, f"{message_id}.{timestamp}.{body}".encode(), hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode('ascii')}"


class Sender:
    """Sends messages. Use it on one event loop."""

    def __init__(self, allowed: Allowed) -> None:
        self._allowed = allowed
        self._http: httpx.AsyncClient | None = None
        # A name server that a user controls can delay its answer for longer than `_SECONDS`, and a look-up cannot be
        # interrupted. In the threads of the event loop it would delay other requests.
        self._resolvers = ThreadPoolExecutor(_RESOLVERS, "dermis-webhook-names")

    async def close(self) -> None:
        """Close all connections."""
        self._resolvers.shutdown(wait=False, cancel_futures=True)
        if self._http is not None:
            await self._http.aclose()

    async def send(self, url: str, secret: str, message_id: str, timestamp: int, body: str) -> tuple[int | None, str]:
        """Send a message.

        Returns:
            The status, or None without an answer, and a text about the outcome without anything that the receiver sent.
        """
        try:
            async with asyncio.timeout(_SECONDS):
                host = check_url(url, self._allowed)
                address = await self._resolve(host, urlsplit(url).port or 443)
                status = await self._post(url, host, address, secret, message_id, timestamp, body)
        except UrlRefusedError as error:
            return None, f"refused: {error}"
        except TimeoutError:
            return None, f"no answer in {_SECONDS:g} s"
        except httpx.HTTPError as error:
            reason = "its certificate is not valid" if "certificate" in str(error).lower() else "no connection"
            return None, f"{reason} ({type(error).__name__})"
        except OSError as error:  # of TLS after the handshake, which httpx lets through
            return None, f"the connection broke ({type(error).__name__})"
        return status, f"status {status}"

    async def _resolve(self, host: str, port: int) -> str:
        """The address to connect to.

        Raises:
            UrlRefusedError: One of the addresses of the host is not allowed.
        """
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._resolvers, _addresses_of, host, port)
        except (OSError, UnicodeError):
            raise UrlRefusedError(_NO_ADDRESS) from None
        addresses = [_parse(str(entry[4][0])) for entry in found]
        if not addresses or not all(each is not None and _may_connect(host, each, self._allowed) for each in addresses):
            raise UrlRefusedError(_NO_ADDRESS)
        return str(addresses[0])

    async def _post(
        self, url: str, host: str, address: str, secret: str, message_id: str, timestamp: int, body: str
    ) -> int:
        if self._http is None:
            self._http = httpx.AsyncClient(
                verify=httpx.create_ssl_context(),  # with the authorities of SSL_CERT_FILE, if it is set
                trust_env=False,
                follow_redirects=False,
                timeout=4 * _SECONDS,  # `send` has the limit of the whole attempt
                limits=httpx.Limits(max_keepalive_connections=0),  # a connection is for one checked address
            )
        target = httpx.URL(url)
        headers = {
            "Host": target.netloc.decode("ascii"),
            "Content-Type": "application/json",
            "User-Agent": f"dermis/{__version__}",
            "webhook-id": message_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": signature(secret, message_id, timestamp, body),
        }
        async with self._http.stream(
            "POST",
            target.copy_with(host=address),
            content=body.encode(),
            headers=headers,
            extensions={"sni_hostname": host},  # the certificate must be that of the host, not of its address
        ) as response:
            return response.status_code


def _addresses_of(host: str, port: int) -> list[tuple[Any, ...]]:
    return list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))


def _name_of(host: str) -> str:
    """A host name in the form in which names are compared."""
    return host.lower().removesuffix(".")


def _parse(text: str) -> _Address | None:
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _may_connect(host: str, address: _Address, allowed: Allowed) -> bool:
    if allowed.has_name(host) or allowed.has_address(address):
        return True
    if isinstance(address, ipaddress.IPv6Address) and address not in _PUBLIC_IPV6:
        return False
    if any(address in network for network in _NOT_PUBLIC if network.version == address.version):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved
