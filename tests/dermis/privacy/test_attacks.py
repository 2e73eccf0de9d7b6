"""Tests of the attacks, bounds and rules of a privacy audit on simulated features."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import norm

from dermis.bundle.card import with_privacy_section
from dermis.errors import DataError
from dermis.metrics.neighbours import nearest
from dermis.privacy.attacks import (
    Scores,
    Space,
    holm,
    learned_scores_for_halves,
    neighbours_of,
    permutation_p,
)
from dermis.privacy.audit import Evidence, PrivacyAudit, Subject, WithoutIds, _detectable, run_audit
from dermis.privacy.controls import split_control
from dermis.privacy.disclosure import disclosures
from dermis.privacy.epsilon import bound_from_guesses, epsilon_bound, patient_halves
from dermis.privacy.power import detectable_share
from dermis.privacy.questions import Attribute, _answer_of_images, linkability
from dermis.privacy.report import audit_report
from dermis.privacy.verdict import RULES, Outcome, rules_of, verdict_of

Features = NDArray[np.float32]

MEMBERS, HELD_OUT, DIM, LATENT = 1000, 500, 128, 16


def _population(seed: int, count: int) -> Features:
    """Features [count, 128] around a curved surface of 16 dimensions, as those of images are."""
    mixing = np.random.default_rng(7)
    slow, fast = mixing.normal(size=(2, LATENT, DIM))
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(count, LATENT))
    x: Features = (np.tanh(z @ slow / 4) + 0.3 * np.sin(z @ fast) + 0.05 * rng.normal(size=(count, DIM))).astype(
        np.float32
    )
    return x


def _noisy(images: Features, seed: int = 0) -> Features:
    copies: Features = (images + np.random.default_rng(seed).normal(0, 0.1, images.shape)).astype(np.float32)
    return copies


def _audit(
    members: Features,
    held_out: Features,
    generated: Features,
    *,
    classes: tuple[list[str], list[str]] | None = None,
    generator_scores: tuple[Scores, ...] = (),
    scope: str = "dataset",
    images_each: int = 1,
    shift: float | None = None,
) -> PrivacyAudit:
    """With `shift` the spaces are pixels and that of a classifier, in which members and generated images are shifted."""
    spaces = [
        Space(name, members[:, part], held_out[:, part], generated[:, part])
        for name, part in (("one", slice(None, DIM // 2)), ("two", slice(DIM // 2, None)))
    ]
    real = len(members) + len(held_out)
    subject = Subject(
        scope=scope,  # type: ignore[arg-type]
        bundle_name="simulated",
        bundle_digest="0" * 64,
        dataset_digest=None,
        generated=len(generated),
        members=len(members),
        member_patients=len(members) // images_each,
        members_sha256="1" * 64,
        members_are_training_set=True,
        non_members=len(held_out),
        non_member_patients=len(held_out) // images_each,
        non_members_sha256="2" * 64,
        spaces={"one": "one", "two": "two"},
        seed=0,
        dataset_of_bundle=True,
    )
    if classes is None:
        rng = np.random.default_rng(3)
        classes = (rng.choice(["a", "b"], real).tolist(), rng.choice(["a", "b"], len(generated)).tolist())
    copies = _noisy(members[: round(0.02 * len(members))], seed=9)
    planted = {"one": copies[:, : DIM // 2], "two": copies[:, DIM // 2 :]}
    patients = [f"patient-{i // images_each}" for i in range(real)]
    if shift is not None:
        known, shifted = ((each + shift).astype(np.float32) for each in (members, generated))
        spaces = [Space("pixels", members, held_out, generated), Space("classifier", known, held_out, shifted, True)]
        planted = {"pixels": copies, "classifier": copies}
    evidence = Evidence(spaces, patients, generator_scores, [Attribute("class", *classes)], planted)
    return run_audit(subject, evidence, replicates=200)


def _statuses(audit: PrivacyAudit) -> dict[str, str]:
    return {outcome.rule: outcome.status for outcome in audit.outcomes}


def test_honest_generator_passes_every_rule() -> None:
    audit = _audit(_population(1, MEMBERS), _population(2, HELD_OUT), _population(3, MEMBERS))
    assert (audit.verdict.status, audit.verdict.complete) == ("pass", True), audit.verdict
    assert set(_statuses(audit)) == {rule.id for rule in rules_of("dataset")}
    assert all(attack.halves_auc.low < 0.5 < attack.halves_auc.high for attack in audit.attacks)
    at_one_in_a_thousand = audit.attacks[0].recognised[1]
    assert at_one_in_a_thousand.share is None
    assert at_one_in_a_thousand.reason.startswith("not measurable with 500 held-out images")


def test_generator_that_memorises_on_purpose_fails() -> None:
    members, held_out = _population(1, MEMBERS), _population(2, HELD_OUT)
    rng = np.random.default_rng(3)
    of_real = rng.choice(["a", "b"], MEMBERS + HELD_OUT).tolist()
    audit = _audit(members, held_out, _noisy(members), classes=(of_real, of_real[:MEMBERS]))
    failed = {rule for rule, status in _statuses(audit).items() if status == "fail"}
    expected = {"samples-average", "samples-few", "disclosures", "epsilon", "singling-out", "linkability", "inference"}
    assert failed == expected and audit.verdict.status == "fail"
    assert audit.epsilon is not None and audit.epsilon.value > 3
    assert all(attack.auc.low > 0.95 and attack.excess_auc.low > 0.4 for attack in audit.attacks)


@pytest.mark.full
def test_two_percent_near_copies_are_caught_with_500_held_out_images() -> None:
    members, held_out, generated = _population(11, 2000), _population(12, HELD_OUT), _population(13, 1960)
    audit = _audit(members, held_out, np.concatenate([generated, _noisy(members[100:140])]))
    assert audit.verdict.status == "fail" and _statuses(audit)["samples-few"] == "fail", audit.verdict
    assert max(attack.auc.value for attack in audit.attacks) < 0.6, "an average hides them"


def test_few_or_truncated_samples_of_a_bundle_do_not_pass() -> None:
    """The planted copies are detected among them, but the generator's own copies may be missing."""
    audit = _audit(_population(1, 1000), _population(2, 500), _population(3, 50), scope="bundle")
    planted = audit.power.planted
    assert planted is not None and planted.detected and _statuses(audit)["power"] == "warn"
    assert "Only 50 images were generated for 1,000 members" in audit_report(audit)
    enough = replace(audit.subject, generated=1000, truncation_psi=1.0)
    assert _detectable(audit.power, enough).status == "pass"
    truncated = replace(enough, truncation_psi=0.2)
    assert _detectable(audit.power, truncated).status == "warn"
    assert "| truncation psi | 0.2 |" in audit_report(replace(audit, subject=truncated))
    card = with_privacy_section("# Card\n", replace(audit, subject=truncated).to_json())
    assert "1,000 generated ones (truncation psi 0.2)" in card
    assert _detectable(audit.power, replace(audit.subject, scope="dataset")).status == "pass", "it has no other images"


def test_attacks_that_cannot_succeed_are_not_measured() -> None:
    """All generated images are the same but for noise, and of one class: nothing is near them, and no guess can be right."""
    members, held_out = _population(1, 150), _population(2, 150)
    generated = (_population(3, 1) + 10 + np.random.default_rng(0).normal(0, 1e-3, (100, DIM))).astype(np.float32)
    constant = Scores("projection", "generator", "pixels", np.zeros(300))
    broken = Scores("discriminator", "generator", "logit", np.full(300, np.nan))
    classes = (["a", "b"] * 150, ["a"] * 100)
    audit = _audit(members, held_out, generated, classes=classes, generator_scores=(constant, broken), scope="bundle")
    statuses = _statuses(audit)
    powerless = {"disclosures", "singling-out", "inference", "generator-average", "generator-few"}
    assert {rule for rule, status in statuses.items() if status == "not measured"} >= powerless, audit.outcomes
    assert {"same score", "not numbers"} <= {
        text for text in ("same score", "not numbers") if text in str(audit.remarks)
    }
    text = audit_report(PrivacyAudit.from_json(audit.to_json()))
    assert "0 of 300 patients show it; at least" in text and not audit.verdict.complete
    same = np.ones((100, DIM), np.float32)
    without_differences = _audit(same, same, same, classes=(["a"] * 200, ["a"] * 100))
    measured = {rule for rule, status in _statuses(without_differences).items() if status == "pass"}
    assert measured == {"training-set", "patients", "fair-split"} and not without_differences.attacks


def test_no_near_image_passes_only_where_planted_copies_are_near() -> None:
    members, held_out = _population(1, 600), _population(2, 300)
    space = Space("one", members, held_out, (_population(3, 50) + 10).astype(np.float32))
    labels, patients = np.repeat(np.array([1, 0]), [600, 300]), np.arange(900)
    neighbours = neighbours_of(space, patients)
    copies = {noise: members[:30] + np.random.default_rng(0).normal(0, noise, (30, DIM)) for noise in (0.1, 5.0)}
    excess = {}
    for noise, planted in copies.items():
        distances = nearest(space.real, planted.astype(np.float32), 1)[0][:, 0]
        excess[noise] = disclosures(
            "one", neighbours, labels, patients, to_planted=distances, level=0.95, seed=0
        ).excess
    measured = excess[0.1]
    assert excess[5.0] is None and measured is not None
    assert measured.low < measured.value == 0 < measured.high < 0.01


def test_attack_that_always_succeeds_shows_no_difference() -> None:
    members, held_out = _population(1, 100), _population(2, 100)
    spaces = [Space(name, members, held_out, _population(3, 1)) for name in ("one", "two")]
    labels, patients = np.repeat(np.array([1, 0]), 100), np.arange(200)
    neighbours = [neighbours_of(space, patients) for space in spaces]
    answer = linkability(spaces, neighbours, labels, patients, level=0.95, seed=0)
    assert answer.excess is None and "0 of 200 patients do not show it" in answer.reason


def test_risk_is_not_defined_if_every_held_out_attempt_succeeds() -> None:
    success = np.arange(1100) >= 5  # 5 of 1,000 members fail, and none of 100 held-out images
    labels = np.repeat(np.array([1, 0]), [1000, 100])
    answer = _answer_of_images("inference", "class", "", success, labels, np.arange(1100), level=0.95, seed=0)
    assert (answer.members, answer.controls, answer.risk) == (0.995, 1.0, None)
    assert answer.excess is not None and answer.excess.low < 0
    audit = replace(_audit(_population(1, 60), _population(2, 60), _population(3, 60)), answers=(answer,))
    assert PrivacyAudit.from_json(audit.to_json()) == audit and "| not defined |" in audit_report(audit)
    damaged = replace(audit, answers=(replace(answer, controls=0.9),))
    with pytest.raises(DataError, match="answers"):
        PrivacyAudit.from_json(damaged.to_json())


def test_many_copies_with_the_same_highest_score_are_few_members_too() -> None:
    scores = np.concatenate([np.full(40, 9.0), np.random.default_rng(0).normal(size=1460)])
    p = permutation_p([scores], np.repeat(np.array([1, 0]), [1000, 500]), np.arange(1500), seed=0, permutations=1000)
    assert p[0, 1] < 0.01


@pytest.mark.full
def test_attack_on_sets_of_different_populations_does_not_count() -> None:
    held_out = (0.8 * _population(2, HELD_OUT) + 0.15).astype(np.float32)
    audit = _audit(_population(1, MEMBERS), held_out, _population(3, MEMBERS))
    assert max(attack.auc.value for attack in audit.attacks) > 0.8, "the attack seems to succeed"
    assert audit.control.separates and not any(attack.beats_control_average for attack in audit.attacks)
    statuses = _statuses(audit)
    assert {statuses[rule] for rule in ("samples-average", "samples-few", "epsilon")} == {"not measured"}
    assert (audit.verdict.status, audit.verdict.complete) == ("warn", False)


@pytest.mark.full
def test_classifier_that_was_trained_on_the_members_hides_no_copies() -> None:
    members, held_out, generated = _population(11, 2000), _population(12, HELD_OUT), _population(13, 1960)
    audit = _audit(members, held_out, np.concatenate([generated, _noisy(members[100:140])]), shift=0.5)
    statuses = _statuses(audit)
    assert (statuses["fair-split"], statuses["samples-few"]) == ("pass", "fail") and audit.control.space == "pixels"
    in_classifier = [each for each in audit.attacks if each.space == "classifier"]
    assert len(in_classifier) == 2 and min(each.auc.value for each in in_classifier) > 0.9, "they seem to succeed"
    assert not any(each.beats_control_average or each.beats_control_few for each in in_classifier)
    assert max(each.auc.value for each in audit.attacks if each not in in_classifier) < 0.6
    assert statuses["epsilon"] == statuses["singling-out"] == "pass" and statuses["samples-average"] != "fail"
    assert [each.excess is None for each in audit.disclosures] == [False, True]


def _split_p(simulations: int) -> NDArray[np.float64]:
    """p-values of the classifier of the split, of features that have nothing to do with the sets."""
    labels, patients = np.repeat(np.array([1, 0]), 100), np.arange(200)
    values = []
    for seed in range(simulations):
        x = np.random.default_rng([seed, 7]).normal(size=(200, 8)).astype(np.float32)
        space = Space("one", x[:100], x[100:], x[:1])
        values.append(split_control([space], labels, patients, np.ones((2, 200)), seed=seed)[0].p)
    return np.array(values)


@pytest.mark.full
def test_p_of_the_classifier_of_the_split_is_uniform() -> None:
    """The normal quantiles of its p-values have a variance of 1; without fitting again it is about 1.6."""
    assert norm.ppf(np.clip(_split_p(200), 1e-3, 1 - 1e-3)).var() < 1.35


@pytest.mark.full
def test_p_of_the_classifier_of_the_split_is_uniform_in_many_audits() -> None:
    p_values = _split_p(400)
    assert norm.ppf(np.clip(p_values, 1e-3, 1 - 1e-3)).var() < 1.3
    assert (p_values < 0.05).sum() <= 39 and (p_values < 0.01).sum() <= 13
    assert 160 <= (p_values < 0.5).sum() <= 240, "nor are they too large"


@pytest.mark.full
def test_attack_on_the_generator_is_judged_by_its_own_rule() -> None:
    members, held_out, generated = _population(1, MEMBERS), _population(2, HELD_OUT), _population(3, MEMBERS)
    values = np.random.default_rng(0).normal(size=MEMBERS + HELD_OUT)
    values[:MEMBERS] += 1
    scores = (Scores("discriminator", "generator", "logit", values),)
    audit = _audit(members, held_out, generated, generator_scores=scores, scope="bundle")
    assert {rule for rule, status in _statuses(audit).items() if status == "fail"} >= {"generator-average"}
    assert _statuses(audit)["samples-average"] == "pass"
    without = _audit(members, held_out, generated, scope="bundle")
    assert _statuses(without)["generator-average"] == "not measured"
    assert (without.verdict.status, without.verdict.complete) == ("warn", False)


def test_result_round_trips_and_refuses_newer_formats() -> None:
    audit = _audit(_population(1, 100), _population(2, 100), _population(3, 100))
    values = json.loads(json.dumps(audit.to_json(), allow_nan=False))
    assert PrivacyAudit.from_json(values) == audit
    with pytest.raises(DataError, match="format 3.*newer dermis"):
        PrivacyAudit.from_json(values | {"format_version": 3})
    with pytest.raises(DataError, match="verdict"):
        PrivacyAudit.from_json({key: value for key, value in values.items() if key != "verdict"})
    former = PrivacyAudit.from_json(values | {"format_version": 1})
    assert audit.epsilon is not None
    text = audit_report(audit)
    assert "together with 95 % confidence" in text.replace("95%", "95 %") and "for replacing one patient" in text
    assert "earlier version" in audit_report(former) and "earlier version" not in text
    assert "patient-" not in text + json.dumps(values)
    assert text.index("**Verdict:") < text.index("## Rules") < text.index("## Attacks") < text.index("## Limits")


def test_audit_whose_fields_contradict_each_other_is_refused() -> None:
    document = _audit(_population(1, 100), _population(2, 100), _population(3, 100)).to_json()
    failed = [{**outcome, "status": "fail"} for outcome in document["outcomes"]]
    answers = [{**answer, "members": None} for answer in document["answers"]]
    for change, message in (
        ({"outcomes": failed, "verdict": {**document["verdict"], "status": "pass"}}, "verdict: is pass"),
        ({"outcomes": [*document["outcomes"], document["outcomes"][0]]}, "more than once"),
        ({"answers": answers}, "answers"),
    ):
        with pytest.raises(DataError, match=f"^file: is not a privacy audit: .*{message}"):
            PrivacyAudit.from_json({**document, **change}, "file")
    outcomes = [outcome for outcome in document["outcomes"] if outcome["rule"] != "power"]
    verdict = {"status": "warn", "complete": False, "text": "a\n\n# Verdict: pass"}
    text = audit_report(PrivacyAudit.from_json({**document, "outcomes": outcomes, "verdict": verdict}))
    assert "\n# Verdict" not in text and "Not measured." in text


def test_patients_in_both_sets_are_refused() -> None:
    spaces = [Space("one", *(_population(i, 60) for i in range(3)))]
    subject = _audit(_population(1, 60), _population(2, 60), _population(3, 60)).subject
    with pytest.raises(DataError, match="1 patients"):
        run_audit(subject, Evidence(spaces, [f"p{i % 119}" for i in range(120)]))


@given(st.dictionaries(st.sampled_from([rule.id for rule in RULES]), st.sampled_from(["pass", "warn", "not measured"])))
def test_what_was_not_measured_never_passes(statuses: dict[str, str]) -> None:
    outcomes = [Outcome(rule, status, "") for rule, status in statuses.items()]  # type: ignore[arg-type]
    verdict = verdict_of(outcomes, "bundle")
    measured = all(statuses.get(rule.id, "not measured") != "not measured" for rule in RULES)
    assert verdict.complete == measured and (measured or (verdict.status == "warn" and "incomplete" in verdict.text))
    failed = verdict_of([*outcomes, Outcome("epsilon", "fail", "")], "bundle")
    assert failed.status == "fail"


def test_scores_behind_the_bounds_do_not_depend_on_labels_of_the_half_that_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise the guesses about the second half know its answers, and the counts are not binomial."""
    members, held_out, generated = (_population(seed, 120) for seed in (1, 2, 3))
    captured: dict[str, object] = {}
    monkeypatch.setattr(
        "dermis.privacy.audit.epsilon_bound",
        lambda scores, labels, patients, **options: captured.update(options, scores=scores),
    )
    _audit(members, held_out, generated)
    space = Space("one", members, held_out, generated)
    labels, patients = np.repeat(np.array([1, 0]), 120), np.arange(240) // 2  # two images of each patient
    neighbours = [neighbours_of(space, patients)]
    choice, test = patient_halves(labels, patients, 0)
    flipped = labels.copy()
    for label in (0, 1):
        half = patients[test[labels[test] == label]][::2]
        flipped[np.isin(patients, half)] = 1 - label
    assert (flipped != labels).sum() >= 60 and flipped.sum() == labels.sum()
    before, after = (
        learned_scores_for_halves(neighbours, each, patients, choice, generated=120, seed=0).values
        for each in (labels, flipped)
    )
    assert np.array_equal(before, after)

    parts = (slice(None, DIM // 2), slice(DIM // 2, None))
    own = np.unique([f"patient-{i}" for i in range(240)], return_inverse=True)[1]
    neighbours = [
        neighbours_of(Space("", members[:, part], held_out[:, part], generated[:, part]), own) for part in parts
    ]
    halves = patient_halves(labels, own, 0)
    expected = learned_scores_for_halves(neighbours, labels, own, halves[0], generated=120, seed=0).values
    used, scores = captured["halves"], captured["scores"]
    assert isinstance(used, tuple) and all(map(np.array_equal, used, halves))
    assert isinstance(scores, dict) and np.array_equal(scores["learned (all)"], expected)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0]), st.integers(0, 1000))
def test_epsilon_of_randomized_response_is_not_exceeded(epsilon: float, seed: int) -> None:
    """Every image's membership is answered truthfully with probability e^epsilon / (1 + e^epsilon), the worst case."""
    trials, count, confidence = 40, 400, 0.95
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.array([1, 0]), count)
    truthful = math.exp(epsilon) / (1 + math.exp(epsilon))
    above = np.zeros(2)
    for trial in range(trials):
        answers = np.where(rng.random(2 * count) < truthful, labels, 1 - labels).astype(np.float64)
        bound = epsilon_bound(
            {"answer": answers}, labels, np.arange(2 * count), delta=0.0, confidence=confidence, seed=trial
        )
        assert bound is not None
        above += (bound.from_rates > epsilon, bound.from_pairs > 2 * epsilon)
    # With probability 0.9999 a Binomial(40, 0.05) is at most 9. A pair of two independent answers has twice the epsilon.
    assert above.max() <= 9


def test_bounds_are_stated_for_all_images_of_a_patient() -> None:
    """One image more or less changes the answer about a patient by 1: epsilon 0.5. All ten have ten times that."""
    rng, each, patients = np.random.default_rng(0), 10, 100
    answers = np.repeat([each] * patients + [0] * patients, each) + np.repeat(rng.laplace(0, 2, 2 * patients), each)
    audit = _audit(
        *(_population(seed, count * each) for seed, count in ((1, patients), (2, patients), (3, 10))),
        generator_scores=(Scores("answer", "generator", "count", answers),),
        scope="bundle",
        images_each=each,
    )
    assert audit.epsilon is not None and 1 < audit.epsilon.from_rates < 5
    finding = next(outcome.finding for outcome in audit.outcomes if outcome.rule == "epsilon")
    text = audit_report(audit).partition("## Epsilon")[2].partition("## The three")[0]
    for stated in (finding, text):
        assert "all images of one patient" in stated and "one image of" not in stated and "guaranteed" not in stated
        assert "for one image" not in stated and "an image" not in stated and "removing one image" not in stated
    unknown = replace(audit.subject, member_patients=None, non_member_patients=None)
    assert "neither is guaranteed" in audit_report(replace(audit, subject=unknown)).partition("## Epsilon")[2]
    single = replace(audit.subject, member_patients=1000, non_member_patients=1000)
    assert "one patient (each has one image)" in audit_report(replace(audit, subject=single))
    some_unknown = audit_report(replace(audit, subject=replace(single, members_without_ids=WithoutIds(1, 0))))
    assert "neither is guaranteed" in some_unknown and "each has one image" not in some_unknown


def test_bounds_are_large_for_certain_attacks_and_zero_for_guesses() -> None:
    labels, rng = np.repeat(np.array([1, 0]), 500), np.random.default_rng(0)
    certain = epsilon_bound({"a": labels + rng.normal(0, 0.01, 1000)}, labels, np.arange(1000))
    guess = epsilon_bound({"a": rng.normal(size=1000)}, labels, np.arange(1000))
    assert certain is not None and guess is not None
    assert certain.from_rates > 3.9 and certain.from_pairs > 4 and guess.value < 0.5
    assert certain.confidence == 0.975 and math.isclose(certain.joint_confidence, 0.95), "of each, of both"
    low = 0.05 ** (1 / 100)
    assert math.isclose(bound_from_guesses(100, 100, error=0.05), math.log(low / (1 - low)), rel_tol=1e-9)
    assert epsilon_bound({"a": rng.normal(size=60)}, labels[470:530], np.arange(60)) is None


def test_permutations_of_patients_are_exact_where_images_are_repeated() -> None:
    """With 20 equal images of each patient, a test of images would reject far too often."""
    rng, p_values = np.random.default_rng(0), []
    for trial in range(60):
        patients = np.repeat(np.arange(60), 20)
        labels = np.repeat(rng.permutation(60) < 30, 20).astype(np.int64)
        scores = np.repeat(rng.normal(size=60), 20)
        p_values.append(permutation_p([scores], labels, patients, seed=trial, permutations=200)[0])
    assert 0.3 < np.mean(p_values) < 0.75 and np.mean(np.array(p_values) < 0.05) < 0.15


def test_neighbours_leave_out_images_of_the_same_patient() -> None:
    base = _population(1, 40)
    space = Space("one", np.concatenate([base, base]), _population(2, 60), _population(3, 50))
    patients = np.concatenate([np.arange(40), np.arange(40), np.arange(40, 100)])
    assert (neighbours_of(space, patients).to_real[:40, 0] > 0.1).all()
    assert (neighbours_of(space, np.arange(140)).to_real[:40, 0] == 0).all()


def test_holm_and_power_agree_with_known_values() -> None:
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03])), [0.03, 0.06, 0.06])
    # 28 of 2,000 members on top of 500 others: 0.8^28 is about 0.0017.
    share = detectable_share(2000, 500, 0.002)
    assert share == pytest.approx(28 / 2000)
    assert detectable_share(20, 500, 1e-40) is None


def test_subject_has_no_path() -> None:
    subject = _audit(_population(1, 60), _population(2, 60), _population(3, 60)).subject
    assert not any("/" in str(value) for value in vars(replace(subject, spaces={})).values())
