"""The report of a dataset, as `client.datasets.report` returns it. A number that was not measured is None."""

from __future__ import annotations

from typing import Any

from dermis_client.models import Count, ResponseRecord


class ReportNumber(ResponseRecord):
    """A number of a report.

    Attributes:
        name: What was measured.
        value: The number; None if it was not measured.
        class_name: Class of the images; None for all.
        low: Lower end of the 95 % interval, if there is one.
        high: Upper end of it.
        reference: The same number of real images, if it is known.
        unit: "share", "distance", "ratio", "images", "degrees" or "".
    """

    name: str
    value: float | None = None
    class_name: str | None = None
    low: float | None = None
    high: float | None = None
    reference: float | None = None
    unit: str = ""


class ReportSection(ResponseRecord):
    """A part of a report.

    Attributes:
        status: "measured", "partly measured" or "not measured".
        numbers: The numbers.
        images: Number of images that were measured; None if that is the whole dataset or none.
        reason: Why some or all numbers are not measured.
        remedy: What to do so that they are.
        notes: How to read the numbers.
    """

    status: str
    numbers: list[ReportNumber]
    images: Count | None = None
    reason: str | None = None
    remedy: str | None = None
    notes: list[str]

    def number(self, name: str, class_name: str | None = None) -> ReportNumber:
        """Return the number with this name and class.

        Raises:
            KeyError: There is none.
        """
        for number in self.numbers:
            if (number.name, number.class_name) == (name, class_name):
                return number
        raise KeyError((name, class_name))


class ReportQuestion(ResponseRecord):
    """One of the seven rows of the scorecard. id: such as "congruence"; status as in `ReportSection`."""

    id: str
    question: str
    status: str
    numbers: list[ReportNumber]
    notes: list[str]


class ReportRule(ResponseRecord):
    """A rule of the privacy audit. status: "pass", "warn", "fail" or "not measured"."""

    id: str
    status: str
    text: str


class ReportAudit(ResponseRecord):
    """A privacy audit. verdict: "pass", "warn", "fail" or "not measured"; scope: "bundle", or "dataset" for these images."""

    verdict: str
    rules: list[ReportRule]
    remedy: str | None = None
    scope: str = "bundle"


class ReportRequest(ResponseRecord):
    """What was asked for. text: in words; options: as it was sent."""

    text: str
    options: dict[str, Any]


class ReportOrigin(ResponseRecord):
    """What made the images. digest: SHA-256 of bundle.json; resolution: side in px."""

    bundle: str
    digest: str
    licence: str
    attribution: str
    training_images: Count | None = None
    resolution: Count


class DatasetReport(ResponseRecord):
    """The report of a dataset.

    Attributes:
        request: What was asked for.
        origin: What made the images.
        images: Images in the dataset.
        requested: Images that were asked for.
        sample: Images whose artefacts and skin tones were measured.
        scorecard: Seven questions, each with its numbers.
        audit: The privacy audit of the dataset if it has one, otherwise of the bundle.
        limits: Sentences on what the dataset must not be used for.
    """

    format_version: Count
    request: ReportRequest
    origin: ReportOrigin
    images: Count
    requested: Count
    sample: Count
    scorecard: list[ReportQuestion]
    classes: ReportSection
    fidelity: ReportSection
    variety: ReportSection
    utility: ReportSection
    privacy: ReportSection
    audit: ReportAudit
    artefacts: ReportSection
    skin_tone: ReportSection
    limits: list[str]
