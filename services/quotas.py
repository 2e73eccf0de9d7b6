"""Quotas of tenants: what one tenant may use of the service, and the setting DERMIS_QUOTAS.

The counters are in the jobs database (`services.jobs.counters`), so that all replicas of the service share them.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ByteSize, ConfigDict, Field, TypeAdapter, ValidationError

from dermis.errors import DermisError
from services.tenants import is_tenant

EVERYONE = "*"
"""The name in DERMIS_QUOTAS of the quotas that hold where a tenant's own entry does not name one."""

MINUTE, DAY = 60, 86_400

_Whole = Annotated[int, Field(strict=True, ge=0, lt=1 << 53)]


class Quota(BaseModel):
    """The quotas of a tenant. A quota that is null has no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    images_per_day: _Whole | None = Field(
        default=None, description="Generated images in a day: of datasets, of calls and of reader studies."
    )
    projections_per_day: _Whole | None = Field(default=None, description="Images that are projected in a day.")
    authenticity_per_minute: _Whole | None = Field(
        default=None,
        description="Images compared by /v1/authenticity or the gate of /v1/images, or placed by /v1/embeddings, in a minute.",
    )
    authenticity_per_day: _Whole | None = Field(
        default=None,
        description="Images compared by /v1/authenticity or the gate of /v1/images, or placed by /v1/embeddings, in a day.",
    )
    upload_megapixels_per_minute: _Whole | None = Field(
        default=None, description="Megapixels of uploaded images in a minute."
    )
    requests_per_minute: _Whole | None = Field(
        default=None,
        description="Requests with valid credentials in a minute, except those for usage, for metrics and below /v1/admin.",
    )
    active_jobs: _Whole | None = Field(default=None, description="Queued and running datasets and projections.")
    stored_bytes: Annotated[ByteSize, Field(ge=0, lt=1 << 62)] | None = Field(
        default=None,
        description="Bytes of the files of datasets, projections and reader studies, and the estimates of active ones.",
    )
    retention_days: float | None = Field(
        default=None,
        gt=0,
        le=36_500,
        allow_inf_nan=False,
        description="Days after its end at which a dataset is deleted; a reader study, at the latest, after its creation.",
    )

    @property
    def limits(self) -> bool:
        """Whether any quota has a limit."""
        return any(getattr(self, name) is not None for name in QUOTAS)

    def limit_of(self, name: str) -> int | None:
        """The limit of a quota in the unit that is counted; None if it has none."""
        value: int | None = getattr(self, name)
        return None if value is None else int(value) * QUOTAS[name].scale


@dataclass(frozen=True)
class QuotaKind:
    """What a quota limits.

    Attributes:
        unit: The unit of its value.
        seconds: Length of the window after which the use starts again at 0; None if the use is what exists now.
        scale: Counted units in one unit of the value.
    """

    unit: str
    seconds: int | None
    scale: int = 1

    @property
    def period(self) -> str:
        """The window, for a message."""
        return {None: "at one time", MINUTE: "a minute", DAY: "a day"}[self.seconds]


QUOTAS: Mapping[str, QuotaKind] = {
    "images_per_day": QuotaKind("images", DAY),
    "projections_per_day": QuotaKind("images", DAY),
    "authenticity_per_minute": QuotaKind("images", MINUTE),
    "authenticity_per_day": QuotaKind("images", DAY),
    "upload_megapixels_per_minute": QuotaKind("megapixels", MINUTE, 1_000_000),
    "requests_per_minute": QuotaKind("requests", MINUTE),
    "active_jobs": QuotaKind("jobs", None),
    "stored_bytes": QuotaKind("bytes", None),
}
_WHAT = {
    "requests_per_minute": "requests",
    "images_per_day": "generated images",
    "projections_per_day": "projected images",
    "authenticity_per_minute": "images compared with the training images",
    "authenticity_per_day": "images compared with the training images",
    "upload_megapixels_per_minute": "megapixels of uploaded images",
    "active_jobs": "queued and running jobs",
    "stored_bytes": "stored bytes",
}
# Seconds after which to try again, if no time is known at which something becomes free.
_RETRY_SECONDS = {"active_jobs": 30, "stored_bytes": 3600}


@dataclass(frozen=True)
class QuotaUse:
    """The use of one quota by a tenant, in counted units.

    Attributes:
        name: A key of `QUOTAS`.
        limit: The limit; None if there is none.
        used: The use; None if it is not counted because there is no limit.
        resets_at: Time at which the window ends, seconds since 1970; None if the quota has no window.
    """

    name: str
    limit: int | None
    used: int | None
    resets_at: float | None = None

    @property
    def kind(self) -> QuotaKind:
        """What the quota limits."""
        return QUOTAS[self.name]

    @property
    def remaining(self) -> int | None:
        """What is left; None if there is no limit."""
        return None if self.limit is None or self.used is None else max(0, self.limit - self.used)

    def seconds_left(self, now: float) -> int:
        """Whole seconds after which to try again, at least 1."""
        if self.resets_at is None:
            return _RETRY_SECONDS[self.name]
        return max(1, math.ceil(self.resets_at - now))


class QuotaExceededError(DermisError):
    """A request exceeds a quota of its tenant; nothing was counted or stored.

    Attributes:
        use: The quota and its use.
        requested: What the request needs, in counted units.
        retry_after: Seconds after which to try again; None if the request exceeds the quota by itself.
    """

    def __init__(self, use: QuotaUse, requested: int, now: float | None = None) -> None:
        limit = use.limit or 0
        kind, what = use.kind, _WHAT[use.name]
        unit = kind.scale
        allowed = f"the quota {use.name} of this tenant allows {_number(limit, unit)} {what} {kind.period}"
        self.use, self.requested = use, requested
        self.retry_after: int | None = None
        if requested > limit:
            super().__init__(f"{allowed}, and this request alone needs {_number(requested, unit)}")
            return
        self.retry_after = use.seconds_left(time.time() if now is None else now)
        needs = f"{_number(use.used or 0, unit)} are used and this request needs {_number(requested, unit)}"
        super().__init__(f"{allowed}; {needs}; {_when_free(use)}")


def _number(count: int, scale: int) -> str:
    return f"{count:,}" if scale == 1 else f"{count / scale:,.6g}"


def _when_free(use: QuotaUse) -> str:
    if use.name == "active_jobs":
        return "try again when a job has ended"
    if use.name == "stored_bytes":
        return "delete datasets or wait until some expire"
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(use.resets_at or 0))
    return f"it is free again at {moment} UTC"


def quota_of(quotas: Mapping[str, Quota], tenant: str) -> Quota:
    """The quotas of a tenant: those that its own entry names, and for the others those of everyone."""
    everyone, own = quotas.get(EVERYONE), quotas.get(tenant)
    if everyone is None or own is None:
        return own or everyone or _UNLIMITED
    return everyone.model_copy(update={name: getattr(own, name) for name in own.model_fields_set})


_UNLIMITED = Quota()
_QUOTAS: TypeAdapter[dict[str, Quota]] = TypeAdapter(dict[str, Quota])


def read_quotas(value: Any) -> dict[str, Quota]:
    """Read the value of DERMIS_QUOTAS: a JSON object with the quotas by tenant.

    Those of `*` hold where a tenant's own entry does not name one.

    Raises:
        ValueError: The value is not such an object; the message names the tenant and the quota.
    """
    if isinstance(value, str):
        if not value.strip():
            return {}
        try:
            value = json.loads(value, object_pairs_hook=_without_repetition)
        except json.JSONDecodeError as error:
            raise ValueError(f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    if not isinstance(value, dict):
        raise ValueError('write a JSON object, such as {"*": {"images_per_day": 1000}}')
    for tenant in value:
        if tenant != EVERYONE and not is_tenant(str(tenant)):
            raise ValueError(
                f"{str(tenant)[:100]!r} is not the name of a tenant: use lower-case letters, digits and hyphens, or *"
            )
    try:
        return _QUOTAS.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        # Without the names of the branches of a union, which pydantic adds.
        place = ".".join(str(part) for part in first["loc"][:2])
        if first["type"] == "extra_forbidden":
            raise ValueError(f"{place[:100]}: unknown; the quotas are {', '.join(Quota.model_fields)}") from None
        raise ValueError(f"{place[:100]}: {first['msg']}") from None


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{repeated[:100]!r} occurs twice in one object")
    return values
