"""Tests of `dermis project` and `dermis authenticity`: they continue after a stop, skip bad files, report correct numbers."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from commands.main import app
from dermis.authenticity.checker import Checker
from dermis.bundle import Bundle
from dermis.errors import BundleError, DataError, RequestError, StorageError
from dermis.image_reading import read_image
from dermis.imaging import Images, decode, encode
from dermis.projection.projector import ImageProjector
from dermis.projection.result import Projection, from_bytes, to_bytes
from tiny_index import make_complete_bundle

pytest.importorskip("faiss", reason="FAISS is not installed")


def noise(count: int, seed: int = 0) -> Images:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_complete_bundle(tmp_path_factory.mktemp("bundles"), noise(60), held_out=noise(30, seed=9))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Training images, one of them in a folder of its own."""
    (tmp_path / "in" / "more").mkdir(parents=True)
    for number, image in enumerate(noise(60)[:5]):
        (tmp_path / "in" / ("more" if number == 4 else ".") / f"{number}.png").write_bytes(encode(image))
    return tmp_path / "in"


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def project(bundle: Bundle, folder: Path, out: Path, *more: Any) -> Result:
    options = ("--distance", "lite0", "--device", "cpu", "--steps", 4, "--batch-size", 2)
    return run("project", "--images", folder, "--out", out, "--bundle", bundle.location, *options, *more)


def results(out: Path) -> dict[str, Projection]:
    files = sorted(out.rglob("*.safetensors"))
    return {file.relative_to(out).as_posix(): from_bytes(file.read_bytes(), "x")[0] for file in files}


# -- project


@pytest.mark.full
def test_projection_writes_result_picture_and_row_for_each_image(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    done = project(bundle, folder, tmp_path / "out", "--video", "gif")
    assert done.exit_code == 0, done.output
    projections = results(tmp_path / "out")
    assert list(projections) == [
        "0.safetensors",
        "1.safetensors",
        "2.safetensors",
        "3.safetensors",
        "more/4.safetensors",
    ]
    for name, projection in projections.items():
        path = tmp_path / "out" / name
        assert np.array_equal(decode(path.with_suffix(".png").read_bytes()), projection.image)
        assert path.with_suffix(".gif").read_bytes().startswith(b"GIF89a")
    rows = list(csv.DictReader((tmp_path / "out" / "projections.csv").open()))
    assert [row["result"] for row in rows] == list(projections)
    assert [float(row["distance"]) for row in rows] == [projection.distance for projection in projections.values()]
    assert decode((tmp_path / "out" / "pairs.png").read_bytes()).shape[1] > 4 * 16


@pytest.mark.full
def test_stopped_projection_command_resumes(
    bundle: Bundle, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert project(bundle, folder, tmp_path / "straight").exit_code == 0
    begun = ImageProjector.project
    out = tmp_path / "out"

    def stops_after_two(self: ImageProjector, *arguments: Any, **options: Any) -> Any:
        for number, each in enumerate(begun(self, *arguments, **options)):
            if number == 2:
                raise KeyboardInterrupt
            yield each

    monkeypatch.setattr(ImageProjector, "project", stops_after_two)
    stopped = project(bundle, folder, out)
    assert stopped.exit_code == 130 and "again to continue" in stopped.output
    first = {name: (out / name).stat().st_mtime_ns for name in results(out)}
    assert len(first) == 2
    (out / "1.safetensors").write_bytes(b"half a file")  # as a crash of the disk may leave it
    monkeypatch.setattr(ImageProjector, "project", begun)
    assert project(bundle, folder, out).exit_code == 0
    assert (out / "0.safetensors").stat().st_mtime_ns == first["0.safetensors"]
    for name, projection in results(tmp_path / "straight").items():
        # The other images of the batch differ, so the last bits may differ.
        assert np.allclose(projection.ws, results(out)[name].ws, atol=1e-3)
    for changed in (("--space", "w"), ("--class", bundle.class_names[0])):
        other = project(bundle, folder, out, *changed)
        assert isinstance(other.exception, StorageError) and "other settings" in str(other.exception)


def test_unreadable_image_is_named_and_left_out(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    done = project(bundle, folder, tmp_path / "out")
    assert isinstance(done.exception, DataError) and "broken.png" in done.output
    assert len(list(csv.DictReader((tmp_path / "out" / "projections.csv").open()))) == 5


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (("--start", "encoder"), "start"),
        (("--class", "naevus"), "--class"),
        (("--steps", 0), "steps"),
    ],
)
def test_projection_with_invalid_option_is_refused_by_name(
    bundle: Bundle, folder: Path, tmp_path: Path, options: tuple[Any, ...], field: str
) -> None:
    refused = project(bundle, folder, tmp_path / "out", *options)
    assert isinstance(refused.exception, RequestError) and field in str(refused.exception)
    for wrong in (("--schedule", "slow"), ("--video", "avi")):
        refused = project(bundle, folder, tmp_path / "out", *wrong)
        assert refused.exit_code == 2 and wrong[0] in refused.output


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(0, 3), st.integers(0, 10**6))
def test_projection_file_round_trips_and_damaged_file_is_refused(layers: int, maps: int, cut: int) -> None:
    rng = np.random.default_rng(layers)
    noise_maps = tuple(rng.normal(size=(4, 4)).astype(np.float32) for _ in range(maps))
    before = Projection(
        ws=rng.normal(size=(layers, 5)).astype(np.float32),
        noise=noise_maps or None,
        image=rng.integers(0, 256, (4, 4, 3), dtype=np.uint8),
        distance=1.25,
        distance_name="lite0",
        pixel_error=3.5,
        steps=7,
        start="mean",
        space="w+",
    )
    data = to_bytes(before, {"a": "b"})
    after, origin = from_bytes(data, "x")
    assert origin == {"a": "b"} and np.array_equal(after.ws, before.ws) and np.array_equal(after.image, before.image)
    assert len(after.noise or ()) == maps and after.distance == 1.25
    with pytest.raises(DataError, match="somewhere"):
        from_bytes(data[: cut % len(data)], "somewhere")


@pytest.mark.full
def test_projection_is_edited_along_direction(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    assert project(bundle, folder, tmp_path / "out").exit_code == 0
    file = tmp_path / "out" / "2.safetensors"
    options = ("--direction", "axis-1", "--steps", 3, "--reach", 2, "--device", "cpu", "--out", tmp_path / "s.png")
    done = run("directions", "strips", bundle.location, *options, "--projection", file)
    assert done.exit_code == 0, done.output
    sheet = decode((tmp_path / "s.png").read_bytes())
    middle = sheet[2:18, 2 + 18 : 18 + 18].astype(int)  # strength 0: the projection itself
    assert np.abs(middle - results(tmp_path / "out")["2.safetensors"].image).max() <= 12
    file.write_bytes(b"no")
    assert isinstance(run("directions", "strips", bundle.location, *options, "--projection", file).exception, DataError)


# -- authenticity


def test_authenticity_check_separates_copies_from_other_images(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    for number, image in enumerate(noise(4, seed=7)):
        (folder / f"new-{number}.png").write_bytes(encode(image))
    done = run(
        "authenticity", "check", folder, "--bundle", bundle.location, "--out", tmp_path / "x.csv", "--device", "cpu"
    )
    assert done.exit_code == 0, done.output
    rows = {Path(row["file"]).stem: row for row in csv.DictReader((tmp_path / "x.csv").open())}
    assert all(rows[str(k)]["authentic"] == "0" and float(rows[str(k)]["distance"]) < 0.01 for k in range(5))
    new = [f"new-{k}" for k in range(4)]
    with Checker(bundle, device="cpu", threads=1) as checker:
        expected = checker.check([read_image((folder / f"{name}.png").read_bytes()) for name in new])
    assert [int(rows[name]["authentic"]) for name in new] == expected.authentic.astype(int).tolist()
    for number in range(5):
        (tmp_path / "training" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        file = next(folder.rglob(f"{number}.png"))
        shutil.copy(file, tmp_path / "training" / "ab"[number % 2] / f"original-{number}.png")
    options = ("--bundle", bundle.location, "--data", tmp_path / "training", "--device", "cpu")
    done = run("authenticity", "check", folder, *options, "--show", tmp_path / "pairs.html")
    assert done.exit_code == 0, done.output
    articles = (tmp_path / "pairs.html").read_text().split("<article")[1:]
    assert len(articles) == 9 and sum(f"original-{k}<" in articles[k] for k in range(5)) == 5
    # The folder has five of the training images, and the nearest ones of the new images are others.
    assert ["is not in this collection" in article for article in articles] == [False] * 5 + [True] * 4
    assert isinstance(run("authenticity", "check", folder, "--show", tmp_path / "x.html").exception, RequestError)
    changed = Path(shutil.copytree(bundle.location, tmp_path / "changed"))
    (changed / "authenticity" / "authenticity.json").write_text("{}")
    refused = run("authenticity", "check", folder, "--bundle", changed, "--device", "cpu")
    assert isinstance(refused.exception, BundleError) and "authenticity/authenticity.json" in str(refused.exception)
    strict = run("authenticity", "check", folder, "--bundle", bundle.location, "--strict", "--device", "cpu")
    assert strict.exit_code == 2
    (folder / "broken.png").write_bytes(b"")
    assert isinstance(run("authenticity", "check", folder, "--bundle", bundle.location).exception, DataError)


def test_audit_reports_its_measurements(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    done = run(
        *("authenticity", "audit", "--images", folder, "--out", tmp_path / "a", "--bundle", bundle.location),
        *("--samples", 40, "--steps", 3, "--distance", "lite0", "--device", "cpu"),
    )
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "a" / "audit.json").read_text())
    rows = list(csv.DictReader((tmp_path / "a" / "projections.csv").open()))
    of = document["projections"]
    assert of["count"] == len(rows) == 5
    assert of["too_close"] == sum(row["too_close"] == "1" for row in rows)
    assert of["cosine_distance"]["mean"] == pytest.approx(
        np.mean([float(row["cosine_distance"]) for row in rows]), abs=1e-4
    )
    assert document["samples"]["held_out_authentic"] is not None
    assert document["samples"]["exposure"]["attack"]["held_out"] == 30
    report = (tmp_path / "a" / "REPORT.md").read_text()
    assert "5 training images were projected" in report and "Membership inference" in report
    assert "counts images as independent" in report and "than guessing" not in report, "patients are not known"
    assert decode((tmp_path / "a" / "pairs.png").read_bytes()).ndim == 3
