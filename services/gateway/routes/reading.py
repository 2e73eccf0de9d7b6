"""/v1/reading: a reader of a study, and /study, the page for readers.

The secret of an invitation is in the fragment of the page's address, which browsers send to nobody. The page sends it in the
header Authorization, so it is in no log of a server or a proxy.
"""

from __future__ import annotations

import asyncio
from importlib.resources import files
from typing import Annotated

from fastapi import APIRouter, Path
from starlette.requests import Request
from starlette.responses import Response

from services.gateway.auth.invited import Reader, invited
from services.gateway.dependencies import ContextDep, read_model
from services.gateway.openapi import JSON_PROBLEMS, content, json_body, problems
from services.gateway.schemas.studies import AnswerRequest, Progress, Reading, reading_body
from services.problems import ProblemError
from services.studies.service import AHEAD
from services.studies.table import StudyStateError

router = APIRouter(tags=["reading"])

_Reader = Annotated[Reader, invited()]
_Position = Annotated[int, Path(ge=1, le=100_000, description="Position of the image in the order of the reader.")]
_PRIVATE = {"Cache-Control": "no-store"}
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src blob: data:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_MEDIA_TYPES = {"index.html": "text/html", "reader.css": "text/css", "reader.js": "text/javascript"}


@router.get("/v1/reading", summary="Show the study of an invitation", responses=problems("not-ready"))
async def get_reading(response: Response, context: ContextDep, reader: _Reader) -> Reading:
    """Show the study, and the answers that this reader has given."""
    response.headers.update(_PRIVATE)
    answers = await asyncio.to_thread(context.studies.table.answers_of, reader.invitation.id)
    return reading_body(reader.study, reader.invitation, answers)


@router.get(
    "/v1/reading/images/{position}",
    summary="Show an image of the study",
    response_class=Response,
    responses={
        200: {"description": "The image.", "content": content("image/png")},
        **problems("not-found", "invalid-request", "answer-order", "study-state", "overloaded", "not-ready"),
    },
)
async def get_reading_image(position: _Position, context: ContextDep, reader: _Reader) -> Response:
    """Show an image in the order of this reader: one that has an answer, the next one, or the one after that.

    All images of a study are PNG files of the same length without metadata. They are shown while the study is open.
    """
    study, studies = reader.study, context.studies
    if study.state in ("collecting", "preparing"):
        raise StudyStateError("the images of the study are being prepared; try again in a moment")
    if study.state != "open":
        raise StudyStateError("the study has ended; its images are not shown any more")
    if position > study.images:
        raise ProblemError("not-found", f"the study has {study.images} images")
    answered = await asyncio.to_thread(studies.table.answered, reader.invitation.id)
    if position > answered + 1 + AHEAD:
        raise ProblemError("answer-order", f"image {answered + 1} has no answer yet; answer it first")
    number = studies.image_of(study, reader.invitation, position - 1)
    with context.limits.study_images.hold(study.tenant):
        data = await context.storage_threads.run(studies.picture, study, number)
    return Response(data, media_type="image/png", headers=_PRIVATE)


@router.put(
    "/v1/reading/answers/{position}",
    summary="Answer an image of the study",
    response_model=Progress,
    openapi_extra=json_body("AnswerRequest"),
    responses=problems(*JSON_PROBLEMS, "not-found", "answer-order", "study-state", "not-ready"),
)
async def put_reading_answer(position: _Position, request: Request, context: ContextDep, reader: _Reader) -> Progress:
    """Store an answer, or replace an earlier one to the same image."""
    study, studies = reader.study, context.studies
    body = await read_model(request, AnswerRequest)
    if position > study.images:
        raise ProblemError("not-found", f"the study has {study.images} images")
    answered = await asyncio.to_thread(
        studies.table.answer,
        reader.invitation,
        position - 1,
        studies.image_of(study, reader.invitation, position - 1),
        body.answer,
        body.confidence,
        body.seconds,
    )
    return Progress(answered=answered, images=study.images)


@router.get("/study", include_in_schema=False)
def reader_page() -> Response:
    """The page for readers. It contains nothing of a study."""
    return _asset("index.html")


@router.get("/study/reader.css", include_in_schema=False)
def reader_style() -> Response:
    """The look of the page."""
    return _asset("reader.css")


@router.get("/study/reader.js", include_in_schema=False)
def reader_script() -> Response:
    """The program of the page."""
    return _asset("reader.js")


def _asset(name: str) -> Response:
    data = files("services.gateway").joinpath("reader_page", name).read_bytes()
    headers = {
        "Content-Security-Policy": _PAGE_POLICY,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Robots-Tag": "noindex",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }
    return Response(data, media_type=_MEDIA_TYPES[name], headers=headers)
