"""Body of `/v1/usage`."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from services.gateway.auth.principal import SCOPES, Principal
from services.gateway.schemas.common import ResponseBody, utc_time_or_none
from services.quotas import QuotaUse


class QuotaUsage(ResponseBody):
    """One quota and its use."""

    name: str
    unit: str = Field(description="Unit of the numbers.")
    limit: float | None = Field(description="What the tenant may use; null if there is no limit.")
    used: float | None = Field(description="What it uses; null if that is not counted, because there is no limit.")
    remaining: float | None = Field(description="What is left; null if there is no limit.")
    window_seconds: int | None = Field(description="Length of the window; null for what exists at one time.")
    resets_at: datetime.datetime | None = Field(description="End of the window, at which the use starts again at 0.")


class Usage(ResponseBody):
    """The quotas of the sender's tenant and their use."""

    object: Literal["usage"] = "usage"
    tenant: str
    scopes: list[str] = Field(description="What the credentials of the sender allow.")
    quotas: list[QuotaUsage]
    retention_days: float | None = Field(
        description="Days after which a dataset that has ended is deleted; null if it is kept."
    )


def usage_of(principal: Principal, uses: Sequence[QuotaUse], retention_days: float | None) -> Usage:
    """The body that describes the quotas of a sender's tenant."""

    def scaled(use: QuotaUse, count: int | None) -> float | None:
        return None if count is None else count / use.kind.scale

    return Usage(
        tenant=principal.tenant,
        scopes=[scope for scope in SCOPES if scope in principal.scopes],
        quotas=[
            QuotaUsage(
                name=use.name,
                unit=use.kind.unit,
                limit=scaled(use, use.limit),
                used=scaled(use, use.used),
                remaining=scaled(use, use.remaining),
                window_seconds=use.kind.seconds,
                resets_at=utc_time_or_none(use.resets_at),
            )
            for use in uses
        ],
        retention_days=retention_days,
    )
