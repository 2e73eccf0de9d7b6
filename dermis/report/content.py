"""The content of the report of a dataset: report.json.

The report is a pure function of its arguments and has no date. A section that could not be measured says so, with the reason
and what to do; it never reads as a result. docs/dataset-report.md explains every number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dermis.artefacts import NAMES, wilson_interval
from dermis.authenticity.attack import INTERVAL
from dermis.authenticity.verdict import FALSE_ALARMS
from dermis.bundle.reference import MINIMUM_GROUP, read_features
from dermis.dataset.plan import DatasetPlan, request_in_words
from dermis.dataset.privacy import SHOWN, PrivacyReport, has_percentile
from dermis.dataset.scoring import ClassifierTally
from dermis.privacy.verdict import read_verdict
from dermis.report.appearance import Appearance, artefact_counts, skin_tones
from dermis.report.features import MIN_IMAGES, FeatureComparison, Floats, compare
from dermis.skin_tone import CLASSES, tone_counts

if TYPE_CHECKING:
    from dermis.bundle import Bundle

FORMAT_VERSION = 1
NOT_MEASURED = "not measured"
Status = Literal["measured", "partly measured", "not measured"]
Unit = Literal["share", "distance", "ratio", "images", "degrees", ""]

REFERENCE_COMMAND = "dermis bundle reference --bundle BUNDLE --data IMAGES"
_NO_REFERENCE = "the bundle has no statistics of real images"
_MAKE_REFERENCE = f"make them with `{REFERENCE_COMMAND}`"


@dataclass(frozen=True)
class ReportNumber:
    """A measured number, or one that is not measured (`value` None).

    Attributes:
        name: What was measured.
        value: The number.
        class_name: Class of the images; None for all.
        low: Lower end of the 95 % interval, if there is one.
        high: Upper end of it.
        reference: The same number of real images, if it is known.
        unit: How to read the number.
    """

    name: str
    value: float | None
    class_name: str | None = None
    low: float | None = None
    high: float | None = None
    reference: float | None = None
    unit: Unit = ""


@dataclass(frozen=True)
class ReportSection:
    """A part of the report.

    Attributes:
        status: Whether its numbers were measured.
        images: Number of images that were measured; None if that is the whole dataset or none.
        numbers: The numbers.
        reason: Why some or all are not measured.
        remedy: What to do so that they are.
        notes: Sentences on how to read them.
    """

    status: Status
    numbers: tuple[ReportNumber, ...] = ()
    images: int | None = None
    reason: str | None = None
    remedy: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReportRule:
    """A rule of the privacy audit."""

    id: str
    status: str
    text: str


@dataclass(frozen=True)
class ReportAudit:
    """The privacy audit of this dataset or, if it was not audited, of the bundle: its verdict, or "not measured"."""

    verdict: str
    rules: tuple[ReportRule, ...] = ()
    remedy: str | None = None
    scope: Literal["bundle", "dataset"] = "bundle"


@dataclass(frozen=True)
class ReportQuestion:
    """A row of the scorecard."""

    id: str
    question: str
    status: Status
    numbers: tuple[ReportNumber, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReportRequest:
    """What was asked for, in words and as it was sent."""

    text: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class ReportOrigin:
    """What made the images."""

    bundle: str
    digest: str
    licence: str
    attribution: str
    training_images: int | None
    resolution: int
    """Side of the images, px."""


@dataclass(frozen=True)
class DatasetReport:
    """The whole report."""

    request: ReportRequest
    origin: ReportOrigin
    images: int
    """Images in the dataset."""
    requested: int
    sample: int
    """Images of the sample whose pixels were measured."""
    scorecard: tuple[ReportQuestion, ...]
    classes: ReportSection
    fidelity: ReportSection
    variety: ReportSection
    utility: ReportSection
    privacy: ReportSection
    audit: ReportAudit
    artefacts: ReportSection
    skin_tone: ReportSection
    limits: tuple[str, ...]
    format_version: int = FORMAT_VERSION

    def to_json(self) -> bytes:
        """Encode the report. The same report gives the same bytes."""
        return (json.dumps(asdict(self), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


@dataclass(frozen=True)
class Measurements:
    """What was measured of a dataset.

    Attributes:
        appearances: Artefacts and skin tone of a sample of the images, by class.
        features: Features [N, dim] in the space of the index, of the classes of which they were computed.
        features_problem: Why there are no features, if the bundle could have had them.
        tallies: Results of the classifier by class; None if images were not scored.
        privacy: Results of the gate; None without one.
        audit: Privacy audit of these images as JSON values; None to show that of the bundle.
    """

    appearances: Mapping[str, Sequence[Appearance]]
    features: Mapping[str, Floats] = field(default_factory=dict)
    features_problem: str | None = None
    tallies: Mapping[str, ClassifierTally] | None = None
    privacy: PrivacyReport | None = None
    audit: Mapping[str, Any] | None = None


def make_report(
    plan: DatasetPlan,
    bundle: Bundle,
    counts: Mapping[str, int],
    measured: Measurements,
) -> DatasetReport:
    """Make the report of a dataset.

    Args:
        plan: The plan of the dataset.
        bundle: The bundle whose generator made the images.
        counts: Images in the dataset by class.
        measured: What was measured of the images.
    """
    from dermis.report.scorecard import scorecard

    compared, problem = _compared(plan, bundle, measured)
    sections = {
        "classes": _classes(plan, bundle, counts),
        "fidelity": _fidelity(plan, compared, problem),
        "variety": _variety(plan, compared, problem),
        "utility": _utility(bundle),
        "privacy": _privacy(plan, measured.privacy),
        "artefacts": _artefacts(bundle, measured),
        "skin_tone": _skin_tone(bundle, measured),
    }
    audited = report_audit(bundle.privacy_audit if measured.audit is None else measured.audit)
    if measured.audit is not None:
        audited = replace(audited, scope="dataset")
    training = bundle.provenance.get("dataset")
    count = training.get("images") if isinstance(training, Mapping) else None
    origin = ReportOrigin(
        bundle=bundle.name,
        digest=bundle.digest,
        licence=str(bundle.provenance.get("licence") or "unknown"),
        attribution=str(bundle.provenance.get("attribution") or "not stated"),
        training_images=count if type(count) is int else None,
        resolution=bundle.generator.img_resolution,
    )
    return DatasetReport(
        request=ReportRequest(request_in_words(plan), plan.request.model_dump()),
        origin=origin,
        images=sum(counts.values()),
        requested=plan.samples,
        sample=sum(len(each) for each in measured.appearances.values()),
        scorecard=scorecard(plan, bundle, sections, audited, measured, origin),
        audit=audited,
        limits=_limits(plan, measured),
        classes=sections["classes"],
        fidelity=sections["fidelity"],
        variety=sections["variety"],
        utility=sections["utility"],
        privacy=sections["privacy"],
        artefacts=sections["artefacts"],
        skin_tone=sections["skin_tone"],
    )


def rounded(value: float | None, digits: int = 4) -> float | None:
    """Round a number for the report, so that the last bits of a processor do not show; None if there is no number."""
    return None if value is None or not np.isfinite(value) else round(float(value), digits) + 0.0


def share(
    name: str, count: int, total: int, class_name: str | None = None, reference: float | None = None
) -> ReportNumber:
    """Return a share with its Wilson interval; not measured if there are no images."""
    if total == 0:
        return ReportNumber(name, None, class_name, reference=rounded(reference), unit="share")
    low, high = wilson_interval(count, total)
    return ReportNumber(
        name, rounded(count / total), class_name, rounded(low), rounded(high), rounded(reference), unit="share"
    )


def counted(name: str, count: int, total: int, class_name: str | None = None) -> ReportNumber:
    """Return a share of all images, which has no interval; not measured if there are no images."""
    return ReportNumber(name, rounded(count / total) if total else None, class_name, unit="share")


def status_of(numbers: Sequence[ReportNumber]) -> Status:
    """Return whether all, some or none of the numbers were measured."""
    values = [number.value is not None for number in numbers]
    return "measured" if values and all(values) else "partly measured" if any(values) else "not measured"


def _classes(plan: DatasetPlan, bundle: Bundle, counts: Mapping[str, int]) -> ReportSection:
    reference = {name: each.images for name, each in bundle.reference.classes.items()} if bundle.reference else {}
    known = sum(reference.values()) if set(counts) <= set(reference) else 0
    total = sum(counts.values())
    numbers: list[ReportNumber] = []
    for name, count in counts.items():
        real = reference[name] / known if known else None
        numbers += [
            ReportNumber("images requested", plan.request.classes[name], name, unit="images"),
            ReportNumber("images", count, name, unit="images"),
            ReportNumber("share", rounded(count / total), name, reference=rounded(real), unit="share"),
        ]
    return ReportSection("measured", tuple(numbers), notes=("The class is the one that the generator was asked for.",))


def _compared(
    plan: DatasetPlan, bundle: Bundle, measured: Measurements
) -> tuple[dict[str, FeatureComparison], tuple[str, str]]:
    """Compare features by class; a class without statistics or with too few images is missing.

    Returns:
        The comparisons, and reason and remedy for the missing ones.
    """
    reference = bundle.reference
    if reference is None:
        return {}, (_NO_REFERENCE, _MAKE_REFERENCE)
    if reference.space is None:
        return {}, (
            "the statistics of real images have no features, because the bundle had no index",
            f"build one with `dermis index build`, then {_MAKE_REFERENCE}",
        )
    index = plan.authenticity or bundle.authenticity
    if index is None or index.digest != reference.space.index:
        return {}, ("the statistics of real images are of another index than the bundle's", _MAKE_REFERENCE)
    if measured.features_problem is not None:
        return {}, (measured.features_problem, "repair this and make the dataset again")
    real = read_features(f"{bundle.location}/reference", reference)
    compared: dict[str, FeatureComparison] = {}
    for name, features in measured.features.items():
        if name in real and len(features) >= MIN_IMAGES:
            compared[name] = compare(features[:, : reference.space.dim], real[name], reference.classes[name])
    return compared, (
        f"a class has fewer than {MIN_IMAGES} images here, or fewer than {MINIMUM_GROUP} in the statistics of real images",
        f"generate at least {MIN_IMAGES} images of each class",
    )


def _section(numbers: Sequence[ReportNumber], problem: tuple[str, str], **others: Any) -> ReportSection:
    status = status_of(numbers)
    reason, remedy = (None, None) if status == "measured" else problem
    return ReportSection(status, tuple(numbers), reason=reason, remedy=remedy, **others)


def _fidelity(plan: DatasetPlan, compared: Mapping[str, FeatureComparison], problem: tuple[str, str]) -> ReportSection:
    numbers: list[ReportNumber] = []
    for name in plan.request.classes:
        if (result := compared.get(name)) is None:
            numbers += [
                ReportNumber("Fréchet distance", None, name, unit="distance"),
                ReportNumber("typical images", None, name),
            ]
            continue
        distance, typical = result.distance, result.typical
        numbers += [
            ReportNumber(
                "Fréchet distance",
                rounded(distance.value, 6),
                name,
                rounded(distance.low, 6),
                rounded(distance.high, 6),
                rounded(result.real_distance, 6),
                "distance",
            ),
            ReportNumber(
                "typical images",
                rounded(typical.value),
                name,
                rounded(typical.low),
                rounded(typical.high),
                rounded(result.real_typical),
                "share",
            ),
        ]
    notes = (
        "A lower distance is better. The reference is that of as many held-out real images, for typical images that of all.",
    )
    return _of_features(numbers, compared, problem, notes)


def _variety(plan: DatasetPlan, compared: Mapping[str, FeatureComparison], problem: tuple[str, str]) -> ReportSection:
    numbers: list[ReportNumber] = []
    for name in plan.request.classes:
        if (result := compared.get(name)) is None:
            numbers += [
                ReportNumber("coverage", None, name, unit="share"),
                ReportNumber("spread", None, name, unit="ratio"),
            ]
            continue
        coverage, spread = result.coverage, result.spread
        numbers += [
            ReportNumber(
                "coverage",
                rounded(coverage.value),
                name,
                rounded(coverage.low),
                rounded(coverage.high),
                rounded(result.real_coverage),
                "share",
            ),
            ReportNumber(
                "spread", rounded(spread.value), name, rounded(spread.low), rounded(spread.high), 1.0, "ratio"
            ),
        ]
    notes = ("Coverage near its reference and a spread near 1 are good; values near 0 mean that the images are alike.",)
    return _of_features(numbers, compared, problem, notes)


def _of_features(
    numbers: Sequence[ReportNumber],
    compared: Mapping[str, FeatureComparison],
    problem: tuple[str, str],
    notes: tuple[str, ...],
) -> ReportSection:
    """Make a section of features; without held-out images it has no reference, so it is measured partly."""
    section = _section(numbers, problem, images=sum(each.images for each in compared.values()) or None, notes=notes)
    if section.status != "measured" or all(each.reference is not None for each in numbers):
        return section
    return replace(
        section,
        status="partly measured",
        reason="the statistics of real images have no held-out images of a class, or are of an earlier version, so it is not "
        "known what real images have",
        remedy=f"make them again with held-out images: `{REFERENCE_COMMAND} --held-out HELD_OUT`",
    )


def _utility(bundle: Bundle) -> ReportSection:
    """Read the transfer that was measured for the bundle: training on its synthetic images, testing on real ones."""
    transfer = bundle.metrics.get("transfer")
    try:
        assert isinstance(transfer, Mapping)
        values = {
            key: [float(transfer[key][part]) for part in ("value", "low", "high")] for key in ("synthetic", "real")
        }
        name, images = str(transfer["measure"]), int(transfer["test_images"])
        if not np.isfinite([*values["synthetic"], *values["real"]]).all():
            raise ValueError("not finite")
    except (AssertionError, KeyError, TypeError, ValueError):
        return ReportSection(
            "not measured",
            (ReportNumber("transfer", None),),
            reason="metrics.json of the bundle has no `transfer`: no record of what a classifier learns from its images",
            remedy="train a classifier on generated images alone, test it on real ones, and add the result to metrics.json",
        )
    numbers: list[ReportNumber] = []
    for kind in ("synthetic", "real"):
        value, low, high = (rounded(each) for each in values[kind])
        numbers.append(ReportNumber(f"{name} of training on {kind} images", value, None, low, high))
    note = f"Measured once for the bundle, on {images:,} real images, not for this dataset."
    return ReportSection("measured", tuple(numbers), notes=(note,))


def _privacy(plan: DatasetPlan, privacy: PrivacyReport | None) -> ReportSection:
    if privacy is None:
        has_index = plan.authenticity is not None
        return ReportSection(
            "not measured",
            (
                ReportNumber("authentic images", None, unit="share"),
                ReportNumber("nearest distance", None, unit="distance"),
            ),
            reason="the request had no gate, so no image was compared with the training images"
            if has_index
            else "the bundle has no index of its training images",
            remedy="make the dataset again with `privacy` in the request (`dermis generate --gate authentic`)"
            if has_index
            else "build an index with `dermis index build`, then make the dataset again with a gate",
        )
    tallies = privacy.classes.values()
    seen, images = sum(each.seen for each in tallies), sum(each.images for each in tallies)
    numbers = [
        counted("authentic before the gate", sum(each.seen_authentic for each in tallies), seen),
        counted("authentic after the gate", sum(each.authentic for each in tallies), images),
        ReportNumber("images compared", seen, unit="images"),
        ReportNumber("rejected by the gate", sum(each.rejected for each in tallies), unit="images"),
        ReportNumber("flagged in the dataset", sum(each.flagged for each in tallies), unit="images"),
    ]
    if plan.detects_copies:
        numbers.append(
            share("taken for changed copies", sum(each.copies or 0 for each in tallies), seen, reference=FALSE_ALARMS)
        )
    numbers += [
        ReportNumber(f"nearest distance, {percentile} %", generated, reference=real, unit="distance")
        for percentile, generated, real in zip(SHOWN, privacy.distances, privacy.baseline, strict=True)
        if has_percentile(images, percentile)
    ]
    numbers.append(
        ReportNumber("identifiability", rounded(privacy.exposure.identifiability), unit="share"),
    )
    attack = privacy.exposure.attack
    numbers.append(
        ReportNumber("AUC of the distance attack", None)
        if attack is None
        else ReportNumber(
            "AUC of the distance attack", rounded(attack.auc), None, rounded(attack.low), rounded(attack.high)
        )
    )
    notes = [
        "Distances to the nearest training image; the reference is that of training images to each other.",
        f"An AUC of 0.5 is guessing. The attack uses these {images:,} images; it finds less with fewer images. {INTERVAL}.",
    ]
    if not all(has_percentile(images, percentile) for percentile in SHOWN):
        notes.append("Percentiles that lie between the two nearest or the two farthest images are left out.")
    if privacy.weakness is not None:
        notes.append(f"Copies may pass this check: {privacy.weakness}.")
    problem = (
        "the index has no held-out images, so the attack was not measured",
        "build the index with --held-out",
    )
    return _section(numbers, problem, notes=tuple(notes))


def report_audit(audit: Mapping[str, Any] | None) -> ReportAudit:
    """Read verdict and rules of privacy_audit.json. An audit whose verdict cannot be relied on measured nothing."""
    stored = None if audit is None else read_verdict(audit)
    if stored is None:
        return ReportAudit(NOT_MEASURED, remedy="run `dermis privacy audit --attach`, then make the dataset again")
    rules = tuple(ReportRule(each.rule, each.status, each.finding) for each in stored.outcomes)
    return ReportAudit(stored.verdict.status, rules)


def _artefacts(bundle: Bundle, measured: Measurements) -> ReportSection:
    numbers: list[ReportNumber] = []
    reference = bundle.reference
    for name, sample in measured.appearances.items():
        counts = artefact_counts(sample)
        real = reference.classes.get(name) if reference is not None else None
        for artefact in NAMES:
            known = real.artefacts.get(artefact) if real is not None else None
            numbers.append(
                share(
                    artefact,
                    counts[artefact],
                    len(sample),
                    name,
                    None if known is None or real is None else min(known / real.images, 1.0),
                )
            )
    return _of_sample(
        bundle, numbers, measured, "Shares of detected artefacts, by the same detectors as for real images."
    )


def _skin_tone(bundle: Bundle, measured: Measurements) -> ReportSection:
    numbers: list[ReportNumber] = []
    for name, sample in measured.appearances.items():
        angles = skin_tones(sample)
        counts = tone_counts(angles)
        real = bundle.reference.classes.get(name) if bundle.reference is not None else None
        total = sum(real.skin_tones.values()) if real is not None else 0
        for tone in CLASSES:
            known = real.skin_tones.get(tone, 0) / total if real is not None and total else None
            numbers.append(share(tone, counts[tone], len(angles), name, known))
        median = float(np.median(angles)) if angles else None
        numbers += [
            ReportNumber(
                "median angle",
                rounded(median, 1),
                name,
                reference=rounded(real.skin_tone_median, 1) if real is not None and total else None,
                unit="degrees",
            ),
            ReportNumber("overlap", _overlap(counts, real.skin_tones) if real and angles else None, name, unit="share"),
        ]
    note = (
        "Individual typology angle of the skin around the lesion; the photographs are not calibrated, so it compares "
        "collections and does not measure people."
    )
    return _of_sample(bundle, numbers, measured, note)


def _overlap(counts: Mapping[str, int], real: Mapping[str, int]) -> float | None:
    """Return the sum over the classes of skin tone of the smaller of both shares."""
    images, others = sum(counts.values()), sum(real.values())
    if not images or not others:
        return None
    return rounded(sum(min(count / images, real.get(tone, 0) / others) for tone, count in counts.items()))


def _of_sample(bundle: Bundle, numbers: Sequence[ReportNumber], measured: Measurements, note: str) -> ReportSection:
    problem = (_NO_REFERENCE, _MAKE_REFERENCE)
    if bundle.reference is not None:
        problem = (
            f"a class has no images here, or fewer than {MINIMUM_GROUP} in the statistics of real images",
            "generate images of each class",
        )
    status = status_of(numbers)
    if status == "measured" and any(number.reference is None for number in numbers if number.name != "overlap"):
        status = "partly measured"
    reason, remedy = (None, None) if status == "measured" else problem
    images = sum(len(sample) for sample in measured.appearances.values())
    return ReportSection(status, tuple(numbers), images, reason, remedy, (note,))


def _limits(plan: DatasetPlan, measured: Measurements) -> tuple[str, ...]:
    limits = [
        "No image is a photograph of a person, but a generator can reproduce a training image. Not for diagnosis.",
        "A class name says which class the generator was asked for, not what a dermatologist would see.",
        "The images have the biases of the data that the generator was trained on, and a dataset cannot have more variety.",
        "Fidelity and variety are measured in the features of one network; other networks see other differences.",
        "A gate finds copies of whole images; it does not prove that nothing about a patient can be learnt.",
    ]
    if plan.filtered:
        limits.append(
            "The classifier's filter reduces variety: images that the classifier finds difficult are missing."
        )
    if plan.request.truncation_psi < 1:
        limits.append("Truncation below 1 reduces variety.")
    if measured.privacy is None:
        limits.append("Whether single images are too similar to training images has not been checked for this dataset.")
    return tuple(limits)
