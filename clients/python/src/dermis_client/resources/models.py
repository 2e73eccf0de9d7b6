"""client.models: the models that a service offers."""

from __future__ import annotations

from functools import cached_property
from urllib.parse import quote

from dermis_client._flow import Flow, Request, call, parse
from dermis_client._raw import async_raw, raw
from dermis_client._transport import AsyncTransport, SyncTransport
from dermis_client.errors import DermisError, InvalidRequestError
from dermis_client.models import Model, ResponseRecord

_ModelList = list[Model]  # `list` is a method in the classes below


class _Page(ResponseRecord):
    data: list[Model]


# Flows


def list_models(max_retries: int) -> Flow[list[Model]]:
    """GET /v1/models."""
    response = yield from call(Request("GET", "/v1/models"), max_retries)
    return parse(response, _Page.model_validate).data


def default_model(max_retries: int) -> Flow[Model]:
    """GET /v1/models, and return the model that the service marks as its default."""
    models = yield from list_models(max_retries)
    default = next((model for model in models if model.default), None)
    if default is None:
        raise DermisError("the service has no default model: it serves no model, or is older than this client")
    return default


def retrieve_model(name: str, max_retries: int) -> Flow[Model]:
    """GET /v1/models/{name}."""
    if not name or name in {".", ".."}:
        raise InvalidRequestError(f"model: {name!r} is not a model name")
    response = yield from call(Request("GET", f"/v1/models/{quote(name, safe='')}"), max_retries)
    return parse(response, Model.model_validate)


class RawModels:
    """The methods of `Models` with the responses of the service; see `RawResponse`."""

    def __init__(self, resource: Models) -> None:
        self.list = raw(resource.list)
        self.default = raw(resource.default)
        self.retrieve = raw(resource.retrieve)


class Models:
    """The models of a service: `client.models` of a DermisClient."""

    with_raw_response = cached_property(RawModels)

    def __init__(self, transport: SyncTransport) -> None:
        self._transport, self._max_retries = transport, transport.settings.max_retries

    def list(self) -> _ModelList:
        """List the models that the service offers.

        Returns:
            The models, the default one first, without their cards.

        Raises:
            APIConnectionError: The service did not respond.
        """
        return self._transport.run(list_models(self._max_retries))

    def default(self) -> Model:
        """Retrieve the model that the service uses for requests that name none.

        Returns:
            The model, without its card; `retrieve(model.name)` has the card.

        Raises:
            DermisError: The service serves no model.
            APIConnectionError: The service did not respond.
        """
        return self._transport.run(default_model(self._max_retries))

    def retrieve(self, name: str) -> Model:
        """Retrieve one model with its card.

        Args:
            name: Name of the model.

        Returns:
            The model.

        Raises:
            NotFoundError: The service has no such model.
            InvalidRequestError: The name is empty or not a name.
            APIConnectionError: The service did not respond.
        """
        return self._transport.run(retrieve_model(name, self._max_retries))


class AsyncRawModels:
    """The methods of `AsyncModels` with the responses of the service; see `RawResponse`."""

    def __init__(self, resource: AsyncModels) -> None:
        self.list = async_raw(resource.list)
        self.default = async_raw(resource.default)
        self.retrieve = async_raw(resource.retrieve)


class AsyncModels:
    """The models of a service: `client.models` of an AsyncDermisClient."""

    with_raw_response = cached_property(AsyncRawModels)

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport, self._max_retries = transport, transport.settings.max_retries

    async def list(self) -> _ModelList:
        """List the models; see `Models.list`."""
        return await self._transport.run(list_models(self._max_retries))

    async def default(self) -> Model:
        """Retrieve the model for requests that name none; see `Models.default`."""
        return await self._transport.run(default_model(self._max_retries))

    async def retrieve(self, name: str) -> Model:
        """Retrieve one model with its card; see `Models.retrieve`."""
        return await self._transport.run(retrieve_model(name, self._max_retries))
