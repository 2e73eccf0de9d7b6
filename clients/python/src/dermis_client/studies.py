"""Records of reader studies: what `client.studies` returns."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from dermis_client.models import Count, ModelRef, ResponseRecord

Truth = Literal["real", "generated"]


class StudyImages(ResponseRecord):
    """Images of one class.

    Attributes:
        uploaded: Real images uploaded so far; None once the images are chosen.
        real: Chosen real images; None before.
        generated: Generated images; None before.
    """

    uploaded: int | None = None
    real: int | None = None
    generated: int | None = None


class Study(ResponseRecord):
    """A blinded study of real and generated images.

    Attributes:
        id: Its id.
        name: Its name, which readers see.
        state: "collecting" real images, "preparing" its images, "open" for answers, "closed", or "failed".
        images: Number of images, half of them real.
        prepared: Images that are ready.
        real_images: "uploads" or "folder".
        classes: Images by class.
        model: The model of the generated images.
        size: Side of the images in pixels.
        seed: Seed of everything random; do not show it to readers.
        readers: Invitations that were not revoked.
        answers: Answers so far.
        error: Why it failed.
        created_at: When it was created.
        expires_at: When it is deleted with its images and answers.
    """

    id: str
    name: str = ""
    state: str
    images: Count
    prepared: Count = 0
    real_images: str = "uploads"
    classes: dict[str, StudyImages] = Field(default_factory=dict)
    model: ModelRef
    size: Count = 0
    seed: int = Field(repr=False)
    readers: Count = 0
    answers: Count = 0
    error: str | None = None
    created_at: datetime
    expires_at: datetime

    @property
    def finished(self) -> bool:
        """Whether its images are not being prepared."""
        return self.state != "preparing"


class StudyList(ResponseRecord):
    """The studies of the tenant, newest first.

    Attributes:
        data: The studies.
        folder_of_real_images: Whether the operator has set a folder of real images for the tenant.
        max_images: Maximum number of images in one study.
    """

    data: list[Study]
    folder_of_real_images: bool = False
    max_images: int = 0


class Invitation(ResponseRecord):
    """The invitation of one reader.

    Attributes:
        id: Its id.
        label: Name or code of the reader.
        state: "active", "expired" or "revoked".
        answered: Images that the reader has answered.
        created_at: When it was created.
        expires_at: When its link stops working.
        last_used_at: When it was last used.
    """

    id: str
    label: str
    state: str
    answered: Count = 0
    created_at: datetime
    expires_at: datetime
    last_used_at: datetime | None = None


class NewInvitation(Invitation):
    """An invitation that was just created.

    Attributes:
        token: The secret of the link; not part of the repr.
        path: Path of the link on the service, which contains the secret.
        url: The whole link for the reader.
    """

    token: str = Field(repr=False)
    path: str = Field(repr=False)
    url: str = Field(default="", repr=False)


class StudyRate(ResponseRecord):
    """A share with its 95 % confidence interval; None if the total is 0."""

    count: int
    total: int
    share: float | None = None
    low: float | None = None
    high: float | None = None


class StudyRates(ResponseRecord):
    """Accuracy and the rates that it consists of; "generated" is the positive answer.

    Attributes:
        accuracy: Share of right answers; chance is 0.5.
        sensitivity: Share of generated images that were called generated.
        specificity: Share of real images that were called real.
        called_generated: Share of the answer "generated".
    """

    accuracy: StudyRate
    sensitivity: StudyRate
    specificity: StudyRate
    called_generated: StudyRate


class ReaderResults(ResponseRecord):
    """Results of one reader.

    Attributes:
        invitation: Id of the invitation.
        label: Name or code of the reader.
        answered: Images that the reader has answered.
        rates: Accuracy, sensitivity and specificity.
        d_prime: Ability of signal detection theory.
        criterion: Below 0: a preference for "generated".
        auc: Area under the ROC curve of answers and confidence together.
        median_seconds: Median time for an image.
    """

    invitation: str
    label: str
    answered: int
    rates: StudyRates
    d_prime: float
    criterion: float
    auc: float | None = None
    median_seconds: float


class KappaOfPair(ResponseRecord):
    """Cohen's kappa of two readers."""

    first: str
    second: str
    kappa: float | None = None


class ReaderAgreement(ResponseRecord):
    """Agreement of the readers.

    Attributes:
        images: Images that all of them answered.
        observed: Mean share of pairs of readers with the same answer.
        fleiss_kappa: Fleiss' kappa.
        pairs: Cohen's kappa of every two readers.
    """

    images: int
    observed: float | None = None
    fleiss_kappa: float | None = None
    pairs: list[KappaOfPair] = Field(default_factory=list)


class StudyResults(ResponseRecord):
    """Results of the answers so far.

    Attributes:
        answers: Number of answers.
        rates: Of all readers together.
        p_value: Permutation test of all readers together against chance.
        classes: Rates by class of the image.
        readers: Results of each reader.
        agreement: Agreement of the readers; None with fewer than two.
        median_seconds: Median time for an image.
    """

    answers: int
    rates: StudyRates
    p_value: float | None = None
    classes: dict[str, StudyRates] = Field(default_factory=dict)
    readers: list[ReaderResults] = Field(default_factory=list)
    agreement: ReaderAgreement | None = None
    median_seconds: float | None = None


class StudyAnswer(ResponseRecord):
    """One answer, with the truth.

    Attributes:
        reader: Name or code of the reader.
        invitation: Id of the invitation.
        position: Position in the order of the reader, from 1.
        image: Number of the image in the study, the same for all readers.
        class_name: Class of the image.
        truth: "real" or "generated".
        answer: What the reader said.
        right: Whether that is the truth.
        confidence: 1 (a guess) to 5 (certain).
        seconds: Time for which the image was looked at.
        changes: How often the answer was changed.
        answered_at: When it was given.
    """

    reader: str
    invitation: str
    position: int
    image: int
    class_name: str = Field(default="", alias="class")
    truth: Truth
    answer: Truth
    right: bool
    confidence: int
    seconds: float
    changes: int = 0
    answered_at: datetime
