"""/v1/directions and /v1/edits: the directions of a model, and images edited along them."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from dermis.bundle import Bundle
from dermis.dataset.request import EditOption, classes_of
from dermis.directions.edit import bundle_offset
from dermis.errors import RequestError
from dermis.image_metadata import ImageOrigin, edits_in_words, origin_of
from dermis.imaging import MEDIA_TYPES, animation, contact_sheet
from services.gateway.auth.authentication import check_scope, requires
from services.gateway.auth.principal import Principal
from services.gateway.dependencies import (
    Context,
    ContextDep,
    ModelQuery,
    choose_media_type,
    model_header,
    read_model,
    served_bundle,
)
from services.gateway.openapi import GENERATION_PROBLEMS, content, headers, json_body, problems
from services.gateway.routes.projections import ready_projection
from services.gateway.sampling import Encode, check_classes, check_cutoff, check_edits, encoder, generate_within_limits
from services.gateway.schemas.common import model_ref
from services.gateway.schemas.directions import DirectionList, ModelDirection
from services.gateway.schemas.edits import EditedImage, EditedList, EditedProjection, EditsRequest
from services.inference.samples import Image, Options, Samples, pack_rows
from services.jobs.projection import ProjectionOptions

router = APIRouter(tags=["edits"])

_Sender = Annotated[Principal, requires("edits")]
_ModelReader = Annotated[Principal, requires("models:read")]

_JSON, _GIF = "application/json", "image/gif"
_IMAGE_TYPES = tuple(MEDIA_TYPES.values())


@router.get(
    "/v1/directions",
    summary="List the directions of a model",
    responses=problems("unknown-model", "invalid-request", "model-unavailable"),
)
async def list_directions(context: ContextDep, principal: _ModelReader, model: ModelQuery = None) -> DirectionList:
    """List the named directions in w, with the method and the values that were measured for each."""
    bundle = await served_bundle(context, principal, model)
    return DirectionList(
        model=model_ref(bundle),
        data=[
            ModelDirection(name=d.name, method=d.method, layers=list(d.layers), scale=d.scale, facts=dict(d.facts))
            for d in bundle.directions
        ],
    )


@router.post(
    "/v1/edits",
    summary="Edit images along directions",
    response_model=EditedList,
    openapi_extra=json_body("EditsRequest"),
    responses={
        200: {
            "description": "JSON with every image; if the Accept header prefers an image, the image itself, or a sheet with a "
            "row for each sample and a column for each strength. A GIF shows the strengths one after the other and back.",
            "content": content(*_IMAGE_TYPES, _GIF),
            "headers": headers("X-Dermis-Model"),
        },
        **problems(*GENERATION_PROBLEMS, "not-found", "projection-not-ready"),
    },
)
async def edit_images(request: Request, context: ContextDep, principal: _Sender) -> Response:
    """Generate edited samples, or edited projections. Edits change neither noise nor truncation."""
    body = await read_model(request, EditsRequest)
    if body.projections is not None:
        check_scope(principal, "projections")
    preferred = MEDIA_TYPES[body.image_format]
    offers = [_JSON, preferred, *(kind for kind in _IMAGE_TYPES if kind != preferred), _GIF]
    media_type = choose_media_type(request, offers)
    encode_image = encoder(context, body.provenance)
    bundle = await served_bundle(context, principal, body.model)
    strengths: list[float | None] = [None] if body.sweep is None else list(body.sweep.strengths)
    _check(body, bundle, len(strengths), context.settings.max_images)
    if body.projections is None:
        rows = _sample_rows(body, bundle, strengths)
        generate = partial(context.inference.generator.images, rows)
    else:
        projected = await projected_latents(context, principal, body.projections, bundle)
        ws = _edited_latents(body, bundle, strengths, projected)
        generate = partial(context.inference.generator.draw, bundle, ws, body.noise)
    count = body.sources * len(strengths)
    images = await generate_within_limits(context, request, principal, bundle, count, generate)
    response_headers = model_header(bundle) | {"Vary": "Accept"}
    if media_type != _JSON:
        data = await context.image_threads.run(_picture, images, strengths, media_type, body, bundle, encode_image)
        return Response(data, media_type=media_type, headers=response_headers)
    edited = await context.image_threads.run(_edited, body, bundle, strengths, images, encode_image)
    response_body = EditedList(model=model_ref(bundle), data=edited)
    return Response(response_body.model_dump_json(), media_type=_JSON, headers=response_headers)


def _check(body: EditsRequest, bundle: Bundle, strengths: int, max_images: int) -> None:
    """Check a request.

    Raises:
        RequestError: The request exceeds a limit, or the bundle cannot serve it.
    """
    check_classes({f"samples.{i}.class": sample.class_ for i, sample in enumerate(body.samples or ())}, bundle)
    total = body.sources * strengths
    if total > max_images:
        field = "samples" if body.projections is None else "projections"
        raise RequestError(field, f"{total} images requested; at most {max_images} in one call", "request-too-large")
    check_cutoff(body.truncation_cutoff, bundle)
    check_edits(body.edits or (), bundle)
    if body.sweep is not None:
        try:
            check_edits([_option(body, strength) for strength in body.sweep.strengths], bundle)
        except RequestError as error:
            field = error.field.partition(".")[2] if error.field else ""
            raise RequestError(f"sweep.{field}", error.message) from None


def _option(body: EditsRequest, strength: float) -> EditOption:
    assert body.sweep is not None
    return EditOption(direction=body.sweep.direction, strength=strength, layers=body.sweep.layers)


def _sample_rows(body: EditsRequest, bundle: Bundle, strengths: list[float | None]) -> Samples:
    """Rows for the generator, by sample and then by strength."""
    label_of = {name: label for label, name in enumerate(classes_of(bundle))}
    names = [direction.name for direction in bundle.directions]
    rows = []
    for sample in body.samples or ():
        for strength in strengths:
            swept = [] if strength is None else [_option(body, strength)]
            options = Options(
                bundle.digest,
                body.truncation_psi,
                body.truncation_cutoff,
                body.noise,
                edits=[option.edit for option in [*(body.edits or ()), *swept]],
                directions=names,
            )
            rows.append(pack_rows(options, sample.seed, [sample.index], [label_of[sample.class_]]))
    return np.concatenate(rows)


async def projected_latents(
    context: Context, principal: Principal, projections: Sequence[EditedProjection], bundle: Bundle
) -> NDArray[np.float32]:
    """ws [N, num_ws, w_dim] of projections.

    Raises:
        RequestError: A projection is of another model, or has no such image.
    """
    latents = []
    for place, each in enumerate(projections):
        job = await ready_projection(context, principal, each.id)
        if job.model_digest != bundle.digest:
            raise RequestError(f"projections.{place}.id", f"is of model {job.model_name}, not of this {bundle.name}")
        if each.image >= ProjectionOptions.model_validate(job.request).images:
            raise RequestError(f"projections.{place}.image", "the projection has fewer images")
        latents.append(await context.storage_threads.run(context.projections.latents, job, each.image))
    return np.stack(latents)


def _edited_latents(
    body: EditsRequest, bundle: Bundle, strengths: list[float | None], ws: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Edited ws [N * strengths, num_ws, w_dim], by projection and then by strength."""
    offsets = []
    for strength in strengths:
        swept = [] if strength is None else [_option(body, strength)]
        moves = [option.edit for option in [*(body.edits or ()), *swept]]
        offsets.append(bundle_offset(bundle, moves))
    return (ws[:, None] + np.stack(offsets)[None]).reshape(-1, *ws.shape[1:])


def _origin(body: EditsRequest, bundle: Bundle, source: int, strength: float | None) -> ImageOrigin:
    """Origin of one image. That of a projection is an edited photograph, not a product of random numbers alone."""
    edits = [option.edit for option in [*(body.edits or ()), *([] if strength is None else [_option(body, strength)])]]
    if body.samples is None:
        return replace(origin_of(bundle, "compositeWithTrainedAlgorithmicMedia"), edits=edits_in_words(edits))
    return origin_of(bundle).of_sample(body.samples[source].seed, body.samples[source].index, edits)


def _origin_of_sheet(body: EditsRequest, bundle: Bundle) -> ImageOrigin:
    return origin_of(bundle, "trainedAlgorithmicMedia" if body.samples else "compositeWithTrainedAlgorithmicMedia")


def _picture(
    generated: Sequence[Image],
    strengths: list[float | None],
    media_type: str,
    body: EditsRequest,
    bundle: Bundle,
    encode_image: Encode,
) -> bytes:
    count, images = len(strengths), np.stack(generated)
    if media_type == _GIF:
        frames = [contact_sheet(images[place::count], columns=8, padding=0) for place in range(count)]
        return animation(np.stack([*frames, *frames[-2:0:-1]]), body.frame_ms, _origin_of_sheet(body, bundle))
    image_format = next(name for name, kind in MEDIA_TYPES.items() if kind == media_type)
    single = len(images) == 1
    sheet = images[0] if single else contact_sheet(images, columns=count if count > 1 else 8)
    origin = _origin(body, bundle, 0, strengths[0]) if single else _origin_of_sheet(body, bundle)
    return encode_image(sheet, image_format, body.image_quality, origin).data


def _edited(
    body: EditsRequest, bundle: Bundle, strengths: list[float | None], images: Sequence[Image], encode_image: Encode
) -> list[EditedImage]:
    edited: list[EditedImage] = []
    for place, image in enumerate(images):
        source, strength = place // len(strengths), strengths[place % len(strengths)]
        origin = _origin(body, bundle, source, strength)
        encoded = encode_image(image, body.image_format, body.image_quality, origin)
        edited.append(
            EditedImage(
                sample=source,
                strength=strength,
                media_type=MEDIA_TYPES[body.image_format],
                sha256=hashlib.sha256(encoded.data).hexdigest(),
                canonical_sha256=encoded.canonical_sha256,
                b64=base64.b64encode(encoded.data).decode("ascii"),
            )
        )
    return edited
