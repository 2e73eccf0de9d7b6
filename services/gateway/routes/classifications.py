"""/v1/classifications: what the classifier says of uploaded images."""

from __future__ import annotations

import asyncio
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from dermis.classifier.description import DEFAULT_THRESHOLD, NOTICE, Description
from dermis.classifier.scores import scores_of
from dermis.errors import RequestError
from services.gateway.dependencies import ContextDep
from services.gateway.problems import ProblemError
from services.gateway.routes.answers import headers, image_body, problems
from services.gateway.schemas import Classification, ClassificationList, ClassificationModel, ThresholdUsed

router = APIRouter(prefix="/v1/classifications", tags=["classifications"])

_BUSY = {"Retry-After": "5"}


@router.post(
    "",
    summary="Classify images",
    description=f"""The probability that each image shows the positive class, and the class at a threshold.

**{NOTICE}**

Send `multipart/form-data` with one part called `files` for each image, or one image as the body. PNG, JPEG and WebP are
known by their content; the size in bytes and pixels is limited. Images are turned as their EXIF orientation says, made 8-bit
RGB, cut to the largest centred square, and kept in memory only: nothing of them is logged, stored or echoed, not even
their names.""",
    response_model=ClassificationList,
    openapi_extra=image_body("files"),
    responses={
        200: {"description": "One entry for each image, in their order", "headers": headers("X-Dermis-Model")},
        **problems(
            "bad-request",
            "unknown-model",
            "upload-timeout",
            "too-large",
            "image-too-large",
            "unsupported-media-type",
            "invalid-request",
            "request-too-large",
            "unusable-image",
            "no-classifier",
            "overloaded",
            "not-ready",
            "model-unavailable",
        ),
    },
)
async def classify_images(
    request: Request,
    context: ContextDep,
    model: Annotated[
        str | None, Query(max_length=64, description="Name of a served bundle; the default one if left out.")
    ] = None,
    threshold: Annotated[
        str,
        Query(
            pattern=r"^([a-z][a-z0-9_]*|[0-9]*\.?[0-9]+(e-?[0-9]+)?)$",
            max_length=64,
            description="Name of one of the classifier's thresholds (`/v1/models` lists them), or a number from 0 to 1.",
            examples=["sensitivity_90", "0.3"],
        ),
    ] = DEFAULT_THRESHOLD,
) -> Response:
    """Scores of uploaded images. Heat maps are for `dermis.explain`; this answers with numbers."""
    bundle = await asyncio.to_thread(context.models.serving, model or context.models.default)
    described = bundle.classifier
    if described is None:
        raise RequestError(
            "model", f"{bundle.name} has no classifier; /v1/models tells which have one", "no-classifier"
        )
    used = _threshold(described, threshold)
    with context.uploads.place():
        inputs = np.stack(await context.uploads.images(request, described.input.size))
        try:
            async with asyncio.timeout(context.settings.image_timeout_seconds):
                logits = await context.classify(bundle, inputs)
        except TimeoutError:
            raise ProblemError("overloaded", "the classifier is busy; try again", headers=_BUSY) from None
    scores = scores_of(logits, described.temperature)
    pairs = zip(scores.probabilities.tolist(), scores.calibrated.tolist(), strict=True)
    answer = ClassificationList(
        model=ClassificationModel(name=bundle.name, digest=bundle.digest, classifier=described.digest),
        positive_class=described.positive_class,
        threshold=used,
        data=[
            Classification(
                **{"class": described.class_at(calibrated, used.value)},
                index=i,
                probability=probability,
                calibrated=calibrated,
            )
            for i, (probability, calibrated) in enumerate(pairs)
        ],
        notice=NOTICE,
    )
    tell = {"X-Dermis-Model": f"{bundle.name}@{bundle.digest}"}
    return Response(answer.model_dump_json(by_alias=True), media_type="application/json", headers=tell)


def _threshold(described: Description, wanted: str) -> ThresholdUsed:
    """RequestError if it is neither one of the classifier's names nor a number from 0 to 1."""
    if wanted[0].isalpha():
        return ThresholdUsed(name=wanted, value=described.threshold(wanted))
    return ThresholdUsed(name=None, value=described.threshold(float(wanted)))
