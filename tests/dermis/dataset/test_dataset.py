"""Tests of datasets: plans add up, files are reproducible byte for byte, damage is detected, no incomplete file stays."""

from __future__ import annotations

import errno
import hashlib
import importlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from dermis_client import IntegrityError
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dataset_loading import load_by_card
from dermis.bundle import Bundle
from dermis.dataset.manifest import finalize, parse_manifest, read_manifest
from dermis.dataset.plan import plan
from dermis.dataset.request import DatasetRequest, check_against
from dermis.dataset.shards import check_space, find_shard, missing_shards, write_shard
from dermis.dataset.store import Store
from dermis.dataset.verify import verify
from dermis.errors import RequestError, StorageError
from dermis.imaging import decode
from dermis.report.appearance import appearances
from painted_dataset import IDENTITY, contents, make, paint, planned
from tiny import make_bundle


@given(
    counts=st.lists(st.integers(1, 400), min_size=1, max_size=5),
    shard_size=st.integers(1, 100),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_plan_gives_each_class_its_count_and_shard_its_share(counts: list[int], shard_size: int) -> None:
    names = [f"c{i}" for i in range(len(counts))]
    request = DatasetRequest.model_validate(
        {"classes": dict(zip(names, counts, strict=True)), "shard_size": shard_size}
    )
    p = plan(request, "0" * 64, names)
    labels = [p.labels(shard) for shard in range(p.shards)]
    assert [i for shard in range(p.shards) for i in p.shard(shard)] == list(range(sum(counts)))
    assert [sum(part.count(k) for part in labels) for k in range(len(counts))] == counts
    for shard, part in enumerate(labels):
        assert len(part) == len(p.shard(shard))
        for k, count in enumerate(counts):
            assert abs(part.count(k) - len(part) * count / sum(counts)) < 1


@pytest.mark.parametrize("file_format", ["imagefolder", "webdataset", "parquet"])
def test_bytes_do_not_depend_on_order_batches_or_restarts(
    tiny_bundle: Bundle, tmp_path: Path, file_format: str
) -> None:
    whole = make(tmp_path / "whole", tiny_bundle, format=file_format)
    make(tmp_path / "parts", tiny_bundle, order=[3, 1, 0, 2], batch=1, format=file_format)
    finalize(planned(tiny_bundle, format=file_format), Store(tmp_path / "parts"), tiny_bundle, IDENTITY)
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")
    assert read_manifest(Store(tmp_path / "whole")) == whole
    assert verify(tmp_path / "whole").ok


def test_dataset_formats_contain_planned_images(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Every index occurs once, with its own pixels, in the folder or under the label of its class."""
    expected = {i: label for s in range(4) for i, label in zip(
        planned(tiny_bundle).shard(s), planned(tiny_bundle).labels(s), strict=True)}  # fmt: skip
    make(tmp_path / "zip", tiny_bundle)
    with zipfile.ZipFile(tmp_path / "zip" / "images.zip") as archive:
        names = [name for name in archive.namelist() if name.startswith("images/")]
        for name in names:
            _, cls, file = name.split("/")
            index = int(file[4:12])
            assert cls == tiny_bundle.class_names[expected[index]]
            assert decode(archive.read(name))[0, 0].tolist() == [index, expected[index], 7]
    assert len(set(names)) == 20
    make(tmp_path / "tar", tiny_bundle, format="webdataset")
    seen = {}
    for shard in sorted((tmp_path / "tar").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for info in tar:
                if info.name.endswith(".cls"):
                    seen[int(info.name[4:12])] = int(tar.extractfile(info).read())  # type: ignore[union-attr]
    assert seen == expected


@pytest.mark.parametrize(
    "file_format", ["parquet", *(pytest.param(each, marks=pytest.mark.full) for each in ("imagefolder", "webdataset"))]
)
def test_damage_of_a_container_with_signed_images_is_found(
    tiny_bundle: Bundle, tmp_path: Path, file_format: str
) -> None:
    """It is parsed while it is hashed, so its damage must not end the verification."""

    def sign(data: bytes, *_: object) -> bytes:
        return data  # an image without a signature is its own canonical file

    plan_, store = planned(tiny_bundle, format=file_format, provenance={"c2pa": True}), Store(tmp_path)
    for shard in range(plan_.shards):
        write_shard(plan_, shard, paint, store, identity=IDENTITY, sign=sign)
    manifest = finalize(plan_, store, tiny_bundle, IDENTITY, sign=sign)
    assert verify(tmp_path).ok and verify(tmp_path).sha256.keys() == {
        "manifest.json",
        *(f.name for f in manifest.files),
    }
    path = tmp_path / min(file.name for file in manifest.files if file.name.startswith(("data-", "images.zip")))
    content = path.read_bytes()
    for step in range(60):
        damaged = bytearray(content)
        damaged[len(content) * step // 60 + (step * 7) % 13] ^= 0xFF
        damaged[-1 - step] ^= 0x55  # in the directory or the footer, where the format has one
        path.write_bytes(damaged)
        assert verify(tmp_path).changed == (path.name,), step


def test_process_that_was_taken_over_does_not_replace_the_signed_preview(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """A process is suspended while it measures images for the report, and another one finishes the dataset meanwhile."""
    plan_ = planned(tiny_bundle, format="parquet", provenance={"c2pa": True})
    store, others = Store(tmp_path), list[Any]()

    def sign(data: bytes, *_: object) -> bytes:
        return data + os.urandom(8)

    def suspended(images: Any) -> Any:
        others.append(finalize(plan_, store, tiny_bundle, IDENTITY, sign=sign))
        return appearances(images)

    for shard in range(plan_.shards):
        write_shard(plan_, shard, paint, store, identity=IDENTITY, sign=sign)
    assert finalize(plan_, store, tiny_bundle, IDENTITY, sign=sign, measure_images=suspended) == others[0]
    preview = next(file for file in others[0].files if file.name == "preview.png")
    assert hashlib.sha256((tmp_path / "preview.png").read_bytes()).hexdigest() == preview.sha256


def test_signed_shard_of_another_process_is_not_replaced(tiny_bundle: Bundle, tmp_path: Path) -> None:
    plan_ = planned(tiny_bundle, format="webdataset", provenance={"c2pa": True})
    store = Store(tmp_path)

    def write(on_batch: Any = None) -> Any:
        def sign(data: bytes, *_: object) -> bytes:
            return data + os.urandom(8)

        return write_shard(plan_, 0, paint, store, identity=IDENTITY, sign=sign, on_batch=on_batch)

    records: list[Any] = []

    def other(_: int) -> None:
        if not records:
            records.append(write())

    assert write(other) == records[0] == find_shard(plan_, 0, store, identity=IDENTITY)
    before = contents(tmp_path)
    assert len(before) == 2 and missing_shards(plan_, store) == [1, 2, 3]
    (tmp_path / records[0].file.name).unlink()
    write(lambda _: store.write("manifest.json", b"{}"))
    assert contents(tmp_path) == {"manifest.json": b"{}"}


@pytest.mark.parametrize("moment", ["before the file", "while the file is put"])
def test_process_that_was_taken_over_writes_nothing_into_a_finished_dataset(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """A process is suspended while it makes a shard, and another one of another version finishes the dataset meanwhile."""
    p, others, put = planned(tiny_bundle, format="webdataset"), list[Any](), Store._put
    url = f"memory:/{tmp_path}"
    store = Store(url)

    def finish_elsewhere() -> None:
        if not others:
            others.append(None)
            make(url, tiny_bundle, format="webdataset")
            others[0] = {name: store.read(name) for name in store.entries()}

    def slow_put(to: Store, temporary: Path, name: str, *options: Any) -> None:
        put(to, temporary, name, *options)
        if name == "data-00000-of-00004.tar":
            finish_elsewhere()

    monkeypatch.setattr("dermis.dataset.shards._LONG_SECONDS", 0.0)
    on_batch: Any = None
    if moment == "before the file":
        on_batch = lambda _: finish_elsewhere()  # noqa: E731
    else:
        monkeypatch.setattr(Store, "_put", slow_put)
    record = write_shard(p, 0, lambda *a: 255 - paint(*a), store, identity={"device": "b"}, on_batch=on_batch)
    assert len(record.images) == 6
    assert {name: store.read(name) for name in store.entries()} == others[0] and verify(url).ok


def test_folder_in_place_of_the_record_of_a_shard_is_a_missing_shard(tiny_bundle: Bundle, tmp_path: Path) -> None:
    plan_, store = planned(tiny_bundle), Store(tmp_path)
    write_shard(plan_, 0, paint, store, identity=IDENTITY)
    record = tmp_path / ".partial" / "shard-00000.json"
    record.unlink()
    record.mkdir()
    assert find_shard(plan_, 0, store, identity=IDENTITY) is None


def test_files_of_killed_attempts_are_removed_before_the_archive_is_written(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    plan_, store = planned(tiny_bundle), Store(tmp_path)
    for shard in range(plan_.shards):
        write_shard(plan_, shard, paint, store, identity=IDENTITY)
    partial = tmp_path / ".partial"
    kill = (
        "import os; from dermis.dataset.store import Store\n"
        f"with Store({str(tmp_path)!r}).writing('x') as path: path.write_bytes(b'1'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", kill], check=False, timeout=120)
    (killed,) = partial.glob("writing-*")
    seen: list[set[Path]] = []
    with store.writing("other") as other:  # of another worker, which has the job as well
        other.write_bytes(b"1")
        for path in (killed, other):
            os.utime(path, (0, 0))
        finalize(
            plan_, store, tiny_bundle, IDENTITY, while_archiving=lambda: seen.append(set(partial.glob("writing-*")))
        )
        other.parent.mkdir(exist_ok=True)
        other.touch()  # the end of the job has removed it
    assert seen and all(killed not in files and other in files for files in seen)


def test_upload_removes_temporary_files_that_killed_processes_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = Store("memory://abandoned")
    with store.writing("a") as left:
        left.write_bytes(b"1")
    left.write_bytes(b"1")  # nobody has locked it now
    with store.writing("b") as used:
        used.write_bytes(b"22")
        for path in (left, used):
            os.utime(path, (0, 0))
        with store.writing("c"):
            assert used.exists() and not left.exists()
    assert store.read("b") == b"22"


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("read_again", [False, True])
def test_writing_is_tried_again_if_the_temporary_file_was_removed(
    tmp_path: Path, read_again: bool, remote: bool
) -> None:
    store = Store("memory://removed" if remote else tmp_path)
    with pytest.raises(StorageError, match="another process") as lost, store.writing("file") as path:
        path.unlink()
        if read_again:  # as for the hash of a shard
            path.read_bytes()
    assert lost.value.kind == "storage-unavailable" and store.size("file") is None


def test_writing_without_space_for_the_temporary_file_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(StorageError) as error, Store(tmp_path).writing("file"):
        pass
    assert error.value.kind == "storage-full"


_TABLE = {"isic_id": "string", "target": "string", "source": "string"}
_EMPTY = {
    "patient_id": "string",
    "diagnosis": "string",
    "age_approx": "float64",
    "sex": "string",
    "anatom_site": "string",
}
_NUMBERS = {"seed": "int64", "index": "int64", "sha256": "string"}
CLASSES = ("benign", "malignant", "null", "a b.c")  # names that YAML or a folder name could change


@pytest.mark.full
@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("file_format", ["imagefolder", "webdataset", "parquet"])
def test_dataset_card_loads_every_column_with_its_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: str, image_format: str
) -> None:
    bundle = make_bundle(tmp_path / "bundle", classes=CLASSES)
    folder, counts = tmp_path / "made", {"malignant": 6, "a b.c": 5}
    make(folder, bundle, format=file_format, image_format=image_format, classes=counts)
    layout = planned(bundle, classes=counts)
    labels = [label for shard in range(layout.shards) for label in layout.labels(shard)]
    loaded = list(load_by_card(folder, tmp_path / "cache", monkeypatch))
    assert len(loaded) == {"imagefolder": 2, "webdataset": 3, "parquet": 2}[file_format]
    for dataset in loaded:
        if not hasattr(dataset, "features"):  # the library webdataset has rows only
            rows = [(label, row["index"], image.size) for image, label, row in dataset]
            assert rows == [(label, index, (8, 8)) for index, label in enumerate(labels)]
            continue
        features = json.loads(json.dumps(dataset.features.to_dict()))
        suffix = {"png": "png", "jpeg": "jpg", "webp": "webp"}[image_format]
        image, label = (suffix, "cls") if file_format == "webdataset" else ("image", "label")
        assert features.pop(image)["_type"] == "Image"
        names = {"names": list(CLASSES), "_type": "ClassLabel"}
        assert features.pop(label) == names
        kinds = _TABLE | _NUMBERS | (_EMPTY if file_format == "imagefolder" else {})
        if file_format == "webdataset":
            row = features.pop("json")
            assert row.pop("label") == names
            assert row == _values(kinds | {"file_name": "string"})
            kinds = {"__key__": "string", "__url__": "string"}
        assert features == _values(kinds)
        assert dataset[label] == labels and dataset[0][image].size == (8, 8)
        rows = dataset["json"] if file_format == "webdataset" else dataset
        assert [row["index"] for row in rows] == list(range(11))
        assert all(row["source"] == "dermis-synthetic" and row.get("sex") is None for row in rows)


def _values(kinds: dict[str, str]) -> dict[str, Any]:
    return {name: {"dtype": kind, "_type": "Value"} for name, kind in kinds.items()}


@pytest.mark.parametrize("scheme", ["file://", "memory:/"])
def test_a_url_gives_the_same_files_as_a_folder(tiny_bundle: Bundle, tmp_path: Path, scheme: str) -> None:
    expected = make(tmp_path / "folder", tiny_bundle)
    url = f"{scheme}{tmp_path}/url"
    assert make(url, tiny_bundle) == expected
    assert verify(url).ok and set(Store(url).entries()) == contents(tmp_path / "folder").keys()


def test_stopped_shard_leaves_no_files_and_is_repeated(tiny_bundle: Bundle, tmp_path: Path) -> None:
    p, store = planned(tiny_bundle, format="webdataset"), Store(tmp_path)
    calls = 0

    def stopping(indices: Sequence[int], labels: Sequence[int]) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return paint(indices, labels)

    write_shard(p, 0, paint, store, identity=IDENTITY)
    before = contents(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        write_shard(p, 1, stopping, store, identity=IDENTITY, batch_size=2)
    assert contents(tmp_path) == before
    with pytest.raises(StorageError, match="shard 1 of 4"):
        finalize(p, store, tiny_bundle, IDENTITY)
    assert contents(tmp_path) == before

    def never(indices: Sequence[int], labels: Sequence[int]) -> Any:
        raise AssertionError("an intact shard was made again")

    write_shard(p, 0, never, store, identity=IDENTITY)
    with pytest.raises(AssertionError):  # a shard of another machine is made again
        write_shard(p, 0, never, store, identity={"device": "other"})
    path = tmp_path / "data-00000-of-00004.tar"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AssertionError):  # and so is a damaged one
        write_shard(p, 0, never, store, identity=IDENTITY)


def test_verify_reports_changed_missing_and_extra_files(tiny_bundle: Bundle, tmp_path: Path) -> None:
    make(tmp_path, tiny_bundle, format="webdataset")
    shard = tmp_path / "data-00002-of-00004.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "notes.txt").write_text("mine")
    report = verify(tmp_path)
    assert not report.ok
    assert (report.changed, report.missing, report.extra) == ((shard.name,), ("metadata.csv",), ("notes.txt",))


def test_verify_compares_unpacked_images_with_the_archive(tiny_bundle: Bundle, tmp_path: Path) -> None:
    make(tmp_path, tiny_bundle)
    with zipfile.ZipFile(tmp_path / "images.zip") as archive:
        archive.extractall(tmp_path, [name for name in archive.namelist() if name.startswith("images/")])
    assert verify(tmp_path).ok
    first, second, *_ = sorted((tmp_path / "images").rglob("*.png"))
    first.write_bytes(b"changed")
    second.unlink()
    (tmp_path / "images" / "more.png").write_bytes(b"")
    report = verify(tmp_path)
    assert [Path(name).name for name in report.changed] == [first.name]
    assert [Path(name).name for name in report.missing] == [second.name]
    assert report.extra == ("images/more.png",)


@pytest.mark.parametrize("verifier", ["dermis.dataset.verify", "dermis_client.folders"])
def test_archive_without_manifest_is_verified_by_its_table(tiny_bundle: Bundle, tmp_path: Path, verifier: str) -> None:
    check = importlib.import_module(verifier).verify
    make(tmp_path / "made", tiny_bundle)
    archive = (tmp_path / "made" / "images.zip").rename(tmp_path / "images.zip")
    report = check(archive)
    assert report.ok and report.checked == 20
    with zipfile.ZipFile(archive) as whole:
        members = [(info.filename, whole.read(info)) for info in whole.infolist()]
    with zipfile.ZipFile(archive, "w") as spoiled:
        (first, data), (second, _), *rest = members
        for name, content in ((first, data + b"x"), ("images/benign/more.png", data), *rest):
            spoiled.writestr(name, content)
    report = check(archive)
    assert (report.changed, report.missing, report.extra) == ((first,), (second,), ("images/benign/more.png",))
    with zipfile.ZipFile(archive, "w") as other:
        other.writestr("images/benign/a.png", data)
    with pytest.raises((StorageError, IntegrityError), match=r"images\.zip"):
        check(archive)


def test_full_disk_is_reported_and_leaves_no_partial_file(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, store = planned(tiny_bundle), Store(tmp_path)
    for shard in range(p.shards):
        write_shard(p, shard, paint, store, identity=IDENTITY)
    before = contents(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "writestr", full)
        with pytest.raises(StorageError, match="no space left") as caught:
            finalize(p, store, tiny_bundle, IDENTITY)
    assert caught.value.kind == "storage-full"
    assert contents(tmp_path) == before
    finalize(p, store, tiny_bundle, IDENTITY)
    assert verify(tmp_path).ok
    monkeypatch.setattr(Store, "free_bytes", lambda _: 1000)
    with pytest.raises(StorageError, match="MB free") as caught:
        check_space(planned(tiny_bundle), Store(tmp_path / "new"), 64)
    assert caught.value.kind == "storage-full"


def test_the_preview_shows_the_first_samples_of_each_class(tiny_bundle: Bundle, tmp_path: Path) -> None:
    make(tmp_path, tiny_bundle)
    sheet = decode((tmp_path / "preview.png").read_bytes())
    corner = sheet[6, 6]
    assert corner.tolist()[1:] == [0, 7]
    assert sheet.shape == (3 * 10 + 2, 8 * 10 + 2, 3)  # 9 benign and 11 malignant of 8 px, padding 2


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"classes": {}}, "classes"),
        ({"classes": {"benign": -1}}, "classes.benign"),
        ({"classes": {"benign": True}}, "classes.benign"),
        ({"classes": {"benign": "3"}}, "classes.benign"),
        ({"classes": {"benign": 10**9}}, "classes.benign"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"truncation_psi": float("nan")}, "truncation_psi"),
        ({"format": "rar"}, "format"),
        ({"image_quality": 0}, "image_quality"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_error_of_invalid_request_names_field(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        DatasetRequest.model_validate({"classes": {"benign": 1}, **change})
    assert ".".join(map(str, caught.value.errors()[0]["loc"])) == field


def test_requests_that_the_model_cannot_serve_are_refused(tiny_bundle: Bundle) -> None:
    for change, field in (
        ({"classes": {"nevus": 1}}, "classes.nevus"),
        ({"truncation_cutoff": 50}, "truncation_cutoff"),
        ({"classes": {"benign": 11}}, "classes"),
    ):
        request = DatasetRequest.model_validate({"classes": {"benign": 1}, **change})
        with pytest.raises(RequestError) as caught:
            check_against(request, tiny_bundle, max_samples=10)
        assert caught.value.field == field


def test_a_damaged_manifest_is_refused_with_its_field(tiny_bundle: Bundle, tmp_path: Path) -> None:
    data = make(tmp_path, tiny_bundle).to_json()
    for spoiled in (data[:-5], b"[]", data.replace(b'"format_version": 2', b'"format_version": 3'), b"\xff"):
        with pytest.raises(StorageError, match="m.json"):
            parse_manifest(spoiled, "m.json")
    document = json.loads(data)
    document["files"][0]["name"] = "../../etc/passwd"
    with pytest.raises(StorageError, match=r"files\.0\.name"):
        parse_manifest(json.dumps(document).encode(), "m.json")


def test_metadata_has_a_row_for_each_image(tiny_bundle: Bundle, tmp_path: Path) -> None:
    import csv
    import hashlib

    make(tmp_path, tiny_bundle, seed=5)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "metadata.csv").read_text())))
    assert [row["isic_id"] for row in rows] == [f"SYN_{i:08d}" for i in range(20)]
    assert {row["seed"] for row in rows} == {"5"}
    with zipfile.ZipFile(tmp_path / "images.zip") as archive:
        for row in rows:
            assert hashlib.sha256(archive.read(row["file_name"])).hexdigest() == row["sha256"]


def test_listing_of_a_folder_that_is_removed_meanwhile_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dataset" / "part").mkdir(parents=True)
    scandir = os.scandir

    def remove_first(path: Path) -> Any:
        if (tmp_path / "dataset").exists():
            (tmp_path / "dataset").rename(tmp_path / "removed")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", remove_first)
    assert Store(str(tmp_path / "dataset")).entries() == []
