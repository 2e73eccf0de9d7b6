"""/v1/images: a few samples at once."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Sequence

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from dermis.bundle import Bundle
from dermis.dataset.request import classes_of
from dermis.errors import RequestError
from dermis.imaging import MEDIA_TYPES, ImageFormat, contact_sheet, encode
from dermis.latents import MAX_INDEX
from services.gateway.dependencies import ContextDep, negotiate, read_model
from services.gateway.openapi import content, headers, json_body, problems
from services.gateway.sampling import check_classes, check_cutoff, check_edits, draw_soon
from services.gateway.schemas import ImagesRequest, ModelRef, Sample, SampleList
from services.inference.samples import Image, Options, Samples, pack
from services.problems import ProblemError

router = APIRouter(prefix="/v1/images", tags=["images"])

_IMAGE_TYPES = tuple(MEDIA_TYPES.values())


@router.post(
    "",
    summary="Generate a few images",
    response_model=SampleList,
    openapi_extra=json_body("ImagesRequest"),
    responses={
        200: {
            "description": "With an Accept header that prefers an image: the image, or a contact sheet of several. "
            "Otherwise JSON with every image.",
            "content": content(*_IMAGE_TYPES),
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
            "overloaded",
            "not-ready",
            "model-unavailable",
        ),
    },
)
async def generate_images(request: Request, context: ContextDep) -> Response:
    """Images of a seed's sequence, the same whenever they are asked for."""
    wanted = await read_model(request, ImagesRequest)
    preferred = MEDIA_TYPES[wanted.image_format]
    offers = ["application/json", preferred, *(kind for kind in _IMAGE_TYPES if kind != preferred)]
    media_type = negotiate(request.headers.get("accept"), offers)
    if media_type is None:
        raise ProblemError("not-acceptable", f"this answers with {', '.join(offers)}")
    bundle = await asyncio.to_thread(context.models.serving, wanted.model or context.models.default)
    names = class_of_each(wanted, bundle, context.settings.max_images)
    rows = rows_of(wanted, bundle, names)
    images = await draw_soon(context, lambda: context.inference.generator.images(rows))
    # Names of bundles are plain ASCII, so they fit a header.
    tell = {"X-Dermis-Model": f"{bundle.name}@{bundle.digest}", "Vary": "Accept"}
    if media_type != "application/json":
        image_format = next(name for name, kind in MEDIA_TYPES.items() if kind == media_type)
        data = await asyncio.to_thread(_one_image, images, image_format, wanted.image_quality)
        return Response(data, media_type=media_type, headers=tell)
    samples = await asyncio.to_thread(_samples, wanted, names, images)
    answer = SampleList(model=ModelRef(name=bundle.name, digest=bundle.digest), data=samples)
    return Response(answer.model_dump_json(by_alias=True), media_type="application/json", headers=tell)


def class_of_each(wanted: ImagesRequest, bundle: Bundle, max_images: int) -> list[str]:
    """The class of every sample, in order; RequestError if the bundle or the limits cannot serve them."""
    check_classes({f"classes.{name}": name for name in wanted.classes}, bundle)
    total = sum(wanted.classes.values())
    if total > max_images:
        message = f"{total} images asked for; at most {max_images} here, more as a dataset (POST /v1/datasets)"
        raise RequestError("classes", message, "request-too-large")
    if wanted.start_index + total - 1 > MAX_INDEX:
        raise RequestError("start_index", f"the last index would pass {MAX_INDEX}", "invalid-request")
    check_cutoff(wanted.truncation_cutoff, bundle)
    check_edits(wanted.edits or (), bundle)
    return [name for name, count in wanted.classes.items() for _ in range(count)]


def rows_of(wanted: ImagesRequest, bundle: Bundle, names: Sequence[str]) -> Samples:
    """The rows of a call's samples, each of its class in `names`."""
    label_of = {name: label for label, name in enumerate(classes_of(bundle))}
    options = Options(
        bundle.digest,
        wanted.truncation_psi,
        wanted.truncation_cutoff,
        wanted.noise_mode,
        edits=[option.edit for option in wanted.edits or ()],
        directions=[direction.name for direction in bundle.directions],
    )
    indices = range(wanted.start_index, wanted.start_index + len(names))
    return pack(options, wanted.seed, indices, [label_of[name] for name in names])


def _one_image(images: Sequence[Image], image_format: ImageFormat, quality: int) -> bytes:
    return encode(images[0] if len(images) == 1 else contact_sheet(np.stack(images)), image_format, quality)


def _samples(wanted: ImagesRequest, names: Sequence[str], images: Sequence[Image]) -> list[Sample]:
    samples: list[Sample] = []
    for i, (name, image) in enumerate(zip(names, images, strict=True)):
        data = encode(image, wanted.image_format, wanted.image_quality)
        samples.append(
            Sample(
                **{"class": name},
                seed=wanted.seed,
                index=wanted.start_index + i,
                media_type=MEDIA_TYPES[wanted.image_format],
                sha256=hashlib.sha256(data).hexdigest(),
                b64=base64.b64encode(data).decode("ascii"),
            )
        )
    return samples
