"""client.projections: find the latents of uploaded images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, SupportsIndex

from PIL import Image

from dermis_client._files import write_atomically
from dermis_client._flow import Flow, Request, call, compute, delete, parse
from dermis_client._progress import projection_progress
from dermis_client._raw import async_raw, raw
from dermis_client._requests import idempotency_header, job_path, whole
from dermis_client._status import describe
from dermis_client._transport import AsyncTransport, SyncTransport
from dermis_client._uploads import Source, form_parts, read_file, sources_of, with_file_names
from dermis_client._waiting import STATUS_TIMEOUT, wait_until_finished
from dermis_client.errors import APIResponseError, APIStatusError, ProjectionFailed, WaitTimeoutError
from dermis_client.images import decode
from dermis_client.latent import Projection
from dermis_client.params import ProjectionSchedule, ProjectionSpace, ProjectionStart

MAX_FILE_BYTES = 256 << 20  # maximum size of one file of a projection: latents, an image or a video
_SUFFIXES = {"latents": "safetensors", "image": "png", "video": "gif"}

# Flows


def query(**options: Any) -> dict[str, str]:
    """Return the query of /v1/projections; options that are None are left out.

    Raises:
        InvalidRequestError: `steps` is not a whole number.
    """
    params: dict[str, str] = {}
    for name, value in options.items():
        if value is None:
            continue
        if name == "steps":
            params[name] = str(whole(name, value))
        elif name == "video":
            params[name] = "true" if value else "false"
        else:
            params[name] = str(value)
    return params


def create_projection(
    sources: Sequence[Source], params: Mapping[str, str], idempotency_key: str | None, max_retries: int
) -> Flow[Projection]:
    """POST /v1/projections, all images in one request."""
    files = []
    for position, source in enumerate(sources):
        files.append((yield from read_file(position, source)))
    headers = idempotency_header(idempotency_key)
    request = Request("POST", "/v1/projections", params=params, headers=headers, files=form_parts(files))
    try:
        response = yield from call(request, max_retries)
    except APIStatusError as error:
        raise with_file_names(error, files) from error
    return parse(response, Projection.model_validate)


def retrieve_projection(projection_id: str, max_retries: int) -> Flow[Projection]:
    """GET /v1/projections/{id}."""
    response = yield from call(Request("GET", job_path("projection", projection_id)), max_retries)
    return parse(response, Projection.model_validate)


def preview_projection(projection_id: str, image: SupportsIndex, max_retries: int) -> Flow[bytes]:
    """GET the current image of a running projection."""
    name = f"preview-{whole('image', image):05d}.png"
    path = job_path("projection", projection_id, "files", name)
    return (yield from call(Request("GET", path, max_bytes=MAX_FILE_BYTES), max_retries)).content


def delete_projection(projection_id: str, max_retries: int) -> Flow[None]:
    """DELETE /v1/projections/{id}."""
    yield from delete(Request("DELETE", job_path("projection", projection_id)), max_retries)


def wait_for_projection(
    projection_id: str,
    *,
    timeout: float | None,
    poll_interval: float,
    patience: float,
    report: Callable[[Projection], None],
) -> Flow[Projection]:
    """Wait until the projection has finished, with status requests; see `_waiting` for the arguments."""
    request = Request("GET", job_path("projection", projection_id), read_timeout=STATUS_TIMEOUT)

    def poll() -> Flow[Projection]:
        return parse((yield from call(request, 0)), Projection.model_validate)

    def timeout_error(_: Projection | None) -> WaitTimeoutError:
        return WaitTimeoutError(f"{projection_id} continues after {timeout:g} s of waiting: wait for it again", None)

    projection = yield from wait_until_finished(
        poll,
        timeout=timeout,
        poll_interval=poll_interval,
        patience=patience,
        report=report,
        timeout_error=timeout_error,
    )
    if projection.state == "failed":
        reason = describe(projection.error) if projection.error else "the service stated no reason"
        raise ProjectionFailed(f"{projection_id} failed: {reason}", projection)
    return projection


def download_projection(projection_id: str, folder: Path, max_retries: int) -> Flow[list[Path]]:
    """Write all files of a projection into a folder, as 0000.safetensors, 0000.png and so on."""
    projection = yield from retrieve_projection(projection_id, max_retries)
    if projection.data is None:
        # Request a file for the service's own error message, for instance that the projection is still running.
        request = Request("GET", job_path("projection", projection_id, "files", "00000.safetensors"))
        yield from call(request, max_retries)
        raise APIResponseError(f"{projection_id} lists no results; is the service older than this client?")
    if [image.index for image in projection.data] != list(range(len(projection.data))):
        raise APIResponseError(f"{projection_id} lists its images out of order; is the service broken?")
    written: list[Path] = []
    for image in projection.data:
        for kind, path in sorted(image.files.items()):
            name = path.rpartition("/")[2]
            source = job_path("projection", projection_id, "files", name)
            content = (yield from call(Request("GET", source, max_bytes=MAX_FILE_BYTES), max_retries)).content
            target = folder / f"{image.index:04d}.{_SUFFIXES.get(kind, 'bin')}"
            yield from compute(partial(write_atomically, target, content))
            written.append(target)
    return written


class RawProjections:
    """The methods of `Projections` with the responses of the service; see `RawResponse`."""

    def __init__(self, resource: Projections) -> None:
        self.create = raw(resource.create)
        self.retrieve = raw(resource.retrieve)
        self.preview = raw(resource.preview)
        self.delete = raw(resource.delete)


class Projections:
    """Find the latents of images: `client.projections` of a DermisClient."""

    with_raw_response = cached_property(RawProjections)

    def __init__(self, transport: SyncTransport) -> None:
        self._transport, self._max_retries = transport, transport.settings.max_retries

    def create(
        self,
        files: Source | Iterable[Source],
        *,
        model: str | None = None,
        schedule: ProjectionSchedule | None = None,
        steps: SupportsIndex | None = None,
        space: ProjectionSpace | None = None,
        start: ProjectionStart | None = None,
        class_name: str | None = None,
        video: bool | None = None,
        idempotency_key: str | None = None,
    ) -> Projection:
        """Start a job that finds the latents whose images are nearest to these; it takes seconds an image.

        The service keeps the uploaded images until the job has finished, and the results until they are deleted or
        expire. There is no list of projections: keep the id.

        Args:
            files: One or several paths, bytes or files open for reading: PNG, JPEG or WebP, all sent in one request.
            model: Name of the model; by default the service's.
            schedule: "fast" or "official".
            steps: Optimisation steps; by default the schedule's.
            space: "w" or "w+"; by default the schedule's.
            start: "mean" or "encoder"; by default the schedule's.
            class_name: Class of all images; by default, for each image the class whose mean image is nearest.
            video: Whether to make a GIF of the optimisation of each image.
            idempotency_key: A request with the same key does not start a second job; by default a new key.

        Returns:
            The projection, in state "queued".

        Raises:
            UnprocessableEntityError: An image or a value is not valid; `errors` names the field.
            UnsupportedMediaTypeError: A file is not an image.
            TooLargeError: More or larger images than the service accepts.
            NotFoundError: The service has no such model.
            InvalidRequestError: A file cannot be read, or an argument cannot be sent.
            APIConnectionError: The service did not respond.
        """
        params = query(
            model=model,
            schedule=schedule,
            steps=steps,
            space=space,
            start=start,
            video=video,
            **{"class": class_name},
        )
        sources = sources_of(files)
        return self._transport.run(create_projection(sources, params, idempotency_key, self._max_retries))

    def retrieve(self, projection_id: str) -> Projection:
        """Retrieve the current record of a projection.

        Args:
            projection_id: Id of the projection.

        Returns:
            The record.

        Raises:
            NotFoundError: The service has no such projection.
            InvalidRequestError: The id is not valid.
            APIConnectionError: The service did not respond.
        """
        return self._transport.run(retrieve_projection(projection_id, self._max_retries))

    def wait(
        self,
        projection_id: str,
        *,
        progress: bool | Callable[[Projection], None] = False,
        timeout: float | None = None,
        poll_interval: float = 1.0,
        patience: float = 300.0,
    ) -> Projection:
        """Wait until a projection has succeeded.

        Args:
            projection_id: Id of the projection.
            progress: True for a progress bar on stderr, or a function that is called with every record.
            timeout: Seconds for the whole wait; None for no limit.
            poll_interval: Seconds between status requests.
            patience: Seconds without any response before giving up; a shorter restart of the service is tolerated.

        Returns:
            The record of the projection, which has succeeded.

        Raises:
            ProjectionFailed: The projection failed.
            WaitTimeoutError: The timeout expired; the projection continues.
            NotFoundError: The service has no such projection.
            APIConnectionError: No response within `patience`.
        """
        with projection_progress(progress) as report:
            return self._transport.run(
                wait_for_projection(
                    projection_id, timeout=timeout, poll_interval=poll_interval, patience=patience, report=report
                )
            )

    def preview(self, projection_id: str, image: SupportsIndex = 0) -> Image.Image:
        """Fetch how an image of a running projection looks at the moment.

        Args:
            projection_id: Id of the projection.
            image: Position of the image in the request. `previews` of the record lists those that there are.

        Returns:
            The current image of the generator, at most 256 px large.

        Raises:
            NotFoundError: The service has no such projection, or no such preview at the moment.
            IntegrityError: The image cannot be decoded.
            APIConnectionError: The service did not respond.
        """
        return decode(self._transport.run(preview_projection(projection_id, image, self._max_retries)), "preview")

    def download(self, projection_id: str, folder: str | os.PathLike[str]) -> list[Path]:
        """Download latents (safetensors), images and videos.

        Args:
            projection_id: Id of the projection.
            folder: The target folder.

        Returns:
            The paths of the files: 0000.safetensors, 0000.png and so on.

        Raises:
            ConflictError: The projection has not succeeded.
            NotFoundError: The service has no such projection.
            DownloadError: A file cannot be written.
        """
        return self._transport.run(download_projection(projection_id, Path(folder), self._max_retries))

    def delete(self, projection_id: str) -> None:
        """Delete a projection with all its files, whether or not it has finished.

        Args:
            projection_id: Id of the projection.

        Raises:
            NotFoundError: The service has no such projection.
            APIConnectionError: The service did not respond.
        """
        self._transport.run(delete_projection(projection_id, self._max_retries))


class AsyncRawProjections:
    """The methods of `AsyncProjections` with the responses of the service; see `RawResponse`."""

    def __init__(self, resource: AsyncProjections) -> None:
        self.create = async_raw(resource.create)
        self.retrieve = async_raw(resource.retrieve)
        self.preview = async_raw(resource.preview)
        self.delete = async_raw(resource.delete)


class AsyncProjections:
    """Find the latents of images: `client.projections` of an AsyncDermisClient."""

    with_raw_response = cached_property(AsyncRawProjections)

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport, self._max_retries = transport, transport.settings.max_retries

    async def create(
        self,
        files: Source | Iterable[Source],
        *,
        model: str | None = None,
        schedule: ProjectionSchedule | None = None,
        steps: SupportsIndex | None = None,
        space: ProjectionSpace | None = None,
        start: ProjectionStart | None = None,
        class_name: str | None = None,
        video: bool | None = None,
        idempotency_key: str | None = None,
    ) -> Projection:
        """Start a projection; see `Projections.create` for arguments and errors."""
        params = query(
            model=model,
            schedule=schedule,
            steps=steps,
            space=space,
            start=start,
            video=video,
            **{"class": class_name},
        )
        sources = sources_of(files)
        return await self._transport.run(create_projection(sources, params, idempotency_key, self._max_retries))

    async def retrieve(self, projection_id: str) -> Projection:
        """Retrieve the current record of a projection; see `Projections.retrieve`."""
        return await self._transport.run(retrieve_projection(projection_id, self._max_retries))

    async def wait(
        self,
        projection_id: str,
        *,
        progress: bool | Callable[[Projection], None] = False,
        timeout: float | None = None,
        poll_interval: float = 1.0,
        patience: float = 300.0,
    ) -> Projection:
        """Wait until a projection has succeeded; see `Projections.wait` for arguments and errors."""
        with projection_progress(progress) as report:
            return await self._transport.run(
                wait_for_projection(
                    projection_id, timeout=timeout, poll_interval=poll_interval, patience=patience, report=report
                )
            )

    async def preview(self, projection_id: str, image: SupportsIndex = 0) -> Image.Image:
        """Fetch how an image of a running projection looks at the moment; see `Projections.preview`."""
        content = await self._transport.run(preview_projection(projection_id, image, self._max_retries))
        return decode(content, "preview")

    async def download(self, projection_id: str, folder: str | os.PathLike[str]) -> list[Path]:
        """Download latents, images and videos; see `Projections.download`."""
        return await self._transport.run(download_projection(projection_id, Path(folder), self._max_retries))

    async def delete(self, projection_id: str) -> None:
        """Delete a projection with all its files; see `Projections.delete`."""
        await self._transport.run(delete_projection(projection_id, self._max_retries))
