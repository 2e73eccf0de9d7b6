"""/v1/webhooks: messages to URLs of the tenant when datasets and projections end."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from services.gateway.auth.authentication import requires
from services.gateway.auth.principal import Principal
from services.gateway.dependencies import Context, ContextDep, read_model
from services.gateway.openapi import JSON_PROBLEMS, headers, json_body, problems
from services.gateway.schemas.webhooks import (
    NewWebhook,
    Webhook,
    WebhookList,
    WebhookMessage,
    WebhookMessageList,
    WebhookRequest,
    message_of,
    webhook_of,
)
from services.problems import FieldError, ProblemError, invalid_request
from services.webhooks.outbox import Endpoint, TooManyWebhooksError
from services.webhooks.sending import Allowed, UrlRefusedError, check_url

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"])

_User = Annotated[Principal, requires("webhooks")]
_ID_LENGTH = 40


@router.post(
    "",
    status_code=201,
    summary="Create a webhook",
    response_model=NewWebhook,
    openapi_extra=json_body("WebhookRequest"),
    responses={
        201: {"description": "The webhook, with its secret, which is not shown again.", "headers": headers("Location")},
        **problems(*JSON_PROBLEMS, "webhooks-disabled", "too-many-requests", "not-ready"),
    },
)
async def create_webhook(request: Request, response: Response, context: ContextDep, principal: _User) -> NewWebhook:
    """Send a signed message (Standard Webhooks) to a URL whenever a dataset or projection of the tenant ends."""
    settings = context.settings
    if settings.max_webhooks == 0:
        raise ProblemError(
            "webhooks-disabled", "this service sends no webhooks; its operator can set DERMIS_MAX_WEBHOOKS"
        )
    body = await read_model(request, WebhookRequest)
    try:
        check_url(body.url, Allowed.of(settings.webhook_hosts))
    except UrlRefusedError as error:
        raise invalid_request([FieldError(field="url", message=str(error))]) from None
    try:
        endpoint = await asyncio.to_thread(
            context.webhooks.create, principal.tenant, body.url, body.events, settings.max_webhooks
        )
    except TooManyWebhooksError as error:
        raise ProblemError("too-many-requests", str(error), headers={"Retry-After": "3600"}) from None
    response.headers["Cache-Control"] = "no-store"
    response.headers["Location"] = f"/v1/webhooks/{endpoint.id}"
    return NewWebhook(**webhook_of(endpoint).model_dump(), secret=endpoint.secret)


@router.get("", summary="List the webhooks", responses=problems("not-ready"))
async def list_webhooks(context: ContextDep, principal: _User) -> WebhookList:
    """List the webhooks of the tenant, newest first."""
    endpoints = await asyncio.to_thread(context.webhooks.all, principal.tenant)
    return WebhookList(data=[webhook_of(endpoint) for endpoint in endpoints])


@router.get("/{webhook_id}", summary="Show a webhook", responses=problems("not-found", "not-ready"))
async def get_webhook(webhook_id: str, context: ContextDep, principal: _User) -> Webhook:
    """Show a webhook without its secret."""
    return webhook_of(await _find(context, principal, webhook_id))


@router.delete(
    "/{webhook_id}",
    status_code=204,
    summary="Delete a webhook",
    responses={204: {"description": "It is deleted, with its messages"}, **problems("not-found", "not-ready")},
)
async def delete_webhook(webhook_id: str, context: ContextDep, principal: _User) -> Response:
    """Delete a webhook and its messages."""
    await _find(context, principal, webhook_id)
    await asyncio.to_thread(context.webhooks.delete, principal.tenant, webhook_id)
    return Response(status_code=204)


@router.get(
    "/{webhook_id}/messages",
    summary="List the messages of a webhook",
    responses=problems("invalid-request", "not-found", "not-ready"),
)
async def list_messages(
    webhook_id: str,
    context: ContextDep,
    principal: _User,
    state: Annotated[
        Literal["waiting", "delivered", "dead"] | None, Query(description="Only messages in this state.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=100, description="Maximum number of messages.")] = 100,
) -> WebhookMessageList:
    """List the last messages, newest first: those that wait, those of the last week, and dead ones of the last month."""
    endpoint = await _find(context, principal, webhook_id)
    messages = await asyncio.to_thread(context.webhooks.messages, endpoint.id, state, limit)
    return WebhookMessageList(data=[message_of(message) for message in messages])


@router.post(
    "/{webhook_id}/messages/{message_id}/retry",
    summary="Send a dead message again",
    responses=problems("not-found", "not-ready", "too-many-requests"),
)
async def retry_message(webhook_id: str, message_id: str, context: ContextDep, principal: _User) -> WebhookMessage:
    """Send a dead message again, and enable the webhook if it was disabled. Other messages are not changed."""
    endpoint = await _find(context, principal, webhook_id)
    message = None
    if _is_id(message_id):
        context.limits.webhook_retries.add(principal.tenant)
        message = await asyncio.to_thread(context.webhooks.retry, endpoint.id, message_id)
    if message is None:
        raise ProblemError("not-found", f"the webhook has no message {message_id[:100]}")
    return message_of(message)


async def _find(context: Context, principal: Principal, webhook_id: str) -> Endpoint:
    endpoint = None
    if _is_id(webhook_id):
        endpoint = await asyncio.to_thread(context.webhooks.get, principal.tenant, webhook_id)
    if endpoint is None:
        raise ProblemError("not-found", f"there is no webhook {webhook_id[:100]}")
    return endpoint


def _is_id(text: str) -> bool:
    """Whether a text can be an id, so that it can be looked up."""
    return len(text) <= _ID_LENGTH and text.isascii() and text.isprintable()
