"""Bodies of `/v1/studies` and `/v1/reading`."""

from __future__ import annotations

import datetime
import time
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from dermis.latents import MAX_SEED
from dermis.reader_study import Agreement, Rate, Rates
from services.gateway.schemas.common import ModelRef, ResponseBody, utc_time, utc_time_or_none
from services.studies.tables import Answer, Invitation, Study

if TYPE_CHECKING:
    from services.studies.results import StudyResults

_TEXT = r"^[^\x00-\x1f\x7f]+$"
_Position = Annotated[int, Field(description="Position of the image in the order of the reader, from 1.")]


class StudyRequest(BaseModel):
    """A new reader study."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=200, pattern=_TEXT, description="Its name, which readers see.")
    images: int = Field(200, ge=2, multiple_of=2, description="Number of images. Half are real and half generated.")
    real_images: Literal["uploads", "folder"] = Field(
        "uploads",
        description="Where the real images come from: they are uploaded for this study, or drawn from the operator's folder.",
    )
    model: str | None = Field(None, max_length=64, description="Name of a served bundle; null for the default one.")
    equal_classes: bool = Field(
        False,
        description="Whether there are as many images of each class. Otherwise both halves have the proportions of the real "
        "images.",
    )
    truncation_psi: float = Field(1.0, ge=0.0, le=2.0, allow_inf_nan=False)
    seed: int | None = Field(
        None,
        ge=0,
        le=MAX_SEED,
        description="Seed of the choice, the order and the generated images; null for a random one.",
    )
    keep_days: float | None = Field(
        None,
        gt=0,
        le=3650,
        allow_inf_nan=False,
        description="Days until it is deleted; null for as long as is allowed.",
    )


class InvitationRequest(BaseModel):
    """A new invitation of one reader."""

    model_config = ConfigDict(extra="forbid", strict=True)

    label: str = Field(
        min_length=1,
        max_length=100,
        pattern=_TEXT,
        description="Name or code of the reader. Results are shown under it.",
    )
    expires_in_days: float = Field(
        30.0,
        gt=0,
        le=3650,
        allow_inf_nan=False,
        description="Days for which the link works, at most until the study ends.",
    )


class AnswerRequest(BaseModel):
    """The answer of a reader to one image."""

    model_config = ConfigDict(extra="forbid", strict=True)

    answer: Literal["real", "generated"]
    confidence: int = Field(ge=1, le=5, description="1: a guess; 5: certain.")
    seconds: float = Field(
        ge=0,
        le=86_400,
        allow_inf_nan=False,
        description="Time for which the image was looked at, as the page measured it.",
    )


class ImageCounts(ResponseBody):
    """Images of one class."""

    uploaded: int | None = Field(None, description="Real images uploaded so far; null once the images are chosen.")
    real: int | None = Field(None, description="Chosen real images; null before.")
    generated: int | None = None


class StudyBody(ResponseBody):
    """A reader study. Whoever may read it can also read the truth; readers cannot."""

    id: str
    object: Literal["study"] = "study"
    name: str
    state: Literal["collecting", "preparing", "open", "closed", "failed"] = Field(
        description="collecting: real images are uploaded; preparing: its images are made; open: readers answer; closed: they "
        "cannot answer any more; failed: its images cannot be made, `error` says why."
    )
    images: int
    prepared: int = Field(description="Images that are ready.")
    real_images: Literal["uploads", "folder"]
    equal_classes: bool
    classes: dict[str, ImageCounts] = Field(description="By class; the only one is empty for a model without classes.")
    model: ModelRef
    size: int = Field(description="Side of the images in pixels.")
    truncation_psi: float
    seed: int
    readers: int = Field(description="Invitations that were not revoked.")
    answers: int = Field(description="Answers so far.")
    stored_bytes: int
    error: str | None
    created_at: datetime.datetime
    opened_at: datetime.datetime | None
    closed_at: datetime.datetime | None
    expires_at: datetime.datetime = Field(description="When it is deleted with its images and answers.")


class StudyList(ResponseBody):
    """Studies, newest first."""

    data: list[StudyBody]
    folder_of_real_images: bool = Field(
        description="Whether the operator has set a folder of real images for the tenant."
    )
    max_images: int = Field(description="Maximum number of images in one study.")


class UploadedImages(ResponseBody):
    """The outcome of an upload of real images."""

    added: int = Field(description="New images; those that were uploaded before are not added again.")
    study: StudyBody


class InvitationBody(ResponseBody):
    """An invitation of one reader."""

    id: str
    object: Literal["invitation"] = "invitation"
    label: str
    state: Literal["active", "expired", "revoked"]
    answered: int = Field(description="Images that the reader has answered.")
    created_at: datetime.datetime
    expires_at: datetime.datetime
    last_used_at: datetime.datetime | None


class NewInvitation(InvitationBody):
    """A new invitation. Whoever has the link can see the images of the study and answer as this reader."""

    token: str = Field(description="The secret of the link. It is not shown again.")
    path: str = Field(
        description="Path of the reader's page. The secret is in the fragment, which browsers do not send."
    )


class InvitationList(ResponseBody):
    """Invitations, in the order in which they were created."""

    data: list[InvitationBody]


class RateBody(ResponseBody):
    """A share with its 95 % confidence interval."""

    count: int
    total: int
    share: float | None = Field(description="Null if the total is 0.")
    low: float | None
    high: float | None


class RatesBody(ResponseBody):
    """Accuracy, and the rates that it consists of. "Generated" is the positive answer."""

    accuracy: RateBody = Field(description="Share of right answers; chance is 0.5.")
    sensitivity: RateBody = Field(description="Share of generated images that were called generated.")
    specificity: RateBody = Field(description="Share of real images that were called real.")
    called_generated: RateBody = Field(description="Share of the answer generated, whatever the images are.")


class ReaderBody(ResponseBody):
    """Results of one reader."""

    invitation: str
    label: str
    answered: int
    rates: RatesBody
    d_prime: float = Field(description="Ability of signal detection theory.")
    criterion: float = Field(description="Below 0: a preference for generated.")
    auc: float | None = Field(description="Area under the ROC curve of answers and confidence together.")
    median_seconds: float


class PairBody(ResponseBody):
    """Cohen's kappa of two readers."""

    first: str
    second: str
    kappa: float | None


class AgreementBody(ResponseBody):
    """Agreement of the readers."""

    images: int = Field(description="Images that all readers answered.")
    observed: float | None = Field(description="Mean share of pairs of readers with the same answer.")
    fleiss_kappa: float | None
    pairs: list[PairBody]


class ImageVotes(ResponseBody):
    """How often one image was called generated."""

    image: int
    class_: str = Field(alias="class", serialization_alias="class")
    truth: Literal["real", "generated"]
    called_generated: int
    answers: int


class Results(ResponseBody):
    """Results of a study so far."""

    object: Literal["study_results"] = "study_results"
    answers: int
    rates: RatesBody
    p_value: float | None = Field(
        description="Permutation test of all readers together against chance; null without answers."
    )
    classes: dict[str, RatesBody]
    readers: list[ReaderBody]
    agreement: AgreementBody | None = Field(description="Null with fewer than two readers.")
    median_seconds: float | None
    images: list[ImageVotes]


class GivenAnswer(ResponseBody):
    """An answer that the reader has given."""

    position: _Position
    answer: Literal["real", "generated"]
    confidence: int
    seconds: float


class Reading(ResponseBody):
    """What a reader knows about the study."""

    object: Literal["reading"] = "reading"
    study: str = Field(description="Name of the study.")
    reader: str = Field(description="Name or code of the reader.")
    state: Literal["preparing", "open", "closed"] = Field(description="Whether answers are taken.")
    images: int
    size: int = Field(description="Side of the images in pixels.")
    answered: int = Field(description="The next image is at the position after this one.")
    expires_at: datetime.datetime
    answers: list[GivenAnswer]


class Progress(ResponseBody):
    """Progress of a reader."""

    answered: int
    images: int


def study_body(
    study: Study, classes: dict[str, dict[str, int]], invitations: list[Invitation], counts: dict[str, int]
) -> StudyBody:
    """The body that describes a study."""
    return StudyBody(
        id=study.id,
        name=study.name,
        state=study.state,  # type: ignore[arg-type]
        images=study.images,
        prepared=study.prepared,
        real_images=study.real_source,
        equal_classes=study.equal_classes,
        classes={name: ImageCounts(**numbers) for name, numbers in classes.items()},
        model=ModelRef(name=study.model_name, digest=study.model_digest),
        size=study.size,
        truncation_psi=study.truncation_psi,
        seed=study.seed,
        readers=sum(invitation.revoked_at is None for invitation in invitations),
        answers=sum(counts.get(invitation.id, 0) for invitation in invitations),
        stored_bytes=study.stored_bytes,
        error=study.error,
        created_at=utc_time(study.created_at),
        opened_at=utc_time_or_none(study.opened_at),
        closed_at=utc_time_or_none(study.closed_at),
        expires_at=utc_time(study.expires_at),
    )


def invitation_body(invitation: Invitation, answered: int) -> InvitationBody:
    """The body that describes an invitation."""
    return InvitationBody(
        id=invitation.id,
        label=invitation.label,
        state=invitation.state(time.time()),
        answered=answered,
        created_at=utc_time(invitation.created_at),
        expires_at=utc_time(invitation.expires_at),
        last_used_at=utc_time_or_none(invitation.last_used_at),
    )


def reading_body(study: Study, invitation: Invitation, answers: list[Answer]) -> Reading:
    """The body that describes a study to its reader."""
    state = study.state if study.state in ("open", "closed") else "preparing"
    return Reading(
        study=study.name,
        reader=invitation.label,
        state=state,  # type: ignore[arg-type]
        images=study.images,
        size=study.size,
        answered=len(answers),
        expires_at=utc_time(min(study.expires_at, invitation.expires_at)),
        answers=[
            GivenAnswer(
                position=answer.position + 1,
                answer=answer.answer,
                confidence=answer.confidence,
                seconds=answer.seconds,
            )
            for answer in answers
        ],
    )


def _rate(rate: Rate) -> RateBody:
    return RateBody(count=rate.count, total=rate.total, share=rate.share, low=rate.low, high=rate.high)


def rates_body(rates: Rates) -> RatesBody:
    """The body of rates."""
    return RatesBody(
        accuracy=_rate(rates.accuracy),
        sensitivity=_rate(rates.sensitivity),
        specificity=_rate(rates.specificity),
        called_generated=_rate(rates.called_generated),
    )


def agreement_body(agreement: Agreement) -> AgreementBody:
    """The body of the agreement of readers."""
    return AgreementBody(
        images=agreement.images,
        observed=agreement.observed,
        fleiss_kappa=agreement.fleiss_kappa,
        pairs=[PairBody(first=a, second=b, kappa=kappa) for a, b, kappa in agreement.pairs],
    )


def results_body(study: Study, results: StudyResults) -> Results:
    """The body of the results of a study."""
    return Results(
        answers=results.answers,
        rates=rates_body(results.rates),
        p_value=results.p_value,
        classes={name: rates_body(rates) for name, rates in results.classes.items()},
        readers=[
            ReaderBody(
                invitation=reader.invitation.id,
                label=reader.invitation.label,
                answered=reader.answered,
                rates=rates_body(reader.rates),
                d_prime=reader.d_prime,
                criterion=reader.criterion,
                auc=reader.auc,
                median_seconds=reader.median_seconds,
            )
            for reader in results.readers
        ],
        agreement=None if results.agreement is None else agreement_body(results.agreement),
        median_seconds=results.median_seconds,
        images=[
            ImageVotes(
                **{"class": study.class_of(image.label)},
                image=image.number + 1,
                truth=image.truth,
                called_generated=called,
                answers=answers,
            )
            for image, called, answers in results.called_generated
        ],
    )
