"""Reader studies in the jobs database. Methods block, may be called from any thread, and are one short transaction each.

`JobTable.open` creates the tables. A study belongs to a tenant, and so do its images, invitations and answers.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from dermis.errors import DermisError, RequestError
from dermis.reader_study import Slot, Truth
from services.jobs import counters
from services.jobs.database import close_engine, open_engine, reading, time_of, writing
from services.jobs.table import check_existing
from services.quotas import Quota
from services.studies import tables
from services.studies.tables import DELETING, Answer, AnswerArrays, Invitation, Study, StudyImage, study_of

PREFIX = "dermis_rd_"
UPLOAD_PREFIX = "upload-"  # of the names of files of uploaded images
_TOKEN = re.compile(r"dermis_rd_([a-z0-9]{12})_[A-Za-z0-9_-]{43}")
_PREPARING = tables.studies.c.state == "preparing"
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_LAST_USE_SECONDS = 60.0
CLAIM_SECONDS = 60.0
"""Time for which a process has a study whose images it prepares; it renews the claim meanwhile."""
MAX_INVITATIONS = 200  # of one study, revoked ones included


class TooManyStudiesError(DermisError):
    """The tenant has as many studies, or a study as many invitations, as are allowed."""


class StudyStateError(DermisError):
    """The study is not in a state in which this is possible; the message says what to do."""


class AnswerOrderError(DermisError):
    """A reader answers an image before those that come before it."""


@dataclass(frozen=True)
class Upload:
    """A real image that was uploaded for a study."""

    number: int
    label: int
    sha256: str

    @property
    def file(self) -> str:
        """Name of its file in the folder of the study."""
        return upload_file(self.sha256)


def upload_file(sha256: str) -> str:
    """Name of the file of an uploaded image, by the SHA-256 of its pixels."""
    return f"{UPLOAD_PREFIX}{sha256}.png"


class StudyTable:
    """The tables of reader studies."""

    def __init__(self, url: str) -> None:
        self._engine = open_engine(url)

    def close(self) -> None:
        """Close the connections, unless another table of this process uses them."""
        close_engine(self._engine)

    # Studies of a tenant

    def create(self, values: Mapping[str, Any], most: int) -> Study:
        """Create a study in the state `collecting`.

        Args:
            values: Tenant and columns that the creator decides.
            most: Maximum number of studies of the tenant.

        Raises:
            TooManyStudiesError: The tenant has `most` studies.
        """
        row = {
            "id": f"st_{uuid.uuid4().hex}",
            "state": "collecting",
            "prepared": 0,
            "longest": 0,
            "stored_bytes": 0,
            "failures": 0,
            "claimed_until": 0.0,
            "created_at": time.time(),
            **values,
        }
        of_tenant = (tables.studies.c.tenant == row["tenant"]) & (tables.studies.c.state != DELETING)
        with writing(self._engine) as connection:
            counters.lock_tenant(connection, row["tenant"])
            if (connection.scalar(sa.select(sa.func.count()).where(of_tenant)) or 0) >= most:
                raise TooManyStudiesError(f"this tenant has {most} studies; delete one first")
            connection.execute(sa.insert(tables.studies).values(row))
            return _study(connection, row["id"])

    def get(self, tenant: str, study_id: str) -> Study | None:
        """A study of a tenant; None if there is none, or only one of another tenant."""
        with reading(self._engine) as connection:
            row = connection.execute(_select(study_id).where(tables.studies.c.tenant == tenant)).one_or_none()
        return None if row is None or row.state == DELETING else study_of(row)

    def of_tenant(self, tenant: str) -> list[Study]:
        """The studies of a tenant, newest first."""
        query = sa.select(tables.studies).where(tables.studies.c.tenant == tenant, tables.studies.c.state != DELETING)
        with reading(self._engine) as connection:
            return [study_of(row) for row in connection.execute(query.order_by(tables.studies.c.created_at.desc()))]

    def add_uploads(self, study: Study, label: int, sizes: Mapping[str, int], most: int, quota: Quota) -> list[str]:
        """Add uploaded real images, whose files are written afterwards. Those that were added before are not added again.

        Args:
            study: The study.
            label: Class number of the images.
            sizes: Size of the file in bytes by SHA-256 of the pixels.
            most: Maximum number of uploaded images of a study.
            quota: The quotas of the tenant.

        Returns:
            The SHA-256 of the images that are new.

        Raises:
            RequestError: There would be more than `most` images.
            StudyStateError: The study does not collect images any more.
            QuotaExceededError: The tenant may not store so much.
        """
        with writing(self._engine) as connection:
            counters.lock_tenant(connection, study.tenant)
            _check_state(_locked(connection, study.id), "collecting", "it takes no more images")
            known = {row.sha256: row.number for row in connection.execute(_uploads(study.id))}
            new = [digest for digest in sizes if digest not in known]
            if len(known) + len(new) > most:
                raise RequestError("files", f"a study can have at most {most} uploaded images", "request-too-large")
            if new:
                added_bytes = sum(sizes[digest] for digest in new)
                check_existing(connection, study.tenant, quota, {"stored_bytes": added_bytes})
                first = max(known.values(), default=-1) + 1
                rows = [
                    {"study": study.id, "number": number, "label": label, "sha256": digest}
                    for number, digest in enumerate(new, start=first)
                ]
                connection.execute(sa.insert(tables.uploads), rows)
                _change(connection, study.id, stored_bytes=tables.studies.c.stored_bytes + added_bytes)
            return new

    def remove_uploads(self, study: Study, sizes: Mapping[str, int]) -> list[str]:
        """Remove uploaded images whose files could not be written, except those that may have been chosen meanwhile.

        Args:
            study: The study.
            sizes: Size of the file in bytes by SHA-256 of the pixels.

        Returns:
            The SHA-256 of the images that have no row now, so that their files can be removed.
        """
        with writing(self._engine) as connection:
            counters.lock_tenant(connection, study.tenant)
            row = connection.execute(_select(study.id).with_for_update()).one_or_none()
            state = None if row is None else row.state
            known = {row.sha256 for row in connection.execute(_uploads(study.id))}
            if state not in (None, "collecting", DELETING):
                return [digest for digest in sizes if digest not in known]
            removed = [digest for digest in sizes if digest in known]
            if removed:
                these = (tables.uploads.c.study == study.id) & tables.uploads.c.sha256.in_(removed)
                connection.execute(sa.delete(tables.uploads).where(these))
                removed_bytes = sum(sizes[digest] for digest in removed)
                _change(connection, study.id, stored_bytes=tables.studies.c.stored_bytes - removed_bytes)
            return list(sizes)

    def kept_uploads(self, study_id: str) -> set[str]:
        """The SHA-256 of the uploaded images that a study has; none of a study that was deleted."""
        with reading(self._engine) as connection:
            state = connection.scalar(sa.select(tables.studies.c.state).where(tables.studies.c.id == study_id))
            if state in (None, DELETING):
                return set()
            return {row.sha256 for row in connection.execute(_uploads(study_id))}

    def uploads(self, study_id: str) -> list[Upload]:
        """The uploaded images of a study, in the order of their numbers."""
        with reading(self._engine) as connection:
            rows = connection.execute(_uploads(study_id).order_by(tables.uploads.c.number))
            return [Upload(row.number, row.label, row.sha256) for row in rows]

    def prepare(
        self, study: Study, slots: Sequence[tuple[Slot, str]], uploads: Collection[str], estimate: int, quota: Quota
    ) -> Study:
        """Store the plan of a study, so that its images are prepared.

        Args:
            study: The study.
            slots: The planned images with their sources.
            uploads: SHA-256 of the uploaded images that have files, from which real images were chosen. All others are removed:
                a call that is still writing their files then learns that it was too late.
            estimate: Upper estimate of the size of the files in bytes.
            quota: The quotas of the tenant.

        Raises:
            StudyStateError: The study was opened or closed before, or an upload was removed meanwhile.
            QuotaExceededError: A quota of the tenant would be exceeded. Nothing was stored or counted.
        """
        rows = [
            {
                "study": study.id,
                "number": number,
                "truth": slot.truth,
                "label": slot.label,
                "source": source,
                "prepared": False,
            }
            for number, (slot, source) in enumerate(slots)
        ]
        generated = sum(slot.truth == "generated" for slot, _ in slots)
        with writing(self._engine) as connection:
            counters.lock_tenant(connection, study.tenant)
            _check_state(_locked(connection, study.id), "collecting", "it was opened already")
            known = {row.sha256 for row in connection.execute(_uploads(study.id))}
            if not known.issuperset(uploads):
                raise StudyStateError("an upload failed at this moment; try again")
            check_existing(connection, study.tenant, quota, {"stored_bytes": estimate})
            late = (tables.uploads.c.study == study.id) & tables.uploads.c.sha256.in_(known.difference(uploads))
            connection.execute(sa.delete(tables.uploads).where(late))
            counters.add(connection, study.tenant, {"images_per_day": generated}, quota)
            connection.execute(sa.insert(tables.images), rows)
            size = tables.studies.c.stored_bytes + estimate
            _change(connection, study.id, state="preparing", images=len(rows), stored_bytes=size)
            return _study(connection, study.id)

    def end(self, study: Study) -> Study:
        """Close an open study: its readers cannot answer any more.

        Raises:
            StudyStateError: The study is not open.
        """
        with writing(self._engine) as connection:
            current = _locked(connection, study.id)
            if current.state != "closed":
                _check_state(current, "open", "only open studies can be closed")
                _change(connection, study.id, state="closed", closed_at=time.time())
            return _study(connection, study.id)

    # Preparation and removal

    def claim(self) -> Study | None:
        """A study of any tenant whose images this process is to prepare, for a limited time; None if there is none."""
        now = time.time()
        until = tables.studies.c.claimed_until
        query = sa.select(tables.studies).where(_PREPARING, until < now).order_by(until).limit(1)
        with reading(self._engine) as connection:  # every process asks often, and one that writes would lock others
            if connection.execute(query).one_or_none() is None:
                return None
        with writing(self._engine) as connection:
            row = connection.execute(query.with_for_update(skip_locked=True)).one_or_none()
            if row is None:
                return None
            _change(connection, row.id, claimed_until=now + CLAIM_SECONDS)
            return study_of(row)

    def renew(self, study_id: str) -> None:
        """Prolong the claim on a study whose preparation goes on, unless it was released or deleted."""
        claimed = tables.studies.c.claimed_until > 0
        with writing(self._engine) as connection:
            _change(connection, study_id, _PREPARING, claimed, claimed_until=time.time() + CLAIM_SECONDS)

    def release(self, study_id: str, seconds: float = 0.0) -> None:
        """Let another process prepare the study, after some seconds."""
        with writing(self._engine) as connection:
            _change(connection, study_id, _PREPARING, claimed_until=time.time() + seconds if seconds else 0.0)

    def unprepared(self, study_id: str, limit: int) -> list[StudyImage]:
        """Images of a study that are not stored yet."""
        with reading(self._engine) as connection:
            query = _images(study_id).where(tables.images.c.prepared.is_(False)).limit(limit)
            return [StudyImage(**row._mapping) for row in connection.execute(query)]

    def record_prepared(self, study_id: str, sizes: Mapping[int, int]) -> bool:
        """Record images that are stored.

        Args:
            study_id: The study.
            sizes: Size of the file in bytes by number of the image.

        Returns:
            Whether the study still needs images; not if it is complete, or was deleted meanwhile.
        """
        of_study = tables.images.c.study == study_id
        with writing(self._engine) as connection:
            row = connection.execute(_select(study_id).with_for_update()).one_or_none()
            if row is None or row.state != "preparing":
                return False
            if sizes:
                numbers = tables.images.c.number.in_(list(sizes))
                connection.execute(sa.update(tables.images).where(of_study, numbers).values(prepared=True))
            done = connection.scalar(sa.select(sa.func.count()).where(of_study, tables.images.c.prepared)) or 0
            longest = max((row.longest, *sizes.values()))
            failures = 0 if sizes else row.failures
            claimed_until = time.time() + CLAIM_SECONDS
            _change(
                connection, study_id, prepared=done, longest=longest, failures=failures, claimed_until=claimed_until
            )
            return bool(done < row.images)

    def record_opened(self, study_id: str, stored_bytes: int) -> None:
        """Open a study whose images are complete."""
        with writing(self._engine) as connection:
            row = connection.execute(_select(study_id).with_for_update()).one_or_none()
            if row is not None and row.state == "preparing":
                connection.execute(sa.delete(tables.uploads).where(tables.uploads.c.study == study_id))
                _change(connection, study_id, state="open", opened_at=time.time(), stored_bytes=stored_bytes)

    def record_failure(self, study_id: str, message: str, most: int) -> None:
        """Count a failed attempt to prepare a study; it has failed after `most` of them."""
        with writing(self._engine) as connection:
            row = connection.execute(_select(study_id).with_for_update()).one_or_none()
            if row is not None and row.state == "preparing":
                failed = row.failures + 1 >= most
                values = {"state": "failed"} if failed else {"claimed_until": time.time() + 5.0 * (row.failures + 1)}
                _change(connection, study_id, failures=row.failures + 1, error=message[:500], **values)

    def mark_deleting(self, study_id: str) -> None:
        """Hide a study, whose files are about to be removed."""
        with writing(self._engine) as connection:
            _change(connection, study_id, tables.studies.c.state != DELETING, state=DELETING, claimed_until=0.0)

    def to_delete(self) -> list[Study]:
        """Studies of all tenants that have expired, and those whose files are to be removed, for the first or second time."""
        columns = tables.studies.c
        with reading(self._engine) as connection:
            until = sa.case((columns.state == DELETING, columns.claimed_until), else_=columns.expires_at)
            rows = connection.execute(sa.select(tables.studies).where(until < time_of(connection)))
            return [study_of(row) for row in rows]

    def delete(self, study_id: str, keep_seconds: float = 0.0) -> None:
        """Delete all rows of a study. For `keep_seconds` after the first call its own row is kept, for `to_delete`."""
        with writing(self._engine) as connection:
            # Before the other rows, so that nobody adds some to a study that is gone then.
            row = connection.execute(_select(study_id).with_for_update()).one_or_none()
            for table in (tables.answers, tables.invitations, tables.images, tables.uploads):
                connection.execute(sa.delete(table).where(table.c.study == study_id))
            now = time_of(connection)
            until = 0.0 if row is None or not keep_seconds else row.claimed_until or now + keep_seconds
            if until > now:
                _change(connection, study_id, name="", stored_bytes=0, claimed_until=until)
            else:
                connection.execute(sa.delete(tables.studies).where(tables.studies.c.id == study_id))

    # Invitations

    def invite(self, study: Study, label: str, expires_at: float) -> tuple[Invitation, str]:
        """Create an invitation.

        Args:
            study: The study.
            label: Name or code of the reader.
            expires_at: Seconds since 1970.

        Returns:
            The invitation and its token, which is not stored.

        Raises:
            TooManyStudiesError: The study has as many invitations as are allowed.
            StudyStateError: The study has ended.
        """
        identifier = "".join(secrets.choice(_LETTERS) for _ in range(12))
        token = f"{PREFIX}{identifier}_{secrets.token_urlsafe(32)}"
        values: dict[str, Any] = {
            "id": identifier,
            "study": study.id,
            "tenant": study.tenant,
            "label": label,
            "hash": _hash(token),
            "created_at": time.time(),
            "expires_at": expires_at,
        }
        last = sa.select(sa.func.max(tables.invitations.c.number)).where(tables.invitations.c.study == study.id)
        with writing(self._engine) as connection:
            counters.lock_tenant(connection, study.tenant)
            if _locked(connection, study.id).state in ("closed", "failed", DELETING):
                raise StudyStateError("the study has ended; nobody can be invited to it")
            number = (connection.scalar(last) or 0) + 1
            if number > MAX_INVITATIONS:
                raise TooManyStudiesError(f"a study can have at most {MAX_INVITATIONS} invitations")
            connection.execute(sa.insert(tables.invitations).values(number=number, **values))
            return _invitation(connection, identifier), token

    def invitations(self, study_id: str) -> list[Invitation]:
        """The invitations of a study, in the order in which they were created."""
        query = sa.select(tables.invitations).where(tables.invitations.c.study == study_id)
        with reading(self._engine) as connection:
            rows = connection.execute(query.order_by(tables.invitations.c.number))
            return [Invitation(**row._mapping) for row in rows]

    def revoke(self, study_id: str, invitation_id: str) -> Invitation | None:
        """Revoke an invitation of a study; None if it has no such one. Answers are kept."""
        it = (tables.invitations.c.study == study_id) & (tables.invitations.c.id == invitation_id)
        unrevoked = tables.invitations.c.revoked_at.is_(None)
        with writing(self._engine) as connection:
            connection.execute(sa.update(tables.invitations).where(it, unrevoked).values(revoked_at=time.time()))
            row = connection.execute(sa.select(tables.invitations).where(it)).one_or_none()
        return None if row is None else Invitation(**row._mapping)

    def find_reader(self, token: str) -> tuple[Invitation, Study] | None:
        """The invitation with this token, in whatever state, and its study; None if there is none."""
        match = _TOKEN.fullmatch(token)
        if match is None:
            return None
        with reading(self._engine) as connection:
            query = sa.select(tables.invitations).where(tables.invitations.c.id == match[1])
            row = connection.execute(query).one_or_none()
            if row is None or not hmac.compare_digest(row.hash, _hash(token)):
                return None
            study = connection.execute(_select(row.study)).one_or_none()
        if study is None or study.state == DELETING:
            return None
        return Invitation(**row._mapping), study_of(study)

    def record_use(self, invitation: Invitation) -> None:
        """Record that an invitation is used, at most once a minute."""
        now = time.time()
        if invitation.last_used_at is not None and now - invitation.last_used_at < _LAST_USE_SECONDS:
            return
        first = sa.func.coalesce(tables.invitations.c.first_used_at, now)
        with writing(self._engine) as connection:
            connection.execute(
                sa.update(tables.invitations)
                .where(tables.invitations.c.id == invitation.id)
                .values(last_used_at=now, first_used_at=first)
            )

    # Images and answers

    def images(self, study_id: str) -> list[StudyImage]:
        """All images of a study with the truth, by number."""
        with reading(self._engine) as connection:
            return [StudyImage(**row._mapping) for row in connection.execute(_images(study_id))]

    def answer_arrays(self, study_id: str, readers: Mapping[str, int], images: int) -> AnswerArrays:
        """All answers to a study.

        Args:
            study_id: The study.
            readers: Row of each invitation in the arrays; answers of others are left out.
            images: Number of images of the study.
        """
        columns = tables.answers.c
        query = sa.select(columns.invitation, columns.image, columns.answer, columns.confidence, columns.seconds)
        arrays = AnswerArrays.empty(len(readers), images)
        with reading(self._engine) as connection:
            rows = connection.execution_options(yield_per=1000).execute(query.where(columns.study == study_id))
            for invitation, image, answer, confidence, seconds in rows:
                if (reader := readers.get(invitation)) is not None:
                    arrays.called[reader, image] = answer == "generated"
                    arrays.confidence[reader, image] = confidence
                    arrays.seconds[reader, image] = seconds
        return arrays

    def answers_version(self, study_id: str) -> tuple[int, int]:
        """The number of answers to a study and of their changes: it differs after each answer."""
        query = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(tables.answers.c.changes), 0))
        with reading(self._engine) as connection:
            count, changes = connection.execute(query.where(tables.answers.c.study == study_id)).one()
            return int(count), int(changes)

    def answer_counts(self, study_ids: Sequence[str]) -> dict[str, int]:
        """The number of answers by invitation, of some studies."""
        query = sa.select(tables.answers.c.invitation, sa.func.count()).where(tables.answers.c.study.in_(study_ids))
        with reading(self._engine) as connection:
            return {row[0]: row[1] for row in connection.execute(query.group_by(tables.answers.c.invitation))}

    def answers_of(self, invitation_id: str) -> list[Answer]:
        """The answers of one reader, by position."""
        query = sa.select(tables.answers).where(tables.answers.c.invitation == invitation_id)
        with reading(self._engine) as connection:
            return [Answer(**row._mapping) for row in connection.execute(query.order_by(tables.answers.c.position))]

    def answered(self, invitation_id: str) -> int:
        """The number of images that a reader has answered: those before this position."""
        with reading(self._engine) as connection:
            return _answered(connection, invitation_id)

    def answer(
        self, invitation: Invitation, position: int, image: int, answer: Truth, confidence: int, seconds: float
    ) -> int:
        """Store the answer of a reader, or replace the earlier one to this image.

        Args:
            invitation: The invitation of the reader.
            position: Position in the order of the reader, from 0.
            image: Number of the image.
            answer: What the reader thinks that it is.
            confidence: 1 (a guess) to 5 (certain).
            seconds: Time for which the image was looked at.

        Returns:
            The number of images that the reader has answered.

        Raises:
            StudyStateError: The study is not open.
            AnswerOrderError: An earlier image has no answer.
        """
        at = (tables.answers.c.invitation == invitation.id) & (tables.answers.c.position == position)
        values = {"answer": answer, "confidence": confidence, "seconds": seconds, "answered_at": time.time()}
        columns = tables.answers.c
        differs = (columns.answer != answer) | (columns.confidence != confidence) | (columns.seconds != seconds)
        changes = columns.changes + sa.case((differs, 1), else_=0)  # the same one comes again if its response was lost
        replace = sa.update(tables.answers).where(at).values(changes=changes, **values)
        try:
            with writing(self._engine) as connection:
                # Readers do not wait for each other.
                _check_state(_locked(connection, invitation.study, shared=True), "open", "it takes no answers")
                answered = _answered(connection, invitation.id)
                if position > answered:
                    raise AnswerOrderError(f"image {answered + 1} has no answer yet; answer it first")
                if not connection.execute(replace).rowcount:
                    connection.execute(
                        sa.insert(tables.answers).values(
                            invitation=invitation.id,
                            position=position,
                            study=invitation.study,
                            image=image,
                            changes=0,
                            **values,
                        )
                    )
                return _answered(connection, invitation.id)
        except IntegrityError:  # the same answer twice at the same moment (PostgreSQL)
            with writing(self._engine) as connection:
                connection.execute(replace)
                return _answered(connection, invitation.id)


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _select(study_id: str) -> sa.Select[Any]:
    return sa.select(tables.studies).where(tables.studies.c.id == study_id)


def _uploads(study_id: str) -> sa.Select[Any]:
    return sa.select(tables.uploads).where(tables.uploads.c.study == study_id)


def _images(study_id: str) -> sa.Select[Any]:
    return sa.select(tables.images).where(tables.images.c.study == study_id).order_by(tables.images.c.number)


def _study(connection: sa.Connection, study_id: str) -> Study:
    return _found(connection.execute(_select(study_id)).one_or_none())


def _locked(connection: sa.Connection, study_id: str, *, shared: bool = False) -> Study:
    """A study that no other transaction changes or deletes until this one has ended; only reads it itself if `shared`.

    Without the lock, a transaction of PostgreSQL that began before a deletion would undo it, or add rows that nothing removes.
    """
    return _found(connection.execute(_select(study_id).with_for_update(read=shared)).one_or_none())


def _found(row: sa.Row[Any] | None) -> Study:
    if row is None:
        raise StudyStateError("the study was deleted meanwhile")
    return study_of(row)


def _invitation(connection: sa.Connection, invitation_id: str) -> Invitation:
    query = sa.select(tables.invitations).where(tables.invitations.c.id == invitation_id)
    return Invitation(**connection.execute(query).one()._mapping)


def _answered(connection: sa.Connection, invitation_id: str) -> int:
    query = sa.select(sa.func.count()).where(tables.answers.c.invitation == invitation_id)
    return connection.scalar(query) or 0


def _change(connection: sa.Connection, study_id: str, *conditions: sa.ColumnElement[bool], **values: Any) -> None:
    change = sa.update(tables.studies).where(tables.studies.c.id == study_id, *conditions)
    connection.execute(change.values(values))


def _check_state(study: Study, state: str, otherwise: str) -> None:
    if study.state != state:
        raise StudyStateError(f"the study is {study.state}: {otherwise}")
