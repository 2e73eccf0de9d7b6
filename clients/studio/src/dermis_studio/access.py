"""Who visits the studio: the key in the session cookie, checked with the service, and what its scopes allow."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from dermis_client import AuthenticationError

from dermis_studio.service import Service

# A session cookie: the browser forgets it when it is closed. Scripts cannot read it, and other sites cannot make the browser
# send it.
COOKIE = "dermis_studio_key"
MAX_KEY_LENGTH = 3800  # a browser keeps about 4096 bytes of a cookie

_KNOWN_SECONDS = 30.0
_REFUSED_SECONDS = 5.0
_MAX_KNOWN = 1000


# Groups of scopes: of each group a visitor needs one.
Needs = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Visitor:
    """Someone who may use the studio.

    Attributes:
        key: API key or access token; None if the service needs none.
        tenant: Tenant that the key belongs to.
        scopes: What the key allows; None if the service does not state it.
    """

    key: str | None
    tenant: str
    scopes: frozenset[str] | None

    def may(self, *any_of: str) -> bool:
        """Whether the key has one of these scopes. Without knowledge of scopes the service decides at each call."""
        return self.scopes is None or not any_of or not self.scopes.isdisjoint(any_of)

    def lacks(self, needs: Needs) -> Needs:
        """Return the groups of scopes of which the key has none."""
        return tuple(group for group in needs if not self.may(*group))


class Visitors:
    """Finds out who a visitor is. For each key it calls the service at most once in some seconds.

    Args:
        service: The service.
        needs_key: Whether it needs a key; None to ask it.
    """

    def __init__(self, service: Service, needs_key: bool | None = None) -> None:
        self._service = service
        self._needs_key = needs_key
        self._known: OrderedDict[bytes, tuple[float, Visitor | None]] = OrderedDict()

    async def find(self, key: str | None) -> Visitor | None:
        """Return the visitor with this key; None if the service does not accept it, or needs one.

        Raises:
            dermis_client.DermisError: The service does not respond.
        """
        if key is None and self._needs_key:
            return None
        name = hashlib.sha256((key or "").encode()).digest()
        known = self._known.get(name)
        if known is not None and known[0] > time.monotonic():
            return known[1]
        visitor = await self._ask(key)
        seconds = _REFUSED_SECONDS if visitor is None else _KNOWN_SECONDS
        self._known[name] = (time.monotonic() + seconds, visitor)
        self._known.move_to_end(name)
        while len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)
        return visitor

    async def _ask(self, key: str | None) -> Visitor | None:
        try:
            usage = await self._service.client(key, max_retries=1).usage.retrieve()
        except AuthenticationError:
            return None
        return Visitor(key, usage.tenant, None if usage.scopes is None else frozenset(usage.scopes))


def key_of(cookies: Mapping[str, str]) -> str | None:
    """Return the key of a request's cookies, if there is one."""
    return cookies.get(COOKIE) or None
