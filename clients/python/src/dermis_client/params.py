"""The objects that requests contain, as TypedDicts: a type checker finds a misspelt option or choice before anything is sent.

At run time they are ordinary dictionaries. The service checks them too, and has the limits of numbers.
"""

# Annotations are not postponed here: `__required_keys__` would not respect NotRequired.
from collections.abc import Sequence
from typing import Literal, NotRequired, TypedDict

GateCondition = Literal["authentic", "min_distance"]
OnReject = Literal["resample", "drop", "flag"]
ClassifierKeep = Literal["all", "agreeing"]
ProjectionSchedule = Literal["fast", "official"]
ProjectionSpace = Literal["w", "w+"]
ProjectionStart = Literal["mean", "encoder"]
WebhookEvent = Literal[
    "dataset.succeeded",
    "dataset.failed",
    "dataset.cancelled",
    "projection.succeeded",
    "projection.failed",
    "projection.cancelled",
]


class ClassifierParams(TypedDict, total=False):
    """Options of scoring the images of a dataset with the classifier of the model, and of filtering them by the result.

    Attributes:
        score: Whether images are scored at all.
        keep: "all", or "agreeing" for images to which the classifier gives the requested class.
        threshold: Name of the threshold from which on an image is of the positive class.
        min_probability: Least calibrated probability of images to keep, 0 to 1.
        max_probability: Greatest calibrated probability of images to keep, 0 to 1.
        tries: Latents to try for each image until one is kept, 1 to 64.
    """

    score: bool
    keep: ClassifierKeep
    threshold: str
    min_probability: float
    max_probability: float
    tries: int


class GateParams(TypedDict, total=False):
    """The condition of a gate against copies of training images.

    Attributes:
        gate: "authentic", or "min_distance" for a distance of your own.
        percentile: For "min_distance": percentile of the radii of the training images, 0 to 100.
        detect_copies: Whether an image also fails the gate if the copy detector of the model takes it for a changed copy.
    """

    gate: GateCondition
    percentile: float
    detect_copies: bool


class PrivacyParams(GateParams, total=False):
    """Options of the gate of a dataset, in addition to its condition.

    Attributes:
        on_reject: What to do with images that fail: "resample" (try the next latent), "drop" or "flag".
        tries: For "resample": images that may be rejected before a sample is left out, 1 to 16.
    """

    on_reject: OnReject
    tries: int


class ProvenanceParams(TypedDict, total=False):
    """Options of what image files say of their origin.

    Attributes:
        c2pa: Whether each image has a signed manifest (C2PA); None: if the service has a certificate.
    """

    c2pa: bool | None


class EditParams(TypedDict):
    """An edit along a direction.

    Attributes:
        direction: Name of a direction of the model.
        strength: How far, in standard deviations of w along the direction.
        layers: First and last + 1 of the style vectors to move; None for those of the direction.
    """

    direction: str
    strength: float
    layers: NotRequired[Sequence[int] | None]


class SweepParams(TypedDict):
    """One direction with several strengths.

    Attributes:
        direction: Name of a direction of the model.
        strengths: The strengths, in standard deviations of w along the direction.
        layers: First and last + 1 of the style vectors to move; None for those of the direction.
    """

    direction: str
    strengths: Sequence[float]
    layers: NotRequired[Sequence[int] | None]
