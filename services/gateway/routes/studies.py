"""/v1/studies: reader studies, for those who make them. `reading` has the routes of readers."""

from __future__ import annotations

import asyncio
import re
import time
from contextvars import copy_context
from functools import partial
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from services.gateway.audit import describe
from services.gateway.auth.authentication import requires
from services.gateway.auth.principal import Principal
from services.gateway.dependencies import Context, ContextDep, count_pixels, read_model, served_bundle
from services.gateway.openapi import JSON_PROBLEMS, UPLOAD_PROBLEMS, content, headers, image_body, json_body, problems
from services.gateway.schemas.studies import (
    InvitationBody,
    InvitationList,
    InvitationRequest,
    NewInvitation,
    Results,
    StudyBody,
    StudyList,
    StudyRequest,
    UploadedImages,
    invitation_body,
    results_body,
    study_body,
)
from services.problems import ProblemError
from services.quotas import DAY
from services.studies.tables import Study

_PRIVATE = {"Cache-Control": "no-store"}


def _is_private(response: Response) -> None:
    """Let no browser write a response to disk: seeds and votes tell the truth, and invitations have secrets."""
    response.headers.update(_PRIVATE)


router = APIRouter(prefix="/v1/studies", tags=["studies"], dependencies=[Depends(_is_private)])

_Owner = Annotated[Principal, requires("studies")]
_STUDY_ID = re.compile(r"st_[0-9a-f]{32}")
_INVITATION_ID = re.compile(r"[a-z0-9]{12}")
_CSV = "text/csv; charset=utf-8"


@router.post(
    "",
    status_code=201,
    summary="Create a reader study",
    response_model=StudyBody,
    openapi_extra=json_body("StudyRequest"),
    responses={
        201: {"description": "The study.", "headers": headers("Location")},
        **problems(
            *JSON_PROBLEMS,
            "studies-disabled",
            "unknown-model",
            "request-too-large",
            "quota-exceeded",
            "too-many-requests",
            "not-ready",
            "model-unavailable",
            "storage-full",
        ),
    },
)
async def create_study(request: Request, response: Response, context: ContextDep, principal: _Owner) -> StudyBody:
    """Create a blinded study of real and generated images.

    With `real_images` `folder`, its images are prepared in the background at once. With `uploads`, send the real images of
    each class to `/v1/studies/{study_id}/images`, and then open the study.
    """
    if context.settings.max_studies == 0:
        raise ProblemError(
            "studies-disabled", "this service has no reader studies; its operator can set DERMIS_MAX_STUDIES"
        )
    body = await read_model(request, StudyRequest)
    bundle = await served_bundle(context, principal, body.model)
    study = await asyncio.to_thread(
        context.studies.create,
        principal.tenant,
        principal.subject,
        bundle,
        name=body.name,
        images=body.images,
        real_source=body.real_images,
        equal_classes=body.equal_classes,
        truncation_psi=body.truncation_psi,
        seed=body.seed,
        keep_days=body.keep_days,
    )
    response.headers["Location"] = f"/v1/studies/{study.id}"
    return await asyncio.to_thread(_described, context, study)


@router.get("", summary="List the studies", responses=problems("not-ready"))
async def list_studies(context: ContextDep, principal: _Owner) -> StudyList:
    """List the studies of the tenant, newest first."""
    studies = await asyncio.to_thread(context.studies.table.of_tenant, principal.tenant)
    data = await asyncio.to_thread(lambda: [_described(context, study) for study in studies])
    folder = context.settings.study_folder_of(principal.tenant) is not None
    return StudyList(data=data, folder_of_real_images=folder, max_images=context.settings.max_study_images)


@router.get("/{study_id}", summary="Show a study", responses=problems("not-found", "not-ready"))
async def get_study(study_id: str, context: ContextDep, principal: _Owner) -> StudyBody:
    """Show a study and its progress."""
    study = await _find(context, principal, study_id)
    return await asyncio.to_thread(_described, context, study)


@router.delete(
    "/{study_id}",
    status_code=204,
    summary="Delete a study",
    responses={
        204: {"description": "It is deleted, with its images and answers"},
        **problems("not-found", "not-ready"),
    },
)
async def delete_study(study_id: str, context: ContextDep, principal: _Owner) -> Response:
    """Delete a study with its images, invitations and answers."""
    study = await _find(context, principal, study_id)
    await asyncio.to_thread(context.studies.delete, study)
    return Response(status_code=204)


@router.post(
    "/{study_id}/images",
    summary="Upload real images",
    response_model=UploadedImages,
    openapi_extra=image_body("files"),
    responses=problems(
        *UPLOAD_PROBLEMS, "not-found", "study-state", "unknown-class", "quota-exceeded", "not-ready", "storage-full"
    ),
)
async def add_study_images(
    study_id: str,
    request: Request,
    context: ContextDep,
    principal: _Owner,
    class_name: Annotated[
        str | None,
        Query(alias="class", max_length=200, description="Class of these images; needed by models with classes."),
    ] = None,
) -> UploadedImages:
    """Upload real images of one class. They are kept as squares at the resolution of the model until the study is deleted.

    Send `multipart/form-data` with one part called `files` for each image, or one image as the body. Images that the study
    has already are not added again, so a call can be repeated.
    """
    study = await _find(context, principal, study_id)
    with context.limits.uploads.hold(principal.tenant):
        admit = partial(count_pixels, context, request, principal)
        images = await context.uploads.images(request, study.size, None, admit)
    added = await asyncio.to_thread(context.studies.add_uploads, study, class_name, images)
    return UploadedImages(added=added, study=await get_study(study_id, context, principal))


@router.post(
    "/{study_id}/open",
    summary="Open a study",
    responses=problems("not-found", "invalid-request", "study-state", "quota-exceeded", "not-ready", "storage-full"),
)
async def open_study(study_id: str, context: ContextDep, principal: _Owner) -> StudyBody:
    """Choose the images of a study with uploaded real images. They are prepared in the background; then it is open."""
    study = await _find(context, principal, study_id)
    return await asyncio.to_thread(_described, context, await asyncio.to_thread(context.studies.open, study))


@router.post("/{study_id}/close", summary="Close a study", responses=problems("not-found", "study-state", "not-ready"))
async def close_study(study_id: str, context: ContextDep, principal: _Owner) -> StudyBody:
    """Close a study: its readers cannot answer any more. It cannot be opened again."""
    study = await _find(context, principal, study_id)
    return await asyncio.to_thread(_described, context, await asyncio.to_thread(context.studies.table.end, study))


@router.get(
    "/{study_id}/results",
    summary="Show the results of a study",
    responses=problems("not-found", "study-state", "overloaded", "not-ready"),
)
async def get_study_results(study_id: str, context: ContextDep, principal: _Owner) -> Results:
    """Show the results of the answers so far: accuracy, sensitivity, specificity, agreement and times."""
    study = await _find(context, principal, study_id)
    with context.limits.study_results.hold(principal.tenant):
        compute = partial(copy_context().run, context.studies.results, study)
        results = await asyncio.get_running_loop().run_in_executor(context.studies.pool, compute)
        return await asyncio.to_thread(results_body, study, results)


@router.get(
    "/{study_id}/answers",
    summary="Export the answers of a study",
    response_class=Response,
    responses={
        200: {"description": "One row for each answer.", "content": content("application/json", "text/csv")},
        **problems("not-found", "invalid-request", "not-ready"),
    },
)
async def export_study_answers(
    study_id: str,
    context: ContextDep,
    principal: _Owner,
    file_format: Annotated[Literal["json", "csv"], Query(alias="format", description="Format of the rows.")] = "json",
) -> Response:
    """Export every answer with the truth, as JSON or CSV."""
    from services.studies.results import as_csv, as_json

    study = await _find(context, principal, study_id)
    # Row by row of one reader after another: a study can have 400,000 answers.
    rows = await asyncio.to_thread(context.studies.answer_rows, study)
    parts, media_type = (as_csv(rows), _CSV) if file_format == "csv" else (as_json(study, rows), "application/json")
    disposition = {"Content-Disposition": f'attachment; filename="{study.id}.{file_format}"', **_PRIVATE}
    return StreamingResponse(parts, media_type=media_type, headers=disposition)


@router.post(
    "/{study_id}/invitations",
    status_code=201,
    summary="Invite a reader",
    response_model=NewInvitation,
    openapi_extra=json_body("InvitationRequest"),
    responses={
        201: {
            "description": "The invitation with its secret, which is not shown again.",
            "headers": headers("Location"),
        },
        **problems(*JSON_PROBLEMS, "not-found", "study-state", "too-many-requests", "not-ready"),
    },
)
async def invite_reader(
    study_id: str, request: Request, response: Response, context: ContextDep, principal: _Owner
) -> NewInvitation:
    """Create a link with which one reader answers, without an API key."""
    study = await _find(context, principal, study_id)
    body = await read_model(request, InvitationRequest)
    expires_at = min(time.time() + body.expires_in_days * DAY, study.expires_at)
    invitation, token = await asyncio.to_thread(context.studies.table.invite, study, body.label, expires_at)
    describe(request, f"invitation {invitation.id}")
    response.headers["Location"] = f"/v1/studies/{study.id}/invitations/{invitation.id}"
    return NewInvitation(**invitation_body(invitation, 0).model_dump(), token=token, path=f"/study#{token}")


@router.get(
    "/{study_id}/invitations", summary="List the invitations of a study", responses=problems("not-found", "not-ready")
)
async def list_invitations(study_id: str, context: ContextDep, principal: _Owner) -> InvitationList:
    """List the invitations without their secrets, and how far each reader is."""
    study = await _find(context, principal, study_id)
    table = context.studies.table
    invitations = await asyncio.to_thread(table.invitations, study.id)
    counts = await asyncio.to_thread(table.answer_counts, [study.id])
    return InvitationList(data=[invitation_body(each, counts.get(each.id, 0)) for each in invitations])


@router.delete(
    "/{study_id}/invitations/{name}",
    summary="Revoke an invitation",
    responses=problems("not-found", "not-ready"),
)
async def revoke_invitation(
    study_id: str, name: str, request: Request, context: ContextDep, principal: _Owner
) -> InvitationBody:
    """Revoke an invitation at once, by its id. The answers of its reader are kept."""
    study = await _find(context, principal, study_id)
    invitation = None
    if _INVITATION_ID.fullmatch(name):
        invitation = await asyncio.to_thread(context.studies.table.revoke, study.id, name)
    if invitation is None:
        raise ProblemError("not-found", f"the study has no invitation {name[:100]}")
    describe(request, f"invitation {invitation.id}")
    counts = await asyncio.to_thread(context.studies.table.answer_counts, [study.id])
    return invitation_body(invitation, counts.get(invitation.id, 0))


async def _find(context: Context, principal: Principal, study_id: str) -> Study:
    study = None
    if _STUDY_ID.fullmatch(study_id):
        study = await asyncio.to_thread(context.studies.table.get, principal.tenant, study_id)
    if study is None:
        raise ProblemError("not-found", f"there is no study {study_id[:100]}")
    return study


def _described(context: Context, study: Study) -> StudyBody:
    table = context.studies.table
    return study_body(
        study, context.studies.counts(study), table.invitations(study.id), table.answer_counts([study.id])
    )
