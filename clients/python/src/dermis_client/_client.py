"""The blocking and the asynchronous client with their resources."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, Self

import httpx

from dermis_client._flow import Flow, Request, call
from dermis_client._transport import AsyncTransport, ClientSettings, SyncTransport, settings
from dermis_client.errors import InvalidRequestError
from dermis_client.resources.authenticity import AsyncAuthenticity, Authenticity
from dermis_client.resources.classifications import AsyncClassifications, Classifications
from dermis_client.resources.datasets import AsyncDatasets, Datasets
from dermis_client.resources.edits import AsyncEdits, Edits
from dermis_client.resources.embeddings import AsyncEmbeddings, Embeddings
from dermis_client.resources.images import AsyncImages, Images
from dermis_client.resources.models import AsyncModels, Models
from dermis_client.resources.projections import AsyncProjections, Projections
from dermis_client.resources.studies import AsyncStudies, Studies
from dermis_client.resources.usage import AsyncUsageResource, UsageResource
from dermis_client.resources.webhooks import AsyncWebhooks, Webhooks


def _raw(
    values: ClientSettings,
    method: str,
    path: str,
    json: Any,
    params: Mapping[str, str | int] | None,
    headers: Mapping[str, str] | None,
) -> Flow[httpx.Response]:
    if not path.startswith("/") or path.startswith("//"):
        raise InvalidRequestError(f"path: {path!r} does not begin with one slash")
    more = dict(headers or {})
    idempotent = method.upper() not in {"POST", "PATCH"} or any(name.lower() == "idempotency-key" for name in more)
    request = Request(method.upper(), path, dict(params or {}), more, json, idempotent=idempotent)
    return call(request, values.max_retries)


class DermisClient:
    """A blocking client of a dermis service. Threads can share it.

    Example:
        ```python
        with DermisClient("http://127.0.0.1:3000") as client:
            dataset = client.datasets.create(classes={"malignant": 500, "benign": 500}, seed=7)
            dataset = dataset.wait(progress=True)
            dataset.download("lesions")
        ```

    Attributes:
        datasets: Generate, follow and download datasets.
        images: Generate a few images in one call.
        classifications: Classify images.
        authenticity: Compare images with the training images of a model.
        edits: Edit images along directions of the latent space.
        embeddings: A map of images beside the training images of a model.
        projections: Find the latents of images.
        models: The models that the service offers.
        studies: Blinded studies in which readers tell generated from real images.
        usage: The quotas of the caller's tenant and their use.
        webhooks: Messages to URLs when datasets and projections end.
    """

    datasets: Datasets
    images: Images
    classifications: Classifications
    authenticity: Authenticity
    edits: Edits
    embeddings: Embeddings
    projections: Projections
    models: Models
    studies: Studies
    usage: UsageResource
    webhooks: Webhooks

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        token_provider: Callable[[], str] | None = None,
        allow_plain_http: bool | None = None,
        timeout: float = 120.0,
        max_retries: int = 3,
        headers: Mapping[str, str] | None = None,
        http_client: httpx.Client | None = None,
    ) -> None:
        """Create a client; it connects at the first request.

        Args:
            base_url: Address of the service; by default DERMIS_BASE_URL from the environment, or
                http://127.0.0.1:3000.
            api_key: API key of the service; by default DERMIS_API_KEY from the environment, or none. "" is none in any case.
            token_provider: In place of an API key, a function that returns an access token. It is called before each
                request, so it should keep the token until shortly before it expires.
            allow_plain_http: Whether credentials may be sent over http:// to another machine; by default
                DERMIS_ALLOW_PLAIN_HTTP from the environment, or no.
            timeout: Seconds that a request may wait for a response.
            max_retries: Further attempts after a broken connection or a busy service, with growing pauses.
            headers: Further headers of every request, for instance for a proxy in front of the service. They are not sent
                after a redirect to another address.
            http_client: Your own httpx.Client, for instance with a proxy. This client does not close it.

        Raises:
            InvalidRequestError: An argument is not valid.
        """
        values = settings(base_url, api_key, token_provider, allow_plain_http, timeout, max_retries, headers)
        self._use(SyncTransport(values, http_client))

    def _use(self, transport: SyncTransport) -> None:
        self._transport = transport
        self.datasets, self.images, self.models = Datasets(transport), Images(transport), Models(transport)
        self.classifications, self.authenticity = Classifications(transport), Authenticity(transport)
        self.edits, self.projections = Edits(transport), Projections(transport)
        self.embeddings = Embeddings(transport)
        self.studies = Studies(transport)
        self.usage, self.webhooks = UsageResource(transport), Webhooks(transport)

    @property
    def base_url(self) -> str:
        """Address of the service, without a trailing slash."""
        return self._transport.settings.base_url

    def with_options(
        self,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        token_provider: Callable[[], str] | None = None,
        allow_plain_http: bool | None = None,
        timeout: float | None = None,
        max_retries: int | None = None,
        headers: Mapping[str, str | None] | None = None,
    ) -> Self:
        """Return a client with other options and the same connections, for instance for one call that takes long.

        An option that is None stays as it is. The connections end with the client that opened them.

        Args:
            base_url: Address of the service. The credentials are sent there too, unless others are given.
            api_key: API key in place of the credentials of this client; "" for none.
            token_provider: A function that returns an access token, in place of the credentials of this client.
            allow_plain_http: Whether credentials may be sent over http:// to another machine.
            timeout: Seconds that a request may wait for a response.
            max_retries: Further attempts after a broken connection or a busy service.
            headers: Headers of every request, in addition to those of this client; a value of None removes one.

        Raises:
            InvalidRequestError: An argument is not valid.
        """
        values = self._transport.settings.changed(
            base_url=base_url,
            api_key=api_key,
            token_provider=token_provider,
            allow_plain_http=allow_plain_http,
            timeout=timeout,
            max_retries=max_retries,
            headers=headers,
        )
        other = object.__new__(type(self))
        other._use(self._transport.with_settings(values))
        return other

    def request(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        params: Mapping[str, str | int] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """Send a request, with the credentials and retries of this client, and return the response as it is.

        It is for routes of a newer service, and for headers of a response, such as those of quotas.

        Args:
            method: HTTP method.
            path: Path from the base URL, such as "/v1/usage".
            json: Body, if any.
            params: Query parameters.
            headers: Further headers. A POST that may have been executed (a broken connection, 500, 502, 504) is repeated only
                with an Idempotency-Key.

        Raises:
            InvalidRequestError: The path does not begin with one slash.
            APIStatusError: The response has an error status.
            APIConnectionError: The service did not respond.
        """
        return self._transport.run(_raw(self._transport.settings, method, path, json, params, headers))

    def _stopped_by(self, stop: threading.Event) -> Self:
        """Return a client with the same connections whose calls, also those that wait for the next attempt, end with `stop`."""
        other = object.__new__(type(self))
        other._use(self._transport.stopped_by(stop))
        return other

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"DermisClient({self._transport.settings!r})"


class AsyncDermisClient:
    """A client of a dermis service for asyncio. Its attributes are those of `DermisClient`; most methods are coroutines.

    Example:
        ```python
        async with AsyncDermisClient("http://127.0.0.1:3000") as client:
            dataset = await client.datasets.create(classes={"malignant": 500, "benign": 500}, seed=7)
            dataset = await dataset.wait(progress=True)
            await dataset.download("lesions")
        ```
    """

    datasets: AsyncDatasets
    images: AsyncImages
    classifications: AsyncClassifications
    authenticity: AsyncAuthenticity
    edits: AsyncEdits
    embeddings: AsyncEmbeddings
    projections: AsyncProjections
    models: AsyncModels
    studies: AsyncStudies
    usage: AsyncUsageResource
    webhooks: AsyncWebhooks

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        token_provider: Callable[[], str | Awaitable[str]] | None = None,
        allow_plain_http: bool | None = None,
        timeout: float = 120.0,
        max_retries: int = 3,
        headers: Mapping[str, str] | None = None,
        http_client: httpx.AsyncClient | None = None,
    ) -> None:
        """Create a client; arguments and errors as for DermisClient. `token_provider` may be a coroutine function."""
        values = settings(base_url, api_key, token_provider, allow_plain_http, timeout, max_retries, headers)
        self._use(AsyncTransport(values, http_client))

    def _use(self, transport: AsyncTransport) -> None:
        self._transport = transport
        self.datasets, self.images, self.models = (
            AsyncDatasets(transport),
            AsyncImages(transport),
            AsyncModels(transport),
        )
        self.classifications, self.authenticity = AsyncClassifications(transport), AsyncAuthenticity(transport)
        self.edits, self.projections = AsyncEdits(transport), AsyncProjections(transport)
        self.embeddings = AsyncEmbeddings(transport)
        self.studies = AsyncStudies(transport)
        self.usage, self.webhooks = AsyncUsageResource(transport), AsyncWebhooks(transport)

    @property
    def base_url(self) -> str:
        """Address of the service, without a trailing slash."""
        return self._transport.settings.base_url

    def with_options(
        self,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        token_provider: Callable[[], str | Awaitable[str]] | None = None,
        allow_plain_http: bool | None = None,
        timeout: float | None = None,
        max_retries: int | None = None,
        headers: Mapping[str, str | None] | None = None,
    ) -> Self:
        """Return a client with other options and the same connections; see DermisClient.with_options."""
        values = self._transport.settings.changed(
            base_url=base_url,
            api_key=api_key,
            token_provider=token_provider,
            allow_plain_http=allow_plain_http,
            timeout=timeout,
            max_retries=max_retries,
            headers=headers,
        )
        other = object.__new__(type(self))
        other._use(self._transport.with_settings(values))
        return other

    async def request(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        params: Mapping[str, str | int] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """Send a request and return the response as it is; see DermisClient.request."""
        return await self._transport.run(_raw(self._transport.settings, method, path, json, params, headers))

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncDermisClient({self._transport.settings!r})"
