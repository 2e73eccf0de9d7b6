"""The whole audit: from features and scores to a result with a verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from dermis.errors import DataError
from dermis.metrics.classification import REPLICATES, Labels, resampled
from dermis.metrics.neighbours import Features, nearest
from dermis.privacy import verdict as rules
from dermis.privacy.attacks import (
    LEARNED,
    Access,
    AttackResult,
    Controls,
    Neighbours,
    Patients,
    Scores,
    Space,
    fair_spaces,
    learned_scores,
    learned_scores_for_halves,
    measure_attacks,
    neighbours_of,
    sample_scores,
)
from dermis.privacy.controls import SplitControl, split_control
from dermis.privacy.disclosure import Disclosures, disclosures
from dermis.privacy.epsilon import DELTA, EpsilonBound, epsilon_bound, patient_halves
from dermis.privacy.power import Power, plant, power_of
from dermis.privacy.questions import Answer, Attribute, answer_questions
from dermis.privacy.verdict import FORMAT_VERSION, Outcome, Scope, Status, Verdict, contradiction, verdict_of

MIN_IMAGES = 50  # of members and of non-members


@dataclass(frozen=True)
class WithoutIds:
    """Numbers of images whose patient is not known.

    Attributes:
        patient: Images without a patient id.
        patient_and_lesion: Those of them that have no lesion id either: each counts as a patient of its own.
    """

    patient: int = 0
    patient_and_lesion: int = 0


@dataclass(frozen=True)
class Subject:
    """What was audited, and with which images. It names no image, patient or path.

    Attributes:
        scope: "bundle", or "dataset" for the images of a dataset.
        bundle_name: Name of the bundle.
        bundle_digest: Digest of the bundle before the audit was stored in it.
        dataset_digest: SHA-256 of the dataset's manifest, or of its images if it has none or was not finished.
        generated: Number of generated images.
        members: Number of members.
        member_patients: Number of their patients; None if not known.
        members_sha256: SHA-256 of the set of members.
        members_are_training_set: Whether the bundle names it as its training set; None if the bundle names none.
        non_members: Number of held-out images.
        non_member_patients: Number of their patients.
        non_members_sha256: SHA-256 of the set.
        spaces: Identity of each feature space by name.
        seed: Seed of everything random.
        truncation_psi: Truncation of the samples; None for a dataset.
        members_without_ids: Numbers of members without an id; None if they were not counted, as in earlier audits.
        non_members_without_ids: The same numbers for held-out images.
        dataset_of_bundle: Whether the bundle with this digest made the dataset. None for a bundle, for a dataset without a
            manifest, and in earlier audits.
    """

    scope: Scope
    bundle_name: str
    bundle_digest: str
    dataset_digest: str | None
    generated: int
    members: int
    member_patients: int | None
    members_sha256: str
    members_are_training_set: bool | None
    non_members: int
    non_member_patients: int | None
    non_members_sha256: str
    spaces: Mapping[str, str]
    seed: int
    truncation_psi: float | None = None
    members_without_ids: WithoutIds | None = None
    non_members_without_ids: WithoutIds | None = None
    dataset_of_bundle: bool | None = None

    @property
    def unit(self) -> str:
        """What the bounds on epsilon are about: an image only if it is known that every patient has exactly one."""
        single = (self.member_patients, self.non_member_patients) == (self.members, self.non_members)
        return "one patient (each has one image)" if single and not self.doubt else "all images of one patient"

    @property
    def doubt(self) -> str:
        """Why the bounds on epsilon are not guaranteed, as the end of a sentence; "" if they are."""
        unknown = any(each and each.patient for each in (self.members_without_ids, self.non_members_without_ids))
        if None not in (self.member_patients, self.non_member_patients) and not unknown:
            return ""
        return "; neither is guaranteed, because it is not known which images are of one patient"


@dataclass(frozen=True)
class Evidence:
    """Everything that an audit is computed from.

    Attributes:
        spaces: Features of all images.
        patients: Patient of each real image, members first.
        generator_scores: Scores of attacks on the generator.
        attributes: Attributes of the images.
        planted: Features of copies of some members by space, for the test of the audit itself; empty for none.
        remarks: Why something could not be measured, and other facts that a reader must know.
    """

    spaces: Sequence[Space]
    patients: Sequence[str]
    generator_scores: Sequence[Scores] = ()
    attributes: Sequence[Attribute] = ()
    planted: Mapping[str, Features] = field(default_factory=dict)
    remarks: Sequence[str] = ()


@dataclass(frozen=True)
class PrivacyAudit:
    """Result of an audit. All intervals are 95 % unless another level is stated beside them."""

    format_version: int
    verdict: Verdict
    outcomes: tuple[Outcome, ...]
    subject: Subject
    control: SplitControl
    attacks: tuple[AttackResult, ...]
    disclosures: tuple[Disclosures, ...]
    epsilon: EpsilonBound | None
    power: Power
    answers: tuple[Answer, ...]
    remarks: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the audit as JSON values."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return values

    @staticmethod
    def from_json(values: Mapping[str, Any], where: str = "audit") -> PrivacyAudit:
        """Read what `to_json` returned.

        Args:
            values: The JSON values.
            where: Name of the file for errors.

        Raises:
            DataError: They are not an audit, or one of a newer format.
        """
        version = values.get("format_version")
        if type(version) is int and version > FORMAT_VERSION:
            raise DataError(
                f"{where}: has format {version}, this dermis reads up to {FORMAT_VERSION}; install a newer dermis"
            )
        try:
            audit = _ADAPTER.validate_json(json.dumps(values), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"])) or "the document"
            raise DataError(f"{where}: is not a privacy audit: {name}: {first['msg']}") from None
        if problem := _contradiction(audit):
            raise DataError(f"{where}: is not a privacy audit: {problem}; audit the bundle again")
        return audit


def _contradiction(audit: PrivacyAudit) -> str | None:
    """Return how the fields of an audit contradict each other; None if they do not."""
    if problem := contradiction(audit.verdict, audit.outcomes, audit.subject.scope):
        return problem
    for number, answer in enumerate(audit.answers):
        if answer.excess is None:
            continue
        if answer.members is None or answer.controls is None or (answer.risk is None and answer.controls < 1):
            return f"answers.{number}: has excess, but not all of members, controls and risk"
    return None


_ADAPTER = TypeAdapter(PrivacyAudit)


def run_audit(
    subject: Subject, evidence: Evidence, *, replicates: int = REPLICATES, delta: float = DELTA
) -> PrivacyAudit:
    """Run all attacks and controls and apply the rules.

    Args:
        subject: Description of the audit for the result.
        evidence: Features and scores.
        replicates: Replicates of the bootstrap.
        delta: The delta of the bound on epsilon.

    Raises:
        DataError: There are too few images, or a patient is in both sets.
    """
    spaces, seed = evidence.spaces, subject.seed
    labels, patients = _labels(spaces[0], evidence.patients)
    weights = resampled(labels, [str(patient) for patient in patients], replicates, seed)
    neighbours = [neighbours_of(space, patients) for space in spaces]
    control, controls = split_control(spaces, labels, patients, weights, seed=seed)
    scores = [each for pair in zip(spaces, neighbours, strict=True) for each in sample_scores(*pair)]
    # What a space that knows the members shows can be its own knowledge. Only attacks in one space have a control for that.
    fair = fair_spaces(spaces)
    of_fair = [neighbours[i] for i in fair]
    scores.append(learned_scores(of_fair, labels, patients, generated=len(spaces[0].generated), seed=seed))
    scores += evidence.generator_scores
    scores, useless = _useful(scores)
    attacks = measure_attacks(scores, controls, labels, patients, weights, seed=seed)
    level = 1 - rules.WARN_LEVEL
    near = _near(evidence, neighbours, controls, labels, patients, level=1 - (1 - level) / len(spaces), seed=seed)
    evidence = replace(evidence, spaces=[spaces[i] for i in fair])
    epsilon = _bound(scores, evidence, of_fair, labels, patients, delta=delta, seed=seed)
    answers = answer_questions(evidence.spaces, of_fair, evidence.attributes, labels, patients, level=level, seed=seed)
    power = _power(evidence, of_fair, labels, patients, max(2 * len(scores), 1), seed)
    outcomes = (
        *_outcomes_of_images(subject),
        _fair_split(control),
        *_outcomes_of_attacks(attacks, subject.scope, control),
        _disclosures(near, control),
        _epsilon(epsilon, control, subject),
        *(_question(answers, name, control) for name in ("singling out", "linkability", "inference")),
        _detectable(power, subject),
    )
    return PrivacyAudit(
        FORMAT_VERSION,
        verdict_of(outcomes, subject.scope),
        outcomes,
        subject,
        control,
        attacks,
        near,
        epsilon,
        power,
        answers,
        (*evidence.remarks, *useless),
    )


def _near(
    evidence: Evidence,
    neighbours: Sequence[Neighbours],
    controls: Controls,
    labels: Labels,
    patients: Patients,
    *,
    level: float,
    seed: int,
) -> tuple[Disclosures, ...]:
    """Count near pairs in all spaces; a space that tells the sets apart by itself is not measured."""
    results = []
    for space, each in zip(evidence.spaces, neighbours, strict=True):
        planted = evidence.planted.get(space.name)
        to_planted = None if planted is None else nearest(space.real, planted, 1)[0][:, 0]
        found = disclosures(space.name, each, labels, patients, to_planted=to_planted, level=level, seed=seed)
        if space.name in controls.own and controls.own[space.name].separates:
            reason = (
                "its network, which may have been trained on the members, distinguishes them from the held-out images"
            )
            found = replace(found, excess=None, reason=reason)
        results.append(found)
    return tuple(results)


def _bound(
    scores: Sequence[Scores],
    evidence: Evidence,
    neighbours: Sequence[Neighbours],
    labels: Labels,
    patients: Patients,
    *,
    delta: float,
    seed: int,
) -> EpsilonBound | None:
    """Compute the bounds on epsilon from attacks on the generator and in the spaces of the evidence.

    The learned one is fitted anew, to the first half of the patients.
    """
    halves = patient_halves(labels, patients, seed)
    generated = len(evidence.spaces[0].generated)
    learned = learned_scores_for_halves(neighbours, labels, patients, halves[0], generated=generated, seed=seed)
    names = {space.name for space in evidence.spaces}
    fixed = [each for each in scores if each.attack != LEARNED and (each.access == "generator" or each.space in names)]
    used = {f"{each.attack} ({each.space})": each.values for each in (*fixed, *_useful([learned])[0])}
    return epsilon_bound(used, labels, patients, delta=delta, seed=seed, halves=halves)


def _useful(scores: Sequence[Scores]) -> tuple[list[Scores], list[str]]:
    """Return the scores that can distinguish images, and a remark on each attack that was left out."""
    useful, remarks = [], []
    for each in scores:
        name = f"The attack {each.attack} ({each.space})"
        if not np.isfinite(each.values).all():
            remarks.append(f"{name} has scores that are not numbers, so it was left out.")
        elif np.ptp(each.values) <= 1e-9 * max(1.0, float(np.abs(each.values).max())):
            remarks.append(f"{name} has the same score for all images, so it was left out.")
        else:
            useful.append(each)
    return useful, remarks


def _labels(space: Space, names: Sequence[str]) -> tuple[Labels, Patients]:
    """Return labels (1: member) and patients' numbers of all real images."""
    count = len(space.members)
    for kind, images in (("members", space.members), ("held-out images", space.non_members)):
        if len(images) < MIN_IMAGES:
            raise DataError(f"{len(images)} {kind} are too few for an audit; give {MIN_IMAGES} or more")
    if len(space.generated) < MIN_IMAGES:
        raise DataError(f"{len(space.generated)} generated images are too few for an audit; give {MIN_IMAGES} or more")
    patients = np.unique(np.asarray(names), return_inverse=True)[1].astype(np.int64)
    if both := set(patients[:count].tolist()) & set(patients[count:].tolist()):
        raise DataError(f"{len(both)} patients have images among the members and among the held-out images")
    return (np.arange(len(names)) < count).astype(np.int64), patients


def _power(
    evidence: Evidence, neighbours: Sequence[Neighbours], labels: Labels, patients: Patients, tests: int, seed: int
) -> Power:
    planted = None
    if evidence.planted:
        planted = plant(
            evidence.spaces,
            neighbours,
            evidence.planted,
            labels,
            patients,
            tests=tests,
            level=rules.WARN_LEVEL,
            seed=seed,
        )
    counts = [len(np.unique(patients[labels == label])) for label in (1, 0)]
    return power_of(counts[0], counts[1], tests, planted, level=rules.WARN_LEVEL)


# -- rules


def _outcomes_of_images(subject: Subject) -> list[Outcome]:
    outcomes = [_training_set(subject)]
    if subject.member_patients is None or subject.non_member_patients is None:
        finding = "Patients are not known: each image counts as a patient, so intervals may be too narrow."
        outcomes.append(Outcome("patients", "warn", finding))
    elif finding := _without_patient(subject):
        outcomes.append(Outcome("patients", "warn", finding))
    else:
        finding = (
            f"{subject.member_patients:,} patients of members, {subject.non_member_patients:,} of held-out images."
        )
        outcomes.append(Outcome("patients", "pass", finding))
    return outcomes


def _training_set(subject: Subject) -> Outcome:
    """Judge whether the members are the training set of the generator that made the images."""
    same, made = subject.members_are_training_set, subject.dataset_of_bundle
    if not same:
        why = "The bundle names no training set." if same is None else "The bundle names another training set."
        finding = f"{why} What is found for these members need not hold for the others."
    elif subject.scope == "bundle" or made:
        return Outcome("training-set", "pass", "The members are the bundle's training set.")
    else:
        why = (
            "The dataset has no manifest, so it is not known which generator made it."
            if made is None
            else "The dataset was made by a bundle with another digest: by another generator, or by this one before a part or "
            "an audit was attached to the bundle, which changes the digest."
        )
        finding = f"{why} If it was another generator, the members need not be its training images."
    return Outcome("training-set", "warn", finding)


def _without_patient(subject: Subject) -> str:
    """State how many images have no patient id, and as what they count; empty if all have one.

    No share is tolerated: one patient can have all of these images, and images in both sets.
    """
    members, others = (each or WithoutIds() for each in (subject.members_without_ids, subject.non_members_without_ids))
    missing = members.patient + others.patient
    alone = members.patient_and_lesion + others.patient_and_lesion
    if not missing:
        return ""
    parts = []
    if alone:
        parts.append(f"{alone:,} of these count as patients of their own")
    if missing > alone:
        parts.append(f"{missing - alone:,} count with the other images of their lesion only")
    return (
        f"{members.patient:,} of {subject.members:,} members and {others.patient:,} of {subject.non_members:,} held-out images "
        f"have no patient id: {' and '.join(parts)}. All intervals and tests rest on this, so intervals may be too narrow, and "
        "a patient may be in both sets."
    )


def _fair_split(control: SplitControl) -> Outcome:
    text = (
        f"A classifier of the images alone has an AUC of {control.auc.value:.3f} [{control.auc.low:.3f}, "
        f"{control.auc.high:.3f}] ({control.space}, adjusted p {control.p:.2g})"
    )
    if control.separates:
        return Outcome("fair-split", "warn", f"{text}: the two sets differ, and an attack must beat this number.")
    return Outcome("fair-split", "pass", f"{text}: it cannot tell the sets apart.")


def _outcomes_of_attacks(attacks: Sequence[AttackResult], scope: Scope, control: SplitControl) -> list[Outcome]:
    kinds: tuple[Access, ...] = ("samples", "generator") if scope == "bundle" else ("samples",)
    return [judge(attacks, access, control) for access in kinds for judge in (_average, _few)]


def _average(attacks: Sequence[AttackResult], access: Access, control: SplitControl) -> Outcome:
    chosen = [each for each in attacks if each.access == access]
    rule = f"{access}-average"
    if not chosen:
        return Outcome(rule, "not measured", "No attack of this kind was possible.")
    best = min(chosen, key=lambda each: (not each.beats_control_average, each.adjusted_average, -each.auc.value))
    text = (
        f"{best.attack} ({best.space}): AUC {best.auc.value:.3f} [{best.auc.low:.3f}, {best.auc.high:.3f}], control "
        f"{best.control_auc.value:.3f}, adjusted p {best.adjusted_average:.2g}"
    )
    counting = [each for each in chosen if each.beats_control_average and each.adjusted_average < rules.WARN_LEVEL]
    fails = any(each.adjusted_average < rules.FAIL_LEVEL and each.auc.value >= rules.FAIL_AUC for each in counting)
    return _judge(rule, text, bool(counting), fails, control)


def _few(attacks: Sequence[AttackResult], access: Access, control: SplitControl) -> Outcome:
    chosen = [each for each in attacks if each.access == access]
    rule = f"{access}-few"
    if not chosen:
        return Outcome(rule, "not measured", "No attack of this kind was possible.")
    best = min(chosen, key=lambda each: (not each.beats_control_few, each.adjusted_few))
    found = best.recognised[0]
    share = (
        found.reason
        if found.share is None
        else f"{found.share.value:.1%} [{found.share.low:.1%}, {found.share.high:.1%}]"
    )
    expected = "" if found.expected is None else f" (guessing: {found.expected:.1%})"
    text = (
        f"{best.attack} ({best.space}): members found at 1 % false positives {share}{expected}, adjusted p "
        f"{best.adjusted_few:.2g}"
    )
    counting = [each for each in chosen if each.beats_control_few and each.adjusted_few < rules.WARN_LEVEL]
    return _judge(rule, text, bool(counting), any(e.adjusted_few < rules.FAIL_LEVEL for e in counting), control)


def _judge(rule: str, text: str, counts: bool, fails: bool, control: SplitControl) -> Outcome:
    """Make an outcome. If the sets differ without any generator, an attack that does not count decides nothing."""
    if counts:
        return Outcome(rule, "fail" if fails else "warn", f"{text}: members can be recognised.")
    if control.separates:
        return Outcome(
            rule, "not measured", f"{text}. The sets differ already in their images, so this cannot be judged."
        )
    return Outcome(rule, "pass", f"{text}: no attack beats its control.")


def _disclosures(near: Sequence[Disclosures], control: SplitControl) -> Outcome:
    measured = [(each, each.excess) for each in near if each.excess is not None]
    missing = "; ".join(f"{each.space}: {each.reason}" for each in near if each.excess is None)
    if not measured:
        return Outcome("disclosures", "not measured", f"Images with a near generated image are too few ({missing}).")
    worst, excess = max(measured, key=lambda pair: pair[1].low)
    text = (
        f"{worst.members_near:,} of {worst.members:,} members have a near generated image, {worst.expected_by_chance:.1f} "
        f"are expected by coincidence ({worst.space}); difference of the shares {excess.value:+.2%} "
        f"[{excess.low:+.2%}, {excess.high:+.2%}]{_also_missing(missing)}"
    )
    return _by_interval("disclosures", text, excess.low, rules.FAIL_EXCESS_NEAR, control)


def _also_missing(reasons: str) -> str:
    return f"; not measured: {reasons}" if reasons else ""


def _by_interval(rule: str, text: str, low: float, limit: float, control: SplitControl) -> Outcome:
    if low <= 0:
        return Outcome(rule, "pass", f"{text}.")
    if control.separates:
        return Outcome(
            rule, "not measured", f"{text}. The sets differ already in their images, so this cannot be judged."
        )
    return Outcome(rule, "fail" if low > limit else "warn", f"{text}.")


def _epsilon(bound: EpsilonBound | None, control: SplitControl, subject: Subject) -> Outcome:
    if bound is None:
        return Outcome("epsilon", "not measured", "There are too few patients for two halves, or no attack.")
    text = (
        f"With {bound.joint_confidence:.0%} confidence for both, epsilon for {subject.unit} is at least "
        f"{bound.from_rates:.2f} for adding or removing (delta {bound.delta:g}) and at least {bound.from_pairs:.2f} for "
        f"replacing{subject.doubt}"
    )
    if control.separates:
        return Outcome(
            "epsilon", "not measured", f"{text}; the bounds are not valid, because the sets differ in their images."
        )
    status: Status = "pass"
    if bound.value > rules.WARN_EPSILON:
        status = "fail" if bound.value > rules.FAIL_EPSILON else "warn"
    return Outcome("epsilon", status, f"{text}. The true values can be much larger.")


def _question(answers: Sequence[Answer], name: str, control: SplitControl) -> Outcome:
    rule = name.replace(" ", "-")
    measured = [(each, each.excess) for each in answers if each.question == name and each.excess is not None]
    missing = "; ".join(
        f"{each.subject}: {each.reason}" for each in answers if each.question == name and not each.excess
    )
    if not measured:
        return Outcome(rule, "not measured", f"Not measured ({missing}).")
    worst, excess = max(measured, key=lambda pair: pair[1].low)
    text = (
        f"{worst.subject}: success {worst.members:.1%} on members, {worst.controls:.1%} on held-out images, difference "
        f"{excess.value:+.1%} [{excess.low:+.1%}, {excess.high:+.1%}]{_also_missing(missing)}"
    )
    return _by_interval(rule, text, excess.low, rules.FAIL_RISK, control)


def _detectable(power: Power, subject: Subject) -> Outcome:
    share, planted = power.detectable_copies, power.planted
    text = (
        "Even copies of all members could not be detected"
        if share is None
        else f"Copies of {share:.2%} of the members are detected if they have the highest scores"
    )
    text += f"; an average attack is detected from an AUC of {power.detectable_auc:.3f}"
    if planted is None:
        return Outcome("power", "not measured", f"{text}. No copies were planted to try the audit itself.")
    text += (
        f"; {planted.copies:,} planted copies ({planted.share:.1%} of the members) were "
        f"{'detected' if planted.detected else 'not detected'} (adjusted p {planted.p:.2g})."
    )
    good = share is not None and share <= rules.MAX_DETECTABLE_COPIES and planted.detected
    missed = _missed_samples(subject)
    return Outcome("power", "pass" if good and not missed else "warn", text + missed)


def _missed_samples(subject: Subject) -> str:
    """State why the samples of a bundle may not show what its generator repeats, as sentences; empty if they can.

    The planted copies are added to whatever was generated, so they are detected among few or truncated samples too. The images
    of a dataset are all that its recipients get.
    """
    text = ""
    if subject.scope == "bundle" and subject.generated < subject.members:
        text += (
            f" Only {subject.generated:,} images were generated for {subject.members:,} members: copies that the generator "
            "makes rarely may not be among them."
        )
    if subject.truncation_psi not in (None, 1):
        text += (
            f" The samples were truncated (psi {subject.truncation_psi:g}): copies that the generator makes at psi 1 may not "
            "be among them."
        )
    return text
