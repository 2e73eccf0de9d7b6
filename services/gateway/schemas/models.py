"""Bodies of `/v1/models`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from dermis.bundle import Bundle
from dermis.bundle.classifier import ClassifierDescription
from dermis.bundle.index import IndexDescription
from dermis.dataset.privacy import SHOWN
from dermis.dataset.request import classes_of
from services.gateway.schemas.common import ResponseBody
from services.gateway.schemas.provenance import ModelProvenance, provenance_of


class ModelClassifier(ResponseBody):
    """The classifier of a served bundle."""

    digest: str = Field(description="SHA-256 of classifier.json: the identity of the classifier.")
    architecture: str
    input_size: int = Field(description="Side in px of the centred square that is the input of the network.")
    classes: list[str]
    positive_class: str
    temperature: float
    thresholds: dict[str, float] = Field(description="Thresholds of the calibrated probability by name.")
    metrics: dict[str, Any]


class ModelAuthenticity(ResponseBody):
    """The index of the training images of a served bundle."""

    digest: str = Field(description="SHA-256 of authenticity.json: the identity of the index.")
    extractor: str = Field(description="Feature space of the embeddings.")
    metric: str
    vectors: int = Field(description="Number of training images.")
    held_out: int = Field(description="Number of real images that are not training images, for the membership attack.")
    uploads: bool = Field(
        description="Whether the service also compares uploaded images (`DERMIS_AUTHENTICITY_UPLOADS`)."
    )
    baseline: dict[str, float] = Field(
        description="Percentiles of the distance between a training image and its nearest neighbour among them."
    )


class Model(ResponseBody):
    """A served bundle."""

    object: Literal["model"] = "model"
    name: str
    digest: str
    default: bool
    resolution: int
    classes: list[str]
    z_dim: int
    w_dim: int
    num_ws: int
    licence: str | None
    attribution: str | None
    kimg: float | None
    provenance: ModelProvenance
    metrics: dict[str, Any]
    classifier: ModelClassifier | None = Field(description="Null if the bundle has none.")
    authenticity: ModelAuthenticity | None = Field(description="Null if the bundle has no index.")
    directions: list[str] = Field(description="Names of its directions; /v1/directions describes them.")


class ModelWithCard(Model):
    """A served bundle and its model card."""

    card: str = Field(description="The model card in Markdown.")


class ModelList(ResponseBody):
    """The served bundles, the default one first."""

    object: Literal["list"] = "list"
    data: list[Model]


def model_of(bundle: Bundle, default: bool, uploads: bool) -> Model:
    """The body that describes a bundle.

    Args:
        bundle: The bundle.
        default: Whether requests that name no model use it.
        uploads: Whether the service compares uploaded images with the training images.
    """
    return Model(**_model_fields(bundle, default, uploads))


def model_with_card_of(bundle: Bundle, default: bool, uploads: bool) -> ModelWithCard:
    """The body that describes a bundle, with its model card. Arguments as for `model_of`."""
    return ModelWithCard(**_model_fields(bundle, default, uploads), card=bundle.model_card)


def _model_fields(bundle: Bundle, default: bool, uploads: bool) -> dict[str, Any]:
    config = bundle.generator
    return {
        "name": bundle.name,
        "digest": bundle.digest,
        "default": default,
        "resolution": config.img_resolution,
        "classes": list(classes_of(bundle)),
        "z_dim": config.z_dim,
        "w_dim": config.w_dim,
        "num_ws": config.num_ws,
        "licence": _text(bundle.provenance, "licence"),
        "attribution": _text(bundle.provenance, "attribution"),
        "kimg": _number(bundle.provenance, "kimg"),
        "provenance": provenance_of(bundle.provenance),
        "metrics": dict(bundle.metrics),
        "classifier": None if bundle.classifier is None else _classifier_of(bundle.classifier),
        "authenticity": None if bundle.authenticity is None else _authenticity_of(bundle.authenticity, uploads),
        "directions": [direction.name for direction in bundle.directions],
    }


def _authenticity_of(index: IndexDescription, uploads: bool) -> ModelAuthenticity:
    return ModelAuthenticity(
        digest=index.digest,
        extractor=index.extractor,
        metric=index.metric,
        vectors=index.vectors,
        held_out=index.held_out,
        uploads=uploads,
        baseline={str(percentile): round(index.radii[percentile], 4) for percentile in SHOWN},
    )


def _classifier_of(classifier: ClassifierDescription) -> ModelClassifier:
    return ModelClassifier(
        digest=classifier.digest,
        architecture=classifier.architecture,
        input_size=classifier.input.size,
        classes=list(classifier.class_names),
        positive_class=classifier.positive_class,
        temperature=classifier.temperature,
        thresholds=dict(classifier.thresholds),
        metrics=dict(classifier.metrics),
    )


def _text(values: Mapping[str, Any], key: str) -> str | None:
    value = values.get(key)
    return None if value is None else str(value)


def _number(values: Mapping[str, Any], key: str) -> float | None:
    value = values.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
