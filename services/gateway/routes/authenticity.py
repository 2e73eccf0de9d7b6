"""/v1/authenticity: how near images are to the training images of a model."""

from __future__ import annotations

import asyncio
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from dermis.authenticity.index import Nearest
from dermis.authenticity.verdict import verdicts_of
from dermis.bundle import Bundle
from dermis.bundle.index import IndexDescription
from dermis.classifier.preprocess import batch
from dermis.errors import RequestError
from dermis.imaging import Images
from services.gateway.dependencies import Context, ContextDep, negotiate, read_model
from services.gateway.latent_schemas import AuthenticityList, AuthenticityModel, AuthenticityVerdict
from services.gateway.openapi import headers, image_or_json_body, problems
from services.gateway.routes.images import class_of_each, rows_of
from services.gateway.sampling import draw_soon
from services.gateway.schemas import ImagesRequest
from services.problems import ProblemError

router = APIRouter(prefix="/v1/authenticity", tags=["authenticity"])

_BUSY = {"Retry-After": "5"}
_JSON = "application/json"


@router.post(
    "",
    summary="Compare images with the training images",
    description="""How near each image is to the nearest image that the generator was trained on, and whether it is authentic:
farther from it than that one is from its own nearest other one (Alaa et al., arXiv 2102.08921).

Send the JSON body of `/v1/images`: the images that it names are generated and compared. The answer never says which
training image is near; distances are rounded.

Where the operator has switched it on (`DERMIS_AUTHENTICITY_UPLOADS`; `uploads` in `/v1/models` shows it), images can be sent
instead, as for `/v1/classifications`. It is off by default (403 `uploads-disabled`), because a distance near 0 shows that an
image is a training image. Uploads are kept in memory only; nothing of them is logged, stored or echoed.""",
    response_model=AuthenticityList,
    openapi_extra=image_or_json_body("files", "ImagesRequest"),
    responses={
        200: {"description": "One verdict for each image, in their order.", "headers": headers("X-Dermis-Model")},
        **problems(
            "malformed-json",
            "bad-request",
            "unknown-model",
            "not-acceptable",
            "upload-timeout",
            "too-large",
            "image-too-large",
            "unsupported-media-type",
            "invalid-request",
            "unknown-class",
            "request-too-large",
            "unusable-image",
            "no-index",
            "uploads-disabled",
            "too-many-requests",
            "overloaded",
            "not-ready",
            "model-unavailable",
        ),
    },
)
async def check_authenticity(
    request: Request,
    context: ContextDep,
    model: Annotated[
        str | None,
        Query(max_length=64, description="Of uploads: name of a served bundle; the default one if left out."),
    ] = None,
) -> Response:
    """Verdicts on uploaded or generated images."""
    if negotiate(request.headers.get("accept"), [_JSON]) is None:
        raise ProblemError("not-acceptable", f"this answers with {_JSON}")
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type.endswith(("/json", "+json")):
        bundle, described, found = await _generated(request, context)
    else:
        bundle, described, found = await _uploaded(request, context, model)
    judged = verdicts_of(found, described)
    rows = zip(judged.authentic.tolist(), judged.distances.tolist(), judged.percentiles.tolist(), strict=True)
    answer = AuthenticityList(
        model=AuthenticityModel(name=bundle.name, digest=bundle.digest, index=described.digest),
        data=[
            AuthenticityVerdict(index=i, authentic=authentic, distance=round(distance, 2), percentile=int(percentile))
            for i, (authentic, distance, percentile) in enumerate(rows)
        ],
    )
    tell = {"X-Dermis-Model": f"{bundle.name}@{bundle.digest}"}
    return Response(answer.model_dump_json(), media_type=_JSON, headers=tell)


async def _uploaded(request: Request, context: Context, model: str | None) -> tuple[Bundle, IndexDescription, Nearest]:
    if not context.settings.compares_uploads:
        raise ProblemError(
            "uploads-disabled",
            "comparing uploaded images is switched off, as it shows whether an image is a training image; the operator of "
            "the service can set DERMIS_AUTHENTICITY_UPLOADS=true. Generated images can be compared: send the JSON body of "
            "/v1/images",
        )
    bundle = await asyncio.to_thread(context.models.serving, model or context.models.default)
    described = _index_of(bundle)
    with context.limits.uploads.hold():
        inputs = np.stack(await context.uploads.images(request, described.resolution))
        context.limits.comparisons.add(len(inputs))
        return bundle, described, await _nearest(context, bundle, inputs)


async def _generated(request: Request, context: Context) -> tuple[Bundle, IndexDescription, Nearest]:
    wanted = await read_model(request, ImagesRequest)
    bundle = await asyncio.to_thread(context.models.serving, wanted.model or context.models.default)
    described = _index_of(bundle)
    rows = rows_of(wanted, bundle, class_of_each(wanted, bundle, context.settings.max_images))
    images = np.stack(await draw_soon(context, lambda: context.inference.generator.images(rows)))
    colour = images.repeat(3, axis=3) if images.shape[3] == 1 else images
    return bundle, described, await _nearest(context, bundle, batch(colour, described.resolution))


async def _nearest(context: Context, bundle: Bundle, inputs: Images) -> Nearest:
    try:
        async with asyncio.timeout(context.settings.image_timeout_seconds):
            return await context.inference.authenticity.nearest(bundle, inputs)
    except TimeoutError:
        raise ProblemError("overloaded", "the comparison is busy; try again", headers=_BUSY) from None


def _index_of(bundle: Bundle) -> IndexDescription:
    if bundle.authenticity is None:
        raise RequestError("model", f"{bundle.name} has no index; /v1/models tells which have one", "no-index")
    return bundle.authenticity
