"""Tests of the SDK and dermis-client with the gateway: verdicts, directions, edits, projections, gated and edited datasets."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dermis_client import (
    AsyncDermisClient,
    ConflictError,
    DermisClient,
    InvalidRequestError,
    NotFoundError,
    ProjectionFailed,
    UnprocessableEntityError,
    UnsupportedMediaTypeError,
    cli,
)

from dermis.bundle import Bundle
from dermis.imaging import decode, encode
from dermis.projection.result import from_bytes
from service_kit import Parts, assemble, listening, wait_for
from services.errors import InferenceFailedError
from services.inference.projections import ProjectionPreview
from tiny_index import make_complete_bundle, noise

pytest.importorskip("faiss", reason="FAISS is not installed")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_complete_bundle(tmp_path_factory.mktemp("bundles"), noise(60))


@pytest.fixture(scope="module")
def served(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Parts, str]]:
    parts = assemble(bundle.location, tmp_path_factory.mktemp("data"), default_model="tiny", authenticity_uploads=True)
    with listening(parts) as url:
        yield parts, url


@pytest.fixture
def client(served: tuple[Parts, str]) -> Iterator[DermisClient]:
    with DermisClient(served[1], max_retries=0) as sdk:
        yield sdk


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Twenty images, the first two of them training images."""
    (tmp_path / "in").mkdir()
    paths = [tmp_path / "in" / f"Jane {i}.png" for i in range(20)]
    for path, image in zip(paths, np.concatenate([noise(2), noise(18, seed=3)]), strict=True):
        path.write_bytes(encode(image))
    return paths


def test_client_returns_verdicts_in_order_of_files(client: DermisClient, files: list[Path]) -> None:
    reports: list[tuple[int, int]] = []
    result = client.authenticity.check(files, progress=lambda done, total: reports.append((done, total)))
    assert [one.name for one in result] == [str(path) for path in files] and [one.index for one in result] == [
        *range(20)
    ]
    assert [one.distance for one in result][:2] == [0, 0] and not result[0].authentic and not result[1].authentic
    assert 0 < result.authentic_share < 1
    assert reports[-1] == (20, 20) and len(reports) == 2
    with pytest.raises(UnsupportedMediaTypeError, match=r"files\[1\]"):
        client.authenticity.check([files[0], b"GIF89a"])
    generated = client.authenticity.check_generated({"benign": 3}, seed=5, edits={"axis-0": 1.0})
    assert len(generated) == 3 and generated[0].name == ""


@pytest.mark.full
def test_client_edits_samples_and_projections(client: DermisClient, tmp_path: Path, files: list[Path]) -> None:
    assert [one.name for one in client.edits.directions()] == ["axis-0", "axis-1", "axis-2"]
    sweep = {"direction": "axis-1", "strengths": [-1, 0, 1]}
    made = client.edits.create(samples=[("benign", 0, 4), ("malignant", 1, 2)], edits={"axis-0": 2}, sweep=sweep)
    assert [(one.sample, one.strength) for one in made] == [(s, x) for s in (0, 1) for x in (-1, 0, 1)]
    assert made.strip().size == (3 * 18 - 2, 2 * 18 - 2)
    names = [path.name for path in made.save(tmp_path / "out")]
    assert names[:3] == ["0000_-1.00.png", "0000_+0.00.png", "0000_+1.00.png"]
    projection = client.projections.create(files[0], steps=2)
    projection = client.projections.wait(projection.id, timeout=60)
    of = client.edits.create(projections=[(projection.id, 0)], sweep=sweep)
    assert len(of) == 3 and of[0].sha256 != of[2].sha256
    with pytest.raises(InvalidRequestError, match="give samples="):
        client.edits.create(edits={"axis-0": 1})
    with pytest.raises(UnprocessableEntityError) as caught:
        client.edits.create(samples=[("benign", 0, 0)], edits={"north": 1})
    assert caught.value.errors[0].field == "edits[0].direction"
    with pytest.raises(NotFoundError):
        client.edits.create(projections=[("pr_" + "0" * 32, 0)])


@pytest.mark.full
def test_client_places_images_on_the_map(client: DermisClient, served: tuple[Parts, str], files: list[Path]) -> None:
    around = client.embeddings.retrieve()
    assert (around.training.counted, around.training.positions, around.uploads) == (60, None, True)
    made = client.embeddings.place_generated({"benign": 2}, seed=5, images=True)
    again = client.images.generate({"benign": 2}, seed=5)
    assert [one.image.content for one in made if one.image] == [image.content for image in again]
    checked = client.authenticity.check_generated({"benign": 2}, seed=5)
    assert [one.verdict.distance for one in made if one.verdict] == [one.distance for one in checked]
    assert len(made[0].position) == len(around.explained) and made.model == checked.model
    placed = client.embeddings.place([files[0], files[5]])
    assert [one.name for one in placed] == [str(files[0]), str(files[5])] and placed[0].verdict is None
    with pytest.raises(NotFoundError):
        client.embeddings.place_projections(["pr_" + "0" * 32])
    with pytest.raises(InvalidRequestError):
        client.embeddings.place_projections(["../datasets"])


@pytest.mark.full
def test_client_projects_files_and_downloads_results(
    client: DermisClient, served: tuple[Parts, str], files: list[Path], tmp_path: Path
) -> None:
    parts, _ = served
    parts.projector.gate.clear()
    begun = client.projections.create(files[:3], steps=2, video=True, class_name="benign", idempotency_key="one")
    with pytest.raises(NotFoundError, match="no such preview"):
        client.projections.preview(begun.id)
    parts.projector.previews = [ProjectionPreview(1, 7, [(1, 3.0), (7, 2.0)], encode(noise(1)[0]))]
    wait_for(lambda: client.projections.retrieve(begun.id).previews)
    preview = (client.projections.retrieve(begun.id).previews or [])[0]
    assert (preview.index, preview.step, preview.distance, preview.distances[0].distance) == (1, 7, 2.0, 3.0)
    assert np.array_equal(np.asarray(client.projections.preview(begun.id, 1)), noise(1)[0])
    with pytest.raises(ConflictError, match=r"running|queued"):
        client.projections.download(begun.id, tmp_path / "early")
    assert (
        client.projections.create(files[:3], steps=2, video=True, class_name="benign", idempotency_key="one").id
        == begun.id
    )
    parts.projector.gate.set()
    seen: list[float] = []
    done = client.projections.wait(begun.id, progress=lambda record: seen.append(record.progress.fraction))
    assert done.state == "succeeded" and seen[-1] == 1 and done.data is not None
    written = client.projections.download(begun.id, tmp_path / "out")
    assert [path.name for path in written][:3] == ["0000.png", "0000.safetensors", "0000.gif"]
    latent = from_bytes((tmp_path / "out" / "0002.safetensors").read_bytes(), "x")[0]
    assert np.array_equal(latent.image, decode((tmp_path / "out" / "0002.png").read_bytes()))
    client.projections.delete(begun.id)
    with pytest.raises(NotFoundError):
        client.projections.retrieve(begun.id)
    with pytest.raises(InvalidRequestError):
        client.projections.retrieve("../datasets")


def test_failed_projection_raises_error_with_its_record(
    client: DermisClient, served: tuple[Parts, str], files: list[Path]
) -> None:
    parts, _ = served
    parts.projector.failures += [InferenceFailedError("the projector broke")] * 3
    begun = client.projections.create(files[0], steps=2)
    with pytest.raises(ProjectionFailed, match="failed") as caught:
        client.projections.wait(begun.id, timeout=60)
    assert caught.value.projection.state == "failed"


def test_asynchronous_client_checks_edits_and_projects(
    served: tuple[Parts, str], files: list[Path], tmp_path: Path
) -> None:
    async def all_of_it() -> tuple[Any, ...]:
        async with AsyncDermisClient(served[1]) as client:
            begun = await client.projections.create(files[:2], steps=2)
            done = await client.projections.wait(begun.id)
            return (
                await client.authenticity.check(files[:2]),
                await client.edits.directions(),
                await client.edits.create(projections=[(done.id, 1)], edits={"axis-0": 1}),
                await client.projections.download(done.id, tmp_path / "out"),
                await client.projections.delete(done.id),
            )

    verdicts, directions, edited, written, _ = asyncio.run(all_of_it())
    assert [one.distance for one in verdicts] == [0, 0] and len(directions) == 3
    assert len(edited) == 1 and len(written) == 4


def run(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: Any
) -> tuple[int, str]:
    """dermis-client's exit status and output."""
    monkeypatch.setattr(sys, "argv", ["dermis-client", "--base-url", url, *map(str, arguments)])
    try:
        cli.main()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    captured = capsys.readouterr()
    return status, captured.out + captured.err


@pytest.mark.full
def test_client_commands_check_edit_and_project(
    served: tuple[Parts, str],
    files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def say(*arguments: Any) -> str:
        status, output = run(served[1], monkeypatch, capsys, *arguments)
        assert status == 0, output
        return output

    assert "not authentic" in say("authenticity", *files[:3])
    assert "of 3 authentic" in say("authenticity", "--classes", "benign=2,malignant=1", "--seed", "5")
    assert "axis-2" in say("directions")
    say(
        "edit",
        "--sample",
        "benign:0:1",
        "--edit",
        "axis-0=1@0-2",
        "--sweep",
        "axis-1=-1:1:3",
        "--strip",
        tmp_path / "s.png",
    )
    assert decode((tmp_path / "s.png").read_bytes()).shape == (16, 52, 3)
    output = say("project", files[0], files[1], "--steps", 2, "--out", tmp_path / "p", "--keep")
    assert "pixel error" in output and (tmp_path / "p" / "0001.safetensors").exists()
    identity = output.split("--projection ")[1].split(":")[0]
    say("edit", "--projection", f"{identity}:1", "--edit", "axis-2=-1", "--out", tmp_path / "e")
    assert (tmp_path / "e" / "0000.png").exists()
    gated = ("--gate", "authentic", "--on-reject", "flag", "--edit", "axis-0=0.5")
    say("datasets", "create", "--classes", "benign=4", *gated, "--out", tmp_path / "d")
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
    assert (
        manifest["request"]["privacy"]["on_reject"] == "flag"
        and manifest["privacy"]["classes"]["benign"]["images"] == 4
    )
    for wrong in (("--sample", "benign"), ("--sample", "benign:0:1", "--sweep", "axis-1=1")):
        status, output = run(served[1], monkeypatch, capsys, "edit", "--strip", tmp_path / "x.png", *wrong)
        assert status != 0 and "does not have the form" in output
