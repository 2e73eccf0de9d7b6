"""The work of a projection job: project the images of a shard at once, and list the results at the end.

This module implements `services.jobs.execution.JobKind`. Uploaded images are kept in the folder of the job, as squares at the
resolution of the generator, until the job has ended; then they are removed, with the previews of its reconstructions. They are
stored nowhere else.
"""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from dermis.bundle import Bundle
from dermis.dataset.request import classes_of
from dermis.dataset.shards import MAX_C2PA_BYTES, max_image_bytes
from dermis.dataset.store import PARTIAL, Store
from dermis.errors import DataError, StorageError
from dermis.image_metadata import origin_of
from dermis.imaging import decode, encode
from dermis.projection.result import fields_of, from_bytes
from dermis.projection.schedule import SCHEDULES, Schedule, Space, Start
from services.errors import DatabaseUnavailableError, InferenceFailedError, InferenceUnavailableError
from services.inference.projections import PREVIEW_DISTANCES, ProjectionFiles, ProjectionPreview, ProjectionTask
from services.jobs.context import (
    JobContext,
    StoppedError,
    call_with_retry,
    must_stop,
    retry_transient,
    run_on_loop,
    stop_if_asked,
)
from services.jobs.table import Job
from services.problems import ProblemError

IMAGES_PER_SHARD = 8
LISTING = "projections.json"
_REPORT_SECONDS = 1.0
_PREVIEWED_SHARDS = 4
# Maximum size of the file of previews of a shard.
_PREVIEW_BYTES = IMAGES_PER_SHARD * (400_000 + 50 * PREVIEW_DISTANCES)
_MAX_FRAMES = 120  # of a video
_RECORD_BYTES = 10_000  # of the list of results, and of the header of the latents


class ProjectionOptions(BaseModel):
    """The request of a projection job, without its images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schedule: Literal["fast", "official"] = "fast"
    steps: int
    space: Space
    start: Start
    class_name: str | None = None
    video: bool = False
    images: int

    @property
    def resolved(self) -> Schedule:
        """The schedule with the options that replace parts of it."""
        base = SCHEDULES[self.schedule]
        return Schedule(
            **{**base.__dict__, "steps": self.steps, "space": self.space, "start": self.start},
        )


@dataclass(frozen=True)
class Preview:
    """An image of a running projection as it is at the moment.

    Attributes:
        index: Position of the image in the request.
        step: Steps that have been done for it.
        distances: (step, distance) of steps so far; the last one is that of `image`.
        image: PNG of the generator's image.
    """

    index: int
    step: int
    distances: Sequence[tuple[int, float]]
    image: bytes


def path(job_id: str) -> str:
    """The path of a projection in the API."""
    return f"/v1/projections/{job_id}"


def shards_of(images: int) -> int:
    """The number of shards of a job with this number of images."""
    return -(-images // IMAGES_PER_SHARD)


def amounts(request: Mapping[str, Any]) -> dict[str, int]:
    """What a projection with this request uses of quotas with a window."""
    return {"projections_per_day": request["images"]}


def max_bytes(options: ProjectionOptions, bundle: Bundle) -> int:
    """An upper estimate of the size of all files of a projection in bytes, the uploaded images included."""
    network = bundle.generator
    pixels = network.img_resolution**2
    picture = max_image_bytes("png", 100, network.img_resolution, origin_of(bundle))
    # ws, the image, and noise maps of which there are two at each resolution.
    latents = 4 * network.num_ws * network.w_dim + 3 * pixels + 11 * pixels
    video = _MAX_FRAMES * (2 * pixels + 1000) if options.video else 0
    previews = min(options.images, IMAGES_PER_SHARD) * _PREVIEW_BYTES // IMAGES_PER_SHARD
    return options.images * (2 * picture + MAX_C2PA_BYTES + latents + video + _RECORD_BYTES) + previews


def write_inputs(store: Store, images: Sequence[NDArray[np.uint8]]) -> None:
    """Store the images of a job, uint8 squares [R, R, 3]."""
    for number, image in enumerate(images):
        store.write(_input_name(number), encode(image))


def has_inputs(ctx: JobContext, job: Job) -> bool:
    """Whether `write_inputs` has stored all images of the job."""
    store = ctx.store(job)
    options = ProjectionOptions.model_validate(job.request)
    return all(store.size(_input_name(number)) is not None for number in range(options.images))


def run_shard(ctx: JobContext, job: Job, shard: int, on_begin: Callable[[], None] = lambda: None) -> None:
    """Project the images of a shard, unless their results are stored.

    Raises:
        StoppedError: If the job is to stop.
    """
    options = ProjectionOptions.model_validate(job.request)
    bundle = ctx.models.serving(job.model_name, job.model_digest)
    store = ctx.retrying_store(job)
    numbers = range(shard * IMAGES_PER_SHARD, min((shard + 1) * IMAGES_PER_SHARD, options.images))
    if not all(_is_done(store, number) for number in numbers):
        on_begin()
        ctx.table.progress(job.id, shard, 0)
        with ctx.projection_turns.of(job.tenant, partial(stop_if_asked, ctx, job.id)):
            projected = _project(ctx, job, shard, bundle, options, store, numbers)
        for number, files in zip(numbers, projected, strict=True):
            origin = origin_of(bundle, "compositeWithTrainedAlgorithmicMedia")
            store.write(f"{number:05d}.png", files.image if ctx.sign is None else ctx.sign(files.image, "png", origin))
            if files.video is not None:
                store.write(f"{number:05d}.gif", files.video)
            store.write(_result_name(number), files.result)  # the last one: an image that has it is done
        store.remove(_preview_name(shard))
    retry_transient(ctx, lambda: ctx.table.progress(job.id, shard, len(numbers) * options.steps, finished=True))


def _project(
    ctx: JobContext,
    job: Job,
    shard: int,
    bundle: Bundle,
    options: ProjectionOptions,
    store: Store,
    numbers: Sequence[int],
) -> list[ProjectionFiles]:
    if not has_inputs(ctx, job):  # the storage was restored without them
        raise ProblemError("upload-interrupted", "its images are not stored any more; send them again")
    images = np.stack([decode(store.read(_input_name(number))) for number in numbers])
    label = None if options.class_name is None else classes_of(bundle).index(options.class_name)
    task = ProjectionTask(options.resolved, options.video)
    ticket = uuid.uuid4().hex
    last_report = time.monotonic()
    last_previews: list[ProjectionPreview] = []

    def report() -> None:
        nonlocal last_report, last_previews
        if time.monotonic() - last_report < _REPORT_SECONDS:
            return
        last_report = time.monotonic()
        stop = must_stop(ctx, job.id)
        # A failure of the service ends the call of `project` itself, and without the database the work continues.
        with suppress(InferenceUnavailableError, InferenceFailedError, DatabaseUnavailableError):
            if stop:
                run_on_loop(ctx, ctx.inference.projector.cancel(ticket))
            else:
                steps, previews = run_on_loop(ctx, ctx.inference.projector.progress(ticket))
                ctx.table.progress(job.id, shard, steps)
                if previews and previews != last_previews:
                    _write_previews(ctx.store(job), shard, numbers, previews)
                    last_previews = previews
        if stop:
            raise StoppedError

    return call_with_retry(
        ctx,
        job.id,
        lambda: ctx.inference.projector.project(bundle, images, [label] * len(images), task, ticket),
        report,
    )


def _write_previews(store: Store, shard: int, numbers: Sequence[int], previews: Sequence[ProjectionPreview]) -> None:
    """Store the previews of a shard in one file, so that images and numbers belong together. A failure changes nothing."""
    rows = [
        {
            "index": numbers[preview.number],
            "step": preview.step,
            "distances": [[step, round(distance, 5)] for step, distance in preview.distances],
            "image": base64.b64encode(preview.image).decode("ascii"),
        }
        for preview in previews
    ]
    with suppress(StorageError):
        store.write(_preview_name(shard), json.dumps(rows).encode())


def previews(store: Store, job: Job) -> list[Preview]:
    """The previews of a running job, by index of the image. Those that are not there yet, or not any more, are left out."""
    found = []
    # Shards begin in order, so those that are running are near the number of those that are finished.
    for shard in range(
        max(0, job.shards_done - _PREVIEWED_SHARDS), min(job.shards_total, job.shards_done + _PREVIEWED_SHARDS)
    ):
        name = _preview_name(shard)
        try:
            rows = json.loads(store.read_if_exists(name, limit=_PREVIEW_BYTES) or b"[]")
        except StorageError:  # the shard has ended meanwhile
            continue
        found += [
            Preview(row["index"], row["step"], [(s, d) for s, d in row["distances"]], base64.b64decode(row["image"]))
            for row in rows
        ]
    return sorted(found, key=lambda preview: preview.index)


def finish(ctx: JobContext, job: Job) -> None:
    """List the results, and remove the uploaded images.

    Images whose results are missing are projected again: database and storage can be restored from different moments.

    Raises:
        StoppedError: If the job is to stop.
    """
    options = ProjectionOptions.model_validate(job.request)
    store = ctx.retrying_store(job)
    if store.size(LISTING) is not None:  # an earlier call ended after this
        store.remove(PARTIAL)
        return
    for shard in range(shards_of(options.images)):
        run_shard(ctx, job, shard)
    rows = []
    for number in range(options.images):
        result, _ = from_bytes(store.read(_result_name(number)), _result_name(number))
        files = [_result_name(number), f"{number:05d}.png", *([f"{number:05d}.gif"] if options.video else [])]
        rows.append({"index": number, **fields_of(result), "files": files})
    store.write(LISTING, json.dumps(rows).encode())
    store.remove(PARTIAL)


def results(store: Store) -> list[Mapping[str, Any]]:
    """The results of a job that has succeeded: one row per image, with the names of its files."""
    rows: list[Mapping[str, Any]] = json.loads(store.read(LISTING))
    return rows


def latents(store: Store, number: int) -> NDArray[np.float32]:
    """ws [num_ws, w_dim] of one image of a job that has succeeded."""
    return from_bytes(store.read(_result_name(number)), _result_name(number))[0].ws


def _is_done(store: Store, number: int) -> bool:
    name = _result_name(number)
    data = store.read_if_exists(name)
    if data is None:
        return False
    try:
        from_bytes(data, name)
    except DataError:
        return False
    return True


def _input_name(number: int) -> str:
    return f"{PARTIAL}/input-{number:05d}.png"


def _preview_name(shard: int) -> str:
    return f"{PARTIAL}/previews-{shard:05d}.json"


def _result_name(number: int) -> str:
    return f"{number:05d}.safetensors"
