"""Images for the routes that return them in the response, within limits of calls and time; checks of their options."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from starlette.requests import Request

from dermis.bundle import Bundle
from dermis.dataset.request import EditOption, ProvenanceOptions, classes_of
from dermis.directions.edit import bundle_offset
from dermis.errors import RequestError
from dermis.image_metadata import ImageOrigin
from dermis.imaging import ImageFormat, Images, encode
from services.gateway.auth.principal import Principal
from services.gateway.dependencies import Context, limited_time, while_connected
from services.image_signing import NO_CERTIFICATE
from services.inference.samples import Image


@dataclass(frozen=True)
class EncodedImage:
    """An encoded image.

    Attributes:
        data: The file.
        canonical_sha256: SHA-256 (hex) of the file without its signed manifest; None if it has none.
    """

    data: bytes
    canonical_sha256: str | None = None


Encode = Callable[[Images, ImageFormat, int, ImageOrigin], EncodedImage]


def encoder(context: Context, provenance: ProvenanceOptions | None) -> Encode:
    """A function that encodes an image, and signs it if the request or the settings ask for that.

    Args:
        context: The context of the routes.
        provenance: The options of the request.

    Raises:
        RequestError: The request asks for signed images, and this service has no certificate.
    """
    sign = context.sign
    options = (provenance or ProvenanceOptions.model_validate({})).resolved(sign is not None, NO_CERTIFICATE)

    def encode_image(image: Images, image_format: ImageFormat, quality: int, origin: ImageOrigin) -> EncodedImage:
        data = encode(image, image_format, quality, origin)
        if sign is None or not options.c2pa:
            return EncodedImage(data)
        return EncodedImage(sign(data, image_format, origin), hashlib.sha256(data).hexdigest())

    return encode_image


async def generate_within_limits(
    context: Context,
    request: Request,
    principal: Principal,
    bundle: Bundle,
    count: int,
    generate: Callable[[], Awaitable[list[Image]]],
    kept: Mapping[str, int] | None = None,
) -> list[Image]:
    """Return the images of `generate`, within the limits of calls and of time and the quota of the sender.

    If the sender closes the connection before, the images are not made, and not counted.

    Args:
        context: The context of the routes.
        request: The request.
        principal: The sender.
        bundle: The model.
        count: Number of images.
        generate: Generates them.
        kept: What the request needs of further quotas, by name; it stays counted if the generator fails.

    Raises:
        ProblemError: If too many calls or images are waiting, if it takes too long, or if the sender closes the connection.
        QuotaExceededError: If a quota of the sender's tenant would be exceeded. Nothing was counted.
    """
    with context.limits.hold_images(principal.tenant, bundle.digest, count) as begin:
        async with (
            context.quotas.counted(request, principal, {"images_per_day": count}, kept or {}),
            while_connected(request),
            limited_time(context, "the generator is busy; try again, or request fewer images"),
        ):
            begin()
            return await generate()


def check_classes(names: Mapping[str, str], bundle: Bundle) -> None:
    """Check the names of classes.

    Args:
        names: Name of the class by field of the request.
        bundle: The model.

    Raises:
        RequestError: If the model has no such class.
    """
    known = classes_of(bundle)
    for field, name in names.items():
        if name not in known:
            raise RequestError(field, f"unknown class; this model has {', '.join(known)}", "unknown-class")


def check_cutoff(truncation_cutoff: int | None, bundle: Bundle) -> None:
    """Raise RequestError if the bundle has fewer style layers."""
    if truncation_cutoff is not None and truncation_cutoff > bundle.generator.num_ws:
        message = f"this model has {bundle.generator.num_ws} style layers"
        raise RequestError("truncation_cutoff", message, "invalid-request")


def check_edits(edits: Sequence[EditOption], bundle: Bundle) -> None:
    """Raise RequestError with the field if the bundle lacks a direction or layers."""
    bundle_offset(bundle, [option.edit for option in edits])
