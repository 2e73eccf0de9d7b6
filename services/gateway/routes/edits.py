"""/v1/directions and /v1/edits: where latents can be moved, and what images become of it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Query
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from dermis.bundle import Bundle
from dermis.dataset.request import EditOption, classes_of
from dermis.directions.edit import bundle_offset
from dermis.errors import RequestError
from dermis.imaging import MEDIA_TYPES, Images, animation, contact_sheet, encode
from services.gateway.dependencies import Context, ContextDep, negotiate, read_model
from services.gateway.latent_schemas import (
    DirectionList,
    EditedImage,
    EditedList,
    EditedProjection,
    EditsRequest,
    ModelDirection,
)
from services.gateway.openapi import content, headers, json_body, problems
from services.gateway.routes.projections import ready_projection
from services.gateway.sampling import check_classes, check_cutoff, check_edits, draw_soon
from services.gateway.schemas import ModelRef
from services.inference.samples import Options, Samples, pack
from services.jobs.projection import ProjectionOptions
from services.problems import ProblemError

router = APIRouter(tags=["edits"])

_JSON, _GIF = "application/json", "image/gif"
_IMAGE_TYPES = tuple(MEDIA_TYPES.values())


@router.get(
    "/v1/directions",
    summary="List the directions of a model",
    responses=problems("unknown-model", "invalid-request", "model-unavailable"),
)
async def list_directions(
    context: ContextDep,
    model: Annotated[
        str | None, Query(max_length=64, description="Name of a served bundle; the default one if left out.")
    ] = None,
) -> DirectionList:
    """Named directions in w, each with how it was found."""
    bundle = await asyncio.to_thread(context.models.serving, model or context.models.default)
    return DirectionList(
        model=ModelRef(name=bundle.name, digest=bundle.digest),
        data=[
            ModelDirection(name=d.name, method=d.method, layers=list(d.layers), scale=d.scale, facts=dict(d.facts))
            for d in bundle.directions
        ],
    )


@router.post(
    "/v1/edits",
    summary="Move images along directions",
    response_model=EditedList,
    openapi_extra=json_body("EditsRequest"),
    responses={
        200: {
            "description": "With an Accept header that prefers an image: the image, or a sheet with a row for each sample and "
            "a column for each strength; a GIF runs through the strengths and back. Otherwise JSON with every image.",
            "content": content(*_IMAGE_TYPES, _GIF),
            "headers": headers("X-Dermis-Model"),
        },
        **problems(
            "malformed-json",
            "unknown-model",
            "not-acceptable",
            "too-large",
            "unsupported-media-type",
            "invalid-request",
            "unknown-class",
            "request-too-large",
            "not-found",
            "projection-not-ready",
            "overloaded",
            "not-ready",
            "model-unavailable",
        ),
    },
)
async def edit_images(request: Request, context: ContextDep) -> Response:
    """The same samples, edited; every other thing about them stays."""
    wanted = await read_model(request, EditsRequest)
    preferred = MEDIA_TYPES[wanted.image_format]
    offers = [_JSON, preferred, *(kind for kind in _IMAGE_TYPES if kind != preferred), _GIF]
    media_type = negotiate(request.headers.get("accept"), offers)
    if media_type is None:
        raise ProblemError("not-acceptable", f"this answers with {', '.join(offers)}")
    bundle = await asyncio.to_thread(context.models.serving, wanted.model or context.models.default)
    strengths: list[float | None] = [None] if wanted.sweep is None else list(wanted.sweep.strengths)
    _check(wanted, bundle, len(strengths), context.settings.max_images)
    if wanted.projections is None:
        rows = _rows(wanted, bundle, strengths)
        images = np.stack(await draw_soon(context, lambda: context.inference.generator.images(rows)))
    else:
        ws = _moved(wanted, bundle, strengths, await _latents(context, wanted.projections, bundle))
        images = np.stack(await draw_soon(context, lambda: context.inference.generator.draw(bundle, ws, wanted.noise)))
    # Names of bundles are plain ASCII, so they fit a header.
    tell = {"X-Dermis-Model": f"{bundle.name}@{bundle.digest}", "Vary": "Accept"}
    if media_type != _JSON:
        data = await asyncio.to_thread(_picture, images, len(strengths), media_type, wanted)
        return Response(data, media_type=media_type, headers=tell)
    made = await asyncio.to_thread(_edited, wanted, strengths, images)
    answer = EditedList(model=ModelRef(name=bundle.name, digest=bundle.digest), data=made)
    return Response(answer.model_dump_json(), media_type=_JSON, headers=tell)


def _check(wanted: EditsRequest, bundle: Bundle, strengths: int, max_images: int) -> None:
    """RequestError if the bundle or the limits cannot serve the request."""
    check_classes({f"samples.{i}.class": sample.class_ for i, sample in enumerate(wanted.samples or ())}, bundle)
    total = wanted.sources * strengths
    if total > max_images:
        field = "samples" if wanted.projections is None else "projections"
        raise RequestError(field, f"{total} images asked for; at most {max_images} in one call", "request-too-large")
    check_cutoff(wanted.truncation_cutoff, bundle)
    check_edits(wanted.edits or (), bundle)
    if wanted.sweep is not None:
        try:
            check_edits([_option(wanted, strength) for strength in wanted.sweep.strengths], bundle)
        except RequestError as error:
            field = error.field.partition(".")[2] if error.field else ""
            raise RequestError(f"sweep.{field}", error.message) from None


def _option(wanted: EditsRequest, strength: float) -> EditOption:
    assert wanted.sweep is not None
    return EditOption(direction=wanted.sweep.direction, strength=strength, layers=wanted.sweep.layers)


def _rows(wanted: EditsRequest, bundle: Bundle, strengths: list[float | None]) -> Samples:
    """Sample after sample, strength after strength."""
    label_of = {name: label for label, name in enumerate(classes_of(bundle))}
    names = [direction.name for direction in bundle.directions]
    parts = []
    for sample in wanted.samples or ():
        for strength in strengths:
            swept = [] if strength is None else [_option(wanted, strength)]
            options = Options(
                bundle.digest,
                wanted.truncation_psi,
                wanted.truncation_cutoff,
                wanted.noise,
                edits=[option.edit for option in [*(wanted.edits or ()), *swept]],
                directions=names,
            )
            parts.append(pack(options, sample.seed, [sample.index], [label_of[sample.class_]]))
    return np.concatenate(parts)


async def _latents(context: Context, wanted: Sequence[EditedProjection], bundle: Bundle) -> NDArray[np.float32]:
    """ws [N, num_ws, w_dim] of projections. RequestError if one is of another model or has no such image."""
    found = []
    for place, each in enumerate(wanted):
        job = await ready_projection(context, each.id)
        if job.model_digest != bundle.digest:
            raise RequestError(f"projections.{place}.id", f"is of model {job.model_name}, not of this {bundle.name}")
        if each.image >= ProjectionOptions.model_validate(job.request).images:
            raise RequestError(f"projections.{place}.image", "the projection has fewer images")
        found.append(await asyncio.to_thread(context.projections.latents, job, each.image))
    return np.stack(found)


def _moved(
    wanted: EditsRequest, bundle: Bundle, strengths: list[float | None], ws: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Projection after projection, strength after strength."""
    offsets = []
    for strength in strengths:
        swept = [] if strength is None else [_option(wanted, strength)]
        moves = [option.edit for option in [*(wanted.edits or ()), *swept]]
        offsets.append(bundle_offset(bundle, moves))
    return (ws[:, None] + np.stack(offsets)[None]).reshape(-1, *ws.shape[1:])


def _picture(images: Images, strengths: int, media_type: str, wanted: EditsRequest) -> bytes:
    if media_type == _GIF:
        frames = [contact_sheet(images[place::strengths], columns=8, padding=0) for place in range(strengths)]
        return animation(np.stack([*frames, *frames[-2:0:-1]]), wanted.frame_ms)
    image_format = next(name for name, kind in MEDIA_TYPES.items() if kind == media_type)
    sheet = images[0] if len(images) == 1 else contact_sheet(images, columns=strengths if strengths > 1 else 8)
    return encode(sheet, image_format, wanted.image_quality)


def _edited(wanted: EditsRequest, strengths: list[float | None], images: Images) -> list[EditedImage]:
    made: list[EditedImage] = []
    for place, image in enumerate(images):
        data = encode(image, wanted.image_format, wanted.image_quality)
        made.append(
            EditedImage(
                sample=place // len(strengths),
                strength=strengths[place % len(strengths)],
                media_type=MEDIA_TYPES[wanted.image_format],
                sha256=hashlib.sha256(data).hexdigest(),
                b64=base64.b64encode(data).decode("ascii"),
            )
        )
    return made
