"""Readers of studies: they have an invitation in place of credentials, which shows and allows nothing but their study."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass
from typing import Any

from fastapi import Depends
from starlette.requests import Request

from services.gateway.auth.authentication import Access
from services.gateway.auth.principal import Principal
from services.problems import ProblemError
from services.studies.tables import Invitation, Study

_BEARER = re.compile(r"bearer +(dermis_rd_[A-Za-z0-9_-]{1,100})", re.IGNORECASE)
_CHALLENGE = {"WWW-Authenticate": 'Bearer realm="dermis"'}


@dataclass(frozen=True)
class Reader(Principal):
    """A reader of a study. It has no scopes.

    Attributes:
        invitation: The invitation.
        study: The study.
    """

    invitation: Invitation
    study: Study


@dataclass(frozen=True)
class Invited(Access):
    """A dependency that returns the reader of a request, whatever DERMIS_AUTH is."""

    async def __call__(self, request: Request) -> Reader:
        """The reader who sent a request.

        Raises:
            ProblemError: There is no invitation, or it is not known, has expired or was revoked (401).
            QuotaExceededError: The tenant has sent too many requests in this minute, its readers included (429).
            DatabaseUnavailableError: Invitations cannot be read.
        """
        values = request.headers.getlist("authorization")
        parts = _BEARER.fullmatch(values[0].strip()) if len(values) == 1 else None
        if parts is None:
            raise _refusal("open the link of your invitation")
        studies = request.app.state.context.studies
        found = await asyncio.to_thread(studies.table.find_reader, parts[1])
        if found is None:
            raise _refusal(
                "the invitation is not known, or its study was deleted; ask the person who sent you the link"
            )
        invitation, study = found
        reader = Reader(study.tenant, f"invitation:{invitation.id}", frozenset(), invitation, study)
        request.scope["dermis.principal"] = reader
        state = invitation.state(time.time())
        if state != "active":
            raise _refusal(f"the invitation is {state}; ask the person who sent you the link for another one")
        if study.expires_at <= time.time():
            raise _refusal("the study has ended")
        await request.app.state.context.quotas.count(request, reader, {"requests_per_minute": 1})
        await asyncio.to_thread(studies.table.record_use, invitation)
        return reader


def _refusal(detail: str) -> ProblemError:
    return ProblemError("unauthenticated", detail, headers=_CHALLENGE)


def invited() -> Any:
    """A parameter annotation: the route needs an invitation."""
    return Depends(Invited((), invitation=True))
