"""Tests of client.classifications and `dermis-client classify`: batches, file names and errors."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import sys
from pathlib import Path

import pytest
from dermis_client import (
    APIResponseError,
    AsyncDermisClient,
    ClassificationsResult,
    DermisClient,
    DermisError,
    InvalidRequestError,
    TooLargeError,
    UnsupportedMediaTypeError,
    _uploads,
    cli,
)
from fake_gateway import FakeGateway, Fault


def image(value: int) -> bytes:
    return bytes([value]) + b"image"


@pytest.fixture
def client(gateway: FakeGateway) -> DermisClient:
    return DermisClient(gateway.url)


@pytest.fixture
def folder(tmp_path: Path) -> list[Path]:
    """Forty images, of values 10 to 49."""
    paths = [tmp_path / f"Jane {i}.jpg" for i in range(40)]
    for i, path in enumerate(paths):
        path.write_bytes(image(10 + i))
    return paths


def test_paths_bytes_and_open_files_are_accepted_as_images(client: DermisClient, folder: list[Path]) -> None:
    result = client.classifications.create([folder[0], str(folder[1]), image(204), io.BytesIO(image(51))])
    assert [round(one.probability * 255) for one in result] == [10, 11, 204, 51]
    assert [one.name for one in result] == [str(folder[0]), str(folder[1]), "files[2]", "files[3]"]
    assert [one.class_name for one in result] == ["benign", "benign", "malignant", "benign"]
    assert (result.positive_class, result.notice, result.threshold.name) == (
        "malignant",
        "Not a medical device.",
        "default",
    )
    assert client.classifications.create(image(204))[0].class_name == "malignant"
    assert len(client.classifications.create(folder[0])) == 1


def test_images_of_any_iterable_are_accepted(client: DermisClient, folder: list[Path]) -> None:
    found = client.classifications.create(folder[0].parent.glob("Jane 1*.jpg"))
    assert (
        sorted(one.name for one in found) == sorted(map(str, folder[0].parent.glob("Jane 1*.jpg"))) and len(found) == 11
    )
    assert [round(one.probability * 255) for one in client.classifications.create(image(i) for i in (9, 8))] == [9, 8]
    for buffer in (bytearray(image(7)), memoryview(image(7)), (bytearray(image(7)),)):
        assert [round(one.probability * 255) for one in client.classifications.create(buffer)] == [7]


def test_threshold_is_accepted_by_name_or_number(client: DermisClient) -> None:
    named = client.classifications.create(image(80), threshold="sensitivity_90")
    assert (named.threshold.value, named[0].class_name) == (0.25, "malignant")
    number = client.classifications.create(image(80), threshold=0.00001)
    assert (number.threshold.name, number.threshold.value) == (None, 0.00001)
    for wrong in (1.5, float("nan"), True):
        with pytest.raises(InvalidRequestError, match="threshold"):
            client.classifications.create(image(80), threshold=wrong)


def test_many_images_are_sent_in_batches_and_returned_in_order(
    gateway: FakeGateway, client: DermisClient, folder: list[Path]
) -> None:
    reports: list[tuple[int, int]] = []
    result = client.classifications.create(folder, progress=lambda done, total: reports.append((done, total)))
    assert [one.index for one in result] == list(range(40))
    assert [round(one.probability * 255) for one in result] == list(range(10, 50))
    assert [len(parts) for parts in gateway.uploads] == [16, 16, 8]
    assert reports == [(16, 40), (32, 40), (40, 40)]
    assert "Jane" not in str(gateway.uploads)  # file names are not sent


def test_large_images_share_request_only_up_to_size_limit(
    gateway: FakeGateway, client: DermisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_uploads, "MAX_BYTES", 1000)
    client.classifications.create([image(9) + bytes(size) for size in (400, 400, 400, 2000, 10)])
    assert [len(parts) for parts in gateway.uploads] == [2, 1, 1, 1]


def test_service_with_lower_limit_gets_smaller_requests(
    gateway: FakeGateway, client: DermisClient, folder: list[Path]
) -> None:
    gateway.most_files = 5
    result = client.classifications.create(folder[:20])
    assert [round(one.probability * 255) for one in result] == list(range(10, 30))
    assert max(len(parts) for parts in gateway.uploads[-2:]) <= 5
    gateway.most_files = 0
    with pytest.raises(TooLargeError):
        client.classifications.create(folder[:2])


def test_error_names_bad_image_by_path_of_caller(client: DermisClient, folder: list[Path]) -> None:
    folder[20].write_bytes(image(0))
    with pytest.raises(UnsupportedMediaTypeError) as caught:
        client.classifications.create(folder)
    assert str(caught.value).startswith(f"{folder[20]}: is no image")
    assert [error.field for error in caught.value.errors] == ["files[20]"]
    folder[20].write_bytes(image(1))
    with pytest.raises(TooLargeError, match=r"Jane 20\.jpg"):
        client.classifications.create(folder)
    folder[20].unlink()
    with pytest.raises(InvalidRequestError, match=r"Jane 20\.jpg: cannot be read \(No such file"):
        client.classifications.create(folder)
    closed = io.BytesIO(b"x")
    closed.close()
    for wrong, message in (
        ([], "files: give at least one image"),
        ([io.StringIO("text")], r"files\[0\]: open it in binary mode"),
        ([folder[0], closed], r"files\[1\]: cannot be read"),
        (["a\0b"], "cannot be read"),
        (["a.png", 7], r"files\[1\]: must be a path, bytes or a file open for reading, not int"),
        (None, "files: must be a path, bytes or a file open for reading, or several of them, not NoneType"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            client.classifications.create(wrong)  # type: ignore[arg-type]  # what a caller may do all the same


def test_request_with_lost_response_is_repeated(gateway: FakeGateway, client: DermisClient) -> None:
    gateway.faults.append(Fault("POST /v1/classifications", after=True))
    assert len(client.classifications.create(image(80))) == 1
    assert len(gateway.uploads) == 2


def test_classifier_change_between_batches_is_an_error(
    gateway: FakeGateway, client: DermisClient, folder: list[Path]
) -> None:
    def change(done: int, total: int) -> None:
        gateway.classifier = "e" * 64

    with pytest.raises(DermisError, match="changed its classifier"):
        client.classifications.create(folder, progress=change)


def test_heat_maps_are_requested_singly_and_saved_unchanged(
    gateway: FakeGateway, client: DermisClient, folder: list[Path], tmp_path: Path
) -> None:
    result = client.classifications.create([folder[0], image(204)], heat_map="xrai")
    assert [len(parts) for parts in gateway.uploads] == [1, 1]
    first = result[0].heat_map
    assert first is not None and (first.method, first.scale) == ("xrai", 0.5)
    assert first.content.startswith(b"\x89PNG")
    assert first.save(tmp_path / "new" / "heat.png").read_bytes() == first.content
    paths = result.save_heat_maps(tmp_path / "all")
    assert [path.name for path in paths] == ["0000-Jane-0.png", "0001-files-1.png"]
    assert client.classifications.create(image(204))[0].heat_map is None

    async def ask() -> ClassificationsResult:
        async with AsyncDermisClient(gateway.url) as other:
            return await other.classifications.create([folder[0], image(204)], heat_map="xrai")

    assert asyncio.run(ask()) == result
    gateway.heat_maps = False
    with pytest.raises(APIResponseError, match="older than this client"):
        client.classifications.create(image(204), heat_map="xrai")


def test_async_client_returns_same_classifications(
    gateway: FakeGateway, client: DermisClient, folder: list[Path]
) -> None:
    async def ask() -> ClassificationsResult:
        async with AsyncDermisClient(gateway.url) as other:
            return await other.classifications.create(folder, threshold=0.125)

    assert asyncio.run(ask()) == client.classifications.create(folder, threshold=0.125)


def test_classify_command_prints_table_csv_and_json(
    gateway: FakeGateway, folder: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DERMIS_BASE_URL", gateway.url)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dermis-client", "classify", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return (int(left.value.code or 0), *capsys.readouterr())

    names = [str(path) for path in folder[:3]]
    status, out, err = run(*names, "--threshold", "sensitivity_90")
    assert status == 0 and "Not a medical device." in err
    assert out.splitlines()[0].split() == ["FILE", "PROBABILITY", "CALIBRATED", "CLASS"]
    assert out.splitlines()[1].split()[-3:] == ["0.0392", "0.0392", "benign"]
    assert "malignant from 0.25 (sensitivity_90)" in out
    rows = list(csv.reader(io.StringIO(run(*names, "--csv")[1])))
    assert rows[0] == ["file", "probability", "calibrated", "class"]
    assert [row[0] for row in rows[1:]] == names and float(rows[1][1]) == 10 / 255
    document = json.loads(run(*names, "--json", "--threshold", "0.01")[1])
    assert [one["class"] for one in document["data"]] == ["malignant"] * 3
    heat = folder[0].parent / "heat"
    status, out, err = run(*names, "--heat-maps", str(heat), "--json")
    assert status == 0 and f"3 heat maps in {heat}" in err
    document = json.loads(out)
    assert document["files"] == [str(path) for path in sorted(heat.iterdir())]
    assert "content" not in document["data"][0]["heat_map"] and "b64" not in document["data"][0]["heat_map"]
    status, out, err = run(names[0], "nowhere.jpg")
    assert (status, out) == (1, "") and "nowhere.jpg" in err.splitlines()[-1]
