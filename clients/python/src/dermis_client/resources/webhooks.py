"""client.webhooks: signed messages to URLs when datasets and projections end."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

from dermis_client._flow import Flow, Request, call, delete, parse
from dermis_client._raw import async_raw, raw
from dermis_client._requests import checked_id, job_path
from dermis_client._transport import AsyncTransport, SyncTransport
from dermis_client.models import NewWebhook, ResponseRecord, Webhook, WebhookMessage
from dermis_client.params import WebhookEvent

_WebhookList = list[Webhook]  # `list` is a method in the classes below
_MessageList = list[WebhookMessage]
MessageState = Literal["waiting", "delivered", "dead"]


class _Webhooks(ResponseRecord):
    data: list[Webhook]


class _Messages(ResponseRecord):
    data: list[WebhookMessage]


# Flows


def create_webhook(url: str, events: Sequence[WebhookEvent] | None, max_retries: int) -> Flow[NewWebhook]:
    """POST /v1/webhooks."""
    body = {"url": url} if events is None else {"url": url, "events": list(events)}
    response = yield from call(Request("POST", "/v1/webhooks", json=body, idempotent=False), max_retries)
    return parse(response, NewWebhook.model_validate)


def list_webhooks(max_retries: int) -> Flow[list[Webhook]]:
    """GET /v1/webhooks."""
    response = yield from call(Request("GET", "/v1/webhooks"), max_retries)
    return parse(response, _Webhooks.model_validate).data


def retrieve_webhook(webhook_id: str, max_retries: int) -> Flow[Webhook]:
    """GET /v1/webhooks/{id}."""
    response = yield from call(Request("GET", job_path("webhook", webhook_id)), max_retries)
    return parse(response, Webhook.model_validate)


def delete_webhook(webhook_id: str, max_retries: int) -> Flow[None]:
    """DELETE /v1/webhooks/{id}."""
    yield from delete(Request("DELETE", job_path("webhook", webhook_id)), max_retries)


def list_messages(webhook_id: str, state: str | None, max_retries: int) -> Flow[list[WebhookMessage]]:
    """GET /v1/webhooks/{id}/messages."""
    params = {} if state is None else {"state": state}
    request = Request("GET", job_path("webhook", webhook_id, "messages"), params=params)
    response = yield from call(request, max_retries)
    return parse(response, _Messages.model_validate).data


def retry_message(webhook_id: str, message_id: str, max_retries: int) -> Flow[WebhookMessage]:
    """POST /v1/webhooks/{id}/messages/{id}/retry."""
    # A message that waits already is not changed by a second request.
    path = job_path("webhook", webhook_id, "messages", checked_id("message", message_id), "retry")
    response = yield from call(Request("POST", path), max_retries)
    return parse(response, WebhookMessage.model_validate)


class RawWebhooks:
    """The methods of `Webhooks` with the responses of the service; see `RawResponse`."""

    def __init__(self, resource: Webhooks) -> None:
        self.create = raw(resource.create)
        self.list = raw(resource.list)
        self.retrieve = raw(resource.retrieve)
        self.delete = raw(resource.delete)
        self.messages = raw(resource.messages)
        self.retry = raw(resource.retry)


class Webhooks:
    """Messages when datasets and projections end: `client.webhooks` of a DermisClient."""

    with_raw_response = cached_property(RawWebhooks)

    def __init__(self, transport: SyncTransport) -> None:
        self._transport, self._max_retries = transport, transport.settings.max_retries

    def create(self, url: str, *, events: Sequence[WebhookEvent] | None = None) -> NewWebhook:
        """Have a signed message (Standard Webhooks) sent to a URL whenever a dataset or projection of the tenant ends.

        Args:
            url: A public https URL, or one that the operator of the service allows.
            events: Which messages are sent, such as ["dataset.succeeded", "dataset.failed"]; by default all.

        Returns:
            The webhook with its `secret`, which the service does not show again. Check the signatures with it.

        Raises:
            UnprocessableEntityError: The service sends nothing to this URL, or does not know an event.
            PermissionDeniedError: The service sends no webhooks, or the credentials do not have the scope.
            RateLimitError: The tenant has as many webhooks as the service allows.
            APIConnectionError: The service did not respond; it may have made the webhook.
        """
        return self._transport.run(create_webhook(url, events, self._max_retries))

    def list(self) -> _WebhookList:
        """List the webhooks of the tenant.

        Returns:
            The webhooks without their secrets, newest first.

        Raises:
            APIConnectionError: The service did not respond.
        """
        return self._transport.run(list_webhooks(self._max_retries))

    def retrieve(self, webhook_id: str) -> Webhook:
        """Retrieve a webhook.

        Args:
            webhook_id: Id of the webhook.

        Returns:
            The webhook without its secret.

        Raises:
            NotFoundError: The tenant has no such webhook.
            InvalidRequestError: The id is not valid.
            APIConnectionError: The service did not respond.
        """
        return self._transport.run(retrieve_webhook(webhook_id, self._max_retries))

    def delete(self, webhook_id: str) -> None:
        """Delete a webhook with its messages.

        Args:
            webhook_id: Id of the webhook.

        Raises:
            NotFoundError: The tenant has no such webhook.
            InvalidRequestError: The id is not valid.
            APIConnectionError: The service did not respond.
        """
        self._transport.run(delete_webhook(webhook_id, self._max_retries))

    def messages(self, webhook_id: str, *, state: MessageState | None = None) -> _MessageList:
        """List the last 100 messages of a webhook and their delivery.

        Args:
            webhook_id: Id of the webhook.
            state: Only messages in this state: "waiting", "delivered", or "dead" for those that are not tried again.

        Returns:
            The messages, newest first.

        Raises:
            NotFoundError: The tenant has no such webhook.
            InvalidRequestError: The id is not valid.
            APIConnectionError: The service did not respond.
        """
        return self._transport.run(list_messages(webhook_id, state, self._max_retries))

    def retry(self, webhook_id: str, message_id: str) -> WebhookMessage:
        """Have a dead message sent again. This also enables a webhook that its receiver disabled with 410.

        Args:
            webhook_id: Id of the webhook.
            message_id: Id of the message. One that is not dead is not changed.

        Returns:
            The message.

        Raises:
            NotFoundError: The webhook has no such message.
            RateLimitError: The tenant has sent too many messages again.
            InvalidRequestError: An id is not valid.
            APIConnectionError: The service did not respond.
        """
        return self._transport.run(retry_message(webhook_id, message_id, self._max_retries))


class AsyncRawWebhooks:
    """The methods of `AsyncWebhooks` with the responses of the service; see `RawResponse`."""

    def __init__(self, resource: AsyncWebhooks) -> None:
        self.create = async_raw(resource.create)
        self.list = async_raw(resource.list)
        self.retrieve = async_raw(resource.retrieve)
        self.delete = async_raw(resource.delete)
        self.messages = async_raw(resource.messages)
        self.retry = async_raw(resource.retry)


class AsyncWebhooks:
    """Messages when datasets and projections end: `client.webhooks` of an AsyncDermisClient."""

    with_raw_response = cached_property(AsyncRawWebhooks)

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport, self._max_retries = transport, transport.settings.max_retries

    async def create(self, url: str, *, events: Sequence[WebhookEvent] | None = None) -> NewWebhook:
        """Create a webhook; see `Webhooks.create` for arguments and errors."""
        return await self._transport.run(create_webhook(url, events, self._max_retries))

    async def list(self) -> _WebhookList:
        """List the webhooks of the tenant; see `Webhooks.list`."""
        return await self._transport.run(list_webhooks(self._max_retries))

    async def retrieve(self, webhook_id: str) -> Webhook:
        """Retrieve a webhook; see `Webhooks.retrieve`."""
        return await self._transport.run(retrieve_webhook(webhook_id, self._max_retries))

    async def delete(self, webhook_id: str) -> None:
        """Delete a webhook with its messages; see `Webhooks.delete`."""
        await self._transport.run(delete_webhook(webhook_id, self._max_retries))

    async def messages(self, webhook_id: str, *, state: MessageState | None = None) -> _MessageList:
        """List the last 100 messages of a webhook; see `Webhooks.messages`."""
        return await self._transport.run(list_messages(webhook_id, state, self._max_retries))

    async def retry(self, webhook_id: str, message_id: str) -> WebhookMessage:
        """Have a dead message sent again; see `Webhooks.retry`."""
        return await self._transport.run(retry_message(webhook_id, message_id, self._max_retries))
