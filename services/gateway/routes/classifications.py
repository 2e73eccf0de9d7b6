"""/v1/classifications: what the classifier says of uploaded images."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Annotated
from urllib.parse import quote

import numpy as np
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from dermis.bundle.classifier import DEFAULT_THRESHOLD, NOTICE, ClassifierDescription
from dermis.classifier.scores import scores_of
from dermis.errors import RequestError
from dermis.explain.attribution import Method
from services.gateway.dependencies import ContextDep, negotiate
from services.gateway.openapi import content, headers, image_body, problems
from services.gateway.schemas import (
    Classification,
    ClassificationHeatMap,
    ClassificationList,
    ClassificationModel,
    ThresholdUsed,
)
from services.gateway.uploads import Limit
from services.inference.heat_maps import MEDIA_TYPE, HeatMap
from services.problems import ProblemError

router = APIRouter(prefix="/v1/classifications", tags=["classifications"])

_BUSY = {"Retry-After": "5"}
_JSON = "application/json"


@router.post(
    "",
    summary="Classify images",
    description=f"""The probability that each image shows the positive class, and the class at a threshold.

**{NOTICE}**

Send `multipart/form-data` with one part called `files` for each image, or one image as the body. PNG, JPEG and WebP are
known by their content; the size in bytes and pixels is limited. Images are turned as their EXIF orientation says, made 8-bit
RGB, cut to the largest centred square, and kept in memory only: nothing of them is logged, stored or echoed, not even
their names.

With `heat_map` each image gets a picture of what of it speaks for the positive class and what against it. That takes
seconds, so a call may have few images, and few calls are in work at a time.""",
    response_model=ClassificationList,
    openapi_extra=image_body("files"),
    responses={
        200: {
            "description": "One entry for each image, in their order. With `heat_map`, one image and an Accept header that "
            "prefers PNG: the heat map itself.",
            "content": content(MEDIA_TYPE),
            "headers": headers("X-Dermis-Model", "X-Dermis-Classification", "X-Dermis-Notice"),
        },
        **problems(
            "bad-request",
            "unknown-model",
            "not-acceptable",
            "upload-timeout",
            "too-large",
            "image-too-large",
            "unsupported-media-type",
            "invalid-request",
            "request-too-large",
            "unusable-image",
            "no-classifier",
            "not-installed",
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
    heat_map: Annotated[
        Method | None, Query(description="Also a heat map of each image, by this method; none if left out.")
    ] = None,
) -> Response:
    """Scores of uploaded images, and heat maps where they are asked for."""
    offers = [_JSON, MEDIA_TYPE] if heat_map else [_JSON]
    media_type = negotiate(request.headers.get("accept"), offers)
    if media_type is None:
        more = "" if heat_map else f", with heat_map also with {MEDIA_TYPE}"
        raise ProblemError("not-acceptable", f"this answers with {' and '.join(offers)}{more}")
    bundle = await asyncio.to_thread(context.models.serving, model or context.models.default)
    described = bundle.classifier
    if described is None:
        raise RequestError(
            "model", f"{bundle.name} has no classifier; /v1/models tells which have one", "no-classifier"
        )
    used = _threshold(described, threshold)
    with ExitStack() as stack:
        limit = None
        if heat_map is not None:
            context.heat_maps.check_enabled()
            stack.enter_context(context.limits.heat_maps.hold())
            limit = Limit(context.settings.max_heat_map_images, " with heat_map")
            if media_type == MEDIA_TYPE:
                limit = Limit(1, f" with Accept: {MEDIA_TYPE}")
        stack.enter_context(context.limits.uploads.hold())
        inputs = np.stack(await context.uploads.images(request, described.input.size, limit))
        try:
            async with asyncio.timeout(context.settings.image_timeout_seconds):
                logits = await context.inference.classifier.logits(bundle, inputs)
        except TimeoutError:
            raise ProblemError("overloaded", "the classifier is busy; try again", headers=_BUSY) from None
        made: Sequence[HeatMap | None] = [None] * len(inputs)
        if heat_map is not None:
            made = await context.heat_maps.make(bundle, heat_map, inputs, lambda: _disconnected(request))
    scores = scores_of(logits, described.temperature)
    pairs = zip(scores.probabilities.tolist(), scores.calibrated.tolist(), strict=True)
    data = [
        Classification(
            **{"class": described.class_at(calibrated, used.value)},
            index=i,
            probability=probability,
            calibrated=calibrated,
            heat_map=None if heat_map is None or picture is None else _heat_map(heat_map, picture),
        )
        for i, ((probability, calibrated), picture) in enumerate(zip(pairs, made, strict=True))
    ]
    # Names of bundles are plain ASCII, so they fit a header.
    tell = {"X-Dermis-Model": f"{bundle.name}@{bundle.digest}", "Vary": "Accept"}
    if media_type == MEDIA_TYPE and made[0] is not None:
        told = f"class={quote(data[0].class_)}; calibrated={data[0].calibrated:.4f}; threshold={used.value:.4f}"
        tell |= {"X-Dermis-Classification": told, "X-Dermis-Notice": NOTICE}
        return Response(made[0].content, media_type=MEDIA_TYPE, headers=tell)
    answer = ClassificationList(
        model=ClassificationModel(name=bundle.name, digest=bundle.digest, classifier=described.digest),
        positive_class=described.positive_class,
        threshold=used,
        data=data,
        notice=NOTICE,
    )
    return Response(answer.model_dump_json(by_alias=True), media_type=_JSON, headers=tell)


async def _disconnected(request: Request) -> None:
    """Return when the caller has closed the connection. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _heat_map(method: Method, made: HeatMap) -> ClassificationHeatMap:
    return ClassificationHeatMap(
        method=method,
        scale=made.scale,
        sha256=hashlib.sha256(made.content).hexdigest(),
        b64=base64.b64encode(made.content).decode("ascii"),
    )


def _threshold(described: ClassifierDescription, wanted: str) -> ThresholdUsed:
    """RequestError if it is neither one of the classifier's names nor a number from 0 to 1."""
    if wanted[0].isalpha():
        return ThresholdUsed(name=wanted, value=described.threshold(wanted))
    return ThresholdUsed(name=None, value=described.threshold(float(wanted)))
