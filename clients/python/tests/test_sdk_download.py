"""Tests of downloads: connections that break, files with wrong content, folders that are already in use."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dermis_client import AsyncDermisClient, Dataset, DermisClient, DownloadProgress, verify
from dermis_client._files import PartFile
from dermis_client.errors import APIStatusError, ConflictError, DownloadError, IntegrityError
from fake_gateway import FakeGateway, Fault

Fetch = Callable[..., Any]


@pytest.fixture(params=["sync", "async"])
def fetch(request: pytest.FixtureRequest, gateway: FakeGateway) -> Fetch:
    """download(id, folder, **options) by either client."""
    if request.param == "sync":

        def blocking(identifier: str, folder: Path, **options: Any) -> Any:
            with DermisClient(gateway.url, max_retries=2) as client:
                return client.datasets.download(identifier, folder, **options)

        return blocking

    def asynchronous(identifier: str, folder: Path, **options: Any) -> Any:
        async def download() -> Any:
            async with AsyncDermisClient(gateway.url, max_retries=2) as client:
                return await client.datasets.download(identifier, folder, **options)

        return asyncio.run(download())

    return asynchronous


def test_cut_download_resumes_at_last_byte(gateway: FakeGateway, fetch: Fetch, tmp_path: Path) -> None:
    identifier = gateway.finished()
    gateway.faults = [Fault("GET .*images.zip", times=4, cut=50_000)]  # more cuts than retries, each with progress
    reports: list[DownloadProgress] = []
    result = fetch(identifier, tmp_path, progress=reports.append)
    requests = gateway.requests("images.zip")
    assert [headers.get("range") for headers in requests[:2]] == [None, "bytes=50000-"]
    assert len(requests) == 5 and "identity" in requests[0]["accept-encoding"]
    assert verify(tmp_path) and not list(tmp_path.glob("*.part"))
    total = sum(path.stat().st_size for path in result.files)
    assert result.bytes_received == total
    assert reports[-1] == DownloadProgress(5, 5, total, total)


def test_second_program_resumes_download_of_incomplete_files(
    gateway: FakeGateway, fetch: Fetch, tmp_path: Path
) -> None:
    identifier = gateway.finished()
    gateway.faults = [Fault("GET .*images.zip", cut=50_000), Fault("GET .*images.zip", times=9, cut=0)]
    with pytest.raises(DownloadError, match="images.zip: .* download again"):
        fetch(identifier, tmp_path)
    assert (tmp_path / "images.zip.part").stat().st_size == 50_000 and not (tmp_path / "images.zip").exists()
    gateway.faults, gateway.log = [], []
    result = fetch(identifier, tmp_path)
    assert gateway.requests("images.zip")[0]["range"] == "bytes=50000-"
    assert not gateway.requests("manifest.json") and verify(tmp_path)
    assert result.bytes_received <= (tmp_path / "images.zip").stat().st_size
    gateway.log = []
    assert fetch(identifier, tmp_path).bytes_received == 0
    assert [line for line, _ in gateway.log] == [f"GET /v1/datasets/{identifier}/files"]


@pytest.mark.parametrize("whole", [False, True], ids=["range kept", "range ignored"])
def test_partial_file_with_other_content_is_discarded(
    gateway: FakeGateway, fetch: Fetch, tmp_path: Path, whole: bool
) -> None:
    identifier = gateway.finished()
    size = len(gateway.files[identifier]["images.zip"])
    (tmp_path / "images.zip.part").write_bytes(b"old" * 9999)
    (tmp_path / "metadata.csv.part").write_bytes(b"x" * 99)  # longer than the file
    (tmp_path / "README.md.part").write_bytes(b"? card\n")  # as long as the file
    gateway.faults = [Fault("GET .*images.zip", whole=whole)]
    assert fetch(identifier, tmp_path).bytes_received >= size
    assert verify(tmp_path)


def test_file_with_wrong_bytes_is_not_stored(gateway: FakeGateway, fetch: Fetch, tmp_path: Path) -> None:
    identifier = gateway.finished()
    gateway.faults = [Fault("GET .*preview.png", times=9, flip=True)]
    with pytest.raises(IntegrityError, match="preview.png") as caught:
        fetch(identifier, tmp_path)
    assert caught.value.name == "preview.png" and caught.value.expected != caught.value.actual
    assert not list(tmp_path.glob("preview.png*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": "0" * 64}, "manifest.json and the service's list"),
        ({"bytes": 3}, "manifest.json and the service's list"),
        ({"name": "other.png"}, "in manifest.json but not in the service's list|in the service's list but not"),
        ({"name": "../preview.png"}, "not safe"),
        ({"name": "/tmp/preview.png"}, "not safe"),
        ({"name": "IMAGES.zip"}, "twice"),
        ({"name": "preview.png.part"}, "not safe"),
    ],
)
def test_wrong_or_unsafe_file_list_is_refused(
    gateway: FakeGateway, fetch: Fetch, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    identifier = gateway.finished()
    gateway.listed = {"preview.png": changes}
    with pytest.raises(IntegrityError, match=message):
        fetch(identifier, tmp_path / "in")
    assert not gateway.requests("images.zip")  # nothing large was fetched before it was noticed
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] in ([], ["manifest.json"])


def test_file_longer_than_listed_is_refused(gateway: FakeGateway, fetch: Fetch, tmp_path: Path) -> None:
    identifier = gateway.finished()
    endless = Fault("GET .*preview.png", status=200, body=b"x" * 9999, media_type="image/png")
    gateway.faults = [endless]
    with pytest.raises(IntegrityError, match="preview.png"):
        fetch(identifier, tmp_path)
    assert not (tmp_path / "preview.png").exists()


def test_foreign_files_are_replaced_only_with_overwrite(gateway: FakeGateway, fetch: Fetch, tmp_path: Path) -> None:
    identifier = gateway.finished()
    (tmp_path / "README.md").write_text("my own notes")
    with pytest.raises(DownloadError, match="another README.md"):
        fetch(identifier, tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own notes" and len(list(tmp_path.iterdir())) == 1
    fetch(identifier, tmp_path, overwrite=True)
    (tmp_path / "README.md").write_text("damaged")  # the folder is now this dataset's, so it is repaired
    fetch(identifier, tmp_path)
    assert verify(tmp_path)


def test_download_of_unfinished_dataset_is_refused(gateway: FakeGateway, fetch: Fetch, tmp_path: Path) -> None:
    dataset = gateway.create({"classes": {"benign": 1}})
    with pytest.raises(ConflictError, match="dataset-not-ready"):
        fetch(dataset["id"], tmp_path / "in")
    assert not (tmp_path / "in").exists()


def test_final_error_status_stops_download(gateway: FakeGateway, fetch: Fetch, tmp_path: Path) -> None:
    identifier = gateway.finished()
    gateway.faults = [Fault("GET .*metadata.csv", times=9, status=507)]
    with pytest.raises(APIStatusError, match="507"):
        fetch(identifier, tmp_path)


def test_download_is_refused_when_disk_space_is_short(
    gateway: FakeGateway, fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identifier = gateway.finished()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DownloadError, match="1000 bytes are free"):
        fetch(identifier, tmp_path)
    assert not list(tmp_path.iterdir())


def test_disk_filling_up_during_download_is_reported(
    gateway: FakeGateway, fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identifier = gateway.finished()
    write = PartFile.write

    def full(part: PartFile, data: bytes) -> None:
        if part.target.name == "preview.png":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(part, data)

    monkeypatch.setattr(PartFile, "write", full)
    with pytest.raises(DownloadError, match="No space left"):
        fetch(identifier, tmp_path)
    assert not (tmp_path / "preview.png").exists()
    monkeypatch.undo()
    fetch(identifier, tmp_path)
    assert verify(tmp_path)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="this system has no /dev/zero")
def test_partial_file_that_is_not_regular_is_refused(gateway: FakeGateway, fetch: Fetch, tmp_path: Path) -> None:
    (tmp_path / "preview.png.part").symlink_to("/dev/zero")
    with pytest.raises(DownloadError, match="not a regular file"):
        fetch(gateway.finished(), tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_target_folder_is_refused(gateway: FakeGateway, fetch: Fetch, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DownloadError, match="Permission denied"):
        fetch(gateway.finished(), tmp_path / "in")


def test_file_in_place_of_target_folder_is_refused(gateway: FakeGateway, fetch: Fetch, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("")
    with pytest.raises(DownloadError, match="in: cannot be written"):
        fetch(gateway.finished(), tmp_path / "in")


def test_concurrent_downloads_into_one_folder_succeed(gateway: FakeGateway, tmp_path: Path) -> None:
    identifier = gateway.finished()
    gateway.faults = [Fault("GET .*images.zip", times=6, cut=60_000)]
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with DermisClient(gateway.url) as client:
                client.datasets.download(identifier, tmp_path)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and verify(tmp_path)


def test_cancelled_async_download_leaves_no_running_task(gateway: FakeGateway, tmp_path: Path) -> None:
    identifier = gateway.finished()
    gateway.faults = [Fault("GET .*images.zip", silent=0.3)]

    async def leave() -> None:
        async with AsyncDermisClient(gateway.url) as client:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.15):
                    await client.datasets.download(identifier, tmp_path)
            assert len(asyncio.all_tasks()) == 1
            await client.datasets.download(identifier, tmp_path)

    asyncio.run(leave())
    assert verify(tmp_path)


def test_a_record_without_a_client_is_refused() -> None:
    request = {"model": "demo", "classes": {"a": 1}}
    with pytest.raises(ValueError, match="not connected to a client"):
        Dataset.model_validate({"id": "ds_1", "state": "queued", "request": request}).refresh()
