"""Tests of the data folder: only this account reads it, killed processes leave nothing, no log contains a projection's id."""

from __future__ import annotations

import logging
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fsspec.registry import _registry as loaded_storages

from benchmarks.components import free_port
from dermis.bundle import Bundle
from dermis.imaging import encode
from launched_service import Launched
from pictures import PIXELS
from service_kit import service
from services import logs
from services.data_folder import prepare_data_folder
from services.settings import Settings, SettingsError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="modes and signals")


def settings_of(folder: Path, **values: str) -> Settings:
    return Settings(_env_file=None, data_dir=folder, **values)


def open_to_others(folder: Path) -> list[str]:
    paths = [folder, *folder.rglob("*")]
    return [str(path) for path in paths if not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) & 0o077]


def test_modes_of_an_earlier_version_are_corrected(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    job = folder / "datasets" / f"pr_{'0' * 32}" / ".partial"
    job.mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"x")
    (folder / "datasets" / "link").symlink_to(elsewhere)
    strange = folder / "notes.txt"
    for path in (strange, folder / "jobs.sqlite", folder / "jobs.sqlite-wal", job / "input-00000.png"):
        path.write_bytes(b"x")
    for path in (folder, *folder.rglob("*"), elsewhere):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() else 0o644)
    prepare_data_folder(settings_of(folder))
    assert open_to_others(folder) == [str(strange)]  # not the service's, and the folder around it is closed
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o644


def test_new_data_folder_is_closed_to_other_accounts(tmp_path: Path) -> None:
    prepare_data_folder(settings_of(tmp_path / "a" / "data"))
    assert stat.S_IMODE((tmp_path / "a" / "data").stat().st_mode) == 0o700


def test_shared_data_folder_is_refused_and_left_unchanged(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    with pytest.raises(SettingsError, match="DERMIS_DATA_DIR.*shared by all accounts"):
        prepare_data_folder(settings_of(tmp_path))
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o1777


def test_missing_storage_package_prevents_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(loaded_storages, "s3", raising=False)  # a class that another test has loaded
    with pytest.raises(SettingsError, match=r"DERMIS_STORAGE_URL: s3://bucket/x: .*pip install s3fs"):
        prepare_data_folder(settings_of(tmp_path, storage_url="s3://bucket/x"))
    with pytest.raises(SettingsError, match="DERMIS_STORAGE_URL: nowhere://x"):
        prepare_data_folder(settings_of(tmp_path, storage_url="nowhere://x"))


def test_requests_are_logged_by_route_and_ids_are_cut(
    tiny_bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), service(tiny_bundle.location, tmp_path / "data") as running:
        asked = running.client.post("/v1/projections?steps=1", files=[("files", encode(PIXELS))])
        identity = asked.json()["id"]
        for path in ("", "/", "/files/00000.png", "/files/none"):
            running.client.get(f"/v1/projections/{identity}{path}")
        running.client.delete(f"/v1/projections/{identity}")
    formatter = logs.LineFormatter()
    lines = [formatter.format(record) for record in caplog.records if record.name.startswith("dermis")]
    assert any("route=/v1/projections/{projection_id} " in line for line in lines)
    assert not [line for line in lines if identity in line]


def test_an_id_in_a_message_or_a_trace_is_cut() -> None:
    identity = "pr_0123456789abcdef0123456789abcdef"
    try:
        raise OSError(f"/data/datasets/{identity}/00000.png")
    except OSError:
        record = logging.LogRecord("dermis", logging.ERROR, "", 0, "lost %s", (identity,), sys.exc_info())
    record.workflow = f"{identity}-0"
    line = logs.LineFormatter().format(record)
    assert identity not in line and line.count("pr_012345...") >= 3


@pytest.mark.full
def test_files_of_running_service_are_closed_to_other_accounts(
    tiny_bundle: Bundle,
    launch: Callable[..., Launched],
    tmp_path: Path,
) -> None:
    before = os.umask(0)  # the least restrictive umask
    try:
        running = launch(tiny_bundle.location, free_port(), log_level="DEBUG")
    finally:
        os.umask(before)
    running.wait_until(running.ready)
    asked = running.client.post("/v1/projections?steps=2", files=[("files", encode(PIXELS))])
    assert asked.status_code == 202, asked.text
    path = asked.headers["Location"]
    running.wait_until(lambda: running.client.get(path).json()["state"] == "succeeded")
    dataset = running.client.post("/v1/datasets", json={"classes": {"benign": 2}}).json()
    running.wait_until(lambda: running.progress(dataset)["state"] == "succeeded")
    written = [path.name for path in (tmp_path / "data").rglob("*")]
    assert "00000.png" in written and "jobs.sqlite-wal" in written
    assert open_to_others(tmp_path / "data") == []
    assert asked.json()["id"] not in running.log.read_text()
