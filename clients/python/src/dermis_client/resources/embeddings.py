"""client.embeddings: a map of images beside the training images of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, SupportsIndex

from dermis_client import _requests
from dermis_client._flow import Flow, Request, call, parse
from dermis_client._progress import count_progress
from dermis_client._raw import async_raw, raw
from dermis_client._transport import AsyncTransport, SyncTransport
from dermis_client._uploads import MAX_FILES, File, Source, form_parts, joined, sources_of, upload, with_names
from dermis_client.embeddings import EmbeddingMap, EmbeddingsResult
from dermis_client.models import NoiseMode

_PATH = "/v1/embeddings"

# Flows


def retrieve_map(model: str | None, max_retries: int) -> Flow[EmbeddingMap]:
    """GET /v1/embeddings."""
    params = {} if model is None else {"model": model}
    return parse((yield from call(Request("GET", _PATH, params=params), max_retries)), EmbeddingMap.model_validate)


def place_files(
    sources: Sequence[Source], model: str | None, max_retries: int, report: Callable[[int, int], None]
) -> Flow[EmbeddingsResult]:
    """POST /v1/embeddings with uploads, in as many requests as needed."""
    params = {} if model is None else {"model": model}
    results = yield from upload(sources, MAX_FILES, partial(_place_batch, params, max_retries), report)
    return joined(results, "index", lambda result: result.model)


def _place_batch(params: dict[str, str], max_retries: int, files: Sequence[File]) -> Flow[EmbeddingsResult]:
    request = Request("POST", _PATH, params=params, files=form_parts(files))
    return with_names(parse((yield from call(request, max_retries)), EmbeddingsResult.model_validate), files)


def place_generated(body: Mapping[str, Any], max_retries: int) -> Flow[EmbeddingsResult]:
    """POST /v1/embeddings with the body of /v1/images. The same request gives the same positions."""
    max_bytes = _requests.max_response_bytes(sum(body["classes"].values()))
    response = yield from call(Request("POST", _PATH, json=body, max_bytes=max_bytes), max_retries)
    result = parse(response, EmbeddingsResult.model_validate)
    result.check()
    return result


def place_projections(body: Mapping[str, Any], max_retries: int) -> Flow[EmbeddingsResult]:
    """POST /v1/embeddings/projections."""
    response = yield from call(Request("POST", f"{_PATH}/projections", json=body), max_retries)
    return parse(response, EmbeddingsResult.model_validate)


def _generation(
    classes: Mapping[str, SupportsIndex],
    seed: SupportsIndex,
    images: bool,
    extra: Mapping[str, Any] | None,
    **options: Any,
) -> dict[str, Any]:
    return _requests.generation_body(classes, seed, extra, images=images or None, **options)


def _projections_body(projections: Sequence[str | tuple[str, int]], model: str | None) -> dict[str, Any]:
    named = [(each, 0) if isinstance(each, str) else each for each in projections]
    body: dict[str, Any] = {
        "projections": [
            {"id": _requests.checked_id("projection", identifier), "image": _requests.whole("image", image)}
            for identifier, image in named
        ]
    }
    return body if model is None else body | {"model": model}


class RawEmbeddings:
    """The methods of `Embeddings` with the responses of the service; see `RawResponse`."""

    def __init__(self, resource: Embeddings) -> None:
        self.retrieve = raw(resource.retrieve)
        self.place = raw(resource.place)
        self.place_generated = raw(resource.place_generated)
        self.place_projections = raw(resource.place_projections)


class Embeddings:
    """A map of images: `client.embeddings` of a DermisClient."""

    with_raw_response = cached_property(RawEmbeddings)

    def __init__(self, transport: SyncTransport) -> None:
        self._transport, self._max_retries = transport, transport.settings.max_retries

    def retrieve(self, model: str | None = None) -> EmbeddingMap:
        """Fetch the map of a model: where its training images are, as numbers in cubes.

        Args:
            model: Name of the model; by default the service's.

        Raises:
            UnprocessableEntityError: The model has no index of its training images.
            NotFoundError: The service has no such model.
            APIConnectionError: The service did not respond.
        """
        return self._transport.run(retrieve_map(model, self._max_retries))

    def place(
        self,
        files: Source | Iterable[Source],
        *,
        model: str | None = None,
        progress: bool | Callable[[int, int], None] = False,
    ) -> EmbeddingsResult:
        """Place images on the map, in as many requests as the service needs.

        A service does so only if its operator has enabled uploads; `retrieve(model).uploads` shows it.

        Args:
            files: One or several paths, bytes or files open for reading: PNG, JPEG or WebP. File names are not sent.
            model: Name of the model; by default the service's.
            progress: True for a progress bar on stderr, or a function that is called with (done, total).

        Returns:
            The position of each image, in order.

        Raises:
            PermissionDeniedError: The operator has not enabled it (kind "uploads-disabled").
            UnprocessableEntityError: An image cannot be used, or the model has no index.
            UnsupportedMediaTypeError: A file is not an image.
            TooLargeError: An image is too large for the service.
            NotFoundError: The service has no such model.
            InvalidRequestError: A file cannot be read.
            APIConnectionError: The service did not respond.
        """
        sources = sources_of(files)
        with count_progress(progress, "placing") as report:
            return self._transport.run(place_files(sources, model, self._max_retries, report))

    def place_generated(
        self,
        classes: Mapping[str, SupportsIndex],
        *,
        seed: SupportsIndex = 0,
        start_index: SupportsIndex | None = None,
        model: str | None = None,
        truncation_psi: float | None = None,
        noise_mode: NoiseMode | None = None,
        images: bool = False,
        extra_body: Mapping[str, Any] | None = None,
    ) -> EmbeddingsResult:
        """Place the images that `Images.generate` returns for these arguments, and compare them with the training images.

        Args:
            classes: Number of images of each class.
            seed: 0 to 2**63 - 1.
            start_index: Index of the first image.
            model: Name of the model; by default the service's.
            truncation_psi: See `Images.generate`.
            noise_mode: See `Images.generate`.
            images: Whether to fetch the images too.
            extra_body: Further fields, for a newer service.

        Returns:
            The position and verdict of each image, in order.

        Raises:
            UnprocessableEntityError: A value is not valid, or the model has no index.
            TooLargeError: More images than the service generates in one call.
            NotFoundError: The service has no such model.
            InvalidRequestError: An argument cannot be sent; nothing was sent.
            APIConnectionError: The service did not respond.
        """
        body = _generation(
            classes,
            seed,
            images,
            extra_body,
            start_index=start_index,
            model=model,
            truncation_psi=truncation_psi,
            noise_mode=noise_mode,
        )
        return self._transport.run(place_generated(body, self._max_retries))

    def place_projections(
        self, projections: Sequence[str | tuple[str, int]], *, model: str | None = None
    ) -> EmbeddingsResult:
        """Place the reconstructions of finished projections.

        Args:
            projections: Ids of projections, or pairs of id and position of an image in it.
            model: Name of the model of the projections; by default the service's.

        Returns:
            The position of each reconstruction, in order.

        Raises:
            NotFoundError: There is no such projection.
            ConflictError: A projection has not succeeded.
            UnprocessableEntityError: A projection is of another model, or the model has no index.
            APIConnectionError: The service did not respond.
        """
        return self._transport.run(place_projections(_projections_body(projections, model), self._max_retries))


class AsyncRawEmbeddings:
    """The methods of `AsyncEmbeddings` with the responses of the service; see `RawResponse`."""

    def __init__(self, resource: AsyncEmbeddings) -> None:
        self.retrieve = async_raw(resource.retrieve)
        self.place = async_raw(resource.place)
        self.place_generated = async_raw(resource.place_generated)
        self.place_projections = async_raw(resource.place_projections)


class AsyncEmbeddings:
    """A map of images: `client.embeddings` of an AsyncDermisClient."""

    with_raw_response = cached_property(AsyncRawEmbeddings)

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport, self._max_retries = transport, transport.settings.max_retries

    async def retrieve(self, model: str | None = None) -> EmbeddingMap:
        """Fetch the map of a model; see `Embeddings.retrieve` for arguments and errors."""
        return await self._transport.run(retrieve_map(model, self._max_retries))

    async def place(
        self,
        files: Source | Iterable[Source],
        *,
        model: str | None = None,
        progress: bool | Callable[[int, int], None] = False,
    ) -> EmbeddingsResult:
        """Place images on the map; see `Embeddings.place` for arguments and errors."""
        sources = sources_of(files)
        with count_progress(progress, "placing") as report:
            return await self._transport.run(place_files(sources, model, self._max_retries, report))

    async def place_generated(
        self,
        classes: Mapping[str, SupportsIndex],
        *,
        seed: SupportsIndex = 0,
        start_index: SupportsIndex | None = None,
        model: str | None = None,
        truncation_psi: float | None = None,
        noise_mode: NoiseMode | None = None,
        images: bool = False,
        extra_body: Mapping[str, Any] | None = None,
    ) -> EmbeddingsResult:
        """Place generated images and compare them; see `Embeddings.place_generated` for arguments and errors."""
        body = _generation(
            classes,
            seed,
            images,
            extra_body,
            start_index=start_index,
            model=model,
            truncation_psi=truncation_psi,
            noise_mode=noise_mode,
        )
        return await self._transport.run(place_generated(body, self._max_retries))

    async def place_projections(
        self, projections: Sequence[str | tuple[str, int]], *, model: str | None = None
    ) -> EmbeddingsResult:
        """Place reconstructions of projections; see `Embeddings.place_projections` for arguments and errors."""
        return await self._transport.run(place_projections(_projections_body(projections, model), self._max_retries))
