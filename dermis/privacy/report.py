"""The audit as a text for people who decide about a dataset or a generator: verdict, rules, numbers, limits."""

from __future__ import annotations

from collections.abc import Iterable

from dermis.metrics.classification import Estimate
from dermis.privacy.attacks import AttackResult, Recognised
from dermis.privacy.audit import PrivacyAudit, WithoutIds
from dermis.privacy.verdict import rules_of

_MEANING = {
    "pass": "no rule found a disclosure",
    "warn": "read the rules below before you release anything",
    "fail": "do not release this before the cause is found",
}
_FORMER = (
    "This audit was made by an earlier version of dermis: its intervals of rare events are too narrow, and a question without "
    "any success counts as a pass. Audit again."
)
LIMITS = (
    "A pass is no proof of anonymity. It says that these attacks, with these images, found nothing; section Power says what "
    "they could have found.",
    "All comparisons are in the feature spaces named above. Copies that these spaces do not recognise (mirrored, recoloured, "
    "parts of images) can be missed.",
    "Everything rests on held-out images from the same population, separated at random before the training and by patient. "
    "The rule fair-split checks this as far as images show it.",
    "The bounds on epsilon are lower bounds. Only training with differential privacy gives an upper bound.",
    "What a model that is trained on the generated images discloses was not measured.",
    "Tests also reject by chance. For a generator that discloses nothing, the rules on attacks together give a warning in at "
    "most 5 % and a fail in at most 1 % of audits, fair-split a warning in 5 %, disclosures and the three questions one in "
    "at most 2.5 % each.",
)


def audit_report(audit: PrivacyAudit) -> str:
    """Write the audit as Markdown. It names no image, patient or path."""
    parts = [
        _head(audit),
        "## Rules",
        _rules(audit),
        "## Attacks",
        _attacks(audit),
        "## Disclosures",
        _disclosures(audit),
        "## Epsilon",
        _epsilon(audit),
        "## The three questions of WP29 05/2014",
        _answers(audit),
        "## Power",
        next((_line(outcome.finding) for outcome in audit.outcomes if outcome.rule == "power"), "Not measured."),
        "## Limits",
        "\n".join(f"- {limit}" for limit in LIMITS),
    ]
    return "\n\n".join(parts) + "\n"


def _head(audit: PrivacyAudit) -> str:
    subject, verdict = audit.subject, audit.verdict
    what = "bundle" if subject.scope == "bundle" else "dataset"
    status = verdict.status if verdict.complete else f"{verdict.status} (incomplete)"
    patients = [
        _patients(subject.member_patients, subject.members_without_ids),
        _patients(subject.non_member_patients, subject.non_members_without_ids),
    ]
    rows = [
        ("bundle", f"{subject.bundle_name}, digest {subject.bundle_digest}"),
        *([("dataset", f"SHA-256 {subject.dataset_digest}")] if subject.dataset_digest else []),
        ("members (training images)", f"{subject.members:,}, {patients[0]}, SHA-256 {subject.members_sha256}"),
        ("held-out images", f"{subject.non_members:,}, {patients[1]}, SHA-256 {subject.non_members_sha256}"),
        ("generated images", f"{subject.generated:,}"),
        *([] if subject.truncation_psi is None else [("truncation psi", f"{subject.truncation_psi:g}")]),
        ("feature spaces", ", ".join(sorted(subject.spaces))),
        ("seed", str(subject.seed)),
    ]
    stated = [*audit.remarks, *([_FORMER] if audit.format_version < 2 else [])]
    remarks = "".join(f"\n- {_line(remark)}" for remark in stated)
    text = _line(verdict.text)
    return (
        f"# Privacy audit of a {what}\n\n"
        f"**Verdict: {status}** - {_MEANING[verdict.status]}.\n\n"
        f"{text[:1].upper()}{text[1:]}.\n\n" + _table(("", ""), rows) + (f"\n\nRemarks:\n{remarks}" if remarks else "")
    )


def _patients(count: int | None, without: WithoutIds | None) -> str:
    if count is None:
        return "patients not known"
    alone = 0 if without is None else without.patient_and_lesion
    return f"{count:,} patients" + (f" (of which {alone:,} are images without an id)" if alone else "")


def _rules(audit: PrivacyAudit) -> str:
    outcomes = {outcome.rule: outcome for outcome in audit.outcomes}
    rows = []
    for rule in rules_of(audit.subject.scope):
        outcome = outcomes.get(rule.id)
        status = "not measured" if outcome is None else outcome.status
        rows.append((rule.id, f"**{status}**", rule.measured, "" if outcome is None else outcome.finding))
    return _table(("rule", "status", "what is measured", "finding"), rows)


def _attacks(audit: PrivacyAudit) -> str:
    rows = [
        (
            f"{each.attack} ({each.space})",
            each.access,
            _interval(each.auc),
            _interval(each.control_auc),
            _interval(each.excess_auc, sign=True),
            f"{each.halves_auc.low:.3f} to {each.halves_auc.high:.3f}",
            *(_recognised(share) for share in each.recognised),
            f"{each.adjusted_average:.2g} / {each.adjusted_few:.2g}",
        )
        for each in audit.attacks
    ]
    shares = [f"found at {100 * share.false_positives:g} % false positives" for share in _first(audit.attacks)]
    header = ("attack", "access", "AUC", "control", "AUC - control", "halves", *shares, "adjusted p: average / few")
    return (
        "Each attack tries to tell training images from held-out ones. AUC 0.5 is guessing, 1 is certainty. *control* "
        "is the same "
        "for a classifier that sees no generated image, *halves* the range of 95 % of random halves of the members. "
        "*found* is the "
        "share of members that an attacker finds who accepts that share of false alarms. p-values are by permutation of "
        "patients, adjusted for all of these tests by Holm's method.\n\n" + _table(header, rows)
    )


def _first(attacks: Iterable[AttackResult]) -> tuple[Recognised, ...]:
    return next((each.recognised for each in attacks), ())


def _recognised(share: Recognised) -> str:
    if share.share is None:
        return share.reason
    value = share.share
    return f"{value.value:.1%} [{value.low:.1%}, {value.high:.1%}], guessing {share.expected or 0:.1%}"


def _disclosures(audit: PrivacyAudit) -> str:
    rows = [
        (
            each.space,
            f"{each.members_near:,} of {each.members:,}",
            f"{each.expected_by_chance:.1f}",
            f"{each.non_members_near:,} of {each.non_members:,}",
            f"not measured: {each.reason}"
            if each.excess is None
            else f"{each.excess.value:+.2%} [{each.excess.low:+.2%}, {each.excess.high:+.2%}]",
        )
        for each in audit.disclosures
    ]
    return (
        "Training images with a generated image that is nearer than 99 % of real images are to any other real image. "
        "As many held-out "
        "images have one by coincidence; the difference of the shares is what was disclosed.\n\n"
        + _table(("space", "members", "expected by coincidence", "held-out images", "difference of the shares"), rows)
    )


def _epsilon(audit: PrivacyAudit) -> str:
    bound = audit.epsilon
    if bound is None:
        return "Not measured: there are too few patients for two halves, or no attack."
    return (
        f"If the training was differentially private for {audit.subject.unit} at all, then with these parameters, which hold "
        f"together with {bound.joint_confidence:.0%} confidence{audit.subject.doubt}:\n\n"
        f"- for adding or removing a patient: epsilon at least {bound.from_rates:.2f} at delta {bound.delta:g}, from "
        f"{bound.true_positives:,} of {bound.members:,} members and {bound.false_positives:,} of {bound.non_members:,} "
        f"held-out images, one of each patient, that the attack `{_line(bound.attack)}` took for members;\n"
        f"- for replacing one patient by another: epsilon at least {bound.from_pairs:.2f} at delta 0, from {bound.right:,} "
        f"right guesses of {bound.guesses:,} pairs."
    )


def _answers(audit: PrivacyAudit) -> str:
    rows = []
    for each in audit.answers:
        if each.excess is None:
            rows.append((each.question, each.subject, each.measure, "not measured", each.reason, "", ""))
            continue
        rows.append(
            (
                each.question,
                each.subject,
                each.measure,
                f"{each.members:.1%}",
                f"{each.controls:.1%}",
                f"{each.excess.value:+.1%} [{each.excess.low:+.1%}, {each.excess.high:+.1%}]",
                "not defined" if each.risk is None else f"{each.risk:.1%}",
            )
        )
    header = ("question", "about", "an attempt succeeds if", "on members", "on held-out images", "difference", "risk")
    return (
        "Success on held-out images is what the images of anybody reveal; only the difference comes from the "
        "training. The intervals "
        f"have the level {max((each.level for each in audit.answers), default=0.95):.1%}, so that all together have "
        "95 %. The risk is (members - held-out) / (1 - held-out), not defined if every attempt on held-out images "
        "succeeds.\n\n" + _table(header, rows)
    )


def _interval(value: Estimate, *, sign: bool = False) -> str:
    form = "+.3f" if sign else ".3f"
    return f"{value.value:{form}} [{value.low:{form}}, {value.high:{form}}]"


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(header)
    lines = [names, ["---"] * len(names), *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(_line(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _line(text: str) -> str:
    """Put a text on one line: an audit can come with a foreign bundle, and a new line could begin a section of its own."""
    return " ".join(text.split())
