"""client.images: a few images in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, SupportsIndex

import httpx

from dermis_client import _requests
from dermis_client._flow import Flow, Request, call, compute, parse
from dermis_client._raw import async_raw, raw
from dermis_client._transport import AsyncTransport, SyncTransport
from dermis_client._untrusted import one_line, without_query
from dermis_client.errors import APIResponseError
from dermis_client.images import ImagesResult
from dermis_client.models import ImageFormat, NoiseMode
from dermis_client.params import EditParams, GateParams, ProvenanceParams
from dermis_client.pixels import MEDIA_TYPE, PixelsResult, pixels_of, read_pixels

# Flows


def generate(body: Mapping[str, Any], max_retries: int) -> Flow[ImagesResult]:
    """POST /v1/images. The same request gives the same images, so it may be repeated after any failure."""
    response = yield from call(_request(body), max_retries)
    return _images(response)


def generate_pixels(body: Mapping[str, Any], max_retries: int) -> Flow[PixelsResult]:
    """POST /v1/images, for pixels. A service that does not send any sends image files, which are decoded here."""
    response = yield from call(_request(body, f"{MEDIA_TYPE}, application/json;q=0.5"), max_retries)

    def read() -> PixelsResult:
        media_type = response.headers.get("Content-Type", "").split(";")[0].strip().lower()
        try:
            return read_pixels(response.content) if media_type == MEDIA_TYPE else pixels_of(_images(response))
        except ValueError as error:
            raise APIResponseError(
                f"{without_query(response.url)} sent images that this client does not understand ({one_line(str(error))}); "
                "check base_url"
            ) from error

    result = yield from compute(read)
    return result


def _request(body: Mapping[str, Any], accept: str | None = None) -> Request:
    max_bytes = _requests.max_response_bytes(sum(body["classes"].values()))
    headers = {} if accept is None else {"Accept": accept}
    return Request("POST", "/v1/images", headers=headers, json=body, max_bytes=max_bytes)


def _images(response: httpx.Response) -> ImagesResult:
    result = parse(response, ImagesResult.model_validate)
    for image in result.data:
        image.check()
    return result


class RawImages:
    """The methods of `Images` with the responses of the service; see `RawResponse`."""

    def __init__(self, resource: Images) -> None:
        self.generate = raw(resource.generate)
        self.generate_pixels = raw(resource.generate_pixels)


class Images:
    """Generate a few images: `client.images` of a DermisClient."""

    with_raw_response = cached_property(RawImages)

    def __init__(self, transport: SyncTransport) -> None:
        self._transport, self._max_retries = transport, transport.settings.max_retries

    def generate(
        self,
        classes: Mapping[str, SupportsIndex],
        *,
        seed: SupportsIndex = 0,
        start_index: SupportsIndex | None = None,
        model: str | None = None,
        truncation_psi: float | None = None,
        truncation_cutoff: SupportsIndex | None = None,
        noise_mode: NoiseMode | None = None,
        image_format: ImageFormat | None = None,
        image_quality: SupportsIndex | None = None,
        edits: Sequence[EditParams] | Mapping[str, float] | None = None,
        provenance: ProvenanceParams | None = None,
        privacy: GateParams | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> ImagesResult:
        """Generate a few images, class by class.

        Image i has the latent and the noise of (seed, start_index + i). An option that is None takes the service's
        default.

        Args:
            classes: Number of images of each class, such as {"malignant": 4, "benign": 4}.
            seed: 0 to 2**63 - 1. The same request gives the same images.
            start_index: Index of the first image.
            model: Name of the model.
            truncation_psi: 0 to 2. Lower values give more typical and less varied images.
            truncation_cutoff: Number of layers that truncation applies to.
            noise_mode: "random" (each image has its own noise), "const" (all have the same) or "none".
            image_format: "png", "jpeg" or "webp".
            image_quality: 1 to 100, for "jpeg" and "webp".
            edits: Edits of every image; see `Edits.create`.
            provenance: {"c2pa": True} for images with a signed manifest, False for images without one.
            privacy: A gate, such as {"gate": "min_distance", "percentile": 5}: each image is compared with the training
                images, and `passed` of the result says whether it meets the condition. All images are returned.
            extra_body: Further fields, for a newer service.

        Returns:
            The images, in the order of the classes.

        Raises:
            UnprocessableEntityError: A value is not valid; `errors` names the field.
            TooLargeError: More images than the service generates in one call.
            NotFoundError: The service has no such model.
            IntegrityError: An image does not have the SHA-256 that the service sent.
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
            truncation_cutoff=truncation_cutoff,
            noise_mode=noise_mode,
            image_format=image_format,
            image_quality=image_quality,
            edits=edits,
            provenance=provenance,
            privacy=privacy,
        )
        return self._transport.run(generate(body, self._max_retries))

    def generate_pixels(
        self,
        classes: Mapping[str, SupportsIndex],
        *,
        seed: SupportsIndex = 0,
        start_index: SupportsIndex | None = None,
        model: str | None = None,
        truncation_psi: float | None = None,
        truncation_cutoff: SupportsIndex | None = None,
        noise_mode: NoiseMode | None = None,
        edits: Sequence[EditParams] | Mapping[str, float] | None = None,
        privacy: GateParams | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> PixelsResult:
        """Generate a few images as pixels: those of the PNG files of `generate`, without encoding and decoding them.

        It is faster than `generate` for a program that only computes with the pixels, and the response is larger: 3 bytes a
        pixel. The pixels are not signed. An earlier service sends image files, which are decoded here. Arguments and errors
        are those of `generate`.

        Returns:
            The images, in the order of the classes.

        Raises:
            IntegrityError: The pixels arrived incomplete or damaged.
        """
        body = _requests.generation_body(
            classes,
            seed,
            extra_body,
            start_index=start_index,
            model=model,
            truncation_psi=truncation_psi,
            truncation_cutoff=truncation_cutoff,
            noise_mode=noise_mode,
            edits=edits,
            privacy=privacy,
        )
        return self._transport.run(generate_pixels(body, self._max_retries))


class AsyncRawImages:
    """The methods of `AsyncImages` with the responses of the service; see `RawResponse`."""

    def __init__(self, resource: AsyncImages) -> None:
        self.generate = async_raw(resource.generate)
        self.generate_pixels = async_raw(resource.generate_pixels)


class AsyncImages:
    """Generate a few images: `client.images` of an AsyncDermisClient."""

    with_raw_response = cached_property(AsyncRawImages)

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport, self._max_retries = transport, transport.settings.max_retries

    async def generate(
        self,
        classes: Mapping[str, SupportsIndex],
        *,
        seed: SupportsIndex = 0,
        start_index: SupportsIndex | None = None,
        model: str | None = None,
        truncation_psi: float | None = None,
        truncation_cutoff: SupportsIndex | None = None,
        noise_mode: NoiseMode | None = None,
        image_format: ImageFormat | None = None,
        image_quality: SupportsIndex | None = None,
        edits: Sequence[EditParams] | Mapping[str, float] | None = None,
        provenance: ProvenanceParams | None = None,
        privacy: GateParams | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> ImagesResult:
        """Generate a few images; see `Images.generate` for arguments and errors."""
        body = _requests.generation_body(
            classes,
            seed,
            extra_body,
            start_index=start_index,
            model=model,
            truncation_psi=truncation_psi,
            truncation_cutoff=truncation_cutoff,
            noise_mode=noise_mode,
            image_format=image_format,
            image_quality=image_quality,
            edits=edits,
            provenance=provenance,
            privacy=privacy,
        )
        return await self._transport.run(generate(body, self._max_retries))

    async def generate_pixels(
        self,
        classes: Mapping[str, SupportsIndex],
        *,
        seed: SupportsIndex = 0,
        start_index: SupportsIndex | None = None,
        model: str | None = None,
        truncation_psi: float | None = None,
        truncation_cutoff: SupportsIndex | None = None,
        noise_mode: NoiseMode | None = None,
        edits: Sequence[EditParams] | Mapping[str, float] | None = None,
        privacy: GateParams | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> PixelsResult:
        """Generate a few images as pixels; see `Images.generate_pixels` for arguments and errors."""
        body = _requests.generation_body(
            classes,
            seed,
            extra_body,
            start_index=start_index,
            model=model,
            truncation_psi=truncation_psi,
            truncation_cutoff=truncation_cutoff,
            noise_mode=noise_mode,
            edits=edits,
            privacy=privacy,
        )
        return await self._transport.run(generate_pixels(body, self._max_retries))
