"""The rules of an audit, written down as data, and their outcomes.

Every rule has one of four statuses. The verdict of an audit is the worst of its rules; what was not measured counts as "warn"
there, never as "pass". An audit of a dataset has no rules on the generator, because who receives a dataset does not receive the
generator.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

Status = Literal["pass", "warn", "fail", "not measured"]
Scope = Literal["bundle", "dataset"]

FORMAT_VERSION = 2  # of audits; 1 had no reasons in `disclosures`, and judged questions without any success

WARN_LEVEL, FAIL_LEVEL = 0.05, 0.01
FAIL_AUC = 0.55
WARN_EPSILON, FAIL_EPSILON = 1.0, 3.0
FAIL_EXCESS_NEAR = 0.01
FAIL_RISK = 0.05
MAX_DETECTABLE_COPIES = 0.02


@dataclass(frozen=True)
class Rule:
    """A rule: what is measured, and when it warns and fails."""

    id: str
    measured: str
    warns: str
    fails: str
    generator: bool = False
    """Whether it needs the generator."""


RULES: tuple[Rule, ...] = (
    Rule(
        "training-set",
        "the members are the images that the bundle names as its training set",
        "they are others, the bundle names none, or a dataset is not known to be made by the bundle with this digest",
        "never",
    ),
    Rule(
        "patients",
        "the patients of all images are known, so that intervals and tests count patients",
        "the patient of at least one image is not known",
        "never",
    ),
    Rule(
        "fair-split",
        "a classifier of the images alone cannot tell members from held-out images",
        f"it can (p < {WARN_LEVEL:g}): the held-out images are not a random part of the same population",
        "never",
    ),
    Rule(
        "samples-average",
        "membership inference from generated images: AUC of all attacks",
        f"an attack beats its control (adjusted p < {WARN_LEVEL:g})",
        f"an attack beats its control with adjusted p < {FAIL_LEVEL:g} and an AUC of at least {FAIL_AUC:g}",
    ),
    Rule(
        "samples-few",
        "membership inference from generated images: a few members with unusually high scores",
        f"an attack beats its control (adjusted p < {WARN_LEVEL:g})",
        f"an attack beats its control with adjusted p < {FAIL_LEVEL:g}",
    ),
    Rule(
        "generator-average",
        "membership inference from the generator (projection, discriminator): AUC",
        f"an attack beats its control (adjusted p < {WARN_LEVEL:g})",
        f"an attack beats its control with adjusted p < {FAIL_LEVEL:g} and an AUC of at least {FAIL_AUC:g}",
        generator=True,
    ),
    Rule(
        "generator-few",
        "membership inference from the generator: a few members with unusually high scores",
        f"an attack beats its control (adjusted p < {WARN_LEVEL:g})",
        f"an attack beats its control with adjusted p < {FAIL_LEVEL:g}",
        generator=True,
    ),
    Rule(
        "disclosures",
        "share of members with a near generated image less the share of held-out images with one",
        "the interval of the difference is above 0",
        f"the interval is above {FAIL_EXCESS_NEAR:.0%}",
    ),
    Rule(
        "epsilon",
        "empirical lower bounds on epsilon for all images of one patient, for adding or removing and for replacing them",
        f"one of them is above {WARN_EPSILON:g}",
        f"one of them is above {FAIL_EPSILON:g}",
    ),
    *(
        Rule(
            name.replace(" ", "-"),
            f"WP29 05/2014, {name}: success on members less success on held-out images",
            "the interval of a difference is above 0",
            f"the interval of a difference is above {FAIL_RISK:.0%}",
        )
        for name in ("singling out", "linkability", "inference")
    ),
    Rule(
        "power",
        "what the audit could have detected",
        f"copies of {MAX_DETECTABLE_COPIES:.0%} of the members could not be detected, by calculation or in the test with "
        "planted copies; a bundle: fewer images were generated than there are members, or with a truncation psi that is not 1",
        "never",
    ),
)


@dataclass(frozen=True)
class Outcome:
    """Status of a rule, and the finding in one sentence."""

    rule: str
    status: Status
    finding: str


@dataclass(frozen=True)
class Verdict:
    """The worst status of all rules, and whether all were measured."""

    status: Literal["pass", "warn", "fail"]
    complete: bool
    text: str


def rules_of(scope: Scope) -> tuple[Rule, ...]:
    """Return the rules of an audit of a bundle or of a dataset."""
    return tuple(rule for rule in RULES if scope == "bundle" or not rule.generator)


def verdict_of(outcomes: Sequence[Outcome], scope: Scope) -> Verdict:
    """Combine the outcomes of all rules. A rule without an outcome was not measured."""
    statuses = {outcome.rule: outcome.status for outcome in outcomes}
    of_rules = {rule.id: statuses.get(rule.id, "not measured") for rule in rules_of(scope)}
    missing = [name for name, status in of_rules.items() if status == "not measured"]
    failed, warned = ([name for name, status in of_rules.items() if status == kind] for kind in ("fail", "warn"))
    parts = []
    if failed:
        parts.append(f"{', '.join(failed)} failed")
    if warned:
        parts.append(f"{', '.join(warned)} {'gives' if len(warned) == 1 else 'give'} a warning")
    if missing:
        parts.append(f"incomplete: {', '.join(missing)} {'was' if len(missing) == 1 else 'were'} not measured")
    if not parts:
        parts.append("no rule found a disclosure; this is no proof that there is none")
    status: Literal["pass", "warn", "fail"] = "fail" if failed else "warn" if warned or missing else "pass"
    return Verdict(status, not missing, "; ".join(parts))


@dataclass(frozen=True)
class _StoredSubject:
    """The part of an audit's subject that decides which rules there are."""

    scope: Scope


@dataclass(frozen=True)
class StoredVerdict:
    """Verdict and rules of a stored audit."""

    format_version: int
    subject: _StoredSubject
    verdict: Verdict
    outcomes: tuple[Outcome, ...]


_STORED = TypeAdapter(StoredVerdict)


def read_verdict(document: Mapping[str, Any]) -> StoredVerdict | None:
    """Read verdict and rules of a stored audit. `PrivacyAudit.from_json` reads all of it, but imports torch.

    Returns:
        None if they cannot be relied on: it is not an audit, or one of a newer format, its fields contradict each other, or it
        is of an earlier format, whose rules passed what could not be measured. Only a fail of an earlier format is returned.
    """
    try:
        stored = _STORED.validate_json(json.dumps(document), strict=True)
    except ValidationError:
        return None
    if stored.format_version > FORMAT_VERSION or contradiction(stored.verdict, stored.outcomes, stored.subject.scope):
        return None
    if stored.format_version < FORMAT_VERSION and stored.verdict.status != "fail":
        return None
    return stored


def contradiction(verdict: Verdict, outcomes: Sequence[Outcome], scope: Scope) -> str | None:
    """Return how a verdict and the outcomes of its rules contradict each other; None if they do not."""
    names = [outcome.rule for outcome in outcomes]
    if len(set(names)) < len(names):
        return "outcomes: a rule occurs more than once"
    expected = verdict_of(outcomes, scope)
    if (verdict.status, verdict.complete) != (expected.status, expected.complete):
        stated, correct = (f"{each.status}{'' if each.complete else ' (incomplete)'}" for each in (verdict, expected))
        return f"verdict: is {stated}, but the outcomes of its rules give {correct}"
    return None
