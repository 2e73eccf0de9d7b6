"""The tables of reader studies in the jobs database, and the rows of them.

A change of a table here needs a revision in `services/jobs/migrations/versions`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from dermis.reader_study import Truth

# `collecting`: real images are uploaded; `preparing`: images are generated; `deleting`: what belongs to it is being removed.
StudyState = Literal["collecting", "preparing", "open", "closed", "failed"]
STUDY_STATES: tuple[StudyState, ...] = get_args(StudyState)
DELETING = "deleting"
RealSource = Literal["uploads", "folder"]

metadata = sa.MetaData()

studies = sa.Table(
    "dermis_studies",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("tenant", sa.String(63), nullable=False, index=True),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("state", sa.String(16), nullable=False, index=True),
    sa.Column("images", sa.Integer, nullable=False),  # half of them real
    sa.Column("real_source", sa.String(16), nullable=False),
    sa.Column("equal_classes", sa.Boolean, nullable=False),
    sa.Column("model_name", sa.String(64), nullable=False),
    sa.Column("model_digest", sa.String(64), nullable=False),
    sa.Column("class_names", sa.JSON, nullable=False),
    sa.Column("size", sa.Integer, nullable=False),  # side of the images in px
    sa.Column("truncation_psi", sa.Float, nullable=False),
    sa.Column("seed", sa.BigInteger, nullable=False),  # with it, the truth of each image could be computed
    sa.Column("prepared", sa.Integer, nullable=False),  # images that are stored
    sa.Column("longest", sa.Integer, nullable=False),  # bytes of the longest file
    sa.Column("stored_bytes", sa.BigInteger, nullable=False),
    sa.Column("failures", sa.Integer, nullable=False),  # of the preparation, one after another
    sa.Column("error", sa.String(500)),
    sa.Column("claimed_until", sa.Float, nullable=False),  # a process prepares the images until then
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("created_by", sa.String(300), nullable=False),
    sa.Column("opened_at", sa.Float),
    sa.Column("closed_at", sa.Float),
    sa.Column("expires_at", sa.Float, nullable=False),
)

uploads = sa.Table(
    "dermis_study_uploads",
    metadata,
    sa.Column("study", sa.String(40), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("label", sa.Integer, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),  # of the pixels, to recognise an image that is uploaded again
)

images = sa.Table(
    "dermis_study_images",
    metadata,
    sa.Column("study", sa.String(40), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),  # after shuffling
    sa.Column("truth", sa.String(16), nullable=False),
    sa.Column("label", sa.Integer, nullable=False),
    sa.Column(
        "source", sa.String(1000), nullable=False
    ),  # number of an upload, path in the folder, or index of a sample
    sa.Column("prepared", sa.Boolean, nullable=False),
)

invitations = sa.Table(
    "dermis_study_invitations",
    metadata,
    sa.Column("id", sa.String(16), primary_key=True),
    sa.Column("study", sa.String(40), nullable=False, index=True),
    sa.Column("tenant", sa.String(63), nullable=False),
    sa.Column("number", sa.Integer, nullable=False),  # of the readers of a study; it decides the order of the images
    sa.Column("label", sa.String(100), nullable=False),
    sa.Column("hash", sa.String(64), nullable=False),  # SHA-256 of the token, which is stored nowhere
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("expires_at", sa.Float, nullable=False),
    sa.Column("revoked_at", sa.Float),
    sa.Column("first_used_at", sa.Float),
    sa.Column("last_used_at", sa.Float),  # written at most once a minute
)

answers = sa.Table(
    "dermis_study_answers",
    metadata,
    sa.Column("invitation", sa.String(16), primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True),  # in the order of the reader
    sa.Column("study", sa.String(40), nullable=False, index=True),
    sa.Column("image", sa.Integer, nullable=False),
    sa.Column("answer", sa.String(16), nullable=False),
    sa.Column("confidence", sa.Integer, nullable=False),
    sa.Column("seconds", sa.Float, nullable=False),
    sa.Column("changes", sa.Integer, nullable=False),
    sa.Column("answered_at", sa.Float, nullable=False),
)


@dataclass(frozen=True)
class Study:
    """One study, as it was read. Times are seconds since 1970 (UTC)."""

    id: str
    tenant: str
    name: str
    state: str
    images: int
    real_source: RealSource
    equal_classes: bool
    model_name: str
    model_digest: str
    class_names: list[str]
    size: int
    truncation_psi: float
    seed: int
    prepared: int
    longest: int
    stored_bytes: int
    failures: int
    error: str | None
    claimed_until: float
    created_at: float
    created_by: str
    opened_at: float | None
    closed_at: float | None
    expires_at: float

    def class_of(self, label: int) -> str:
        """The name of a class; empty for a model without classes."""
        return self.class_names[label] if self.class_names else ""


@dataclass(frozen=True)
class StudyImage:
    """One image of a study, with the truth."""

    study: str
    number: int
    truth: Truth
    label: int
    source: str
    prepared: bool

    @property
    def file(self) -> str:
        """Name of its file in the folder of the study."""
        return f"{self.number:05d}.png"


@dataclass(frozen=True)
class Invitation:
    """An invitation of one reader. Times are seconds since 1970 (UTC)."""

    id: str
    study: str
    tenant: str
    number: int
    label: str
    hash: str
    created_at: float
    expires_at: float
    revoked_at: float | None
    first_used_at: float | None
    last_used_at: float | None

    def state(self, now: float) -> Literal["active", "expired", "revoked"]:
        """`active`, `expired` or `revoked`."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at <= now else "active"


@dataclass(frozen=True)
class Answer:
    """The answer of a reader to one image."""

    invitation: str
    position: int
    study: str
    image: int
    answer: Truth
    confidence: int
    seconds: float
    changes: int
    answered_at: float


@dataclass(frozen=True)
class AnswerArrays:
    """All answers to a study, each array [readers, images].

    Attributes:
        called: 1 generated, 0 real, -1 no answer; int8.
        confidence: 1 (a guess) to 5 (certain); int8.
        seconds: Time for which the image was looked at; float64.
    """

    called: npt.NDArray[np.int8]
    confidence: npt.NDArray[np.int8]
    seconds: npt.NDArray[np.float64]

    @classmethod
    def empty(cls, readers: int, images: int) -> AnswerArrays:
        """Arrays without answers."""
        shape = (readers, images)
        return cls(np.full(shape, -1, dtype=np.int8), np.zeros(shape, dtype=np.int8), np.zeros(shape))


def stored_by_studies(connection: sa.Connection, tenant: str) -> int:
    """The size of the images of a tenant's studies in bytes, and the estimates of those that are prepared."""
    return int(connection.scalar(sa.select(sa.func.sum(studies.c.stored_bytes)).where(studies.c.tenant == tenant)) or 0)


def study_of(row: sa.Row[Any]) -> Study:
    """A row of the studies."""
    return Study(**row._mapping)
