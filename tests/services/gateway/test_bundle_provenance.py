"""Tests of the provenance of a bundle in the models API."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import DEMO
from services.gateway.schemas.provenance import provenance_of


def stated() -> dict[str, Any]:
    provenance: dict[str, Any] = json.loads((DEMO / "bundle.json").read_text())["provenance"]
    return provenance


def test_provenance_of_the_demo_names_training_set_version_and_changes() -> None:
    provenance = provenance_of(stated())
    assert provenance.code_version == stated()["code_version"]
    dataset, training = provenance.dataset, provenance.training
    assert dataset is not None and training is not None
    assert dataset.sha256 == stated()["dataset"]["sha256"]
    assert dataset.images == sum(dataset.classes.values()) == 4543
    assert (training.hours, training.seed, training.batch) == (2.805, 0, 16)
    assert len(training.changes) == 6
    change = training.changes[3]
    assert (change.kimg, change.before) == (41.216, {"learning_rate": 0.0025, "moments_weight": 3.0})
    assert training.changes[5].before == {"class_moments_weight": None}
    assert provenance.privacy is None


def test_private_training_states_its_guarantee() -> None:
    privacy = provenance_of({"privacy": {"epsilon": 4.5, "delta": 1e-5, "unit": "patient", "steps": 9}}).privacy
    assert privacy is not None
    assert (privacy.epsilon, privacy.delta, privacy.unit) == (4.5, 1e-5, "patient")


@pytest.mark.parametrize(
    "provenance",
    [
        {},
        {"code_version": 3, "dataset": None, "training": []},
        {"dataset": {"sha256": "no digest", "images": -1, "classes": {"a": True, "b": 1.5}}},
        {"training": {"hours": 1e999, "hardware": ["x"], "changes": [{"before": {}}, 3], "configuration": 1}},
        {"training": {"changes": {"kimg": 1}}},
    ],
)
def test_provenance_of_other_programs_is_left_out_where_it_has_another_form(provenance: dict[str, Any]) -> None:
    body = provenance_of(provenance)
    assert body.code_version is None and body.privacy is None
    if body.dataset is not None:
        assert body.dataset.model_dump() == {"name": None, "images": None, "classes": {}, "sha256": None}
    if body.training is not None:
        empty = {"hardware": None, "hours": None, "seed": None, "batch": None, "changes": []}
        assert body.training.model_dump() == empty


def test_long_texts_of_a_bundle_are_cut() -> None:
    change = {"kimg": 1, "before": {}, "after": {"x" * 999: ["y" * 999]}}
    body = provenance_of({"dataset": {"name": "n" * 9999}, "training": {"changes": [change] * 999}})
    assert body.dataset is not None and body.training is not None
    assert len(body.dataset.name or "") == 300
    assert len(body.training.changes) == 100
    assert len(body.model_dump_json()) < 100_000
