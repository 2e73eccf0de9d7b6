"""/v1/classifications: classify uploaded images."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
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
from services.gateway.auth.authentication import requires
from services.gateway.auth.principal import Principal
from services.gateway.dependencies import (
    ContextDep,
    ModelQuery,
    choose_media_type,
    count_pixels,
    limited_time,
    model_header,
    served_bundle,
    while_connected,
)
from services.gateway.openapi import UPLOAD_PROBLEMS, content, headers, image_body, problems
from services.gateway.schemas.classifications import (
    Classification,
    ClassificationHeatMap,
    ClassificationList,
    ClassificationModel,
    ThresholdUsed,
)
from services.gateway.uploads import Limit
from services.inference.heat_maps import MEDIA_TYPE, EncodedHeatMap

router = APIRouter(prefix="/v1/classifications", tags=["classifications"])

_Sender = Annotated[Principal, requires("classify")]

_JSON = "application/json"


@router.post(
    "",
    summary="Classify images",
    description=f"""The probability that each image shows the positive class, and the class at a threshold.

**{NOTICE}**

Send `multipart/form-data` with one part called `files` for each image, or one image as the body. PNG, JPEG and WebP are
recognised by their content; the size in bytes and in pixels is limited. Images are rotated by their EXIF orientation,
converted to 8-bit RGB, cropped to the largest centred square, and kept in memory only. They and their names are not logged,
stored or sent back.

With `heat_map` the response contains a picture of the areas of each image that raise and lower the probability of the
positive class. A heat map takes seconds, so the number of images in such a call and the number of such calls are limited.""",
    response_model=ClassificationList,
    openapi_extra=image_body("files"),
    responses={
        200: {
            "description": "One entry for each image, in their order. With `heat_map`, a single image and an Accept header "
            "that prefers PNG, the heat map itself.",
            "content": content(MEDIA_TYPE),
            "headers": headers("X-Dermis-Model", "X-Dermis-Classification", "X-Dermis-Notice"),
        },
        **problems(
            *UPLOAD_PROBLEMS,
            "unknown-model",
            "not-acceptable",
            "no-classifier",
            "quota-exceeded",
            "not-installed",
            "not-ready",
            "model-unavailable",
        ),
    },
)
async def classify_images(
    request: Request,
    context: ContextDep,
    principal: _Sender,
    model: ModelQuery = None,
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
        Method | None, Query(description="Method of the heat map of each image; no heat maps by default.")
    ] = None,
) -> Response:
    """Classify uploaded images, with heat maps if the request contains `heat_map`."""
    offers = [_JSON, MEDIA_TYPE] if heat_map else [_JSON]
    more = "" if heat_map else f", with heat_map also with {MEDIA_TYPE}"
    media_type = choose_media_type(request, offers, more)
    bundle = await served_bundle(context, principal, model)
    classifier = bundle.classifier
    if classifier is None:
        raise RequestError(
            "model", f"{bundle.name} has no classifier; /v1/models shows which models have one", "no-classifier"
        )
    used_threshold = _threshold(classifier, threshold)
    with ExitStack() as stack:
        limit = None
        if heat_map is not None:
            context.heat_maps.check_enabled()
            stack.enter_context(context.limits.heat_maps.hold(principal.tenant))
            limit = Limit(context.settings.max_heat_map_images, " with heat_map")
            if media_type == MEDIA_TYPE:
                limit = Limit(1, f" with Accept: {MEDIA_TYPE}")
        stack.enter_context(context.limits.uploads.hold(principal.tenant))
        admit = partial(count_pixels, context, request, principal)
        inputs = np.stack(await context.uploads.images(request, classifier.input.size, limit, admit))
        async with limited_time(context, "the classifier is busy; try again"):
            logits = await context.inference.classifier.logits(bundle, inputs)
        pictures: Sequence[EncodedHeatMap | None] = [None] * len(inputs)
        if heat_map is not None:
            async with while_connected(request):
                pictures = await context.heat_maps.make(bundle, heat_map, inputs)
    scores = scores_of(logits, classifier.temperature)
    pairs = zip(scores.probabilities.tolist(), scores.calibrated.tolist(), strict=True)
    data = [
        Classification(
            **{"class": classifier.class_at(calibrated, used_threshold.value)},
            index=i,
            probability=probability,
            calibrated=calibrated,
            heat_map=None if heat_map is None or picture is None else _heat_map(heat_map, picture),
        )
        for i, ((probability, calibrated), picture) in enumerate(zip(pairs, pictures, strict=True))
    ]
    response_headers = model_header(bundle) | {"Vary": "Accept"}
    if media_type == MEDIA_TYPE and pictures[0] is not None:
        first = data[0]
        response_headers |= {
            "X-Dermis-Classification": f"class={quote(first.class_)}; calibrated={first.calibrated:.4f}; "
            f"threshold={used_threshold.value:.4f}",
            "X-Dermis-Notice": NOTICE,
        }
        return Response(pictures[0].content, media_type=MEDIA_TYPE, headers=response_headers)
    response_body = ClassificationList(
        model=ClassificationModel(name=bundle.name, digest=bundle.digest, classifier=classifier.digest),
        positive_class=classifier.positive_class,
        threshold=used_threshold,
        data=data,
        notice=NOTICE,
    )
    return Response(response_body.model_dump_json(by_alias=True), media_type=_JSON, headers=response_headers)


def _heat_map(method: Method, picture: EncodedHeatMap) -> ClassificationHeatMap:
    return ClassificationHeatMap(
        method=method,
        scale=picture.scale,
        sha256=hashlib.sha256(picture.content).hexdigest(),
        b64=base64.b64encode(picture.content).decode("ascii"),
    )


def _threshold(classifier: ClassifierDescription, text: str) -> ThresholdUsed:
    """The threshold that a query parameter names, or its number.

    Raises:
        RequestError: The classifier has no threshold of this name, or the number is not from 0 to 1.
    """
    if text[0].isalpha():
        return ThresholdUsed(name=text, value=classifier.threshold(text))
    return ThresholdUsed(name=None, value=classifier.threshold(float(text)))
