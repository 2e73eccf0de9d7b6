"""Tests of jobs whose files are older or newer than the database, as after a restore from a backup."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dermis.bundle import Bundle
from dermis.imaging import encode
from service_kit import Service, make_directly, service, wait_for
from services.jobs import dataset

REQUEST: dict[str, Any] = {"classes": {"benign": 7, "malignant": 3}, "seed": 3, "shard_size": 2}


@pytest.fixture(autouse=True)
def _smaller_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dermis.report.sample.SAMPLE", 2)


def files_of(running: Service, job: Mapping[str, Any]) -> dict[str, bytes]:
    folder = Path(running.settings.storage) / job["id"]
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_missing_and_damaged_shards_are_made_again_at_the_end(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finalize, calls = dataset.finalize, list[int]()

    def finalize_others(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            shards = sorted((tmp_path / "data" / "datasets").glob("*/.partial/shard-*.zip"))
            assert len(shards) == 5
            shards[1].with_suffix(".json").unlink()
            shards[3].write_bytes(shards[3].read_bytes()[:-1] + b"?")
        return finalize(*arguments, **options)

    monkeypatch.setattr(dataset, "finalize", finalize_others)
    with service(tiny_bundle.location, tmp_path / "data") as running:
        ended = running.wait(running.ask(REQUEST))
        assert ended["state"] == "succeeded", ended["error"]
        direct = make_directly(tiny_bundle, REQUEST | {"model": "tiny"}, tmp_path / "direct")
        assert files_of(running, ended) == direct
        assert (ended["progress"]["samples_done"], ended["progress"]["shards_done"]) == (10, 5)
        assert (
            7 <= running.generator.calls <= 9
        )  # five shards and those made again: one is missing, which is found first


@pytest.mark.full
def test_projection_whose_images_were_not_restored_says_so(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with service(tiny_bundle.location, tmp_path / "data") as running:
        running.projector.gate.clear()
        square = encode(np.zeros((16, 16, 3), dtype=np.uint8))
        job = running.client.post("/v1/projections?steps=3", files=[("files", ("a.png", square, "image/png"))]).json()
        wait_for(lambda: running.projector.calls == 1)
    shutil.rmtree(Path(running.settings.storage) / job["id"])
    with service(tiny_bundle.location, tmp_path / "data") as running:
        ended: dict[str, Any] = {}
        path = f"/v1/projections/{job['id']}"
        wait_for(lambda: ended.update(running.client.get(path).json()) or ended["state"] == "failed")
        assert ended["error"]["type"] == "urn:dermis:problem:upload-interrupted"
        assert ended["error"]["detail"] == "its images are not stored any more; send them again"
