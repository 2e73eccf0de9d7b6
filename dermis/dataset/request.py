"""A request for a dataset: images of each class, how they are generated, and in which files they are stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, model_validator

from dermis.bundle.classifier import DEFAULT_THRESHOLD, THRESHOLD_PATTERN
from dermis.bundle.directions import NAME_PATTERN
from dermis.directions.edit import MAX_STRENGTH, Edit, bundle_offset
from dermis.errors import RequestError
from dermis.latents import MAX_SEED
from dermis.network_config import NoiseMode

if TYPE_CHECKING:
    from dermis.bundle import Bundle

DatasetFormat = Literal["imagefolder", "webdataset", "parquet"]
ImageFormat = Literal["png", "jpeg", "webp"]

UNCONDITIONAL_CLASS = "image"
# Limits of the format. `check_against` checks the limits of a service, `check_space` those of the storage.
MAX_COUNT = 10**8
MAX_CLASSES = 1000
MAX_TRIES = 64
MAX_GATE_TRIES = 16
MAX_EDITS = 8

ClassName = Annotated[str, Field(min_length=1, max_length=200)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]


class ClassifierOptions(BaseModel):
    """Options of scoring the images with the bundle's classifier, and of filtering them by the result."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    score: bool = Field(True, description="Whether images are scored at all; scoring takes time.")
    keep: Literal["all", "agreeing"] = Field(
        "all",
        description="Images to keep: all, or those to which the classifier gives the class that was requested. "
        "Filtering reduces variety.",
    )
    threshold: str = Field(
        DEFAULT_THRESHOLD,
        pattern=f"^{THRESHOLD_PATTERN}$",
        description="Name of the classifier's threshold from which on an image is of the positive class.",
    )
    min_probability: float = Field(
        0.0, ge=0, le=1, allow_inf_nan=False, description="Least calibrated probability of images to keep."
    )
    max_probability: float = Field(
        1.0, ge=0, le=1, allow_inf_nan=False, description="Greatest calibrated probability of images to keep."
    )
    tries: int = Field(
        1,
        ge=1,
        le=MAX_TRIES,
        description="Latents to try for each image until one is kept. If none is kept, the image is missing.",
    )

    @property
    def filters(self) -> bool:
        """Whether the filter can reject images."""
        return self.keep != "all" or self.min_probability > 0 or self.max_probability < 1

    @model_validator(mode="after")
    def _check_filter(self) -> Self:
        if self.min_probability > self.max_probability:
            raise ValueError("min_probability must not be above max_probability")
        if self.filters and not self.score:
            raise ValueError("score must be true if images are filtered")
        if self.tries > 1 and not self.filters:
            raise ValueError("tries is allowed only with a filter (keep, min_probability or max_probability)")
        return self


class EditOption(BaseModel):
    """An edit of every latent of a dataset along a direction of the bundle."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    direction: str = Field(pattern=f"^{NAME_PATTERN}$", description="Name of one of the model's directions.")
    strength: float = Field(
        ge=-MAX_STRENGTH,
        le=MAX_STRENGTH,
        allow_inf_nan=False,
        description="How far, in standard deviations of w along the direction.",
    )
    layers: list[Annotated[int, Field(ge=0, le=64)]] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="First and last + 1 of the style vectors to move, from the coarsest; null for the direction's own.",
    )

    @property
    def edit(self) -> Edit:
        """This edit in the form that `dermis.directions` takes."""
        return Edit(self.direction, self.strength, None if self.layers is None else (self.layers[0], self.layers[1]))


class GateOptions(BaseModel):
    """The condition of a gate: what the comparison of an image with the training images must give."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    gate: Literal["authentic", "min_distance"] = Field(
        "authentic",
        description="Condition on an image. authentic: its distance to the nearest training image is larger than the radius of "
        "that training image (its distance to the nearest other training image). min_distance: its distance to the nearest "
        "training image is at least the percentile of the radii.",
    )
    percentile: float = Field(
        1.0,
        ge=0,
        le=100,
        allow_inf_nan=False,
        description="For min_distance: percentile of the radii of the training images.",
    )
    # Not serialised if it is true, so that requests keep the digest that they had before the field existed.
    detect_copies: bool = Field(
        True,
        exclude_if=lambda value: value is True,
        description="Whether an image also fails the gate if the model's copy detector takes it for a changed copy of a "
        "training image (mirrored, cropped, recoloured, joined, ...). A model without a detector detects none.",
    )


class PrivacyOptions(GateOptions):
    """Options of comparing the images with the training images, and of the gate on the result."""

    on_reject: Literal["resample", "drop", "flag"] = Field(
        "resample",
        description="What to do with other images. resample: try the next latent. drop: leave the image out. flag: keep it, "
        "and flag it in the metadata.",
    )
    tries: int = Field(
        8,
        ge=1,
        le=MAX_GATE_TRIES,
        description="For resample: images that may be rejected before a sample is left out.",
    )

    @property
    def most(self) -> int:
        """Candidates that the gate can reject before an image is missing."""
        return self.tries if self.on_reject == "resample" else 1


class ProvenanceOptions(BaseModel):
    """Options of what the image files say of their origin, beyond the metadata that all of them have."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    c2pa: bool | None = Field(
        None,
        description="Whether each image has a signed manifest (C2PA, Content Credentials). Null: if the service has a "
        "certificate for it. Signed files differ each time; their pixels, and the files without the manifest, do not.",
    )

    def resolved(self, available: bool, missing: str) -> ProvenanceOptions:
        """The options with a choice in place of null.

        Args:
            available: Whether images can be signed.
            missing: What to do if they cannot be, for the message.

        Raises:
            RequestError: Images are to be signed and cannot be.
        """
        if self.c2pa and not available:
            raise RequestError("provenance.c2pa", f"images cannot be signed: {missing}")
        return ProvenanceOptions(c2pa=available if self.c2pa is None else self.c2pa)


class DatasetRequest(BaseModel):
    """A request for a dataset. With a bundle it determines every byte of the dataset on one kind of machine.

    Types are strict: true, "3" and 3.0 are not counts.

    Raises:
        pydantic.ValidationError: A field is unknown, missing or not allowed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str = Field(
        "demo", min_length=1, max_length=64, description="Name of the model (bundle) that generates them."
    )
    classes: dict[ClassName, Count] = Field(
        min_length=1,
        max_length=MAX_CLASSES,
        description='Images of each class. The class of an unconditional model is "image".',
        examples=[{"malignant": 500, "benign": 500}],
    )
    seed: int = Field(0, ge=0, le=MAX_SEED, description="Sample i has its latent from (seed, i).")
    truncation_psi: float = Field(
        1.0, ge=0, le=2, allow_inf_nan=False, description="1 keeps the full variety, 0 gives the mean image."
    )
    truncation_cutoff: int | None = Field(
        None, ge=0, le=64, description="Number of style layers that are truncated, from the coarsest; null for all."
    )
    noise_mode: NoiseMode = Field(
        "random",
        description="Noise in the layers of the network. random: drawn for sample i from (seed, i). const: the same for all "
        "images. none: no noise.",
    )
    format: DatasetFormat = Field("imagefolder", description="Files: one zip, tar shards, or Parquet shards.")
    image_format: ImageFormat = Field("png", description="Encoding of each image. PNG is lossless.")
    image_quality: int = Field(95, ge=1, le=100, description="Quality of JPEG and WebP. PNG ignores it.")
    shard_size: int = Field(250, ge=1, le=10_000, description="Images in a shard: the unit of work and of recovery.")
    # Not serialised if it is null, so that requests without it keep the digest that they had before the field existed.
    classifier: ClassifierOptions | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="Null: images are scored if the model has a classifier, and all are kept.",
    )

    edits: list[EditOption] | None = Field(
        None,
        min_length=1,
        max_length=MAX_EDITS,
        exclude_if=lambda value: value is None,
        description="Edits of every latent along directions of the model, after truncation. Their order changes only rounding.",
    )
    privacy: PrivacyOptions | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="Null: no image is compared with the training images.",
    )
    provenance: ProvenanceOptions | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="What the image files say of their origin. Null: the defaults.",
    )

    @property
    def samples(self) -> int:
        """Number of images."""
        return sum(self.classes.values())

    @property
    def signed(self) -> bool:
        """Whether every image has a signed manifest."""
        return self.provenance is not None and bool(self.provenance.c2pa)

    def with_signing(self, available: bool, missing: str) -> DatasetRequest:
        """The request with a choice of signing in place of null (see `ProvenanceOptions.resolved`).

        A request that signs nothing has no such options, so that its digest is that of a request before they existed.
        """
        provenance = (self.provenance or ProvenanceOptions.model_validate({})).resolved(available, missing)
        return self.model_copy(update={"provenance": provenance if provenance.c2pa else None})

    @property
    def tries(self) -> int:
        """Maximum number of candidates for one image.

        It is the sum of the limits of classifier and gate, minus 1, because the last candidate counts for both.
        """
        return self.classifier_tries + (self.privacy.most if self.privacy else 1) - 1

    @property
    def classifier_tries(self) -> int:
        """Candidates that the classifier can reject before an image is missing."""
        return self.classifier.tries if self.classifier else 1

    @property
    def moves(self) -> tuple[Edit, ...]:
        """The edits in the form that `dermis.directions` takes."""
        return tuple(option.edit for option in self.edits or ())

    @model_validator(mode="after")
    def _check_tries(self) -> Self:
        if self.tries > MAX_TRIES:
            raise ValueError(f"classifier.tries and privacy.tries together must not be above {MAX_TRIES + 1}")
        return self


def _with_former_defaults(document: Any) -> Any:
    return {"noise_mode": "const", **document} if isinstance(document, dict) else document


StoredRequest = Annotated[DatasetRequest, BeforeValidator(_with_former_defaults)]
"""A request in a manifest or in the jobs database.

Requests are stored with all their options. A request without a noise mode gets the former default, const, so that it
still describes the same images.
"""
_STORED_REQUEST: TypeAdapter[DatasetRequest] = TypeAdapter(StoredRequest)


def stored_request(document: Any) -> DatasetRequest:
    """Read a `StoredRequest`.

    Raises:
        pydantic.ValidationError: The document is not a request.
    """
    return _STORED_REQUEST.validate_python(document)


def classes_of(bundle: Bundle) -> tuple[str, ...]:
    """Return the class names that a request can use, in the order of the labels."""
    return bundle.class_names or (UNCONDITIONAL_CLASS,)


def check_against(request: DatasetRequest, bundle: Bundle, max_samples: int) -> None:
    """Check a request against a bundle and a limit.

    Args:
        request: The request.
        bundle: The bundle that will generate the images.
        max_samples: Largest number of images of a dataset.

    Raises:
        RequestError: The bundle lacks something that the request needs, or the request is too large. The error names the field.
    """
    known = classes_of(bundle)
    for name in request.classes:
        if name not in known:
            message = f"unknown class; this model has {', '.join(known)}"
            raise RequestError(f"classes.{name}", message, kind="unknown-class")
    if request.samples > max_samples:
        message = f"{request.samples:,} images were requested; at most {max_samples:,} are allowed in one dataset"
        raise RequestError("classes", message, kind="request-too-large")
    tries = request.classifier_tries
    if tries > 1 and request.samples * tries > max_samples:
        message = (
            f"up to {request.samples * tries:,} images in {tries} tries; at most {max_samples:,} are "
            "allowed in one dataset: ask for fewer images or tries"
        )
        raise RequestError("classifier.tries", message, kind="request-too-large")
    if request.classifier is not None:
        _check_classifier(request, request.classifier, bundle)
    num_ws = bundle.generator.num_ws
    if request.truncation_cutoff is not None and request.truncation_cutoff > num_ws:
        raise RequestError("truncation_cutoff", f"this model has {num_ws} style layers; give 0 to {num_ws}")
    if request.edits is not None:
        bundle_offset(bundle, request.moves)
    if request.privacy is not None and bundle.authenticity is None:
        raise RequestError(
            "privacy", f"{bundle.name} has no index of its training images; leave it out", kind="no-index"
        )


def _check_classifier(request: DatasetRequest, options: ClassifierOptions, bundle: Bundle) -> None:
    classifier = bundle.classifier
    if classifier is None:
        if options.score:
            raise RequestError("classifier", f"{bundle.name} has no classifier; leave it out", kind="no-classifier")
        return
    try:
        classifier.threshold(options.threshold)
    except RequestError as error:
        raise RequestError(
            "classifier.threshold", error.message.replace(", or give a number from 0 to 1", "")
        ) from None
    if options.keep != "agreeing":
        return
    unknown = [name for name in request.classes if name not in classifier.class_names]
    if unknown:
        known = ", ".join(classifier.class_names)
        raise RequestError(
            "classifier.keep",
            f"the classes of the classifier are {known}; images of {unknown[0]!r} cannot be filtered with agreeing",
        )
