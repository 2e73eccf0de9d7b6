"""client.edits: edit images along directions of the latent space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

from dermis_client._flow import Flow, Request, call, parse
from dermis_client._raw import async_raw, raw
from dermis_client._requests import finite, max_response_bytes, optional_fields, whole
from dermis_client._transport import AsyncTransport, SyncTransport
from dermis_client.errors import InvalidRequestError
from dermis_client.latent import Direction, EditsResult
from dermis_client.models import ImageFormat, NoiseMode, ResponseRecord
from dermis_client.params import EditParams, ProvenanceParams, SweepParams

_DEFAULT_COUNT = 8  # images of the service, if the request names no number


class _Directions(ResponseRecord):
    data: list[Direction]


# Flows


def list_directions(model: str | None, max_retries: int) -> Flow[list[Direction]]:
    """GET /v1/directions."""
    params = {} if model is None else {"model": model}
    response = yield from call(Request("GET", "/v1/directions", params=params), max_retries)
    return parse(response, _Directions.model_validate).data


def create_edits(body: Mapping[str, Any], max_retries: int) -> Flow[EditsResult]:
    """POST /v1/edits. The same request gives the same images, so it may be repeated after any failure."""
    strengths = len((body.get("sweep") or {}).get("strengths", ())) or 1
    max_bytes = max_response_bytes(len(body.get("samples") or body.get("projections") or ()) * strengths)
    response = yield from call(Request("POST", "/v1/edits", json=body, max_bytes=max_bytes), max_retries)
    result = parse(response, EditsResult.model_validate)
    for image in result.data:
        image.check()
    return result


def create_latent_images(
    kind: Literal["interpolations", "neighbours"], body: Mapping[str, Any], count: int | None, max_retries: int
) -> Flow[EditsResult]:
    """POST /v1/edits/interpolations or /v1/edits/neighbours. The same request gives the same images."""
    max_bytes = max_response_bytes(count or _DEFAULT_COUNT)
    response = yield from call(Request("POST", f"/v1/edits/{kind}", json=body, max_bytes=max_bytes), max_retries)
    result = parse(response, EditsResult.model_validate)
    for image in result.data:
        image.check()
    return result


def latent_images_body(
    samples: Mapping[str, tuple[str, int, int]],
    counts: Mapping[str, int | None],
    extra_body: Mapping[str, Any] | None,
    **options: Any,
) -> dict[str, Any]:
    """Return the body of /v1/edits/interpolations or /v1/edits/neighbours; options that are None are left out.

    Raises:
        InvalidRequestError: A number is not valid.
    """
    result: dict[str, Any] = {field: _sample(field, *sample) for field, sample in samples.items()}
    result |= {field: whole(field, count) for field, count in counts.items() if count is not None}
    return result | optional_fields(extra_body, **options)


def edits_body(
    samples: Sequence[tuple[str, int, int]] | None,
    projections: Sequence[tuple[str, int]] | None,
    sweep: SweepParams | None,
    extra_body: Mapping[str, Any] | None,
    **options: Any,
) -> dict[str, Any]:
    """Return the body of /v1/edits; options that are None are left out.

    Raises:
        InvalidRequestError: There are neither samples nor projections, or both, or a number is not valid.
    """
    if bool(samples) == bool(projections):
        raise InvalidRequestError("give samples=[(class, seed, index), ...] or projections=[(id, image), ...]")
    result: dict[str, Any] = {}
    if samples:
        result["samples"] = [_sample("samples", *sample) for sample in samples]
    if projections:
        result["projections"] = [
            {"id": name, "image": whole("projections.image", image)} for name, image in projections
        ]
    if sweep is not None:
        strengths = [finite("sweep.strengths", strength) for strength in sweep.get("strengths", ())]
        result["sweep"] = {**sweep, "strengths": strengths}
    return result | optional_fields(extra_body, **options)


def _sample(field: str, name: str, seed: int, index: int) -> dict[str, Any]:
    return {"class": str(name), "seed": whole(f"{field}.seed", seed), "index": whole(f"{field}.index", index)}


class RawEdits:
    """The methods of `Edits` with the responses of the service; see `RawResponse`."""

    def __init__(self, resource: Edits) -> None:
        self.directions = raw(resource.directions)
        self.create = raw(resource.create)
        self.interpolate = raw(resource.interpolate)
        self.neighbours = raw(resource.neighbours)


class Edits:
    """Edit images along directions: `client.edits` of a DermisClient."""

    with_raw_response = cached_property(RawEdits)

    def __init__(self, transport: SyncTransport) -> None:
        self._transport, self._max_retries = transport, transport.settings.max_retries

    def directions(self, model: str | None = None) -> list[Direction]:
        """List the directions of a model.

        Args:
            model: Name of the model; by default the service's.

        Returns:
            The directions, in the order of the bundle.

        Raises:
            NotFoundError: The service has no such model.
            APIConnectionError: The service did not respond.
        """
        return self._transport.run(list_directions(model, self._max_retries))

    def create(
        self,
        *,
        samples: Sequence[tuple[str, int, int]] | None = None,
        projections: Sequence[tuple[str, int]] | None = None,
        edits: Sequence[EditParams] | Mapping[str, float] | None = None,
        sweep: SweepParams | None = None,
        model: str | None = None,
        truncation_psi: float | None = None,
        noise_mode: NoiseMode | None = None,
        image_format: ImageFormat | None = None,
        provenance: ProvenanceParams | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> EditsResult:
        """Generate images whose latents are edited along directions. Give either samples or projections.

        Args:
            samples: (class, seed, index) of each sample.
            projections: (id of the projection, position of the image in it) of each image.
            edits: {"direction": strength}, or a list of {"direction": name, "strength": number, "layers": [first, last]}.
                Strengths are in standard deviations.
            sweep: {"direction": name, "strengths": [...]}: each sample at every strength.
            model: Name of the model; by default the service's.
            truncation_psi: See `Images.generate`.
            noise_mode: See `Images.generate`. Projections have no noise of their own: "const" (default) or "none".
            image_format: See `Images.generate`.
            provenance: See `Images.generate`.
            extra_body: Further fields, for a newer service.

        Returns:
            The images, by sample and then by strength.

        Raises:
            UnprocessableEntityError: A value is not valid; `errors` names the field.
            NotFoundError: The service has no such model or projection.
            ConflictError: The projection has not finished.
            TooLargeError: More images than the service generates in one call.
            IntegrityError: An image does not have the SHA-256 that the service sent.
            InvalidRequestError: An argument cannot be sent; nothing was sent.
            APIConnectionError: The service did not respond.
        """
        body = edits_body(
            samples,
            projections,
            sweep,
            extra_body,
            edits=edits,
            model=model,
            truncation_psi=truncation_psi,
            noise_mode=noise_mode,
            image_format=image_format,
            provenance=provenance,
        )
        return self._transport.run(create_edits(body, self._max_retries))

    def interpolate(
        self,
        start: tuple[str, int, int],
        end: tuple[str, int, int],
        *,
        images: int | None = None,
        model: str | None = None,
        truncation_psi: float | None = None,
        noise_mode: NoiseMode | None = None,
        image_format: ImageFormat | None = None,
        provenance: ProvenanceParams | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> EditsResult:
        """Generate images on the straight line in w between two samples.

        Args:
            start: (class, seed, index) of the first image.
            end: That of the last one.
            images: Number of images; by default 8.
            model: Name of the model; by default the service's.
            truncation_psi: See `Images.generate`.
            noise_mode: "random" (default): all images have the noise of `start`. See `Images.generate` for the others.
            image_format: See `Images.generate`.
            provenance: See `Images.generate`.
            extra_body: Further fields, for a newer service.

        Returns:
            The images. `strength` is the place of each one, from 0 to 1.

        Raises:
            UnprocessableEntityError: A value is not valid; `errors` names the field.
            NotFoundError: The service has no such model.
            TooLargeError: More images than the service generates in one call.
            IntegrityError: An image does not have the SHA-256 that the service sent.
            InvalidRequestError: An argument cannot be sent; nothing was sent.
            APIConnectionError: The service did not respond.
        """
        body = latent_images_body(
            {"start": start, "end": end},
            {"images": images},
            extra_body,
            model=model,
            truncation_psi=truncation_psi,
            noise_mode=noise_mode,
            image_format=image_format,
            provenance=provenance,
        )
        return self._transport.run(create_latent_images("interpolations", body, images, self._max_retries))

    def neighbours(
        self,
        sample: tuple[str, int, int],
        *,
        count: int | None = None,
        distance: float | None = None,
        model: str | None = None,
        truncation_psi: float | None = None,
        noise_mode: NoiseMode | None = None,
        image_format: ImageFormat | None = None,
        provenance: ProvenanceParams | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> EditsResult:
        """Generate images in the neighbourhood of a sample in w. Neighbour i is always the same image.

        Args:
            sample: (class, seed, index) of the sample.
            count: Number of neighbours; by default 8.
            distance: Their distance in w, as a share of the distance of the sample from the mean; by default 0.3.
            model: Name of the model; by default the service's.
            truncation_psi: See `Images.generate`.
            noise_mode: "random" (default): all neighbours have the noise of the sample. See `Images.generate` for the others.
            image_format: See `Images.generate`.
            provenance: See `Images.generate`.
            extra_body: Further fields, for a newer service.

        Returns:
            The images. `sample` is the number of each neighbour.

        Raises:
            UnprocessableEntityError: A value is not valid; `errors` names the field.
            NotFoundError: The service has no such model.
            TooLargeError: More images than the service generates in one call.
            IntegrityError: An image does not have the SHA-256 that the service sent.
            InvalidRequestError: An argument cannot be sent; nothing was sent.
            APIConnectionError: The service did not respond.
        """
        body = latent_images_body(
            {"sample": sample},
            {"count": count},
            extra_body,
            distance=distance,
            model=model,
            truncation_psi=truncation_psi,
            noise_mode=noise_mode,
            image_format=image_format,
            provenance=provenance,
        )
        return self._transport.run(create_latent_images("neighbours", body, count, self._max_retries))


class AsyncRawEdits:
    """The methods of `AsyncEdits` with the responses of the service; see `RawResponse`."""

    def __init__(self, resource: AsyncEdits) -> None:
        self.directions = async_raw(resource.directions)
        self.create = async_raw(resource.create)
        self.interpolate = async_raw(resource.interpolate)
        self.neighbours = async_raw(resource.neighbours)


class AsyncEdits:
    """Edit images along directions: `client.edits` of an AsyncDermisClient."""

    with_raw_response = cached_property(AsyncRawEdits)

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport, self._max_retries = transport, transport.settings.max_retries

    async def directions(self, model: str | None = None) -> list[Direction]:
        """List the directions of a model; see `Edits.directions`."""
        return await self._transport.run(list_directions(model, self._max_retries))

    async def create(
        self,
        *,
        samples: Sequence[tuple[str, int, int]] | None = None,
        projections: Sequence[tuple[str, int]] | None = None,
        edits: Sequence[EditParams] | Mapping[str, float] | None = None,
        sweep: SweepParams | None = None,
        model: str | None = None,
        truncation_psi: float | None = None,
        noise_mode: NoiseMode | None = None,
        image_format: ImageFormat | None = None,
        provenance: ProvenanceParams | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> EditsResult:
        """Generate edited images; see `Edits.create` for arguments and errors."""
        body = edits_body(
            samples,
            projections,
            sweep,
            extra_body,
            edits=edits,
            model=model,
            truncation_psi=truncation_psi,
            noise_mode=noise_mode,
            image_format=image_format,
            provenance=provenance,
        )
        return await self._transport.run(create_edits(body, self._max_retries))

    async def interpolate(
        self,
        start: tuple[str, int, int],
        end: tuple[str, int, int],
        *,
        images: int | None = None,
        model: str | None = None,
        truncation_psi: float | None = None,
        noise_mode: NoiseMode | None = None,
        image_format: ImageFormat | None = None,
        provenance: ProvenanceParams | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> EditsResult:
        """Generate images between two samples; see `Edits.interpolate` for arguments and errors."""
        body = latent_images_body(
            {"start": start, "end": end},
            {"images": images},
            extra_body,
            model=model,
            truncation_psi=truncation_psi,
            noise_mode=noise_mode,
            image_format=image_format,
            provenance=provenance,
        )
        return await self._transport.run(create_latent_images("interpolations", body, images, self._max_retries))

    async def neighbours(
        self,
        sample: tuple[str, int, int],
        *,
        count: int | None = None,
        distance: float | None = None,
        model: str | None = None,
        truncation_psi: float | None = None,
        noise_mode: NoiseMode | None = None,
        image_format: ImageFormat | None = None,
        provenance: ProvenanceParams | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> EditsResult:
        """Generate neighbours of a sample; see `Edits.neighbours` for arguments and errors."""
        body = latent_images_body(
            {"sample": sample},
            {"count": count},
            extra_body,
            distance=distance,
            model=model,
            truncation_psi=truncation_psi,
            noise_mode=noise_mode,
            image_format=image_format,
            provenance=provenance,
        )
        return await self._transport.run(create_latent_images("neighbours", body, count, self._max_retries))
