"""/v1/projections: find the latents of real images, as a job in the background."""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from dermis.dataset.request import classes_of
from dermis.errors import RequestError
from dermis.projection.schedule import SCHEDULES
from services.gateway.audit import leave_out
from services.gateway.auth.authentication import requires
from services.gateway.auth.principal import Principal
from services.gateway.dependencies import (
    Context,
    ContextDep,
    IdempotencyKey,
    ModelQuery,
    count_pixels,
    is_job_id,
    served_bundle,
)
from services.gateway.files import MEDIA_TYPES, file_response
from services.gateway.openapi import UPLOAD_PROBLEMS, content, headers, image_body, problems
from services.gateway.schemas.projections import PREVIEW_PREFIX, ProjectionJob, preview_name, projection_of
from services.gateway.uploads import Limit
from services.jobs.context import FileInfo
from services.jobs.projection import ProjectionOptions
from services.jobs.table import Job
from services.problems import ProblemError

router = APIRouter(prefix="/v1/projections", tags=["projections"])

_Sender = Annotated[Principal, requires("projections")]


@router.post(
    "",
    status_code=202,
    summary="Project images",
    description="""Find the latents whose images are nearest to the uploaded images. Send `multipart/form-data` with one part
called `files` for each image, or one image as the body.

The response is sent at once. The job runs in the background for some seconds an image, and continues after crashes and
restarts. Until it has ended, the images are stored as squares at the resolution of the generator, in the folder of the job
and nowhere else; then they are removed. The results are kept until they are deleted or expire. There is no list of
projections: only callers of the same tenant who know the id of a projection can read it.""",
    response_model=ProjectionJob,
    openapi_extra=image_body("files"),
    responses={
        202: {
            "description": "The projection; it is queued, or in a later state if the idempotency key was used before",
            "headers": headers("Location"),
            "links": {
                name: {"operationId": name, "parameters": {"projection_id": "$response.body#/id"}}
                for name in ("get_projection", "delete_projection")
            },
        },
        **problems(
            *UPLOAD_PROBLEMS,
            "unknown-model",
            "idempotency-conflict",
            "unknown-class",
            "quota-exceeded",
            "too-many-requests",
            "not-ready",
            "model-unavailable",
            "storage-full",
        ),
    },
)
async def create_projection(
    request: Request,
    response: Response,
    context: ContextDep,
    principal: _Sender,
    key: IdempotencyKey,
    model: ModelQuery = None,
    schedule: Annotated[
        Literal["fast", "official"],
        Query(description="fast, or official: 1,000 steps in w from the mean, as StyleGAN2."),
    ] = "fast",
    steps: Annotated[int | None, Query(ge=1, le=10_000, description="Default: that of the schedule.")] = None,
    space: Annotated[Literal["w", "w+"] | None, Query(description="Default: that of the schedule.")] = None,
    start: Annotated[
        Literal["mean", "encoder"] | None,
        Query(description="Default: the encoder for fast if the model has one, otherwise the mean."),
    ] = None,
    class_name: Annotated[
        str | None,
        Query(
            alias="class",
            max_length=200,
            description="Class of all images. Default: for each image, the class whose mean is nearest.",
        ),
    ] = None,
    video: Annotated[bool, Query(description="Whether to make a GIF of the optimisation of each image.")] = False,
) -> ProjectionJob:
    """Start projecting images."""
    settings = context.settings
    if settings.max_projection_images == 0:
        raise RequestError("files", "this service makes no projections")
    bundle = await served_bundle(context, principal, model)
    if class_name is not None and class_name not in classes_of(bundle):
        raise RequestError("class", f"unknown class; this model has {', '.join(classes_of(bundle))}", "unknown-class")
    if start == "encoder" and bundle.encoder is None:
        raise RequestError("start", f"{bundle.name} has no encoder; start from the mean")
    if bundle.generator.img_channels != 3:
        raise RequestError("model", f"{bundle.name} generates grey images; only colour models can be projected to")
    base = SCHEDULES[schedule]
    step_count = steps or base.steps
    if step_count > settings.max_projection_steps:
        message = f"at most {settings.max_projection_steps} steps are allowed for one image"
        raise RequestError("steps", message, "request-too-large")
    with context.limits.uploads.hold(principal.tenant):
        limit = Limit(settings.max_projection_images, " of a projection")
        admit = partial(count_pixels, context, request, principal)
        images = await context.uploads.images(request, bundle.generator.img_resolution, limit, admit)
        options = ProjectionOptions(
            schedule=schedule,
            steps=step_count,
            space=space or base.space,
            start=start or ("encoder" if schedule == "fast" and bundle.encoder is not None else "mean"),
            class_name=class_name,
            video=video,
            images=len(images),
        )
        job = await asyncio.to_thread(context.projections.submit, principal.tenant, bundle, options, images, key)
    await context.quotas.show(request, principal, "projections_per_day")
    response.headers["Location"] = f"/v1/projections/{job.id}"
    return await _body_of(context, job)


@router.get("/{projection_id}", summary="Show a projection", responses=problems("not-found", "not-ready"))
async def get_projection(
    projection_id: str, request: Request, context: ContextDep, principal: _Sender
) -> ProjectionJob:
    """Show the state and progress of a projection, and its results once it has succeeded."""
    job = await find_projection(context, principal, projection_id)
    if job.state != "succeeded":
        leave_out(request)
    return await _body_of(context, job)


@router.delete(
    "/{projection_id}",
    status_code=204,
    summary="Delete a projection",
    responses={
        204: {"description": "It is deleted; if it was active, its last files are removed within seconds"},
        **problems("not-found", "not-ready"),
    },
)
async def delete_projection(projection_id: str, context: ContextDep, principal: _Sender) -> Response:
    """Delete a projection with all its files, whether or not it has ended."""
    job = await find_projection(context, principal, projection_id)
    await asyncio.to_thread(context.projections.cancel_or_delete, job)
    return Response(status_code=204)


@router.get(
    "/{projection_id}/files/{name}",
    summary="Download a file of a projection",
    response_class=Response,
    responses={
        200: {
            "description": "The file",
            "content": content(*MEDIA_TYPES),
            "headers": headers("ETag", "Accept-Ranges", "Content-Disposition"),
        },
        206: {"description": "The bytes that the Range header names", "content": content(*MEDIA_TYPES)},
        304: {"description": "The file has not changed"},
        **problems("not-found", "overloaded", "not-ready", "projection-not-ready", "range-not-satisfiable"),
    },
)
async def download_projection_file(
    projection_id: str, name: str, request: Request, context: ContextDep, principal: _Sender
) -> Response:
    """Download latents, an image or a video; of a running projection the current image."""
    if name.startswith(PREVIEW_PREFIX):
        return await _current_image(context, principal, projection_id, name, request.headers)
    job = await ready_projection(context, principal, projection_id)
    # The name is only compared with those in the list of the job, and never used as a path.
    info = await context.storage_threads.run(context.projections.file, job, name)
    if info is None:
        raise ProblemError("not-found", f"the projection has no such file; /v1/projections/{job.id} lists them")
    return file_response(
        info,
        request.headers,
        lambda: context.projections.open(job, info),
        context.storage_threads,
        download=context.limits.downloads.hold(principal.tenant),
    )


async def _current_image(
    context: Context, principal: Principal, projection_id: str, name: str, headers: Mapping[str, str]
) -> Response:
    """A preview of a running projection. It is answered from memory, because the stored one may be replaced meanwhile."""
    job = await find_projection(context, principal, projection_id)
    found = await context.storage_threads.run(context.projections.previews, job) if job.state == "running" else []
    image = next((preview.image for preview in found if preview_name(preview.index) == name), None)
    if image is None:
        raise ProblemError(
            "not-found", f"the projection has no such preview at the moment; /v1/projections/{job.id} lists them"
        )
    info = FileInfo(name, len(image), hashlib.sha256(image).hexdigest())
    more = {"Cache-Control": "no-store"}
    return file_response(info, headers, lambda: io.BytesIO(image), context.storage_threads, inline=True, more=more)


async def find_projection(context: Context, principal: Principal, projection_id: str) -> Job:
    """The job with this id, of the sender's tenant.

    Raises:
        ProblemError: The tenant has no such projection, or it was deleted and is being stopped.
    """
    job = None
    if is_job_id(projection_id):
        job = await asyncio.to_thread(context.projections.get, principal.tenant, projection_id)
    if job is None or job.state in ("cancelling", "cancelled"):
        raise ProblemError("not-found", f"there is no projection {projection_id[:100]}")
    return job


async def ready_projection(context: Context, principal: Principal, projection_id: str) -> Job:
    """The job with this id, of the sender's tenant, which has succeeded.

    Raises:
        ProblemError: The tenant has no such projection, or it has not succeeded.
    """
    job = await find_projection(context, principal, projection_id)
    if job.state != "succeeded":
        raise ProblemError(
            "projection-not-ready", f"the projection is {job.state}; its results exist once it has succeeded"
        )
    return job


async def _body_of(context: Context, job: Job) -> ProjectionJob:
    results = await context.storage_threads.run(context.projections.results, job) if job.state == "succeeded" else None
    previews = await context.storage_threads.run(context.projections.previews, job) if job.state == "running" else None
    return projection_of(job, results, context.settings.projection_keep_seconds, previews)
