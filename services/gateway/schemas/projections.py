"""Bodies of `/v1/projections`."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from services.gateway.schemas.common import ModelRef, ResponseBody, utc_time, utc_time_or_none
from services.jobs.projection import IMAGES_PER_SHARD, Preview, ProjectionOptions
from services.jobs.table import Job
from services.problems import Problem


class ProjectionProgress(ResponseBody):
    """Progress of a projection."""

    images_done: int
    images_total: int
    steps_done: int = Field(description="Sum over all images.")
    steps_total: int
    eta_seconds: float | None


class ProjectedImage(ResponseBody):
    """The projection of one image."""

    index: int = Field(ge=0, description="Position of the image in the request, from 0.")
    distance: float = Field(
        description="Distance between the generated image and the uploaded one, in the features that `distance_name` names."
    )
    distance_name: str
    pixel_error: float = Field(description="Root mean square of the pixel differences, 0 to 255.")
    steps: int
    start: str
    space: str
    files: dict[str, str] = Field(
        description="Paths: `latents` (safetensors: ws and image), `image` (PNG of the generated image), `video` (GIF)."
    )


class PreviewDistance(ResponseBody):
    """The distance after a step."""

    step: int
    distance: float


class ProjectionPreview(ResponseBody):
    """An image of a running projection as it is at the moment."""

    index: int = Field(ge=0, description="Position of the image in the request, from 0.")
    step: int = Field(description="Steps that have been done for it.")
    distance: float = Field(
        description="Distance between `file` and the uploaded image. Early steps add noise to the latent."
    )
    distances: list[PreviewDistance] = Field(
        description="Up to 100 of the distances so far, the last one of this step."
    )
    file: str = Field(
        description="Path of the current image (PNG, at most 256 px). Its content changes, and it is removed when the "
        "projection ends."
    )


class ProjectionJob(ResponseBody):
    """A projection job."""

    id: str = Field(pattern=r"^pr_[0-9a-f]{32}$")
    object: Literal["projection"] = "projection"
    state: Literal["queued", "running", "succeeded", "failed"]
    schedule: str
    steps: int
    space: str
    start: str
    model: ModelRef
    progress: ProjectionProgress
    created_at: datetime.datetime
    started_at: datetime.datetime | None
    finished_at: datetime.datetime | None
    expires_at: datetime.datetime | None = Field(
        description="Time at which the projection is deleted with its files; null before it has ended."
    )
    error: Problem | None
    data: list[ProjectedImage] | None = Field(description="One entry for each image; null before it has succeeded.")
    previews: list[ProjectionPreview] | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="The images that are being projected at the moment; only while the state is running.",
    )


PREVIEW_PREFIX = "preview-"
_KINDS_OF_FILES = {"safetensors": "latents", "png": "image", "gif": "video"}


def preview_name(index: int) -> str:
    """The name of the file of a preview."""
    return f"{PREVIEW_PREFIX}{index:05d}.png"


def projection_of(
    job: Job,
    results: Sequence[Mapping[str, Any]] | None,
    keep_seconds: float,
    previews: Sequence[Preview] | None = None,
) -> ProjectionJob:
    """The body that describes a projection job.

    Args:
        job: The job.
        results: One row for each image, with the names of its files; None before the job has succeeded.
        keep_seconds: Time after its end at which the service deletes a projection.
        previews: The current images of a running job.
    """
    options = ProjectionOptions.model_validate(job.request)
    finished = utc_time_or_none(job.finished_at)
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
        created_at=utc_time(job.created_at),
        started_at=utc_time_or_none(job.started_at),
        finished_at=finished,
        expires_at=None if finished is None else finished + datetime.timedelta(seconds=keep_seconds),
        error=None if job.error is None else Problem.model_validate(job.error),
        data=None if results is None else [_projected_image(job.id, row) for row in results],
        previews=None if previews is None else [_preview(job.id, preview) for preview in previews],
    )


def _preview(job_id: str, preview: Preview) -> ProjectionPreview:
    return ProjectionPreview(
        index=preview.index,
        step=preview.step,
        distance=preview.distances[-1][1],
        distances=[PreviewDistance(step=step, distance=distance) for step, distance in preview.distances],
        file=f"/v1/projections/{job_id}/files/{preview_name(preview.index)}",
    )


def _projected_image(job_id: str, row: Mapping[str, Any]) -> ProjectedImage:
    files = {
        _KINDS_OF_FILES[name.rpartition(".")[2]]: f"/v1/projections/{job_id}/files/{name}" for name in row["files"]
    }
    return ProjectedImage(**{**row, "files": files})
