"""Bodies of `/v1/classifications`."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from dermis.bundle.classifier import NOTICE
from dermis.explain.attribution import Method
from services.gateway.schemas.common import ModelRef, ResponseBody


class ClassificationModel(ModelRef):
    """The bundle and the classifier that classified the images."""

    classifier: str = Field(description="SHA-256 of classifier.json, which contains the SHA-256 of the network.")


class ThresholdUsed(ResponseBody):
    """The threshold that the calibrated probability was compared with."""

    name: str | None = Field(description="Name of the threshold; null if the request contains a number.")
    value: float = Field(ge=0, le=1)


class ClassificationHeatMap(ResponseBody):
    """A picture of what each part of an image adds to the classifier's logit of the positive class."""

    method: Method
    scale: float = Field(
        ge=0, description="Logits for each 1 % of the area at which a colour is saturated, for or against the class."
    )
    media_type: Literal["image/png"] = "image/png"
    sha256: str = Field(description="SHA-256 of the decoded bytes.")
    b64: str = Field(
        description="The picture in base64: the centred square of the image in grey, with the colours on top."
    )


class Classification(ResponseBody):
    """The classification of one image."""

    index: int = Field(ge=0, description="Position of the image in the request, from 0.")
    probability: float = Field(ge=0, le=1, description="Probability of the positive class, as the network computes it.")
    calibrated: float = Field(
        ge=0, le=1, description="The same, calibrated on validation data. Thresholds apply to it."
    )
    class_: str = Field(
        alias="class",
        serialization_alias="class",
        description="Positive if `calibrated` is at least the threshold.",
    )
    heat_map: ClassificationHeatMap | None = Field(None, description="Null unless the request contains `heat_map`.")

    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class ClassificationList(ResponseBody):
    """The classifications of the images of one call, in their order."""

    object: Literal["list"] = "list"
    model: ClassificationModel
    positive_class: str = Field(description="The class that the probabilities refer to.")
    threshold: ThresholdUsed
    data: list[Classification]
    notice: str = Field(description="Purposes that the results must not be used for.")

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "object": "list",
                    "model": {"name": "demo", "digest": "f7e4" * 16, "classifier": "09ab" * 16},
                    "positive_class": "malignant",
                    "threshold": {"name": "sensitivity_90", "value": 0.125},
                    "data": [
                        {
                            "index": 0,
                            "probability": 0.25,
                            "calibrated": 0.1875,
                            "class": "malignant",
                            "heat_map": None,
                        }
                    ],
                    "notice": NOTICE,
                }
            ]
        },
    )
