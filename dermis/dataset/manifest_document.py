"""The fields of manifest.json, as they are read."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from dermis.dataset.plan import FORMAT_VERSION
from dermis.dataset.request import StoredRequest

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class FileDocument(_Strict):
    """One file."""

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=200)
    bytes: int = Field(ge=0)
    sha256: Sha256


class CanonicalDocument(_Strict):
    """Hashes without the signatures of images."""

    files: dict[str, Sha256]
    digest: Sha256


class BundleDocument(_Strict):
    """The bundle."""

    name: str
    digest: str
    class_names: list[str]


class PlanDocument(_Strict):
    """The plan."""

    digest: str
    samples: int
    shards: int


class TallyDocument(_Strict):
    """Results of the classifier for a class."""

    images: int
    drawn: int
    agreeing: int | None


class AttackDocument(_Strict):
    """Result of the membership attack."""

    auc: float
    low: float
    high: float
    members: int
    held_out: int


class ExposureDocument(_Strict):
    """What the images disclose of the training set."""

    identifiability: float
    attack: AttackDocument | None


class PrivacyTallyDocument(_Strict):
    """Results of the gate for a class."""

    images: int
    seen: int
    seen_authentic: int
    rejected: int
    authentic: int
    flagged: int
    copies: int | None = None


class PrivacyDocument(_Strict):
    """Results of the comparison with the training images."""

    index: str
    classes: dict[str, PrivacyTallyDocument]
    distances: list[float]
    baseline: list[float]
    exposure: ExposureDocument
    limit: float | None = None
    stands_on: str = ""
    weakness: str | None = None


class ManifestDocument(_Strict):
    """The whole file."""

    format_version: int = Field(ge=1, le=FORMAT_VERSION)
    request: StoredRequest
    bundle: BundleDocument
    synthesizer: dict[str, str]
    plan: PlanDocument
    files: list[FileDocument]
    classifier: dict[str, TallyDocument] | None = None
    privacy: PrivacyDocument | None = None
    canonical: CanonicalDocument | None = None
