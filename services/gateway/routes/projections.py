"""/v1/projections: real images to latents, as a job in the background."""

from __future__ import annotations

import asyncio
import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from dermis.dataset.request import classes_of
from dermis.errors import RequestError
from dermis.projection.schedule import SCHEDULES
from services.gateway.dependencies import Context, ContextDep, IdempotencyKey, is_job_id
from services.gateway.files import MEDIA_TYPES, file_response
from services.gateway.latent_schemas import ProjectedImage, ProjectionJob, ProjectionProgress
from services.gateway.openapi import content, headers, image_body, problems
from services.gateway.schemas import ModelRef
from services.gateway.uploads import Limit
from services.jobs.projection import IMAGES_PER_SHARD, ProjectionOptions
from services.jobs.table import Job
from services.problems import Problem, ProblemError
from services.settings import Settings

router = APIRouter(prefix="/v1/projections", tags=["projections"])


@router.post(
    "",
    status_code=202,
    summary="Project images",
    description="""Find the latents whose images come nearest to the images that are sent, as `multipart/form-data` with one
part called `files` for each, or one image as the body.

The answer comes at once; the work goes on through crashes and restarts, for seconds an image. Until the job has ended the
images are kept, as squares at the generator's resolution, in the job's folder and nowhere else; then they are removed. The
results are kept until they are deleted or expire. Only who knows a projection's id can find it: there is no list.""",
    response_model=ProjectionJob,
    openapi_extra=image_body("files"),
    responses={
        202: {
            "description": "The projection, queued or further",
            "headers": headers("Location"),
            "links": {
                name: {"operationId": name, "parameters": {"projection_id": "$response.body#/id"}}
                for name in ("get_projection", "delete_projection")
            },
        },
        **problems(
            "bad-request",
            "unknown-model",
            "idempotency-conflict",
            "upload-timeout",
            "too-large",
            "image-too-large",
            "unsupported-media-type",
            "invalid-request",
            "unknown-class",
            "request-too-large",
            "unusable-image",
            "too-many-requests",
            "overloaded",
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
    key: IdempotencyKey,
    model: Annotated[
        str | None, Query(max_length=64, description="Name of a served bundle; the default one if left out.")
    ] = None,
    schedule: Annotated[
        Literal["fast", "official"], Query(description="fast, or StyleGAN2's: 1,000 steps in w from the mean.")
    ] = "fast",
    steps: Annotated[int | None, Query(ge=1, le=10_000, description="Default: as the schedule has it.")] = None,
    space: Annotated[Literal["w", "w+"] | None, Query(description="Default: as the schedule has it.")] = None,
    start: Annotated[
        Literal["mean", "encoder"] | None,
        Query(description="Default: the encoder for fast, where the model has one, else the mean."),
    ] = None,
    class_name: Annotated[
        str | None,
        Query(
            alias="class", max_length=200, description="Of all images. Default: the class whose mean image is nearest."
        ),
    ] = None,
    video: Annotated[bool, Query(description="Also a GIF of each image's way.")] = False,
) -> ProjectionJob:
    """Start projecting images."""
    settings = context.settings
    if settings.max_projection_images == 0:
        raise RequestError("files", "this service makes no projections")
    bundle = await asyncio.to_thread(context.models.serving, model or context.models.default)
    if class_name is not None and class_name not in classes_of(bundle):
        raise RequestError("class", f"unknown class; this model has {', '.join(classes_of(bundle))}", "unknown-class")
    if start == "encoder" and bundle.encoder is None:
        raise RequestError("start", f"{bundle.name} has no encoder; start from the mean")
    if bundle.generator.img_channels != 3:
        raise RequestError("model", f"{bundle.name} draws grey images; only colour models can be projected to")
    base = SCHEDULES[schedule]
    wanted_steps = steps or base.steps
    if wanted_steps > settings.max_projection_steps:
        message = f"at most {settings.max_projection_steps} steps are made of one image"
        raise RequestError("steps", message, "request-too-large")
    with context.limits.uploads.hold():
        limit = Limit(settings.max_projection_images, " of a projection")
        images = await context.uploads.images(request, bundle.generator.img_resolution, limit)
        options = ProjectionOptions(
            schedule=schedule,
            steps=wanted_steps,
            space=space or base.space,
            start=start or ("encoder" if schedule == "fast" and bundle.encoder is not None else "mean"),
            class_name=class_name,
            video=video,
            images=len(images),
        )
        job = await asyncio.to_thread(context.projections.submit, bundle, options, images, key)
    response.headers["Location"] = f"/v1/projections/{job.id}"
    return await _shown(context, job)


@router.get("/{projection_id}", summary="Show a projection", responses=problems("not-found", "not-ready"))
async def get_projection(projection_id: str, context: ContextDep) -> ProjectionJob:
    """State and progress; once it has succeeded, the results."""
    return await _shown(context, await find_projection(context, projection_id))


@router.delete(
    "/{projection_id}",
    status_code=204,
    summary="Delete a projection",
    responses={
        204: {"description": "It is gone; if it was at work, its last files go within seconds"},
        **problems("not-found", "not-ready"),
    },
)
async def delete_projection(projection_id: str, context: ContextDep) -> Response:
    """Delete a projection with all its files, whether or not it has ended."""
    await find_projection(context, projection_id)
    await asyncio.to_thread(context.projections.cancel_or_delete, projection_id)
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
        206: {"description": "The bytes that the Range header asks for", "content": content(*MEDIA_TYPES)},
        304: {"description": "The file is the one that you have"},
        **problems("not-found", "not-ready", "projection-not-ready", "range-not-satisfiable"),
    },
)
async def download_projection_file(projection_id: str, name: str, request: Request, context: ContextDep) -> Response:
    """Latents, image or video."""
    job = await ready_projection(context, projection_id)
    # Looked up in the job's list: a name never becomes a path that is not in it.
    info = await asyncio.to_thread(context.projections.file, job, name)
    if info is None:
        raise ProblemError("not-found", f"the projection has no such file; /v1/projections/{job.id} lists them")
    return file_response(info, request.headers, lambda: context.projections.open(job, info.name), head=False)


async def find_projection(context: Context, projection_id: str) -> Job:
    """The job, or the problem that there is none: one that was deleted at work is gone at once."""
    job = await asyncio.to_thread(context.projections.get, projection_id) if is_job_id(projection_id) else None
    if job is None or job.state in ("cancelling", "cancelled"):
        raise ProblemError("not-found", f"there is no projection {projection_id[:100]}")
    return job


async def ready_projection(context: Context, projection_id: str) -> Job:
    """The job if it has succeeded, or the problem that it has not."""
    job = await find_projection(context, projection_id)
    if job.state != "succeeded":
        raise ProblemError(
            "projection-not-ready", f"the projection is {job.state}; its results exist once it has succeeded"
        )
    return job


async def _shown(context: Context, job: Job) -> ProjectionJob:
    """A job as the API shows it."""
    options = ProjectionOptions.model_validate(job.request)
    data = None
    if job.state == "succeeded":
        rows = await asyncio.to_thread(context.projections.results, job)
        kinds = {"safetensors": "latents", "png": "image", "gif": "video"}
        data = [
            ProjectedImage(
                **{
                    **row,
                    "files": {
                        kinds[name.rpartition(".")[2]]: f"/v1/projections/{job.id}/files/{name}"
                        for name in row["files"]
                    },
                }
            )
            for row in rows
        ]
    ended = _time(job.finished_at)
    created = _time(job.created_at)
    assert created is not None
    return ProjectionJob(
        id=job.id,
        state=job.state,  # type: ignore[arg-type]
        schedule=options.schedule,
        steps=options.steps,
        space=options.space,
        start=options.start,
        model=ModelRef(name=job.model_name, digest=job.model_digest),
        progress=ProjectionProgress(
            images_done=min(options.images, job.shards_done * IMAGES_PER_SHARD),
            images_total=options.images,
            steps_done=job.samples_done,
            steps_total=job.samples_total,
            eta_seconds=None if job.eta_seconds is None else round(job.eta_seconds, 1),
        ),
        created_at=created,
        started_at=_time(job.started_at),
        finished_at=ended,
        expires_at=_expiry(context.settings, ended),
        error=None if job.error is None else Problem.model_validate(job.error),
        data=data,
    )


def _expiry(settings: Settings, ended: datetime.datetime | None) -> datetime.datetime | None:
    return None if ended is None else ended + datetime.timedelta(seconds=settings.projection_keep_seconds)


def _time(seconds: float | None) -> datetime.datetime | None:
    return None if seconds is None else datetime.datetime.fromtimestamp(seconds, datetime.UTC)
