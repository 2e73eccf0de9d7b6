"""/v1/embeddings: a map of images in the principal components of the training images' embeddings.

Embeddings stay in the service: its answers contain a few rounded components of them. For training images, the answers contain
only their numbers in cubes of the map, because positions would show who is in the training set.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from dermis.authenticity.training_map import SMALLEST_COUNT, TrainingMap
from dermis.authenticity.verdict import verdicts_of
from dermis.bundle import Bundle
from dermis.bundle.index import IndexDescription
from dermis.errors import RequestError
from services.gateway.auth.authentication import check_scope, requires
from services.gateway.auth.principal import Principal
from services.gateway.comparing import comparisons, index_of, inputs_of, nearest_of
from services.gateway.dependencies import (
    Context,
    ContextDep,
    ModelQuery,
    choose_media_type,
    limited_time,
    model_header,
    read_model,
    served_bundle,
)
from services.gateway.openapi import (
    JSON_PROBLEMS,
    UPLOAD_PROBLEMS,
    headers,
    image_or_json_body,
    json_body,
    problems,
)
from services.gateway.routes.authenticity import (
    check_uploads_allowed,
    model_and_index,
    uploads_to_compare,
    verdict_rows,
)
from services.gateway.routes.edits import projected_latents
from services.gateway.routes.images import class_of_each, rows_of, samples_of
from services.gateway.sampling import encoder, generate_within_limits
from services.gateway.schemas.embeddings import (
    Cube,
    Embedding,
    EmbeddingList,
    EmbeddingMap,
    EmbeddingsRequest,
    ProjectedEmbeddingsRequest,
    TrainingImages,
)
from services.inference.pixels import Comparison

router = APIRouter(prefix="/v1/embeddings", tags=["embeddings"])

_Reader = Annotated[Principal, requires("authenticity:generated")]
_Sender = Annotated[Principal, requires("authenticity:generated", "authenticity:uploads")]
_JSON = "application/json"
_STEP = 0.001  # to multiples of which positions of generated images are rounded
_RESPONSE = {"description": "The position of each image, in their order.", "headers": headers("X-Dermis-Model")}
_COMMON_PROBLEMS = ("unknown-model", "not-acceptable", "no-index", "quota-exceeded", "not-ready", "model-unavailable")


@router.get(
    "",
    summary="Show the map of a model",
    description="""Show where the training images of a model are in the first three principal components of their embeddings:
numbers of images in cubes. A cube with fewer than 20 images is left out, and numbers are rounded to tens, so that nothing is
shown of one image alone. `POST` places images on the map.

The operator can switch this off (`DERMIS_TRAINING_MAP=none`: there are no cubes) or show more (`positions`: callers with the
scope `authenticity:uploads` also get the position of each training image).""",
    responses=problems("unknown-model", "invalid-request", "no-index", "overloaded", "not-ready", "model-unavailable"),
)
async def show_map(context: ContextDep, principal: _Reader, model: ModelQuery = None) -> EmbeddingMap:
    """Show the map of a model."""
    bundle = await served_bundle(context, principal, model)
    index = index_of(bundle)
    known = await _map_of(context, bundle)
    positions = None
    if context.settings.training_map == "positions" and principal.has_any(["authenticity:uploads"]):
        positions = _rounded(known.positions, context.settings.authenticity_distance_step)
    return EmbeddingMap(
        model=model_and_index(bundle, index),
        extractor=index.extractor,
        metric=index.metric,
        explained=[round(float(share), 4) for share in known.explained],
        uploads=context.settings.compares_uploads,
        training=TrainingImages(
            counted=known.counted,
            side=known.side,
            smallest=SMALLEST_COUNT,
            cubes=[
                Cube(centre=[round(float(at), 6) for at in centre], images=int(count))
                for centre, count in zip(known.cubes, known.counts, strict=True)
            ],
            positions=positions,
        ),
    )


@router.post(
    "",
    summary="Place images on the map",
    description="""Compute where images are on the map of a model (`GET`). Send the JSON body of `/v1/images`: its images are
generated and placed, and compared as by `/v1/authenticity`.

If the service compares uploads (`DERMIS_AUTHENTICITY_UPLOADS`), images can be sent instead, as for `/v1/classifications`, with
the scope `authenticity:uploads`. Their positions are rounded to multiples of `DERMIS_AUTHENTICITY_DISTANCE_STEP`, and no
comparison is made. Uploads are kept in memory only.""",
    response_model=EmbeddingList,
    openapi_extra=image_or_json_body("files", "EmbeddingsRequest"),
    responses={
        200: _RESPONSE,
        **problems(
            *JSON_PROBLEMS,
            *UPLOAD_PROBLEMS,
            *_COMMON_PROBLEMS,
            "unknown-class",
            "uploads-disabled",
            "too-many-requests",
        ),
    },
)
async def place_images(request: Request, context: ContextDep, principal: _Sender, model: ModelQuery = None) -> Response:
    """Place generated or uploaded images. The query parameter `model` is for uploads."""
    choose_media_type(request, [_JSON])
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type.endswith(("/json", "+json")):
        check_scope(principal, "authenticity:generated")
        return await _place_samples(request, context, principal)
    check_scope(principal, "authenticity:uploads")
    check_uploads_allowed(context.settings)
    bundle = await served_bundle(context, principal, model)
    index = index_of(bundle)
    with context.limits.uploads.hold(principal.tenant):
        inputs = await uploads_to_compare(request, context, principal, index)
        positions = await _positions_of(context, bundle, inputs, context.settings.authenticity_distance_step)
    return _answer(bundle, index, _placed(positions))


@router.post(
    "/projections",
    summary="Place projections on the map",
    description="""Compute where the reconstructions of finished projections are on the map of a model. They are images of the
generator; the uploaded images themselves are not kept. Needs the scope `projections` too.""",
    response_model=EmbeddingList,
    openapi_extra=json_body("ProjectedEmbeddingsRequest"),
    responses={
        200: _RESPONSE,
        **problems(
            *JSON_PROBLEMS,
            *_COMMON_PROBLEMS,
            "request-too-large",
            "overloaded",
            "not-found",
            "projection-not-ready",
        ),
    },
)
async def place_projections(request: Request, context: ContextDep, principal: _Reader) -> Response:
    """Place reconstructions of projections."""
    choose_media_type(request, [_JSON])
    body = await read_model(request, ProjectedEmbeddingsRequest)
    check_scope(principal, "projections")
    bundle = await served_bundle(context, principal, body.model)
    index = index_of(bundle)
    count = len(body.projections)
    if count > context.settings.max_images:
        message = f"{count} images requested; at most {context.settings.max_images} in one call"
        raise RequestError("projections", message, "request-too-large")
    latents = await projected_latents(context, principal, body.projections, bundle)
    generate = partial(context.inference.generator.draw, bundle, latents, "const")
    images = await generate_within_limits(context, request, principal, bundle, count, generate, comparisons(count))
    inputs = await inputs_of(context, images, index)
    positions = await _positions_of(context, bundle, inputs, _STEP)
    return _answer(bundle, index, _placed(positions))


async def _place_samples(request: Request, context: Context, principal: Principal) -> Response:
    body = await read_model(request, EmbeddingsRequest)
    if body.images:
        check_scope(principal, "images")
    bundle = await served_bundle(context, principal, body.model)
    index = index_of(bundle)
    encode_image = encoder(context, body.provenance)
    names = class_of_each(body, bundle, context.settings.max_images)
    rows = rows_of(body, bundle, names)
    generate = partial(context.inference.generator.images, rows)
    images = await generate_within_limits(
        context, request, principal, bundle, len(names), generate, comparisons(len(names))
    )
    known = await _map_of(context, bundle)
    nearest = await nearest_of(context, bundle, await inputs_of(context, images, index), Comparison())
    verdicts = verdict_rows(verdicts_of(nearest, index, step=0.01), [False] * len(names))
    samples = None
    if body.images:
        samples = await context.image_threads.run(samples_of, body, bundle, names, images, encode_image)
    positions = _rounded(known.project(nearest.embeddings), _STEP)
    return _answer(
        bundle,
        index,
        [
            Embedding(index=i, position=position, verdict=verdict, image=None if samples is None else samples[i])
            for i, (position, verdict) in enumerate(zip(positions, verdicts, strict=True))
        ],
    )


async def _positions_of(context: Context, bundle: Bundle, inputs: NDArray[np.uint8], step: float) -> list[list[float]]:
    """Rounded components of images. What the index says of their distances to training images is not used."""
    known = await _map_of(context, bundle)
    nearest = await nearest_of(context, bundle, inputs, Comparison(detect_copies=False))
    return _rounded(known.project(nearest.embeddings), step)


async def _map_of(context: Context, bundle: Bundle) -> TrainingMap:
    async with limited_time(context, "the map is busy; try again"):
        return await context.inference.authenticity.training_map(bundle)


def _placed(positions: list[list[float]]) -> list[Embedding]:
    """Positions alone."""
    return [Embedding(index=i, position=row, verdict=None, image=None) for i, row in enumerate(positions)]


def _rounded(rows: NDArray[np.float32], step: float) -> list[list[float]]:
    values: list[list[float]] = (np.round(rows.astype(np.float64) / step) * step).round(6).tolist()
    return values


def _answer(bundle: Bundle, index: IndexDescription, data: list[Embedding]) -> Response:
    body = EmbeddingList(model=model_and_index(bundle, index), data=data)
    return Response(body.model_dump_json(by_alias=True), media_type=_JSON, headers=model_header(bundle))
