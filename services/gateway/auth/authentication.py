"""Authenticate requests, and require scopes of routes.

A route that needs a scope has a parameter `principal: Annotated[Principal, requires("images")]`. `check_routes` refuses an
application with a route that has none and is not public.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from fastapi import Depends, FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute, iter_route_contexts
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.routing import Route

from services.gateway.auth.keys import PREFIX, KeyCache, KeyTable, key_id, read_key_file
from services.gateway.auth.principal import ANONYMOUS, InvalidTokenError, Principal
from services.gateway.origins import PROBES
from services.problems import ProblemError
from services.settings import Settings

if TYPE_CHECKING:
    from services.gateway.auth.oidc import TokenVerifier

# RFC 6750, section 2.1. The limit is far above the length of real access tokens.
_BEARER = re.compile(r"bearer +([A-Za-z0-9._~+/-]{1,16384}=*)", re.IGNORECASE)
_NO_CREDENTIALS = {"WWW-Authenticate": 'Bearer realm="dermis"'}
_INVALID_TOKEN = {"WWW-Authenticate": 'Bearer realm="dermis", error="invalid_token"'}

# Paths that everyone may read: they contain nothing private.
PUBLIC = PROBES | {"/", "/study", "/study/reader.css", "/study/reader.js"}


class Authenticator:
    """Turns the credentials of requests into principals, as DERMIS_AUTH says.

    Attributes:
        keys: The API keys.
        cache: The copy of the keys that requests are compared with.
        stored_bootstrap_key: Id of the key that was stored at the start, if one was.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.keys = KeyTable(settings.jobs_url)
        self.cache = KeyCache(self.keys)
        self.stored_bootstrap_key: str | None = None
        self._tokens: TokenVerifier | None = None
        if settings.auth == "oidc":
            from services.gateway.auth.oidc import TokenVerifier  # loads the cryptography, which API keys do not need

            self._tokens = TokenVerifier(settings)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Store the key of DERMIS_BOOTSTRAP_KEY_FILE at the start, and release everything at the end.

        The tables must have been created.
        """
        try:
            path = self._settings.bootstrap_key_file
            if path is not None:
                text = read_key_file(path)
                if await asyncio.to_thread(self.keys.add_bootstrap_key, text):
                    self.stored_bootstrap_key = key_id(text)
            if self._tokens is not None:
                await self._tokens.prepare()
            yield
        finally:
            await self.cache.close()
            self.keys.close()
            if self._tokens is not None:
                await self._tokens.close()

    async def principal_of(self, headers: Headers, *, however_old: bool = False) -> Principal:
        """The sender of a request.

        Args:
            headers: The headers of the request.
            however_old: As for `KeyCache.find`.

        Raises:
            ProblemError: The credentials are missing, not valid, expired or revoked (401).
            DatabaseUnavailableError: API keys cannot be read.
        """
        if self._settings.auth == "none":
            return ANONYMOUS
        values = headers.getlist("authorization")
        if not values:
            how = "an API key" if self._tokens is None else "an API key or an access token"
            raise ProblemError(
                "unauthenticated", f"send {how} in the header Authorization: Bearer ...", headers=_NO_CREDENTIALS
            )
        parts = _BEARER.fullmatch(values[0].strip()) if len(values) == 1 else None
        if parts is None:
            raise _refusal("send one Authorization header: Bearer, a space, and an API key or access token")
        token = parts[1]
        if token.startswith(PREFIX):
            return await self._by_key(token, however_old)
        if self._tokens is None:
            raise _refusal(f"the credentials are not an API key, which begins with {PREFIX}")
        try:
            return await self._tokens.principal_of(token)
        except InvalidTokenError as error:
            raise _refusal(f"the access token is not valid: {error}") from None

    async def _by_key(self, text: str, however_old: bool) -> Principal:
        key = await self.cache.find(text, however_old=however_old)
        if key is None:
            raise _refusal("the API key is not known")
        state = key.state()
        if state != "active":
            raise _refusal(f"the API key {key.prefix} is {state}")
        self.cache.record_use(key)
        return Principal(key.tenant, f"key:{key.id}", frozenset(key.scopes))


def _refusal(detail: str) -> ProblemError:
    return ProblemError("unauthenticated", detail, headers=_INVALID_TOKEN)


@dataclass(frozen=True)
class Access:
    """A dependency that returns the sender of a request, if the sender may use the route.

    Attributes:
        any_of: Scopes of which the sender needs one; every authenticated sender may use the route if there are none.
        opened_by: Name of a setting that lets everyone use the route.
        invitation: Whether the sender is a reader of a study (`services.gateway.auth.invited`).
    """

    any_of: tuple[str, ...]
    opened_by: str | None = None
    invitation: bool = False

    async def __call__(self, request: Request) -> Principal:
        """The sender of a request.

        Raises:
            ProblemError: The sender is not known (401) or lacks the scope (403).
            QuotaExceededError: The tenant has sent too many requests in this minute (429).
            DatabaseUnavailableError: The requests of the tenant are limited and cannot be counted.
        """
        context = request.app.state.context
        if self.opened_by is not None and getattr(context.settings, self.opened_by):
            return ANONYMOUS
        # The metrics show that the database cannot be reached, so a key that was known before it was lost still reads them.
        of_metrics = self.any_of == ("metrics:read",)
        principal = cast(Principal, await context.auth.principal_of(request.headers, however_old=of_metrics))
        request.scope["dermis.principal"] = principal
        if self.any_of:
            check_scope(principal, *self.any_of)
            # What shows the use, and what ends it, stays possible when the quota is used up. Counting needs the database.
            if self.any_of != ("admin",) and not of_metrics:
                await context.quotas.count(request, principal, {"requests_per_minute": 1})
        return principal


def requires(*any_of: str, opened_by: str | None = None) -> Any:
    """A parameter annotation: the route needs one of these scopes; `Access` has the arguments."""
    return Depends(Access(any_of, opened_by))


def check_scope(principal: Principal, *any_of: str) -> None:
    """Check that the sender has one of these scopes.

    Raises:
        ProblemError: The sender has none of them (403).
    """
    if not principal.has_any(any_of):
        raise ProblemError(
            "missing-scope",
            f"this needs the scope {' or '.join(any_of)}, which the credentials do not have",
            headers={
                "WWW-Authenticate": f'Bearer realm="dermis", error="insufficient_scope", scope="{" ".join(any_of)}"'
            },
        )


def access_of(route: APIRoute) -> Access | None:
    """What a route requires; None if it requires nothing."""
    return _access_of(route.dependant)


def _access_of(dependant: Dependant) -> Access | None:
    for each in dependant.dependencies:
        if isinstance(each.call, Access):
            return each.call
        if (below := _access_of(each)) is not None:
            return below
    return None


def check_routes(app: FastAPI) -> None:
    """Check that every route says what it requires.

    Raises:
        RuntimeError: A route is neither public nor requires credentials.
    """
    without = [
        getattr(route, "path", type(route).__name__)
        for route in (context.original_route for context in iter_route_contexts(app.routes))
        if not (isinstance(route, Route) and route.path in PUBLIC)
        and not (isinstance(route, APIRoute) and access_of(route) is not None)
    ]
    if without:
        raise RuntimeError(f"these routes require no scope: {', '.join(without)}")
