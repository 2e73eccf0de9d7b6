"""Tests that the public behaviour equals the records in tests/golden; record.py there documents and writes them."""

from __future__ import annotations

import difflib
import json

import pytest
from golden.record import FOLDER, ROOT, compute, environment, path_of

_SHOWN_LINES = 60


def _compare(section: str) -> None:
    recorded = path_of(section).read_text(encoding="utf-8")
    problem, present = "", ""
    try:
        present = compute(section)
    except RuntimeError as error:
        problem = str(error)
    if problem:
        pytest.fail(problem, pytrace=False)
    if present == recorded:
        return
    lines = difflib.unified_diff(recorded.splitlines(), present.splitlines(), "recorded", "present", lineterm="", n=2)
    difference = [line[:300] for line in lines]
    more = len(difference) - _SHOWN_LINES
    pytest.fail(
        "\n".join(
            [
                f"{path_of(section).relative_to(ROOT)} differs from what the code does now:",
                *difference[:_SHOWN_LINES],
                *([f"... and {more} more lines"] if more > 0 else []),
                f"If the change is intended, record it and commit the file: python {FOLDER.relative_to(ROOT)}/record.py "
                f"{section}",
            ]
        ),
        pytrace=False,
    )


def test_demo_bundle_has_the_recorded_digest() -> None:
    _compare("bundle")


@pytest.mark.full
def test_help_of_every_command_is_as_recorded() -> None:
    _compare("help")


def test_client_exports_the_recorded_names() -> None:
    _compare("client")


def test_openapi_has_the_recorded_operations_and_fields() -> None:
    _compare("openapi")


@pytest.mark.full
def test_get_routes_answer_as_recorded() -> None:
    pytest.importorskip("faiss", reason="FAISS is not installed")
    _compare("routes")


def test_dataset_has_the_recorded_bytes_in_every_format() -> None:
    """Skipped on a machine that may round in another way than the one that recorded the bytes."""
    recorded, present = json.loads(path_of("dataset").read_text(encoding="utf-8"))["recorded_with"], environment()
    differing = [
        f"{name} {recorded.get(name)} there, {present.get(name)} here"
        for name in sorted(recorded.keys() | present.keys())
        if recorded.get(name) != present.get(name)
    ]
    if differing:
        pytest.skip(f"recorded on another kind of machine: {'; '.join(differing)}")
    _compare("dataset")
