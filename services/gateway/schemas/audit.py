"""Bodies of `/v1/admin/audit`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from services.audit.trail import Entry, Head
from services.gateway.schemas.common import ResponseBody


class AuditEntry(ResponseBody):
    """One entry of the audit trail. Its hash is that of the entry before it and of its own content."""

    number: int = Field(description="Place in the trail, from 1.")
    time: str = Field(description="UTC.")
    action: str = Field(description="What was done, such as `dataset.create`.")
    outcome: int = Field(description="The HTTP status; 200 for a command.")
    subject: str | None = Field(
        description="Who did it: `key:<id>`, `user:<sub>`, `anonymous`, `command:<account>` or `service`; null if not known."
    )
    tenant: str | None
    route: str | None = Field(description="Method and path template of the request.")
    object: str | None = Field(description="Id of the dataset, projection or API key.")
    client: str | None = Field(description="Address of the client.")
    request_id: str | None
    detail: str | None
    hash: str
    signature: str | None = Field(description="HMAC-SHA256 of the hash, if the service has a key.")


class AuditHead(ResponseBody):
    """The last entry of the trail."""

    number: int
    hash: str


class AuditList(ResponseBody):
    """Entries of the audit trail, newest first."""

    object: Literal["list"] = "list"
    data: list[AuditEntry]
    next_before: int | None = Field(description="`before` of the next page; null on the last page.")
    head: AuditHead | None = Field(description="Keep it elsewhere to detect later that the trail was rewritten.")


def audit_list(entries: list[Entry], next_before: int | None, head: Head | None) -> AuditList:
    """The body of a page of the trail."""
    return AuditList(
        data=[AuditEntry(**vars(entry)) for entry in entries],
        next_before=next_before,
        head=None if head is None else AuditHead(number=head.number, hash=head.hash),
    )
