"""client.usage: the quotas of the caller's tenant and their use."""

from __future__ import annotations

from functools import cached_property

from dermis_client._flow import Flow, Request, call, parse
from dermis_client._raw import async_raw, raw
from dermis_client._transport import AsyncTransport, SyncTransport
from dermis_client.models import Usage

# Flows


def retrieve_usage(max_retries: int) -> Flow[Usage]:
    """GET /v1/usage."""
    response = yield from call(Request("GET", "/v1/usage"), max_retries)
    return parse(response, Usage.model_validate)


class RawUsageResource:
    """The methods of `UsageResource` with the responses of the service; see `RawResponse`."""

    def __init__(self, resource: UsageResource) -> None:
        self.retrieve = raw(resource.retrieve)


class UsageResource:
    """The use of quotas: `client.usage` of a DermisClient."""

    with_raw_response = cached_property(RawUsageResource)

    def __init__(self, transport: SyncTransport) -> None:
        self._transport, self._max_retries = transport, transport.settings.max_retries

    def retrieve(self) -> Usage:
        """Retrieve the quotas of the caller's tenant and their use.

        Returns:
            Every quota of the service, with or without a limit, and the retention time of datasets.

        Raises:
            AuthenticationError: The credentials are missing or not valid.
            NotFoundError: The service is older than quotas.
            APIConnectionError: The service did not respond.
        """
        return self._transport.run(retrieve_usage(self._max_retries))


class AsyncRawUsageResource:
    """The methods of `AsyncUsageResource` with the responses of the service; see `RawResponse`."""

    def __init__(self, resource: AsyncUsageResource) -> None:
        self.retrieve = async_raw(resource.retrieve)


class AsyncUsageResource:
    """The use of quotas: `client.usage` of an AsyncDermisClient."""

    with_raw_response = cached_property(AsyncRawUsageResource)

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport, self._max_retries = transport, transport.settings.max_retries

    async def retrieve(self) -> Usage:
        """Retrieve the quotas of the caller's tenant and their use; see `UsageResource.retrieve`."""
        return await self._transport.run(retrieve_usage(self._max_retries))
