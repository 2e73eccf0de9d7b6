"""/v1/authenticity: compare images with the training images of a model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Annotated

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from dermis.authenticity.index import Nearest
from dermis.authenticity.verdict import Verdicts, verdicts_of
from dermis.bundle import Bundle
from dermis.bundle.index import IndexDescription
from dermis.imaging import Images
from dermis.perceptual_hash import fingerprints
from services.gateway.auth.authentication import check_scope, requires
from services.gateway.auth.principal import Principal
from services.gateway.comparing import comparisons, index_of, inputs_of, nearest_of
from services.gateway.dependencies import (
    Context,
    ContextDep,
    ModelQuery,
    choose_media_type,
    count_pixels,
    model_header,
    read_model,
    served_bundle,
)
from services.gateway.openapi import JSON_PROBLEMS, UPLOAD_PROBLEMS, headers, image_or_json_body, problems
from services.gateway.routes.images import class_of_each, rows_of
from services.gateway.sampling import generate_within_limits
from services.gateway.schemas.authenticity import AuthenticityList, AuthenticityModel, AuthenticityVerdict
from services.gateway.schemas.images import SamplesRequest
from services.inference.pixels import Comparison
from services.problems import ProblemError
from services.settings import Settings

router = APIRouter(prefix="/v1/authenticity", tags=["authenticity"])

_Sender = Annotated[Principal, requires("authenticity:generated", "authenticity:uploads")]

_JSON = "application/json"
_STEP = 0.01  # to multiples of which distances of generated images are rounded


@router.post(
    "",
    summary="Compare images with the training images",
    description="""Measure the distance of each image to the nearest training image of the generator. An image is authentic if
it is farther from that training image than that training image is from its own nearest neighbour among the training images
(Alaa et al., arXiv 2102.08921).

Send the JSON body of `/v1/images`, without `privacy`: its images are generated and compared. The response does not say which
training image is the nearest, and distances are rounded.

If the operator has enabled it (`DERMIS_AUTHENTICITY_UPLOADS`; `uploads` in `/v1/models` shows the setting), images can be sent
instead, as for `/v1/classifications`. It is disabled by default (403 `uploads-disabled`), because a distance near 0 shows that
an image is a training image. Uploads are kept in memory only. They are not logged, stored or sent back. An upload that
resembles one of the last day (`DERMIS_AUTHENTICITY_REPEAT_SECONDS`) gets the answer for that one, marked as `repeated`; for
this, a fingerprint of 256 bits of each upload is stored with the answer for that time.""",
    response_model=AuthenticityList,
    openapi_extra=image_or_json_body("files", "SamplesRequest"),
    responses={
        200: {"description": "One verdict for each image, in their order.", "headers": headers("X-Dermis-Model")},
        **problems(
            *JSON_PROBLEMS,
            *UPLOAD_PROBLEMS,
            "unknown-model",
            "not-acceptable",
            "unknown-class",
            "no-index",
            "uploads-disabled",
            "quota-exceeded",
            "too-many-requests",
            "not-ready",
            "model-unavailable",
        ),
    },
)
async def check_authenticity(
    request: Request, context: ContextDep, principal: _Sender, model: ModelQuery = None
) -> Response:
    """Compare uploaded or generated images. The query parameter `model` is for uploads."""
    choose_media_type(request, [_JSON])
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type.endswith(("/json", "+json")):
        check_scope(principal, "authenticity:generated")
        bundle, index, nearest = await _compare_generated(request, context, principal)
        verdicts, repeated = verdicts_of(nearest, index, step=_STEP), [False] * len(nearest.distances)
    else:
        check_scope(principal, "authenticity:uploads")
        bundle, index, nearest, repeated = await _compare_uploads(request, context, principal, model)
        verdicts = verdicts_of(nearest, index, step=context.settings.authenticity_distance_step)
    response_body = AuthenticityList(model=model_and_index(bundle, index), data=verdict_rows(verdicts, repeated))
    return Response(response_body.model_dump_json(), media_type=_JSON, headers=model_header(bundle))


def model_and_index(bundle: Bundle, index: IndexDescription) -> AuthenticityModel:
    """The reference to a bundle and its index."""
    return AuthenticityModel(name=bundle.name, digest=bundle.digest, index=index.digest)


def verdict_rows(verdicts: Verdicts, repeated: Sequence[bool]) -> list[AuthenticityVerdict]:
    """The verdict on each image, as it is sent.

    Args:
        verdicts: Verdicts on N images.
        repeated: Whether each of them is that on an earlier image.
    """
    copies = [None] * len(verdicts.distances) if verdicts.copies is None else verdicts.copies.tolist()
    rows = zip(
        verdicts.authentic.tolist(),
        verdicts.distances.tolist(),
        verdicts.percentiles.tolist(),
        copies,
        repeated,
        strict=True,
    )
    return [
        AuthenticityVerdict(
            index=i,
            authentic=authentic,
            distance=round(distance, 6),  # without the error of float32
            percentile=int(percentile),
            copy_detected=copy_detected,
            repeated=is_repeated,
        )
        for i, (authentic, distance, percentile, copy_detected, is_repeated) in enumerate(rows)
    ]


async def _compare_uploads(
    request: Request, context: Context, principal: Principal, model: str | None
) -> tuple[Bundle, IndexDescription, Nearest, list[bool]]:
    """Compare uploads. Images that resemble earlier ones get the answers on those, and are marked in the last list."""
    check_uploads_allowed(context.settings)
    bundle = await served_bundle(context, principal, model)
    index = index_of(bundle)
    with context.limits.uploads.hold(principal.tenant):
        inputs = await uploads_to_compare(request, context, principal, index)
        # The copy detector is left out: it finds training images better than distances do.
        nearest = await nearest_of(context, bundle, inputs, Comparison(detect_copies=False))
        answers = await asyncio.to_thread(
            lambda: context.compared.answer(
                (principal.tenant, index.digest), fingerprints(inputs), nearest.distances, nearest.radii
            )
        )
    nearest = Nearest(answers.distances, answers.radii, nearest.embeddings)
    return bundle, index, nearest, answers.repeated.tolist()


async def uploads_to_compare(
    request: Request, context: Context, principal: Principal, index: IndexDescription
) -> Images:
    """Decode uploads for the network of an index, and count them in the quotas and in the limit of comparisons.

    Returns:
        uint8 [N, R, R, 3].
    """
    admit = partial(count_pixels, context, request, principal)
    inputs = np.stack(await context.uploads.images(request, index.resolution, admit=admit))
    context.limits.comparisons.add(principal.tenant, len(inputs))  # first: a refusal takes nothing from the quota
    await context.quotas.count(request, principal, comparisons(len(inputs)))
    return inputs


def check_uploads_allowed(settings: Settings) -> None:
    """Check that the service compares uploads.

    Raises:
        ProblemError: It does not.
    """
    if not settings.compares_uploads:
        raise ProblemError(
            "uploads-disabled",
            "uploaded images are not compared, because the result shows whether an image is a training image; the operator of "
            "the service can set DERMIS_AUTHENTICITY_UPLOADS=true. For generated images, send the JSON body of /v1/images",
        )


async def _compare_generated(
    request: Request, context: Context, principal: Principal
) -> tuple[Bundle, IndexDescription, Nearest]:
    body = await read_model(request, SamplesRequest)
    bundle = await served_bundle(context, principal, body.model)
    index = index_of(bundle)
    rows = rows_of(body, bundle, class_of_each(body, bundle, context.settings.max_images))
    images = await generate_within_limits(
        context,
        request,
        principal,
        bundle,
        len(rows),
        lambda: context.inference.generator.images(rows),
        comparisons(len(rows)),
    )
    inputs = await inputs_of(context, images, index)
    return bundle, index, await nearest_of(context, bundle, inputs, Comparison())
