"""/v1/images: a few samples in one call."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from dermis.bundle import Bundle
from dermis.bundle.index import IndexDescription
from dermis.dataset.privacy import exact_below_of, passed
from dermis.dataset.request import GateOptions, classes_of
from dermis.errors import RequestError
from dermis.image_metadata import SOURCE_TYPE_PREFIX, ImageOrigin, origin_of, png_texts
from dermis.imaging import MEDIA_TYPES, ImageFormat, contact_sheet
from dermis.latents import MAX_INDEX
from dermis.pixel_archive import MEDIA_TYPE as PIXELS
from dermis.pixel_archive import pixel_archive
from services.gateway.auth.authentication import check_scope, requires
from services.gateway.auth.principal import Principal
from services.gateway.comparing import comparisons, index_of, inputs_of, nearest_of
from services.gateway.dependencies import (
    Context,
    ContextDep,
    choose_media_type,
    model_header,
    read_model,
    served_bundle,
)
from services.gateway.openapi import GENERATION_PROBLEMS, content, headers, json_body, problems
from services.gateway.sampling import Encode, check_classes, check_cutoff, check_edits, encoder, generate_within_limits
from services.gateway.schemas.common import model_ref
from services.gateway.schemas.images import (
    ImagesRequest,
    PixelMetadata,
    PixelSample,
    Sample,
    SampleList,
    SamplesRequest,
)
from services.inference.pixels import Comparison
from services.inference.samples import Image, Options, Samples, pack_rows

router = APIRouter(prefix="/v1/images", tags=["images"])

_Sender = Annotated[Principal, requires("images")]

_IMAGE_TYPES = tuple(MEDIA_TYPES.values())


@router.post(
    "",
    summary="Generate a few images",
    response_model=SampleList,
    openapi_extra=json_body("ImagesRequest"),
    responses={
        200: {
            "description": "JSON with every image; if the Accept header prefers an image, the image itself, or a contact sheet "
            f"of several images; if it prefers {PIXELS}, the pixels and labels of all images as arrays of NumPy.",
            "content": content(*_IMAGE_TYPES, PIXELS),
            "headers": headers("X-Dermis-Model"),
        },
        **problems(*GENERATION_PROBLEMS, "no-index"),
    },
)
async def generate_images(request: Request, context: ContextDep, principal: _Sender) -> Response:
    """Generate images of a seed's sequence. The same request returns the same images.

    With `privacy`, each image is compared with the training images, which needs the scope `authenticity:generated` too.
    """
    body = await read_model(request, ImagesRequest)
    preferred = MEDIA_TYPES[body.image_format]
    offers = ["application/json", preferred, *(kind for kind in _IMAGE_TYPES if kind != preferred), PIXELS]
    media_type = choose_media_type(request, offers)
    encode_image = encoder(context, body.provenance)
    if media_type == PIXELS and body.provenance is not None and body.provenance.c2pa:
        message = f"{PIXELS} has no signed images; leave the option out, or accept another media type"
        raise RequestError("provenance.c2pa", message, "invalid-request")
    if body.privacy is not None:
        check_scope(principal, "authenticity:generated")
        if media_type not in ("application/json", PIXELS):
            message = f"an image has no place for the results; accept application/json or {PIXELS}"
            raise RequestError("privacy", message, "invalid-request")
    bundle = await served_bundle(context, principal, body.model)
    names = class_of_each(body, bundle, context.settings.max_images)
    rows = rows_of(body, bundle, names)
    index = None if body.privacy is None else index_of(bundle, "privacy")
    images = await generate_within_limits(
        context,
        request,
        principal,
        bundle,
        len(names),
        lambda: context.inference.generator.images(rows),
        None if index is None else comparisons(len(names)),
    )
    results: Sequence[bool | None] = [None] * len(names)
    if index is not None and body.privacy is not None:
        results = await _gate_results(context, bundle, index, images, body.privacy)
    response_headers = model_header(bundle) | {"Vary": "Accept"}
    if media_type == PIXELS:
        data = await context.image_threads.run(pixels_response, body, bundle, names, images, results)
        return Response(data, media_type=PIXELS, headers=response_headers)
    if media_type != "application/json":
        image_format = next(name for name, kind in MEDIA_TYPES.items() if kind == media_type)
        data = await context.image_threads.run(_one_image, body, bundle, images, image_format, encode_image)
        return Response(data, media_type=media_type, headers=response_headers)
    samples = await context.image_threads.run(samples_of, body, bundle, names, images, encode_image, results)
    response_body = SampleList(model=model_ref(bundle), data=samples)
    return Response(
        response_body.model_dump_json(by_alias=True), media_type="application/json", headers=response_headers
    )


async def _gate_results(
    context: Context, bundle: Bundle, index: IndexDescription, images: Sequence[Image], options: GateOptions
) -> list[bool]:
    """Whether each image meets the condition of a gate."""
    inputs = await inputs_of(context, images, index)
    comparison = Comparison(exact_below_of(index, options), options.detect_copies)
    nearest = await nearest_of(context, bundle, inputs, comparison)
    return [bool(result) for result in passed(nearest, index, options)]


def class_of_each(body: SamplesRequest, bundle: Bundle, max_images: int) -> list[str]:
    """The class of each sample, in order.

    Raises:
        RequestError: The request exceeds a limit, or the bundle cannot serve it.
    """
    check_classes({f"classes.{name}": name for name in body.classes}, bundle)
    total = sum(body.classes.values())
    if total > max_images:
        message = f"{total} images requested; at most {max_images} here, more as a dataset (POST /v1/datasets)"
        raise RequestError("classes", message, "request-too-large")
    if body.start_index + total - 1 > MAX_INDEX:
        raise RequestError("start_index", f"the last index would pass {MAX_INDEX}", "invalid-request")
    check_cutoff(body.truncation_cutoff, bundle)
    check_edits(body.edits or (), bundle)
    return [name for name, count in body.classes.items() for _ in range(count)]


def rows_of(body: SamplesRequest, bundle: Bundle, names: Sequence[str]) -> Samples:
    """The rows of the samples of a call, for the generator.

    Args:
        body: The request.
        bundle: The model.
        names: Class of each sample.
    """
    label_of = {name: label for label, name in enumerate(classes_of(bundle))}
    options = Options(
        bundle.digest,
        body.truncation_psi,
        body.truncation_cutoff,
        body.noise_mode,
        edits=[option.edit for option in body.edits or ()],
        directions=[direction.name for direction in bundle.directions],
    )
    indices = range(body.start_index, body.start_index + len(names))
    return pack_rows(options, body.seed, indices, [label_of[name] for name in names])


def _one_image(
    body: ImagesRequest, bundle: Bundle, images: Sequence[Image], image_format: ImageFormat, encode_image: Encode
) -> bytes:
    sheet = images[0] if len(images) == 1 else contact_sheet(np.stack(images))
    origin = _origin(body, bundle, body.start_index if len(images) == 1 else None)
    return encode_image(sheet, image_format, body.image_quality, origin).data


def pixels_response(
    body: ImagesRequest,
    bundle: Bundle,
    names: Sequence[str],
    images: Sequence[Image],
    results: Sequence[bool | None],
) -> bytes:
    """The images of a call as an archive of pixels.

    Args:
        body: The request.
        bundle: The model.
        names: Class of each sample.
        images: The images.
        results: Whether each image meets the condition of the gate; None without a gate.
    """
    origin, class_names = _origin(body, bundle, None), list(classes_of(bundle))
    metadata = PixelMetadata(
        model=model_ref(bundle),
        class_names=class_names,
        digital_source_type=SOURCE_TYPE_PREFIX + origin.source_type,
        description=png_texts(origin)["Description"],
        data=[
            PixelSample(**{"class": name}, seed=body.seed, index=body.start_index + i, passed=result)
            for i, (name, result) in enumerate(zip(names, results, strict=True))
        ],
    )
    labels = [class_names.index(name) for name in names]
    return pixel_archive(images, labels, metadata.model_dump_json(by_alias=True).encode(), origin)


def _origin(body: SamplesRequest, bundle: Bundle, index: int | None) -> ImageOrigin:
    return origin_of(bundle).of_sample(body.seed, index, [option.edit for option in body.edits or ()])


def samples_of(
    body: SamplesRequest,
    bundle: Bundle,
    names: Sequence[str],
    images: Sequence[Image],
    encode_image: Encode,
    results: Sequence[bool | None] | None = None,
) -> list[Sample]:
    """The encoded samples of a call.

    Args:
        body: The request.
        bundle: The model.
        names: Class of each sample.
        images: The images.
        encode_image: Encodes one.
        results: Whether each image meets the condition of the gate; None without a gate.
    """
    samples: list[Sample] = []
    for i, (name, image) in enumerate(zip(names, images, strict=True)):
        origin = _origin(body, bundle, body.start_index + i)
        encoded = encode_image(image, body.image_format, body.image_quality, origin)
        samples.append(
            Sample(
                **{"class": name},
                seed=body.seed,
                index=body.start_index + i,
                media_type=MEDIA_TYPES[body.image_format],
                sha256=hashlib.sha256(encoded.data).hexdigest(),
                canonical_sha256=encoded.canonical_sha256,
                passed=None if results is None else results[i],
                b64=base64.b64encode(encoded.data).decode("ascii"),
            )
        )
    return samples
