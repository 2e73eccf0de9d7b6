"""Tests of to_torch, to_hf and of how records look in a notebook."""

from __future__ import annotations

import base64
import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from dermis_client import Dataset, DermisClient, DermisError, IntegrityError, InvalidRequestError
from dermis_client.images import ImagesResult
from fake_gateway import FakeGateway, png, sha256
from PIL import Image

HOSTILE = "<script src=//evil.example>\"'&\x1b"


def records(count: int) -> list[dict[str, Any]]:
    data = png(7)
    return [
        {
            "class": HOSTILE,
            "seed": 1,
            "index": index,
            "media_type": "image/png",
            "sha256": sha256(data),
            "b64": base64.b64encode(data).decode(),
        }
        for index in range(count)
    ]


def result(count: int) -> ImagesResult:
    return ImagesResult.model_validate({"model": {"name": HOSTILE, "digest": "0"}, "data": records(count)})


def sheet_of(page: str) -> Image.Image:
    found = re.search(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert found is not None
    return Image.open(io.BytesIO(base64.b64decode(found[1])))


class Elements(HTMLParser):
    """Collects the elements of a page and the addresses in their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]


def check(page: str) -> None:
    elements = Elements(page)
    assert elements.names <= {"figure", "img", "figcaption", "p", "table", "tr", "th", "td"} and "\x1b" not in page
    assert all(address.startswith("data:image/jpeg;base64,") for address in elements.addresses)


def test_images_are_shown_small_with_escaped_names() -> None:
    many = result(60)._repr_html_()
    check(many)
    assert len(many) < 100_000 and "60 synthetic images" in many and "the first 24 are shown" in many
    one = result(1)[0]._repr_html_()
    check(one)
    assert "&lt;script" in one and "index 0, synthetic" in one
    assert max(sheet_of(one).size) <= 128
    check(result(0)._repr_html_())


def test_sheet_in_a_notebook_still_says_that_it_is_synthetic() -> None:
    assert b"trainedAlgorithmicMedia" in sheet_of(result(3)._repr_html_()).info["xmp"]


def test_dataset_is_shown_as_a_table() -> None:
    record = Dataset.model_validate(
        {
            "id": "ds_1",
            "state": "failed",
            "request": {"model": HOSTILE, "classes": {f"{HOSTILE}{number}": 3 for number in range(20)}},
            "error": {"detail": HOSTILE * 1000},
        }
    )
    page = record._repr_html_()
    check(page)
    assert "ds_1" in page and "0 of 60" in page and "and 12 more classes" in page and len(page) < 5000


@pytest.mark.parametrize(("method", "library", "extra"), [("to_torch", "torch", "torch"), ("to_hf", "datasets", "hf")])
def test_missing_library_is_named_before_anything_is_downloaded(
    gateway: FakeGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, library: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with DermisClient(gateway.url) as client:
        dataset = client.datasets.retrieve(gateway.finished(benign=2))
        with pytest.raises(DermisError, match=rf'{method} needs .*pip install "dermis-client\[{extra}\]"'):
            getattr(dataset, method)(tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_other_formats_are_refused_with_the_method_that_reads_them(gateway: FakeGateway, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    with DermisClient(gateway.url) as client:
        dataset = client.datasets.retrieve(gateway.finished(benign=2))
        other = dataset.model_copy(update={"request": dataset.request.model_copy(update={"format": "webdataset"})})
        with pytest.raises(InvalidRequestError, match="has the format webdataset: use to_hf"):
            other.to_torch(tmp_path / "data")
        with pytest.raises(InvalidRequestError, match="folder: must be given"):
            dataset.model_copy(update={"id": "../up"}).to_torch()


def test_folder_that_the_library_cannot_read_is_named(
    gateway: FakeGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason="the library datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with DermisClient(gateway.url) as client:
        downloaded = client.datasets.retrieve(gateway.finished(benign=2)).download(tmp_path / "data")
    (tmp_path / "data" / "manifest.json").unlink()
    with pytest.raises(IntegrityError, match=r"data has no manifest\.json"):
        downloaded.to_hf(cache_dir=str(tmp_path / "cache"))
