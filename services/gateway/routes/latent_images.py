"""/v1/edits/interpolations and /v1/edits/neighbours: images between two samples, and in the neighbourhood of one."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from dermis.bundle import Bundle
from dermis.dataset.request import classes_of
from dermis.errors import RequestError
from dermis.image_metadata import origin_of
from dermis.imaging import MEDIA_TYPES, animation, contact_sheet
from dermis.latent_neighbours import w_neighbour
from dermis.latents import partner_z, z_for
from services.gateway.auth.authentication import requires
from services.gateway.auth.principal import Principal
from services.gateway.dependencies import (
    Context,
    ContextDep,
    choose_media_type,
    model_header,
    read_model,
    served_bundle,
)
from services.gateway.openapi import GENERATION_PROBLEMS, content, headers, json_body, problems
from services.gateway.sampling import check_classes, check_cutoff, encoder, generate_within_limits
from services.gateway.schemas.common import model_ref
from services.gateway.schemas.edits import EditedImage, EditedList, EditedSample
from services.gateway.schemas.latent_images import InterpolationRequest, NeighboursRequest

router = APIRouter(prefix="/v1/edits", tags=["edits"])

_Sender = Annotated[Principal, requires("edits")]
_Body = InterpolationRequest | NeighboursRequest
_JSON, _GIF = "application/json", "image/gif"
_IMAGE_TYPES = tuple(MEDIA_TYPES.values())
_COLUMNS = 8  # of a sheet
_PROBLEMS = problems(*GENERATION_PROBLEMS)
_CONTENT = {"content": content(*_IMAGE_TYPES, _GIF), "headers": headers("X-Dermis-Model")}


@router.post(
    "/interpolations",
    summary="Generate images between two samples",
    response_model=EditedList,
    openapi_extra=json_body("InterpolationRequest"),
    responses={
        200: {
            "description": "As /v1/edits: `strength` is the place between the samples, from 0 to 1. A GIF shows the images "
            "forwards and then backwards.",
            **_CONTENT,
        },
        **_PROBLEMS,
    },
)
async def interpolate(request: Request, context: ContextDep, principal: _Sender) -> Response:
    """Generate images on the straight line in w between two samples, which are the first and the last image."""
    body = await read_model(request, InterpolationRequest)
    places = [place / (body.images - 1) for place in range(body.images)]

    async def latents(bundle: Bundle) -> NDArray[np.float32]:
        start, end = await _ws_of(context, bundle, body, [body.start, body.end])
        return np.stack([(1 - place) * start + place * end for place in places]).astype(np.float32)

    named = [("start", body.start), ("end", body.end)]
    return await _answer(request, context, principal, body, named, "images", [(0, place) for place in places], latents)


@router.post(
    "/neighbours",
    summary="Generate images in the neighbourhood of a sample",
    response_model=EditedList,
    openapi_extra=json_body("NeighboursRequest"),
    responses={
        200: {"description": "As /v1/edits: `sample` is the number of the neighbour, from 0.", **_CONTENT},
        **_PROBLEMS,
    },
)
async def list_neighbours(request: Request, context: ContextDep, principal: _Sender) -> Response:
    """Generate images whose w have a given distance to that of a sample. Neighbour i of a sample is always the same image."""
    body = await read_model(request, NeighboursRequest)

    async def latents(bundle: Bundle) -> NDArray[np.float32]:
        sample, z_dim = body.sample, bundle.generator.z_dim
        partners = np.stack([partner_z(sample.seed, sample.index, number, z_dim) for number in range(body.count)])
        z = np.concatenate([z_for(sample.seed, [sample.index], z_dim), partners])
        labels = [_label(bundle, sample)] * len(z)
        generator = context.inference.generator
        ws = await generator.map(bundle, z, labels, body.truncation_psi, body.truncation_cutoff)
        mean = (await generator.map(bundle, z[:1], labels[:1], 0.0, None))[0, 0]
        return np.stack([w_neighbour(ws[0], mean, partner, body.distance) for partner in ws[1:]])

    places = [(number, None) for number in range(body.count)]
    return await _answer(request, context, principal, body, [("sample", body.sample)], "count", places, latents)


async def _ws_of(context: Context, bundle: Bundle, body: _Body, samples: Sequence[EditedSample]) -> NDArray[np.float32]:
    """ws [N, num_ws, w_dim] of samples."""
    z = np.concatenate([z_for(sample.seed, [sample.index], bundle.generator.z_dim) for sample in samples])
    labels = [_label(bundle, sample) for sample in samples]
    return await context.inference.generator.map(bundle, z, labels, body.truncation_psi, body.truncation_cutoff)


def _label(bundle: Bundle, sample: EditedSample) -> int:
    return list(classes_of(bundle)).index(sample.class_)


async def _answer(
    request: Request,
    context: Context,
    principal: Principal,
    body: _Body,
    named: Sequence[tuple[str, EditedSample]],
    counted: str,
    places: Sequence[tuple[int, float | None]],
    latents: Callable[[Bundle], Awaitable[NDArray[np.float32]]],
) -> Response:
    """Generate the images of latents, and answer with them.

    Args:
        request: The request.
        context: The context of the routes.
        principal: The sender.
        body: The body.
        named: The samples by field; the first one has the noise.
        counted: The field that says how many images there are.
        places: `sample` and `strength` of each image.
        latents: Computes ws [len(places), num_ws, w_dim].
    """
    preferred = MEDIA_TYPES[body.image_format]
    offers = [_JSON, preferred, *(kind for kind in _IMAGE_TYPES if kind != preferred), _GIF]
    media_type = choose_media_type(request, offers)
    encode_image = encoder(context, body.provenance)
    bundle = await served_bundle(context, principal, body.model)
    check_classes({f"{field}.class": sample.class_ for field, sample in named}, bundle)
    check_cutoff(body.truncation_cutoff, bundle)
    if len(places) > context.settings.max_images:
        message = f"{len(places)} images requested; at most {context.settings.max_images} in one call"
        raise RequestError(counted, message, "request-too-large")
    first = named[0][1]

    async def generate() -> list[NDArray[np.uint8]]:
        ws = await latents(bundle)
        noise_of = (first.seed, first.index) if body.noise_mode == "random" else None
        return await context.inference.generator.draw(bundle, ws, body.noise_mode, noise_of)

    generated = await generate_within_limits(context, request, principal, bundle, len(places), generate)
    origin = origin_of(bundle)  # without seed and index, which name the image of a sample

    def encoded() -> bytes:
        images = np.stack(generated)
        if media_type == _GIF:
            return animation(np.concatenate([images, images[-2:0:-1]]), body.frame_ms, origin)
        if media_type != _JSON:
            image_format = next(name for name, kind in MEDIA_TYPES.items() if kind == media_type)
            sheet = images[0] if len(images) == 1 else contact_sheet(images, columns=_COLUMNS)
            return encode_image(sheet, image_format, body.image_quality, origin).data
        rows = []
        for (sample, strength), image in zip(places, images, strict=True):
            file = encode_image(image, body.image_format, body.image_quality, origin)
            rows.append(
                EditedImage(
                    sample=sample,
                    strength=strength,
                    media_type=preferred,
                    sha256=hashlib.sha256(file.data).hexdigest(),
                    canonical_sha256=file.canonical_sha256,
                    b64=base64.b64encode(file.data).decode("ascii"),
                )
            )
        return EditedList(model=model_ref(bundle), data=rows).model_dump_json().encode()

    data = await context.image_threads.run(encoded)
    return Response(data, media_type=media_type, headers=model_header(bundle) | {"Vary": "Accept"})
