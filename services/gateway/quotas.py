"""Count the requests of tenants against their quotas, and show the rest in response headers.

The headers are `RateLimit-Policy` and `RateLimit` of draft-ietf-httpapi-ratelimit-headers-10. They are sent by the routes that
count against a quota with a window, if the tenant has a limit.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager

from starlette.requests import Request

from services.errors import DatabaseUnavailableError
from services.gateway.auth.principal import Principal
from services.jobs import counters
from services.jobs.table import JobTable
from services.quotas import QuotaUse
from services.settings import Settings

logger = logging.getLogger("dermis.http")

SCOPE_KEY = "dermis.quota_uses"
"""Key of the ASGI scope with the uses that the response headers show."""


class TenantQuotas:
    """The quotas of all tenants and their use, in the jobs database."""

    def __init__(self, settings: Settings, table: JobTable) -> None:
        self._settings, self._table = settings, table

    async def count(self, request: Request, principal: Principal, amounts: Mapping[str, int]) -> None:
        """Count a request of a tenant.

        Args:
            request: The request, whose response will have the headers.
            principal: The sender.
            amounts: What the request needs by name of the quota, in counted units.

        Raises:
            QuotaExceededError: A quota would be exceeded; nothing was counted.
            DatabaseUnavailableError: If the database cannot be reached.
        """
        quota = self._settings.quota_of(principal.tenant)
        if all(quota.limit_of(name) is None for name in amounts):
            return
        uses = await asyncio.to_thread(self._table.count_use, principal.tenant, amounts, quota)
        request.scope.setdefault(SCOPE_KEY, []).extend(uses)

    @asynccontextmanager
    async def counted(
        self, request: Request, principal: Principal, amounts: Mapping[str, int], kept: Mapping[str, int]
    ) -> AsyncIterator[None]:
        """`count`, undone if the work in the `async with` block fails or is cancelled.

        Args:
            request: The request, whose response will have the headers.
            principal: The sender.
            amounts: As for `count`.
            kept: Further amounts that stay counted if the work fails.
        """
        counted_at = counters.now()
        await self.count(request, principal, {**kept, **amounts})
        try:
            yield
        except (Exception, asyncio.CancelledError):
            quota = self._settings.quota_of(principal.tenant)
            limited = {name: amount for name, amount in amounts.items() if quota.limit_of(name) is not None}
            if limited:
                undo = asyncio.to_thread(self._table.undo_use, principal.tenant, limited, counted_at)
                try:
                    await asyncio.shield(undo)
                except DatabaseUnavailableError as error:  # which must not replace the other one, as of a time limit
                    logger.warning("use of quotas not undone", extra={"tenant": principal.tenant, "error": str(error)})
            raise

    async def show(self, request: Request, principal: Principal, *names: str) -> None:
        """Show the use of quotas that were counted elsewhere in the response headers."""
        quota = self._settings.quota_of(principal.tenant)
        limited = [name for name in names if quota.limit_of(name) is not None]
        if limited:
            uses = await asyncio.to_thread(self._table.use, principal.tenant, quota, limited)
            request.scope.setdefault(SCOPE_KEY, []).extend(uses)

    async def usage(self, principal: Principal) -> list[QuotaUse]:
        """The use of every quota by the tenant of the sender."""
        quota = self._settings.quota_of(principal.tenant)
        return await asyncio.to_thread(self._table.use, principal.tenant, quota)


def rate_limit_headers(uses: Iterable[QuotaUse]) -> list[tuple[bytes, bytes]]:
    """The raw headers RateLimit-Policy and RateLimit; none if there are no quotas with a window."""
    policies, states = [], []
    now = time.time()
    for use in uses:
        if use.kind.seconds is None or use.limit is None:
            continue
        scale = use.kind.scale
        policies.append(f'"{use.name}";q={use.limit // scale};w={use.kind.seconds};qu="{use.kind.unit}"')
        states.append(f'"{use.name}";r={(use.remaining or 0) // scale};t={use.seconds_left(now)}')
    if not policies:
        return []
    return [(b"ratelimit-policy", ", ".join(policies).encode()), (b"ratelimit", ", ".join(states).encode())]
