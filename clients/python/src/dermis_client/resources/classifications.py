"""client.classifications: classify uploaded images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial

from dermis_client._flow import Flow, Request, call, parse
from dermis_client._progress import count_progress
from dermis_client._raw import async_raw, raw
from dermis_client._requests import finite, max_response_bytes
from dermis_client._transport import AsyncTransport, SyncTransport
from dermis_client._uploads import MAX_FILES, File, Source, form_parts, joined, sources_of, upload, with_names
from dermis_client.errors import APIResponseError, InvalidRequestError
from dermis_client.models import ClassificationsResult, HeatMapMethod

# A heat map takes seconds, so each image has its own request and no request exceeds a time limit.
MAX_HEAT_MAPS = 1

# Flows


def query(model: str | None, threshold: str | float | None, heat_map: HeatMapMethod | None) -> dict[str, str]:
    """Return the query of /v1/classifications.

    Raises:
        InvalidRequestError: The threshold is neither a name nor a number from 0 to 1.
    """
    params: dict[str, str] = {}
    if model is not None:
        params["model"] = model
    if heat_map is not None:
        params["heat_map"] = heat_map
    if isinstance(threshold, str):
        params["threshold"] = threshold
    elif threshold is not None:
        number = finite("threshold", threshold)
        if not 0.0 <= number <= 1.0:
            raise InvalidRequestError(f"threshold: must be from 0 to 1, or a name, not {threshold!r}")
        params["threshold"] = repr(number)
    return params


def classify(
    sources: Sequence[Source], params: dict[str, str], max_retries: int, report: Callable[[int, int], None]
) -> Flow[ClassificationsResult]:
    """POST /v1/classifications, in as many requests as needed; `report` is called with (done, total) after each."""
    max_files = MAX_HEAT_MAPS if "heat_map" in params else MAX_FILES
    results = yield from upload(sources, max_files, partial(_classify_batch, params, max_retries), report)
    return joined(results, "classifier", lambda result: (result.model, result.threshold))


def _classify_batch(params: dict[str, str], max_retries: int, files: Sequence[File]) -> Flow[ClassificationsResult]:
    max_bytes = max_response_bytes(len(files) if "heat_map" in params else 0)
    request = Request("POST", "/v1/classifications", params=params, files=form_parts(files), max_bytes=max_bytes)
    result = with_names(parse((yield from call(request, max_retries)), ClassificationsResult.model_validate), files)
    for item in result.data:
        if item.heat_map is not None:
            item.heat_map.check()
        elif "heat_map" in params:
            raise APIResponseError("the service made no heat map; it is older than this client")
    return result


class RawClassifications:
    """The methods of `Classifications` with the responses of the service; see `RawResponse`."""

    def __init__(self, resource: Classifications) -> None:
        self.create = raw(resource.create)


class Classifications:
    """Classify images: `client.classifications` of a DermisClient."""

    with_raw_response = cached_property(RawClassifications)

    def __init__(self, transport: SyncTransport) -> None:
        self._transport, self._max_retries = transport, transport.settings.max_retries

    def create(
        self,
        files: Source | Iterable[Source],
        *,
        model: str | None = None,
        threshold: str | float | None = None,
        heat_map: HeatMapMethod | None = None,
        progress: bool | Callable[[int, int], None] = False,
    ) -> ClassificationsResult:
        """Classify one or more images, in as many requests as the service needs.

        Args:
            files: One or several paths, bytes or files open for reading: PNG, JPEG or WebP. File names are not sent.
            model: Name of the model; by default the service's.
            threshold: A name in `client.models.retrieve(name).classifier.thresholds`, or a number from 0 to 1; by default
                the classifier's own.
            heat_map: "xrai" or "integrated-gradients" for a picture of the areas that raise and lower the probability of
                the positive class, which takes seconds an image.
            progress: True for a progress bar on stderr, or a function that is called with (done, total).

        Returns:
            A classification for each image, in order.

        Raises:
            UnprocessableEntityError: An image cannot be used; `errors` names `files[i]`, the message names the path.
            UnsupportedMediaTypeError: A file is not an image.
            TooLargeError: An image is too large for the service.
            NotFoundError: The service has no such model.
            InvalidRequestError: A file cannot be read, or an argument cannot be sent.
            APIConnectionError: The service did not respond.
        """
        sources, params = sources_of(files), query(model, threshold, heat_map)
        with count_progress(progress, "classifying") as report:
            return self._transport.run(classify(sources, params, self._max_retries, report))


class AsyncRawClassifications:
    """The methods of `AsyncClassifications` with the responses of the service; see `RawResponse`."""

    def __init__(self, resource: AsyncClassifications) -> None:
        self.create = async_raw(resource.create)


class AsyncClassifications:
    """Classify images: `client.classifications` of an AsyncDermisClient."""

    with_raw_response = cached_property(AsyncRawClassifications)

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport, self._max_retries = transport, transport.settings.max_retries

    async def create(
        self,
        files: Source | Iterable[Source],
        *,
        model: str | None = None,
        threshold: str | float | None = None,
        heat_map: HeatMapMethod | None = None,
        progress: bool | Callable[[int, int], None] = False,
    ) -> ClassificationsResult:
        """Classify one or more images; see `Classifications.create` for arguments and errors."""
        sources, params = sources_of(files), query(model, threshold, heat_map)
        with count_progress(progress, "classifying") as report:
            return await self._transport.run(classify(sources, params, self._max_retries, report))
