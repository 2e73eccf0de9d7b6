"""Bodies of `/v1/webhooks`."""

from __future__ import annotations

import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from services.gateway.schemas.common import ResponseBody, utc_time, utc_time_or_none
from services.webhooks.outbox import EVENTS, Endpoint, EventName, Message
from services.webhooks.sending import MAX_URL

_Event = Annotated[EventName, Field(description="Kind of the job, and the state in which it ended.")]


class WebhookRequest(BaseModel):
    """A new webhook."""

    model_config = ConfigDict(extra="forbid", strict=True)

    url: str = Field(min_length=1, max_length=MAX_URL, description="Where messages are sent: a public https URL.")
    events: list[_Event] = Field(
        default=list(EVENTS),
        min_length=1,
        max_length=len(EVENTS),
        description="Which messages are sent; by default all.",
    )


class Webhook(ResponseBody):
    """A URL that gets a message when jobs of the tenant end."""

    id: str
    object: Literal["webhook"] = "webhook"
    url: str
    events: list[str]
    created_at: datetime.datetime
    disabled_at: datetime.datetime | None = Field(description="When the receiver answered 410 (Gone).")


class NewWebhook(Webhook):
    """A new webhook."""

    secret: str = Field(description="The secret that signs the messages (Standard Webhooks). It is not shown again.")


class WebhookList(ResponseBody):
    """Webhooks, newest first."""

    data: list[Webhook]


class WebhookMessage(ResponseBody):
    """One message and its delivery."""

    id: str = Field(description="Header `webhook-id`; the same in every attempt.")
    object: Literal["webhook_message"] = "webhook_message"
    event: str
    state: Literal["waiting", "delivered", "dead"] = Field(description="`dead`: not delivered, and not tried again.")
    attempts: int
    next_attempt_at: datetime.datetime | None
    outcome: str | None = Field(description="Of the last attempt.")
    created_at: datetime.datetime
    ended_at: datetime.datetime | None


class WebhookMessageList(ResponseBody):
    """Messages, newest first."""

    data: list[WebhookMessage]


def webhook_of(endpoint: Endpoint) -> Webhook:
    """The body that describes a webhook."""
    return Webhook(
        id=endpoint.id,
        url=endpoint.url,
        events=list(endpoint.events),
        created_at=utc_time(endpoint.created_at),
        disabled_at=utc_time_or_none(endpoint.disabled_at),
    )


def message_of(message: Message) -> WebhookMessage:
    """The body that describes a message."""
    return WebhookMessage(
        id=message.id,
        event=message.event,
        state=message.state,
        attempts=message.attempts,
        next_attempt_at=utc_time(message.due_at) if message.state == "waiting" else None,
        outcome=message.outcome,
        created_at=utc_time(message.created_at),
        ended_at=utc_time_or_none(message.ended_at),
    )
