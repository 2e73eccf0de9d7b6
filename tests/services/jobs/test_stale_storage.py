"""Tests of jobs in a shared folder that cannot be reached for a moment."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from dermis.bundle import Bundle
from dermis.dataset.verify import verify
from service_kit import service, wait_for
from services.errors import is_transient
from services.jobs import context
from stale_folder import stale

REQUEST: dict[str, Any] = {"classes": {"benign": 70, "malignant": 30}, "seed": 3, "shard_size": 9}


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (OSError(errno.ESTALE, os.strerror(errno.ESTALE)), True),
        (OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN)), True),
        (OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)), True),
        (OSError(errno.EIO, os.strerror(errno.EIO)), False),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)), False),
        (TimeoutError("of another kind of call"), False),
    ],
)
def test_error_of_a_file_that_no_store_has_handled_is_transient_or_not(error: OSError, transient: bool) -> None:
    assert is_transient(error) == transient


def test_dataset_waits_while_its_storage_is_stale(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(context, "_FIRST_PAUSE_SECONDS", 0.01)
    with service(tiny_bundle.location, tmp_path / "data") as running:
        running.generator.gate.clear()
        asked = running.ask(REQUEST)
        wait_for(lambda: running.client.get(asked["links"]["self"]).json()["state"] == "running")
        with stale(Path(running.settings.storage)):
            running.generator.gate.set()
            wait_for(lambda: "work waits" in caplog.text or "job failed" in caplog.text)
            refused = running.client.post("/v1/datasets", json=REQUEST)
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5"), refused.text
        assert running.wait(asked)["state"] == "succeeded"
        assert verify(Path(running.settings.storage) / asked["id"]).ok
