"""client.studies: blinded studies in which readers tell generated from real images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, SupportsIndex

from dermis_client._files import write_atomically
from dermis_client._flow import Flow, Request, call, compute, delete, parse
from dermis_client._raw import async_raw, raw
from dermis_client._requests import finite, job_path, optional_fields, whole
from dermis_client._transport import AsyncTransport, SyncTransport
from dermis_client._uploads import MAX_FILES, File, Source, form_parts, sources_of, upload
from dermis_client._waiting import STATUS_TIMEOUT, wait_until_finished
from dermis_client.errors import StudyNotReady, WaitTimeoutError
from dermis_client.models import ResponseRecord
from dermis_client.studies import (
    Invitation,
    NewInvitation,
    Study,
    StudyAnswer,
    StudyList,
    StudyResults,
)

RealImages = Literal["uploads", "folder"]
_MAX_EXPORT_BYTES = 256 << 20  # 400,000 answers, the most of a study, have 100 MB as JSON
_PATIENCE_SECONDS = 300.0  # without any response, before giving up
_InvitationList = list[Invitation]  # `list` is a method in the classes below
_AnswerList = list[StudyAnswer]


class _Invitations(ResponseRecord):
    data: list[Invitation]


class _Answers(ResponseRecord):
    data: list[StudyAnswer]


class _Uploaded(ResponseRecord):
    study: Study


# Flows


def create_study(
    name: str,
    images: SupportsIndex,
    equal_classes: bool,
    seed: SupportsIndex | None,
    max_retries: int,
    **options: Any,
) -> Flow[Study]:
    """POST /v1/studies. Options that are None are left out."""
    body: dict[str, Any] = {"name": name, "images": whole("images", images)}
    body |= {} if seed is None else {"seed": whole("seed", seed)}
    body |= optional_fields(None, equal_classes=equal_classes or None, **options)
    response = yield from call(Request("POST", "/v1/studies", json=body, idempotent=False), max_retries)
    return parse(response, Study.model_validate)


def list_studies(max_retries: int) -> Flow[StudyList]:
    """GET /v1/studies."""
    return parse((yield from call(Request("GET", "/v1/studies"), max_retries)), StudyList.model_validate)


def retrieve_study(study_id: str, max_retries: int) -> Flow[Study]:
    """GET /v1/studies/{id}."""
    response = yield from call(Request("GET", job_path("study", study_id)), max_retries)
    return parse(response, Study.model_validate)


def delete_study(study_id: str, max_retries: int) -> Flow[None]:
    """DELETE /v1/studies/{id}."""
    yield from delete(Request("DELETE", job_path("study", study_id)), max_retries)


def change_study(study_id: str, action: Literal["open", "close"], max_retries: int) -> Flow[Study]:
    """POST /v1/studies/{id}/open or /close. A request that is repeated after it was carried out is refused (409)."""
    request = Request("POST", job_path("study", study_id, action), idempotent=False)
    return parse((yield from call(request, max_retries)), Study.model_validate)


def add_images(study_id: str, sources: Sequence[Source], class_name: str | None, max_retries: int) -> Flow[Study]:
    """POST /v1/studies/{id}/images, in as many requests as needed. Images that the study has are not added again."""
    path = job_path("study", study_id, "images")
    params = {} if class_name is None else {"class": class_name}

    def send(files: Sequence[File]) -> Flow[_Uploaded]:
        request = Request("POST", path, params=params, files=form_parts(files))
        return parse((yield from call(request, max_retries)), _Uploaded.model_validate)

    uploaded = yield from upload(sources, MAX_FILES, send, lambda done, total: None)
    return uploaded[-1].study


def wait_for_study(study_id: str, timeout: float | None, poll_interval: float) -> Flow[Study]:
    """Wait until the images of a study are prepared, with status requests that tolerate a restart of the service."""
    request = Request("GET", job_path("study", study_id), read_timeout=STATUS_TIMEOUT)

    def poll() -> Flow[Study]:
        return parse((yield from call(request, 0)), Study.model_validate)

    def timeout_error(_: Study | None) -> WaitTimeoutError:
        return WaitTimeoutError(f"{study_id} is not open after {timeout:g} s: wait for it again", None)

    study = yield from wait_until_finished(
        poll,
        timeout=None if timeout is None else finite("timeout", timeout),
        poll_interval=max(0.05, finite("poll_interval", poll_interval)),
        patience=_PATIENCE_SECONDS,
        report=lambda study: None,
        timeout_error=timeout_error,
    )
    if study.state not in {"open", "closed"}:
        raise StudyNotReady(f"{study_id} is {study.state}: {study.error or 'open it first'}", study)
    return study


def invite(
    study_id: str, label: str, expires_in_days: float | None, base_url: str, max_retries: int
) -> Flow[NewInvitation]:
    """POST /v1/studies/{id}/invitations."""
    body: dict[str, Any] = {"label": label}
    if expires_in_days is not None:
        body["expires_in_days"] = finite("expires_in_days", expires_in_days)
    request = Request("POST", job_path("study", study_id, "invitations"), json=body, idempotent=False)
    invitation = parse((yield from call(request, max_retries)), NewInvitation.model_validate)
    return invitation.model_copy(update={"url": base_url + invitation.path})


def list_invitations(study_id: str, max_retries: int) -> Flow[list[Invitation]]:
    """GET /v1/studies/{id}/invitations."""
    response = yield from call(Request("GET", job_path("study", study_id, "invitations")), max_retries)
    return parse(response, _Invitations.model_validate).data


def revoke(study_id: str, invitation_id: str, max_retries: int) -> Flow[Invitation]:
    """DELETE /v1/studies/{id}/invitations/{id}."""
    response = yield from call(
        Request("DELETE", job_path("study", study_id, "invitations", invitation_id)), max_retries
    )
    return parse(response, Invitation.model_validate)


def retrieve_results(study_id: str, max_retries: int) -> Flow[StudyResults]:
    """GET /v1/studies/{id}/results."""
    response = yield from call(Request("GET", job_path("study", study_id, "results")), max_retries)
    return parse(response, StudyResults.model_validate)


def list_answers(study_id: str, max_retries: int) -> Flow[list[StudyAnswer]]:
    """GET /v1/studies/{id}/answers."""
    request = Request("GET", job_path("study", study_id, "answers"), max_bytes=_MAX_EXPORT_BYTES)
    response = yield from call(request, max_retries)
    return parse(response, _Answers.model_validate).data


def export_csv(study_id: str, path: Path, max_retries: int) -> Flow[Path]:
    """GET /v1/studies/{id}/answers?format=csv, written into a file."""
    path_of_answers = job_path("study", study_id, "answers")
    request = Request("GET", path_of_answers, params={"format": "csv"}, max_bytes=_MAX_EXPORT_BYTES)
    content = (yield from call(request, max_retries)).content
    yield from compute(partial(write_atomically, path, content))
    return path


class RawStudies:
    """The methods of `Studies` with the responses of the service; see `RawResponse`."""

    def __init__(self, resource: Studies) -> None:
        self.create = raw(resource.create)
        self.list = raw(resource.list)
        self.retrieve = raw(resource.retrieve)
        self.add_images = raw(resource.add_images)
        self.open = raw(resource.open)
        self.close = raw(resource.close)
        self.delete = raw(resource.delete)
        self.invite = raw(resource.invite)
        self.invitations = raw(resource.invitations)
        self.revoke = raw(resource.revoke)
        self.results = raw(resource.results)
        self.answers = raw(resource.answers)


class Studies:
    """Reader studies: `client.studies` of a DermisClient."""

    with_raw_response = cached_property(RawStudies)

    def __init__(self, transport: SyncTransport) -> None:
        self._transport, self._max_retries = transport, transport.settings.max_retries

    def create(
        self,
        name: str,
        *,
        images: SupportsIndex = 200,
        real_images: RealImages = "uploads",
        model: str | None = None,
        equal_classes: bool = False,
        truncation_psi: float | None = None,
        seed: SupportsIndex | None = None,
        keep_days: float | None = None,
    ) -> Study:
        """Create a blinded study of real and generated images.

        Args:
            name: Its name, which readers see.
            images: Number of images; half of them are real.
            real_images: "uploads": upload them with `add_images`, then call `open`; "folder": the service takes them from the
                folder of its operator, and prepares the study at once.
            model: Name of the model of the generated images; by default the service's.
            equal_classes: Whether there are as many images of each class.
            truncation_psi: Truncation of the generated images.
            seed: Seed of the choice, the order and the generated images; by default a random one.
            keep_days: Days until the study is deleted; by default as long as the service allows.

        Returns:
            The study.

        Raises:
            UnprocessableEntityError: A value is not valid, or there are too few real images.
            PermissionDeniedError: The credentials do not have the scope `studies`.
            RateLimitError: The tenant has as many studies as the service allows, or a quota is used up.
            InvalidRequestError: An argument is not valid.
            APIConnectionError: The service did not respond; it may have created the study.
        """
        return self._transport.run(
            create_study(
                name,
                images,
                equal_classes,
                seed,
                self._max_retries,
                real_images=real_images,
                model=model,
                truncation_psi=truncation_psi,
                keep_days=keep_days,
            )
        )

    def list(self) -> StudyList:
        """List the studies of the tenant.

        Returns:
            The studies, newest first, and what the service allows.

        Raises:
            APIConnectionError: The service did not respond.
        """
        return self._transport.run(list_studies(self._max_retries))

    def retrieve(self, study_id: str) -> Study:
        """Retrieve a study and its progress.

        Args:
            study_id: Id of the study.

        Raises:
            NotFoundError: The tenant has no such study.
            InvalidRequestError: The id is not valid.
            APIConnectionError: The service did not respond.
        """
        return self._transport.run(retrieve_study(study_id, self._max_retries))

    def add_images(self, study_id: str, files: Source | Iterable[Source], *, class_name: str | None = None) -> Study:
        """Upload real images of one class, in as many requests as the service needs. Images that it has are not added again.

        Args:
            study_id: Id of the study.
            files: One or several paths, bytes or files open for reading: PNG, JPEG or WebP. File names are not sent.
            class_name: Class of these images; needed by models with classes.

        Returns:
            The study.

        Raises:
            UnprocessableEntityError: An image cannot be used, or the model has no such class.
            ConflictError: The study takes no more images.
            NotFoundError: The tenant has no such study.
            InvalidRequestError: A file cannot be read, or an argument is not valid.
            APIConnectionError: The service did not respond.
        """
        return self._transport.run(add_images(study_id, sources_of(files), class_name, self._max_retries))

    def open(self, study_id: str) -> Study:
        """Choose the images of a study with uploaded real images. They are prepared in the background; see `wait`.

        Args:
            study_id: Id of the study.

        Raises:
            UnprocessableEntityError: There are too few real images.
            ConflictError: The study was opened before.
            NotFoundError: The tenant has no such study.
            RateLimitError: A quota is used up.
            APIConnectionError: The service did not respond.
        """
        return self._transport.run(change_study(study_id, "open", self._max_retries))

    def wait(self, study_id: str, *, timeout: float | None = None, poll_interval: float = 1.0) -> Study:
        """Wait until the images of a study are prepared.

        Args:
            study_id: Id of the study.
            timeout: Seconds to wait at most; None for no limit.
            poll_interval: Seconds between two requests.

        Returns:
            The study, which is open.

        Raises:
            WaitTimeoutError: It was not open in time.
            StudyNotReady: The preparation has failed, or the study was not opened.
            NotFoundError: The tenant has no such study.
            APIConnectionError: The service did not respond.
        """
        return self._transport.run(wait_for_study(study_id, timeout, poll_interval))

    def close(self, study_id: str) -> Study:
        """Close a study: its readers cannot answer any more. It cannot be opened again.

        Args:
            study_id: Id of the study.

        Raises:
            ConflictError: The study is not open.
            NotFoundError: The tenant has no such study.
            APIConnectionError: The service did not respond.
        """
        return self._transport.run(change_study(study_id, "close", self._max_retries))

    def delete(self, study_id: str) -> None:
        """Delete a study with its images, invitations and answers.

        Args:
            study_id: Id of the study.

        Raises:
            NotFoundError: The tenant has no such study.
            InvalidRequestError: The id is not valid.
            APIConnectionError: The service did not respond.
        """
        self._transport.run(delete_study(study_id, self._max_retries))

    def invite(self, study_id: str, label: str, *, expires_in_days: float | None = None) -> NewInvitation:
        """Create a link with which one reader answers, without an API key.

        Args:
            study_id: Id of the study.
            label: Name or code of the reader, under which results are shown.
            expires_in_days: Days for which the link works, at most until the study ends; by default 30.

        Returns:
            The invitation with its `url`, which the service does not show again. Whoever has it can see the images and answer.

        Raises:
            ConflictError: The study has ended.
            NotFoundError: The tenant has no such study.
            UnprocessableEntityError: A value is not valid.
            APIConnectionError: The service did not respond; it may have created the invitation.
        """
        return self._transport.run(
            invite(study_id, label, expires_in_days, self._transport.settings.base_url, self._max_retries)
        )

    def invitations(self, study_id: str) -> _InvitationList:
        """List the invitations of a study, and how far each reader is.

        Args:
            study_id: Id of the study.

        Returns:
            The invitations without their links, in the order in which they were created.

        Raises:
            NotFoundError: The tenant has no such study.
            APIConnectionError: The service did not respond.
        """
        return self._transport.run(list_invitations(study_id, self._max_retries))

    def revoke(self, study_id: str, invitation_id: str) -> Invitation:
        """Revoke an invitation at once. The answers of its reader are kept.

        Args:
            study_id: Id of the study.
            invitation_id: Id of the invitation.

        Raises:
            NotFoundError: The study has no such invitation.
            InvalidRequestError: An id is not valid.
            APIConnectionError: The service did not respond.
        """
        return self._transport.run(revoke(study_id, invitation_id, self._max_retries))

    def results(self, study_id: str) -> StudyResults:
        """Retrieve the results of the answers so far.

        Args:
            study_id: Id of the study.

        Raises:
            NotFoundError: The tenant has no such study.
            ConflictError: The images of the study are not chosen yet.
            APIConnectionError: The service did not respond.
        """
        return self._transport.run(retrieve_results(study_id, self._max_retries))

    def answers(self, study_id: str) -> _AnswerList:
        """Retrieve every answer with the truth.

        Args:
            study_id: Id of the study.

        Returns:
            The answers, by reader and position.

        Raises:
            NotFoundError: The tenant has no such study.
            APIConnectionError: The service did not respond.
        """
        return self._transport.run(list_answers(study_id, self._max_retries))

    def export_csv(self, study_id: str, path: str | os.PathLike[str]) -> Path:
        """Write every answer with the truth into a CSV file.

        Args:
            study_id: Id of the study.
            path: The file, which is replaced if it exists.

        Returns:
            The path.

        Raises:
            NotFoundError: The tenant has no such study.
            OSError: The file cannot be written.
            APIConnectionError: The service did not respond.
        """
        return self._transport.run(export_csv(study_id, Path(path), self._max_retries))


class AsyncRawStudies:
    """The methods of `AsyncStudies` with the responses of the service; see `RawResponse`."""

    def __init__(self, resource: AsyncStudies) -> None:
        self.create = async_raw(resource.create)
        self.list = async_raw(resource.list)
        self.retrieve = async_raw(resource.retrieve)
        self.add_images = async_raw(resource.add_images)
        self.open = async_raw(resource.open)
        self.close = async_raw(resource.close)
        self.delete = async_raw(resource.delete)
        self.invite = async_raw(resource.invite)
        self.invitations = async_raw(resource.invitations)
        self.revoke = async_raw(resource.revoke)
        self.results = async_raw(resource.results)
        self.answers = async_raw(resource.answers)


class AsyncStudies:
    """Reader studies: `client.studies` of an AsyncDermisClient."""

    with_raw_response = cached_property(AsyncRawStudies)

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport, self._max_retries = transport, transport.settings.max_retries

    async def create(
        self,
        name: str,
        *,
        images: SupportsIndex = 200,
        real_images: RealImages = "uploads",
        model: str | None = None,
        equal_classes: bool = False,
        truncation_psi: float | None = None,
        seed: SupportsIndex | None = None,
        keep_days: float | None = None,
    ) -> Study:
        """Create a blinded study of real and generated images; see `Studies.create`."""
        return await self._transport.run(
            create_study(
                name,
                images,
                equal_classes,
                seed,
                self._max_retries,
                real_images=real_images,
                model=model,
                truncation_psi=truncation_psi,
                keep_days=keep_days,
            )
        )

    async def list(self) -> StudyList:
        """List the studies of the tenant; see `Studies.list`."""
        return await self._transport.run(list_studies(self._max_retries))

    async def retrieve(self, study_id: str) -> Study:
        """Retrieve a study and its progress; see `Studies.retrieve`."""
        return await self._transport.run(retrieve_study(study_id, self._max_retries))

    async def add_images(
        self, study_id: str, files: Source | Iterable[Source], *, class_name: str | None = None
    ) -> Study:
        """Upload real images of one class, in as many requests as the service needs; see `Studies.add_images`."""
        return await self._transport.run(add_images(study_id, sources_of(files), class_name, self._max_retries))

    async def open(self, study_id: str) -> Study:
        """Choose the images of a study with uploaded real images; see `Studies.open`."""
        return await self._transport.run(change_study(study_id, "open", self._max_retries))

    async def wait(self, study_id: str, *, timeout: float | None = None, poll_interval: float = 1.0) -> Study:
        """Wait until the images of a study are prepared; see `Studies.wait`."""
        return await self._transport.run(wait_for_study(study_id, timeout, poll_interval))

    async def close(self, study_id: str) -> Study:
        """Close a study: its readers cannot answer any more; see `Studies.close`."""
        return await self._transport.run(change_study(study_id, "close", self._max_retries))

    async def delete(self, study_id: str) -> None:
        """Delete a study with its images, invitations and answers; see `Studies.delete`."""
        await self._transport.run(delete_study(study_id, self._max_retries))

    async def invite(self, study_id: str, label: str, *, expires_in_days: float | None = None) -> NewInvitation:
        """Create a link with which one reader answers, without an API key; see `Studies.invite`."""
        return await self._transport.run(
            invite(study_id, label, expires_in_days, self._transport.settings.base_url, self._max_retries)
        )

    async def invitations(self, study_id: str) -> _InvitationList:
        """List the invitations of a study, and how far each reader is; see `Studies.invitations`."""
        return await self._transport.run(list_invitations(study_id, self._max_retries))

    async def revoke(self, study_id: str, invitation_id: str) -> Invitation:
        """Revoke an invitation at once; see `Studies.revoke`."""
        return await self._transport.run(revoke(study_id, invitation_id, self._max_retries))

    async def results(self, study_id: str) -> StudyResults:
        """Retrieve the results of the answers so far; see `Studies.results`."""
        return await self._transport.run(retrieve_results(study_id, self._max_retries))

    async def answers(self, study_id: str) -> _AnswerList:
        """Retrieve every answer with the truth; see `Studies.answers`."""
        return await self._transport.run(list_answers(study_id, self._max_retries))

    async def export_csv(self, study_id: str, path: str | os.PathLike[str]) -> Path:
        """Write every answer with the truth into a CSV file; see `Studies.export_csv`."""
        return await self._transport.run(export_csv(study_id, Path(path), self._max_retries))
