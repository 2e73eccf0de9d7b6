"""Which network addresses credentials may be sent to without encryption."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit


def is_secure_url(url: str) -> bool:
    """Whether a URL uses https, or http on a loopback address."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        return False
    if not host or parts.username is not None:
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and is_loopback(host))


def is_loopback(host: str) -> bool:
    """Whether a host name or an address is one of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def is_loopback_url(url: str) -> bool:
    """Whether a URL is of this machine, so that no proxy of the environment should see what is sent to it."""
    return is_loopback(urlsplit(url).hostname or "")


def proxy_variable(host: str, environment: Mapping[str, str]) -> str | None:
    """The environment variable that makes HTTP libraries send plain requests for a host through a proxy; None without one.

    Args:
        host: The host, as in the URL.
        environment: The environment variables.
    """
    excluded = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    if {host, "*"} & {each.strip() for each in excluded.split(",")}:
        return None
    names = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
    return next((name for name in names if environment.get(name)), None)
