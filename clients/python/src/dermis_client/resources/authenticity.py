"""client.authenticity: compare images with the training images of a model."""

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
from dermis_client.latent import AuthenticityResult
from dermis_client.params import EditParams

# Flows


def check_files(
    sources: Sequence[Source], model: str | None, max_retries: int, report: Callable[[int, int], None]
) -> Flow[AuthenticityResult]:
    """POST /v1/authenticity with uploads, in as many requests as needed."""
    params = {} if model is None else {"model": model}
    results = yield from upload(sources, MAX_FILES, partial(_check_batch, params, max_retries), report)
    return joined(results, "index", lambda result: result.model)


def _check_batch(params: dict[str, str], max_retries: int, files: Sequence[File]) -> Flow[AuthenticityResult]:
    request = Request("POST", "/v1/authenticity", params=params, files=form_parts(files))
    result = parse((yield from call(request, max_retries)), AuthenticityResult.model_validate)
    return with_names(result, files)


def check_generated(body: Mapping[str, Any], max_retries: int) -> Flow[AuthenticityResult]:
    """POST /v1/authenticity with the body of /v1/images."""
    response = yield from call(Request("POST", "/v1/authenticity", json=body), max_retries)
    return parse(response, AuthenticityResult.model_validate)


class RawAuthenticity:
    """The methods of `Authenticity` with the responses of the service; see `RawResponse`."""

    def __init__(self, resource: Authenticity) -> None:
        self.check = raw(resource.check)
        self.check_generated = raw(resource.check_generated)


class Authenticity:
    """Compare images with training images: `client.authenticity` of a DermisClient."""

    with_raw_response = cached_property(RawAuthenticity)

    def __init__(self, transport: SyncTransport) -> None:
        self._transport, self._max_retries = transport, transport.settings.max_retries

    def check(
        self,
        files: Source | Iterable[Source],
        *,
        model: str | None = None,
        progress: bool | Callable[[int, int], None] = False,
    ) -> AuthenticityResult:
        """Measure how near images are to the training images of a model, in as many requests as the service needs.

        A service compares uploads only if its operator has enabled that; `client.models.retrieve(name).authenticity`
        shows it in the field "uploads".

        Args:
            files: One or several paths, bytes or files open for reading: PNG, JPEG or WebP. File names are not sent.
            model: Name of the model; by default the service's.
            progress: True for a progress bar on stderr, or a function that is called with (done, total).

        Returns:
            A verdict for each image, in order.

        Raises:
            PermissionDeniedError: The operator has not enabled it (kind "uploads-disabled").
            UnprocessableEntityError: An image cannot be used; `errors` names `files[i]`, the message names the path.
            UnsupportedMediaTypeError: A file is not an image.
            TooLargeError: An image is too large for the service.
            NotFoundError: The service has no such model.
            InvalidRequestError: A file cannot be read.
            APIConnectionError: The service did not respond.
        """
        sources = sources_of(files)
        with count_progress(progress, "comparing") as report:
            return self._transport.run(check_files(sources, model, self._max_retries, report))

    def check_generated(
        self,
        classes: Mapping[str, SupportsIndex],
        *,
        seed: SupportsIndex = 0,
        start_index: SupportsIndex | None = None,
        model: str | None = None,
        truncation_psi: float | None = None,
        edits: Sequence[EditParams] | Mapping[str, float] | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> AuthenticityResult:
        """Measure the same for the images that `Images.generate` returns for these arguments, without fetching them.

        Args:
            classes: Number of images of each class.
            seed: 0 to 2**63 - 1.
            start_index: Index of the first image.
            model: Name of the model; by default the service's.
            truncation_psi: See `Images.generate`.
            edits: Edits of every image; see `Edits.create`.
            extra_body: Further fields, for a newer service.

        Returns:
            A verdict for each image, in order.

        Raises:
            UnprocessableEntityError: A value is not valid; `errors` names the field.
            TooLargeError: More images than the service generates in one call.
            NotFoundError: The service has no such model.
            InvalidRequestError: An argument cannot be sent; nothing was sent.
            APIConnectionError: The service did not respond.
        """
        body = _requests.generation_body(
            classes,
            seed,
            extra_body,
            start_index=start_index,
            model=model,
            truncation_psi=truncation_psi,
            edits=edits,
        )
        return self._transport.run(check_generated(body, self._max_retries))


class AsyncRawAuthenticity:
    """The methods of `AsyncAuthenticity` with the responses of the service; see `RawResponse`."""

    def __init__(self, resource: AsyncAuthenticity) -> None:
        self.check = async_raw(resource.check)
        self.check_generated = async_raw(resource.check_generated)


class AsyncAuthenticity:
    """Compare images with training images: `client.authenticity` of an AsyncDermisClient."""

    with_raw_response = cached_property(AsyncRawAuthenticity)

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport, self._max_retries = transport, transport.settings.max_retries

    async def check(
        self,
        files: Source | Iterable[Source],
        *,
        model: str | None = None,
        progress: bool | Callable[[int, int], None] = False,
    ) -> AuthenticityResult:
        """Measure how near images are to training images; see `Authenticity.check` for arguments and errors."""
        sources = sources_of(files)
        with count_progress(progress, "comparing") as report:
            return await self._transport.run(check_files(sources, model, self._max_retries, report))

    async def check_generated(
        self,
        classes: Mapping[str, SupportsIndex],
        *,
        seed: SupportsIndex = 0,
        start_index: SupportsIndex | None = None,
        model: str | None = None,
        truncation_psi: float | None = None,
        edits: Sequence[EditParams] | Mapping[str, float] | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> AuthenticityResult:
        """Measure the same for generated images; see `Authenticity.check_generated` for arguments and errors."""
        body = _requests.generation_body(
            classes,
            seed,
            extra_body,
            start_index=start_index,
            model=model,
            truncation_psi=truncation_psi,
            edits=edits,
        )
        return await self._transport.run(check_generated(body, self._max_retries))
