"""/v1/datasets/{id}/files: list and download the files of a finished dataset."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from services.gateway.auth.authentication import requires
from services.gateway.auth.principal import Principal
from services.gateway.dependencies import Context, ContextDep
from services.gateway.files import MEDIA_TYPES, disposition_of, etag_of, file_response, matches, media_type_of
from services.gateway.openapi import Responses, content, headers, problems
from services.gateway.routes.datasets import find_job
from services.gateway.schemas.datasets import DatasetFile, DatasetFileList
from services.jobs.context import FileInfo
from services.jobs.table import Job
from services.problems import ProblemError

router = APIRouter(prefix="/v1/datasets/{dataset_id}/files", tags=["datasets"])

_Reader = Annotated[Principal, requires("datasets:read")]

_FILE_HEADERS = headers("ETag", "Accept-Ranges", "Content-Disposition")
_DOWNLOAD: Responses = {
    200: {"description": "The file", "content": content(*MEDIA_TYPES), "headers": _FILE_HEADERS},
    304: {"description": "The file has not changed"},
    **problems("not-found", "not-ready", "dataset-not-ready"),
}


async def ready_job(context: Context, principal: Principal, dataset_id: str) -> Job:
    """The job of a dataset of the sender's tenant that has succeeded.

    Raises:
        ProblemError: The tenant has no such dataset, or it has not succeeded.
    """
    job = await find_job(context, principal, dataset_id)
    if job.state != "succeeded":
        raise ProblemError("dataset-not-ready", f"the dataset is {job.state}; its files exist once it has succeeded")
    return job


@router.get(
    "", summary="List the files of a dataset", responses=problems("not-found", "not-ready", "dataset-not-ready")
)
async def list_files(dataset_id: str, context: ContextDep, principal: _Reader) -> DatasetFileList:
    """List every file with its size and hash."""
    job = await ready_job(context, principal, dataset_id)
    files = await context.storage_threads.run(context.jobs.files, job)
    return DatasetFileList(
        data=[
            DatasetFile(
                name=file.name,
                bytes=file.bytes,
                sha256=file.sha256,
                media_type=media_type_of(file.name),
                url=f"/v1/datasets/{job.id}/files/{quote(file.name)}",
            )
            for file in files
        ]
    )


@router.get(
    "/{name}",
    summary="Download a file",
    response_class=Response,
    responses={
        **_DOWNLOAD,
        206: {
            "description": "The bytes that the Range header names",
            "content": content(*MEDIA_TYPES),
            "headers": {**_FILE_HEADERS, **headers("Content-Range")},
        },
        307: {
            "description": "The file is at the URL in Location for some time (DERMIS_DOWNLOAD_URL_SECONDS)",
            "headers": headers("Location", "ETag"),
        },
        **problems("not-found", "overloaded", "not-ready", "dataset-not-ready", "range-not-satisfiable"),
    },
)
async def download_file(
    dataset_id: str, name: str, request: Request, context: ContextDep, principal: _Reader
) -> Response:
    """Download a file, or the range of it that a Range header names."""
    return await _file(dataset_id, name, request, context, principal)


@router.head("/{name}", summary="Size and hash of a file", response_class=Response, responses=_DOWNLOAD)
async def head_file(dataset_id: str, name: str, request: Request, context: ContextDep, principal: _Reader) -> Response:
    """Return the headers of a download without the file."""
    return await _file(dataset_id, name, request, context, principal)


async def _file(dataset_id: str, name: str, request: Request, context: Context, principal: Principal) -> Response:
    job = await ready_job(context, principal, dataset_id)
    # The name is only compared with those in the manifest, and never used as a path.
    files = await context.storage_threads.run(context.jobs.files, job)
    info = next((file for file in files if file.name == name), None)
    if info is None:
        raise ProblemError(
            "not-found", f"the dataset has no such file; {request.url.path.rsplit('/', 1)[0]} lists them"
        )
    if request.method == "GET" and context.settings.download_url_seconds and _is_current(request, info):
        media_type, disposition = media_type_of(info.name), disposition_of(info.name)
        url = await context.storage_threads.run(
            context.jobs.signed_url, job, info.name, media_type=media_type, disposition=disposition
        )
        redirect = {"Location": url, "ETag": etag_of(info), "Cache-Control": "no-store"}
        return Response(status_code=307, headers=redirect)
    return file_response(
        info,
        request.headers,
        lambda: context.jobs.open(job, info),
        context.storage_threads,
        download=context.limits.downloads.hold(principal.tenant),
        head=request.method == "HEAD",
    )


def _is_current(request: Request, info: FileInfo) -> bool:
    """Whether If-None-Match and If-Range change nothing. The storage cannot evaluate them, because its ETags are others."""
    etag = etag_of(info)
    if_range = request.headers.get("if-range")
    return not matches(request.headers.get("if-none-match"), etag, weak=True) and (
        if_range is None or matches(if_range, etag, weak=False)
    )
