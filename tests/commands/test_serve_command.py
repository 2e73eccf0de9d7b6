"""Tests that `dermis serve` and `dermis worker` give their options to the service."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]
UNSET = dict.fromkeys(("bundles", "host", "port", "data_dir", "device"))


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str | None]]:
    """The options of each service that would have been started."""
    calls: list[dict[str, str | None]] = []

    def serve(options: Mapping[str, str | None]) -> int:
        calls.append(dict(options))
        return 3

    monkeypatch.setattr("services.serve.serve", serve)
    return calls


@pytest.mark.parametrize(("command", "role"), [("serve", {}), ("worker", {"role": "worker"})])
def test_options_are_given_to_the_service(
    command: str, role: dict[str, str], run: Run, given: list[dict[str, str | None]], tmp_path: Path
) -> None:
    assert run(command)[0] == 3  # the status of the service
    places = ("--bundles", "a,b", "--host", "::1", "--port", 3001, "--data-dir", tmp_path, "--device", "cpu")
    more = ("--set", "lease_seconds=4", "--set", "storage_url=s3://b/x?y=z", "--set", "port=3002")
    assert run(command, *places, *more)[0] == 3
    options = {"bundles": "a,b", "host": "::1", "port": "3002", "data_dir": str(tmp_path), "device": "cpu"}
    assert given == [
        UNSET | role,
        options | role | {"lease_seconds": "4", "storage_url": "s3://b/x?y=z"},
    ]


@pytest.mark.parametrize("command", ["serve", "worker"])
@pytest.mark.parametrize("setting", ["lease_seconds", "no_such_setting=1"])
def test_unknown_settings_are_refused(command: str, setting: str, run: Run, given: list[dict[str, str | None]]) -> None:
    status, _, message = run(command, "--set", setting)
    assert status == 2 and given == []
    assert setting in message and "NAME=VALUE" in message
