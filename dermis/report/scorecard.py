"""The scorecard of a report: seven questions, each with its numbers.

The seven criteria are those of Zamzmi et al., "Scorecard for synthetic medical data evaluation", Communications Engineering
4, 130 (2025). There is no total score and no threshold for passing: whether a number is good enough depends on the use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dermis.bundle.classifier import DEFAULT_THRESHOLD
from dermis.dataset.plan import DatasetPlan
from dermis.report.content import (
    NOT_MEASURED,
    Measurements,
    ReportAudit,
    ReportNumber,
    ReportOrigin,
    ReportQuestion,
    ReportSection,
    counted,
    rounded,
    share,
    status_of,
)

if TYPE_CHECKING:
    from dermis.bundle import Bundle

_EMPTY_COLUMNS = ("patient_id", "diagnosis", "age_approx", "sex", "anatom_site")
_QUESTIONS = {
    "congruence": "Do the images have the distribution of real images?",
    "coverage": "Do the images have the variety of real images?",
    "constraint": "Are the images typical, and do they show the requested class?",
    "completeness": "Was every requested image delivered, and which columns are empty?",
    "compliance": "Is the privacy of patients protected, and under which licence may the data be used?",
    "comprehension": "Are origin, content and usefulness of the images documented?",
    "consistency": "Is the quality the same in every class?",
}


def scorecard(
    plan: DatasetPlan,
    bundle: Bundle,
    sections: Mapping[str, ReportSection],
    audit: ReportAudit,
    measured: Measurements,
    origin: ReportOrigin,
) -> tuple[ReportQuestion, ...]:
    """Answer the seven questions from the sections of a report."""
    rows: dict[str, tuple[list[ReportNumber], list[str]]] = {
        "congruence": (
            [*_named(sections["fidelity"], "Fréchet distance"), *_named(sections["skin_tone"], "overlap")],
            ["Overlap: skin tones in common with real images."],
        ),
        "coverage": (list(sections["variety"].numbers), []),
        "constraint": (
            [*_named(sections["fidelity"], "typical images"), *_agreement(plan, bundle, measured)],
            ["Anatomical plausibility was not checked by a person."],
        ),
        "completeness": (_completeness(plan, sections["classes"]), [f"Always empty: {', '.join(_EMPTY_COLUMNS)}."]),
        "compliance": (
            [
                *_named(sections["privacy"], "authentic after the gate", "authentic images"),
                *_named(sections["privacy"], "AUC of the distance attack", "nearest distance"),
            ],
            [f"Privacy audit of the {audit.scope}: {audit.verdict}.", f"Licence: {origin.licence}."],
        ),
        "comprehension": (
            [
                _share_of_sections(sections),
                *(
                    ReportNumber(each.name, each.value, None, each.low, each.high)
                    for each in sections["utility"].numbers
                ),
            ],
            [f"Attribution: {origin.attribution}.", "Not for diagnosis."],
        ),
        "consistency": (_consistency(plan, sections), ["Largest difference between any two classes."]),
    }
    questions: list[ReportQuestion] = []
    for key, (numbers, notes) in rows.items():
        status = status_of(numbers)
        if key == "compliance" and audit.verdict == NOT_MEASURED and status == "measured":
            status = "partly measured"
        questions.append(ReportQuestion(key, _QUESTIONS[key], status, tuple(numbers), tuple(notes)))
    return tuple(questions)


def _named(section: ReportSection, *names: str) -> list[ReportNumber]:
    return [number for number in section.numbers if number.name in names]


def _agreement(plan: DatasetPlan, bundle: Bundle, measured: Measurements) -> list[ReportNumber]:
    """Shares of images to which the classifier gives their class, beside those of real test images."""
    if measured.tallies is None:
        return [ReportNumber("classifier agrees", None, name, unit="share") for name in plan.request.classes]
    numbers: list[ReportNumber] = []
    for name, each in measured.tallies.items():
        if each.agreeing is None:
            numbers.append(ReportNumber("classifier agrees", None, name, unit="share"))
        else:
            numbers.append(share("classifier agrees", each.agreeing, each.images, name, _on_real(plan, bundle, name)))
    return numbers


def _on_real(plan: DatasetPlan, bundle: Bundle, class_name: str) -> float | None:
    """Share of real test images of a class to which the classifier gives this class, if its description states it."""
    classifier = bundle.classifier
    if classifier is None:
        return None
    options = plan.request.classifier
    threshold = DEFAULT_THRESHOLD if options is None else options.threshold
    if threshold == DEFAULT_THRESHOLD:
        threshold = str(classifier.metrics.get("default_threshold"))
    rate = "sensitivity" if class_name == classifier.positive_class else "specificity"
    try:
        return rounded(float(classifier.metrics["test"]["at_thresholds"][threshold][rate]["value"]))
    except (KeyError, TypeError, ValueError):
        return None


def _completeness(plan: DatasetPlan, classes: ReportSection) -> list[ReportNumber]:
    kept = {number.class_name: number.value or 0 for number in classes.numbers if number.name == "images"}
    return [
        counted("images delivered", int(kept[name]), plan.request.classes[name], name) for name in plan.request.classes
    ]


def _share_of_sections(sections: Mapping[str, ReportSection]) -> ReportNumber:
    complete = sum(section.status == "measured" for section in sections.values())
    return ReportNumber("sections measured completely", rounded(complete / len(sections)), unit="share")


def _consistency(plan: DatasetPlan, sections: Mapping[str, ReportSection]) -> list[ReportNumber]:
    """Largest differences between classes."""
    chosen = {
        "coverage": _named(sections["variety"], "coverage"),
        "spread": _named(sections["variety"], "spread"),
        **{name: _named(sections["artefacts"], name) for name in ("frame", "ruler", "hair", "ink")},
        "median angle": _named(sections["skin_tone"], "median angle"),
    }
    if len(plan.request.classes) < 2:
        return [ReportNumber(f"difference in {name}", None) for name in ("coverage", "artefacts", "median angle")]
    return [
        ReportNumber(
            f"difference in {name}",
            _range([number.value for number in numbers]),
            reference=None if name in ("coverage", "spread") else _range([number.reference for number in numbers]),
            unit=numbers[0].unit,
        )
        for name, numbers in chosen.items()
        if numbers
    ]


def _range(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return rounded(max(known) - min(known)) if len(known) == len(values) and known else None
