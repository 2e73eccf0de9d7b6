"""/v1/datasets/{id}/report: the report of a finished dataset, as JSON or as a page."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from dermis.dataset.manifest import REPORT, REPORT_PAGE
from dermis.html_page import CONTENT_SECURITY_POLICY
from dermis.report.content import DatasetReport
from services.gateway.auth.authentication import requires
from services.gateway.auth.principal import Principal
from services.gateway.dependencies import ContextDep, choose_media_type
from services.gateway.files import file_response
from services.gateway.openapi import headers, problems
from services.gateway.routes.files import ready_job
from services.problems import ProblemError

router = APIRouter(prefix="/v1/datasets/{dataset_id}/report", tags=["datasets"])

_Reader = Annotated[Principal, requires("datasets:read")]

_JSON, _HTML = "application/json", "text/html"
# Beyond what the page itself says: it must not be shown inside of another page, and it is isolated like a foreign one.
_PAGE_HEADERS = {
    "Content-Security-Policy": f"{CONTENT_SECURITY_POLICY}; frame-ancestors 'none'; sandbox",
    "Referrer-Policy": "no-referrer",
}


@router.get(
    "",
    summary="Show the report of a dataset",
    response_class=Response,
    responses={
        200: {
            "description": "The report: JSON, or one HTML page if `format` or the Accept header asks for it",
            "model": DatasetReport,
            "content": {_HTML: {"schema": {"type": "string"}}},
            "headers": headers("ETag", "Accept-Ranges", "Content-Disposition"),
        },
        304: {"description": "The report has not changed"},
        **problems("not-found", "overloaded", "not-ready", "not-acceptable", "invalid-request", "dataset-not-ready"),
    },
)
async def get_report(
    dataset_id: str,
    request: Request,
    context: ContextDep,
    principal: _Reader,
    report_format: Annotated[
        Literal["json", "html"] | None,
        Query(alias="format", description="json or html; takes precedence over the Accept header."),
    ] = None,
) -> Response:
    """Show what was asked for, what made the images, and their fidelity, variety, privacy, artefacts and skin tones."""
    media_type = {"json": _JSON, "html": _HTML}.get(report_format or "") or choose_media_type(request, (_JSON, _HTML))
    job = await ready_job(context, principal, dataset_id)
    name = REPORT_PAGE if media_type == _HTML else REPORT
    files = await context.storage_threads.run(context.jobs.files, job)
    info = next((file for file in files if file.name == name), None)
    if info is None:
        raise ProblemError(
            "not-found",
            "the dataset has no report, because an earlier version of the service made it; create it again to get one",
        )
    more = {"Vary": "Accept", **(_PAGE_HEADERS if media_type == _HTML else {})}
    # Only whole reports: the part of a page or of a JSON document is of no use.
    relevant = {key: value for key, value in request.headers.items() if key != "range"}
    return file_response(
        info,
        relevant,
        lambda: context.jobs.open(job, info),
        context.storage_threads,
        download=context.limits.downloads.hold(principal.tenant),
        inline=True,
        more=more,
    )
