"""Tests of `dermis serve` and `dermis worker`: the settings with which they start the service."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from services.settings import read_settings

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The values with which the service was started, without those that are left to the environment."""
    values: list[dict[str, str]] = []

    def serve(given: Mapping[str, str | None]) -> int:
        values.append({name: value for name, value in given.items() if value is not None})
        return 7

    monkeypatch.setattr("services.serve.serve", serve)
    return values


@pytest.mark.parametrize(("command", "role"), [("serve", "all"), ("worker", "worker")])
def test_options_become_settings(
    command: str, role: str, run: Run, started: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DERMIS_DATABASE_URL", "postgresql://127.0.0.1:1/dermis")
    monkeypatch.setenv("DERMIS_STORAGE_URL", "s3://datasets/x")
    options = ("--data-dir", tmp_path, "--port", 5001, "--set", "queue_poll_seconds=2.5", "--set", "max_images=9")
    assert run(command, *options) == (7, "", ""), "it ends with the status of the service"
    settings = read_settings(**started[0])
    assert (settings.role, settings.port, settings.data_dir) == (role, 5001, tmp_path)
    assert (settings.queue_poll_seconds, settings.max_images) == (2.5, 9)


@pytest.mark.parametrize("command", ["serve", "worker"])
@pytest.mark.parametrize("text", ["max_images", "images=9"])
def test_unknown_setting_starts_nothing(command: str, text: str, run: Run, started: list[dict[str, str]]) -> None:
    status, _, message = run(command, "--set", text)
    assert status and f"{text}: write NAME=VALUE" in message and not started
