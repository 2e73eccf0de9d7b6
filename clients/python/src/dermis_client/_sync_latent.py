"""The blocking client's part for the latent space: authenticity, edits, projections."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

from dermis_client import _latent, _requests, _uploads
from dermis_client._flow import Api
from dermis_client._progress import count_progress, projection_progress
from dermis_client._transport import SyncTransport
from dermis_client._uploads import Source
from dermis_client.latent import AuthenticityResult, Direction, EditsResult, Projection


class Authenticity:
    """client.authenticity"""

    def __init__(self, transport: SyncTransport, api: Api[Any]) -> None:
        self._transport, self._api = transport, api

    def check(
        self,
        files: Source | Sequence[Source],
        *,
        model: str | None = None,
        progress: bool | Callable[[int, int], None] = False,
    ) -> AuthenticityResult:
        """How near images are to the training images of a model: one, or any number, in as many calls as it needs.

        files, progress and errors as for classifications.create(). A service compares uploads only if its operator has
        switched that on (`authenticity["uploads"]` of a model tells); otherwise APIStatusError of kind "uploads-disabled".
        """
        sources = _uploads.sources_of(files)
        with count_progress(progress, "comparing") as report:
            return self._transport.run(_latent.check_files(self._api, sources, model, report))

    def check_generated(
        self,
        classes: Mapping[str, SupportsIndex],
        *,
        seed: SupportsIndex = 0,
        start_index: SupportsIndex | None = None,
        model: str | None = None,
        truncation_psi: float | None = None,
        edits: Sequence[Mapping[str, Any]] | Mapping[str, float] | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> AuthenticityResult:
        """The same of the images that images.generate() gives for these arguments, without fetching them."""
        body = _requests.body(
            classes,
            seed,
            extra_body,
            start_index=start_index,
            model=model,
            truncation_psi=truncation_psi,
            edits=_requests.edit_options(edits),
        )
        return self._transport.run(_latent.check_generated(self._api, body))


class Edits:
    """client.edits"""

    def __init__(self, transport: SyncTransport, api: Api[Any]) -> None:
        self._transport, self._api = transport, api

    def directions(self, model: str | None = None) -> list[Direction]:
        """The directions of a model; default the service's."""
        return self._transport.run(_latent.list_directions(self._api, model))

    def create(
        self,
        *,
        samples: Sequence[tuple[str, int, int]] | None = None,
        projections: Sequence[tuple[str, int]] | None = None,
        edits: Sequence[Mapping[str, Any]] | Mapping[str, float] | None = None,
        sweep: Mapping[str, Any] | None = None,
        model: str | None = None,
        truncation_psi: float | None = None,
        noise_mode: str | None = None,
        image_format: str | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> EditsResult:
        """Images moved along directions.

        samples: [(class, seed, index), ...]; or projections: [(projection id, place of the image), ...]. edits: {"direction":
        strength} or a list of {"direction", "strength", "layers": [first, last]}, strengths in standard deviations. sweep:
        {"direction": name, "strengths": [...]} for each sample at every strength. Other options as for images.generate(),
        but projections have no noise of their own: their noise_mode is "const" (default) or "none".

        Raises UnprocessableEntityError (`.errors` names the field), NotFoundError (model, projection), ConflictError (the
        projection has not ended), TooLargeError, IntegrityError, APIConnectionError.
        """
        body = _requests.edits_body(
            samples,
            projections,
            sweep,
            extra_body,
            edits=_requests.edit_options(edits),
            model=model,
            truncation_psi=truncation_psi,
            noise_mode=noise_mode,
            image_format=image_format,
        )
        return self._transport.run(_latent.edit(self._api, body))


class Projections:
    """client.projections"""

    def __init__(self, transport: SyncTransport, api: Api[Any]) -> None:
        self._transport, self._api = transport, api

    def create(
        self,
        files: Source | Sequence[Source],
        *,
        model: str | None = None,
        schedule: str | None = None,
        steps: SupportsIndex | None = None,
        space: str | None = None,
        start: str | None = None,
        class_name: str | None = None,
        video: bool | None = None,
        idempotency_key: str | None = None,
    ) -> Projection:
        """Ask for the latents whose images come nearest to these; made in the background, for seconds an image.

        files: as for classifications.create(), all in one call. schedule: "fast" or "official". steps, space ("w", "w+") and
        start ("mean", "encoder"): default the schedule's. class_name: of all images; default the likeliest. video: also a GIF
        of each image's way. The service keeps the images until the job has ended, and the results until they are deleted or
        expire; keep the id, for there is no list. Errors as for classifications.create().
        """
        params = _requests.projection(
            model=model,
            schedule=schedule,
            steps=steps,
            space=space,
            start=start,
            video=video,
            **{"class": class_name},
        )
        sources = _uploads.sources_of(files)
        return self._transport.run(_latent.create_projection(self._api, sources, params, idempotency_key))

    def retrieve(self, projection_id: str) -> Projection:
        """The projection as it is now. Raises NotFoundError."""
        return self._transport.run(_latent.retrieve_projection(self._api, projection_id))

    def wait(
        self,
        projection_id: str,
        *,
        progress: bool | Callable[[Projection], None] = False,
        timeout: float | None = None,
        poll_interval: float = 1.0,
        patience: float = 300.0,
    ) -> Projection:
        """Block until a projection has ended and return it, succeeded.

        progress: True for a bar on stderr, or a function called with every new record. Raises ProjectionFailed,
        WaitTimeoutError (it goes on), NotFoundError, APIConnectionError.
        """
        with projection_progress(progress) as report:
            return self._transport.run(
                _latent.wait_for_projection(
                    self._api,
                    projection_id,
                    timeout=timeout,
                    poll_interval=poll_interval,
                    patience=patience,
                    report=report,
                )
            )

    def download(self, projection_id: str, folder: str | os.PathLike[str]) -> list[Path]:
        """Fetch latents (safetensors), images and videos into a folder. Raises ConflictError until it has succeeded."""
        return self._transport.run(_latent.download_projection(self._api, projection_id, Path(folder)))

    def delete(self, projection_id: str) -> None:
        """Remove a projection with all its files, whether or not it has ended. Raises NotFoundError."""
        self._transport.run(_latent.delete_projection(self._api, projection_id))
