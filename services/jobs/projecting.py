"""What a projection job does: a shard is a handful of images that are projected at once, the finish lists what there is.

Uploaded images lie in the job's folder, as squares at the generator's resolution, until the job has ended; then they are
removed. Nothing else keeps them.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from dermis.bundle import Bundle
from dermis.dataset.request import classes_of
from dermis.dataset.store import PARTIAL, Store
from dermis.errors import DataError
from dermis.imaging import decode, encode
from dermis.projection.result import facts_of, from_bytes
from dermis.projection.schedule import SCHEDULES, Schedule, Space, Start
from services.errors import DatabaseUnavailableError, InferenceFailedError, InferenceUnavailableError
from services.jobs.table import Job
from services.jobs.workshop import StoppedError, Workshop, ask, must_stop, patiently, retry_transient
from services.projections import Projected, Task

SHARD = 8
LISTING = "projections.json"
_TELL_SECONDS = 1.0


class ProjectionOptions(BaseModel):
    """What a projection job was asked for, its images aside."""

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
        """All of the schedule."""
        base = SCHEDULES[self.schedule]
        return Schedule(
            **{**base.__dict__, "steps": self.steps, "space": self.space, "start": self.start},
        )


def shards_of(images: int) -> int:
    """Shards of a job of so many images."""
    return -(-images // SHARD)


def write_inputs(store: Store, images: Sequence[NDArray[np.uint8]]) -> None:
    """Put uint8 squares [R, R, 3] where the work finds them."""
    for number, image in enumerate(images):
        store.write(_input(number), encode(image))


def has_inputs(store: Store, options: ProjectionOptions) -> bool:
    """Whether `write_inputs` came to its end."""
    return all(store.size(_input(number)) is not None for number in range(options.images))


def make_shard(shop: Workshop, job: Job, shard: int) -> None:
    """Project the images of a shard, unless their results are there. StoppedError if the job is to stop."""
    options = ProjectionOptions.model_validate(job.request)
    bundle = shop.models.serving(job.model_name, job.model_digest)
    store = shop.retrying_store(job.id)
    numbers = range(shard * SHARD, min((shard + 1) * SHARD, options.images))
    if not all(_is_done(store, number) for number in numbers):
        shop.table.progress(job.id, shard, 0)
        for number, made in zip(numbers, _project(shop, job, shard, bundle, options, store, numbers), strict=True):
            store.write(f"{number:05d}.png", made.image)
            if made.video is not None:
                store.write(f"{number:05d}.gif", made.video)
            store.write(_result(number), made.result)  # the last: an image with it is done
    retry_transient(shop, lambda: shop.table.progress(job.id, shard, len(numbers) * options.steps, finished=True))


def _project(
    shop: Workshop,
    job: Job,
    shard: int,
    bundle: Bundle,
    options: ProjectionOptions,
    store: Store,
    numbers: Sequence[int],
) -> list[Projected]:
    images = np.stack([decode(store.read(_input(number))) for number in numbers])
    label = None if options.class_name is None else classes_of(bundle).index(options.class_name)
    task = Task(options.resolved, options.video)
    ticket = uuid.uuid4().hex
    told = time.monotonic()

    def look() -> None:
        nonlocal told
        if time.monotonic() - told < _TELL_SECONDS:
            return
        told = time.monotonic()
        stop = must_stop(shop, job.id)
        # What the services say of themselves the call itself will say too; without the database the work goes on.
        with suppress(InferenceUnavailableError, InferenceFailedError, DatabaseUnavailableError):
            if stop:
                ask(shop, shop.cancel_projection(ticket))
            else:
                shop.table.progress(job.id, shard, ask(shop, shop.projection_steps(ticket)))
        if stop:
            raise StoppedError

    found: list[Projected] = patiently(
        shop, job.id, lambda: shop.project(bundle, images, [label] * len(images), task, ticket), look
    )
    return found


def finish(shop: Workshop, job: Job) -> None:
    """List the results, and remove the uploaded images."""
    options = ProjectionOptions.model_validate(job.request)
    store = shop.retrying_store(job.id)
    rows = []
    for number in range(options.images):
        found, _ = from_bytes(store.read(_result(number)), _result(number))
        files = [_result(number), f"{number:05d}.png", *([f"{number:05d}.gif"] if options.video else [])]
        rows.append({"index": number, **facts_of(found), "files": files})
    store.write(LISTING, json.dumps(rows).encode())
    store.remove(PARTIAL)


def results(store: Store) -> list[Mapping[str, Any]]:
    """What a job that has succeeded gave: of each image its facts and its files."""
    found: list[Mapping[str, Any]] = json.loads(store.read(LISTING))
    return found


def latents(store: Store, number: int) -> NDArray[np.float32]:
    """ws [num_ws, w_dim] of one image."""
    return from_bytes(store.read(_result(number)), _result(number))[0].ws


def _is_done(store: Store, number: int) -> bool:
    name = _result(number)
    if store.size(name) is None:
        return False
    try:
        from_bytes(store.read(name), name)
    except DataError:
        return False
    return True


def _input(number: int) -> str:
    return f"{PARTIAL}/input-{number:05d}.png"


def _result(number: int) -> str:
    return f"{number:05d}.safetensors"
