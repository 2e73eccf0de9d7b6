"""Tests of downloads: the calls of the Archive's tool, and that missing images are reported. No network is used."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from commands.main import app
from dermis.errors import DataError
from training.data import download as download_module
from training.data.download import COLLECTIONS, CollectionSize, download, fetch_collection_size, find_collection
from training.data.sources import read_source

# Stands for isic-cli: logs its arguments, keeps the images that are there, and loses those named in LOSE.
FAKE = """#!{python}
import json, os, pathlib, sys
assert sys.stdin.read() == "", "the tool could wait for an answer"
with open({log!r}, "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
if os.environ.get("FAIL"):
    sys.exit(int(os.environ["FAIL"]))
out = pathlib.Path(sys.argv[-1])
out.mkdir(parents=True, exist_ok=True)
names = ["ISIC_1", "ISIC_2", "ISIC_3"]
for name in names:
    if name not in os.environ.get("LOSE", "").split():
        (out / (name + ".jpg")).touch()
        if not (out / (name + ".jpg")).stat().st_size:
            (out / (name + ".jpg")).write_bytes(b"new")
lines = ["isic_id,attribution,copyright_license,diagnosis_1,diagnosis_2"]
lines += [name + ",A,CC-0,Malignant,Malignant melanocytic proliferations (Melanoma)" for name in names]
(out / "metadata.csv").write_text("\\n".join(lines) + "\\n")
"""


@pytest.fixture
def isic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake `isic` on PATH, and an Archive that offers three images a collection. Returns the log of its arguments."""
    log = tmp_path / "isic.log"
    program = tmp_path / "bin" / "isic"
    program.parent.mkdir()
    program.write_text(FAKE.format(python=sys.executable, log=str(log)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(download_module, "fetch_collection_size", lambda collection: CollectionSize(3, 9))
    return log


def _calls(log: Path) -> list[list[str]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def test_training_set_of_paper_is_downloaded_once(isic: Path, tmp_path: Path) -> None:
    out = tmp_path / "isic"
    result = CliRunner().invoke(app, ["data", "download", "--out", str(out)])
    assert result.exit_code == 0, result.output
    melanoma = 'diagnosis_2:"Malignant melanocytic proliferations (Melanoma)"'
    assert _calls(isic) == [
        ["image", "download", "--collections", "70", str(out / "isic-2020")],
        ["image", "download", "--collections", "65", "--search", melanoma, str(out / "isic-2019-melanoma")],
    ]
    source = read_source(out / "isic-2020", binary=True)
    assert [record.class_name for record in source.records] == ["malignant"] * 3
    assert all(record.image for record in source.records)
    assert CliRunner().invoke(app, ["data", "download", "--out", str(out)]).exit_code == 0
    assert len(_calls(isic)) == 2, "a complete collection was requested again"


def test_missing_images_are_counted_and_downloaded_again(
    isic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = find_collection("212")
    monkeypatch.setenv("LOSE", "ISIC_2 ISIC_3")
    with pytest.raises(DataError, match=r"collection-212: 2 of 3 images are missing"):
        download([collection], tmp_path)
    first = tmp_path / "collection-212" / "ISIC_1.jpg"
    first.write_bytes(b"kept")
    monkeypatch.delenv("LOSE")
    assert download([collection], tmp_path) == {"collection-212": 3}
    assert first.read_bytes() == b"kept"
    assert len(_calls(isic)) == 2


def test_a_failing_tool_stops_the_download(isic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIL", "2")
    with pytest.raises(DataError, match="status 2"):
        download([COLLECTIONS["isic-2020"], COLLECTIONS["isic-2019"]], tmp_path / "new" / "folder")
    assert len(_calls(isic)) == 1


def test_too_small_disk_is_refused_before_download(isic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module, "fetch_collection_size", lambda collection: CollectionSize(3, 10**18))
    with pytest.raises(DataError, match="GB are free"):
        download([COLLECTIONS["isic-2020"]], tmp_path)
    assert _calls(isic) == []


def test_missing_download_tool_or_network_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(download_module.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(DataError, match="pip install"):
        download([COLLECTIONS["isic-2020"]], tmp_path)
    with pytest.raises(DataError, match="isic-2021"):
        find_collection("isic-2021")

    def no_network(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("no route to host")

    real = httpx.Client
    with monkeypatch.context() as patch:
        patch.setattr(
            download_module.httpx, "Client", lambda **kw: real(transport=httpx.MockTransport(no_network), **kw)
        )
        with pytest.raises(DataError, match="is there a network"):
            fetch_collection_size(COLLECTIONS["isic-2020"])

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url.params["collections"] == "65"
        assert "Melanoma" in request.url.params["query"]
        return httpx.Response(200, json={"size": 7, "count": 5})

    with monkeypatch.context() as patch:
        patch.setattr(download_module.httpx, "Client", lambda **kw: real(transport=httpx.MockTransport(answer), **kw))
        assert fetch_collection_size(COLLECTIONS["isic-2019-melanoma"]) == CollectionSize(5, 7)
