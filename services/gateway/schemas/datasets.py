"""Bodies of `/v1/datasets`."""

from __future__ import annotations

import datetime
from typing import Literal

from pydantic import ConfigDict, Field

from dermis.dataset.request import DatasetRequest, stored_request
from services.gateway.schemas.common import ModelRef, ResponseBody, utc_time, utc_time_or_none
from services.jobs.table import Job
from services.problems import Problem

State = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]


class Progress(ResponseBody):
    """Progress of a dataset."""

    samples_done: int
    samples_total: int
    shards_done: int
    shards_total: int
    images_per_second: float | None = Field(
        description="Mean of the last seconds; mean of the whole run once it has ended."
    )
    eta_seconds: float | None


class DatasetLinks(ResponseBody):
    """Paths of a dataset's resources."""

    self_: str = Field(alias="self", serialization_alias="self")
    events: str
    files: str

    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class Dataset(ResponseBody):
    """A dataset job."""

    id: str = Field(pattern=r"^ds_[0-9a-f]{32}$")
    object: Literal["dataset"] = "dataset"
    state: State
    request: DatasetRequest
    model: ModelRef
    progress: Progress
    created_at: datetime.datetime
    started_at: datetime.datetime | None
    finished_at: datetime.datetime | None
    expires_at: datetime.datetime | None = Field(
        description="Time at which the dataset is deleted with its files; null if it is kept, and before it has ended."
    )
    error: Problem | None
    links: DatasetLinks


class DatasetList(ResponseBody):
    """A page of datasets, newest first."""

    object: Literal["list"] = "list"
    data: list[Dataset]
    next_cursor: str | None = Field(description="Value of `cursor` for the next page; null on the last page.")


class DatasetFile(ResponseBody):
    """One file of a finished dataset."""

    name: str
    bytes: int
    sha256: str
    media_type: str
    url: str


class DatasetFileList(ResponseBody):
    """The files of a finished dataset."""

    object: Literal["list"] = "list"
    data: list[DatasetFile]


def dataset_of(job: Job, expires_at: float | None) -> Dataset:
    """The body that describes a dataset job.

    Args:
        job: The job.
        expires_at: Time at which it is deleted, seconds since 1970; None if it is kept.
    """
    path = f"/v1/datasets/{job.id}"
    return Dataset(
        id=job.id,
        state=job.state,  # type: ignore[arg-type]
        request=stored_request(job.request),
        model=ModelRef(name=job.model_name, digest=job.model_digest),
        progress=Progress(
            samples_done=job.samples_done,
            samples_total=job.samples_total,
            shards_done=job.shards_done,
            shards_total=job.shards_total,
            images_per_second=_rounded(job.images_per_second),
            eta_seconds=_rounded(job.eta_seconds),
        ),
        created_at=utc_time(job.created_at),
        started_at=utc_time_or_none(job.started_at),
        finished_at=utc_time_or_none(job.finished_at),
        expires_at=utc_time_or_none(expires_at),
        error=None if job.error is None else Problem.model_validate(job.error),
        links=DatasetLinks(**{"self": path, "events": f"{path}/events", "files": f"{path}/files"}),
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
