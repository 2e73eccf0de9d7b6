"""Which network addresses credentials may be sent to without encryption."""

from __future__ import annotations

import ipaddress
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
