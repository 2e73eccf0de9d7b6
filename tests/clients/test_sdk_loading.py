"""Tests of to_torch and to_hf on datasets of a service in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from dermis_client import AsyncDermisClient, Dataset, DermisClient
from dermis_client.models import DatasetFormat

from service_kit import assemble, listening
from tiny import make_bundle

COUNTS = {"benign": 2, "malignant": 3}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DermisClient]:
    root = tmp_path_factory.mktemp("service")
    make_bundle(root / "tiny")
    with listening(assemble(root / "tiny", root / "data", default_model="tiny")) as url, DermisClient(url) as connected:
        yield connected


def make(client: DermisClient, data_format: DatasetFormat = "imagefolder") -> Dataset:
    return client.datasets.create(COUNTS, seed=3, format=data_format).wait()


def test_dataset_opens_in_torch_and_is_downloaded_once(
    client: DermisClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dataset = make(client)
    data = dataset.to_torch()
    assert sorted(data.labels) == [0, 0, 1, 1, 1] and data[0][0].shape == (3, 16, 16)
    assert dataset.to_torch(transform=lambda image: image.size)[0][0] == (16, 16)
    again = dataset.download(dataset.id)
    assert again.bytes_received == 0 and again.folder.name == dataset.id
    assert again.to_torch(class_names=("malignant", "benign")).labels.count(0) == 3
    assert dataset.id in again._repr_html_() and "5 of 5" in dataset._repr_html_()

    async def load() -> int:
        async with AsyncDermisClient(client.base_url) as other:
            return len(await (await other.datasets.retrieve(dataset.id)).to_torch())

    assert asyncio.run(load()) == 5


@pytest.mark.full
@pytest.mark.parametrize("data_format", ["imagefolder", "webdataset", "parquet"])
def test_dataset_opens_in_hugging_face_datasets(
    client: DermisClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_format: DatasetFormat
) -> None:
    datasets = pytest.importorskip("datasets", reason="the library datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    data = make(client, data_format).to_hf(tmp_path / "data", cache_dir=str(tmp_path / "cache"))
    label = "cls" if data_format == "webdataset" else "label"
    assert sorted(data[label]) == [0, 0, 1, 1, 1] and data.features[label].names == ["benign", "malignant"]
