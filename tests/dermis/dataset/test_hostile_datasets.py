"""Tests that an untrusted dataset is read within limits, or refused with a message that names the file or field."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from commands.main import app
from dermis.bundle import Bundle
from dermis.dataset.reading import open_dataset, read_samples, samples_of
from dermis.dataset.verify import verify
from dermis.errors import DataError, DermisError, StorageError
from dermis.provenance.check import images_at
from painted_dataset import make


@pytest.fixture(scope="module")
def originals(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of each format."""
    folder = tmp_path_factory.mktemp("datasets")
    for name in ("imagefolder", "webdataset", "parquet"):
        make(folder / name, tiny_bundle, format=name)
    return folder


@pytest.fixture
def dataset(originals: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(originals / name, tmp_path / name))


def put(folder: Path, name: str, data: bytes) -> None:
    """Write a file and its hash, as an attacker would."""
    (folder / name).write_bytes(data)
    document = json.loads((folder / "manifest.json").read_text())
    for file in document["files"]:
        if file["name"] == name:
            file |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(document))


def read(folder: Path) -> str:
    """What is wrong with the samples of a dataset, "" if nothing; fails at any error that is not one for users."""
    try:
        for row, data in read_samples(folder):
            assert hashlib.sha256(data).hexdigest() == row["sha256"]
    except DermisError as error:
        message = str(error)
        assert message.isprintable() and len(message) < 1000 and str(folder) in message
        return message
    return ""


@pytest.mark.parametrize("name", ["imagefolder", "webdataset", "parquet"])
def test_intact_dataset_is_read_completely(dataset: Callable[[str], Path], name: str) -> None:
    folder = dataset(name)
    assert read(folder) == "" and len(list(read_samples(folder))) == 20


def test_verify_reports_links_and_pipes_as_changed(dataset: Callable[[str], Path], tmp_path: Path) -> None:
    folder = dataset("imagefolder")
    outside = tmp_path / "outside"
    shutil.move(folder / "metadata.csv", outside)
    (folder / "metadata.csv").symlink_to(outside)
    (folder / "preview.png").unlink()
    os.mkfifo(folder / "preview.png")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("/dev/zero")
    (folder / "\x1b[2Jfine").write_text("")
    report = verify(folder)
    assert report.changed == ("README.md", "metadata.csv", "preview.png") and report.missing == ()
    printed = CliRunner().invoke(app, ["verify", str(folder)])
    assert printed.exit_code == 1 and "extra \\x1b[2Jfine\n" in printed.output and "\x1b" not in printed.output
    (tmp_path / "link").symlink_to(dataset("parquet"))
    assert verify(tmp_path / "link").ok


def test_unpacked_image_that_is_pipe_or_link_is_changed(dataset: Callable[[str], Path], tmp_path: Path) -> None:
    folder = dataset("imagefolder")
    with zipfile.ZipFile(folder / "images.zip") as archive:
        archive.extractall(folder)
    (folder / "README.md").unlink(), (folder / "metadata.csv").unlink()
    with zipfile.ZipFile(folder / "images.zip") as archive:
        archive.extractall(folder, ["README.md", "metadata.csv"])
    first, second = sorted(path for path in (folder / "images").rglob("*.png"))[:2]
    first.unlink()
    os.mkfifo(first)
    shutil.move(second, tmp_path / "outside.png")
    second.symlink_to(tmp_path / "outside.png")
    assert verify(folder).changed == tuple(path.relative_to(folder).as_posix() for path in (first, second))


def test_forged_image_with_same_crc_is_reported_as_changed(dataset: Callable[[str], Path]) -> None:
    folder = dataset("imagefolder")
    with zipfile.ZipFile(folder / "images.zip") as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith("images/")])
    assert verify(folder).ok
    image = min((folder / "images").rglob("*.png"))
    data = image.read_bytes()
    start = b"forged" + data[6:-4]
    image.write_bytes(start + _ending(start, zlib.crc32(data)))
    assert zlib.crc32(image.read_bytes()) == zlib.crc32(data) and image.stat().st_size == len(data)
    assert verify(folder).changed == (image.relative_to(folder).as_posix(),)


def _ending(start: bytes, crc: int) -> bytes:
    """The four bytes after which the CRC-32 of all is `crc`. Each bit of them changes the sum by itself (it is linear)."""
    base = zlib.crc32(start + bytes(4))
    rows = [(zlib.crc32(start + (1 << bit).to_bytes(4, "little")) ^ base, 1 << bit) for bit in range(32)]
    difference, ending = base ^ crc, 0
    for place in range(32):
        pivot = next(row for row in rows if row[0] >> place & 1)
        rows = [(a ^ pivot[0], b ^ pivot[1]) if a >> place & 1 else (a, b) for a, b in rows if (a, b) != pivot]
        if difference >> place & 1:
            difference, ending = difference ^ pivot[0], ending ^ pivot[1]
    return ending.to_bytes(4, "little")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("case", ["bzip2", "encrypted", "twice"])
def test_verify_refuses_encrypted_compressed_or_ambiguous_zip(
    dataset: Callable[[str], Path], case: str, alone: bool
) -> None:
    folder = dataset("imagefolder")
    path = folder / "images.zip"
    with zipfile.ZipFile(path) as archive:
        name, data = archive.namelist()[0], archive.read("metadata.csv")
    with zipfile.ZipFile(path, "w") as archive:
        # A block of bzip2 is unpacked as a whole, here into 64 MiB, whatever size the table of the zip states.
        archive.writestr(
            "metadata.csv",
            data + bytes(64 << 20 if case == "bzip2" else 0),
            zipfile.ZIP_BZIP2 if case == "bzip2" else None,
        )
        for _ in range(2 if case == "twice" else 1):
            archive.writestr(name, b"x")
        archive.writestr("padding", bytes(1 << 10))
    if case == "encrypted":
        packed = bytearray(path.read_bytes())
        packed[packed.index(b"PK\x01\x02") + 8] |= 1
        path.write_bytes(packed)
    put(folder, "images.zip", path.read_bytes())
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_bytes(b"x")
    with pytest.raises(StorageError, match="occurs more than once" if case == "twice" else "encrypted, or compressed"):
        verify(path if alone else folder)


@pytest.mark.parametrize("case", ["bzip2", "false size", "cut off"])
def test_images_of_a_hostile_zip_are_not_unpacked(tmp_path: Path, case: str) -> None:
    """`dermis verify --provenance` reads any zip."""
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.png", bytes(64 << 20), zipfile.ZIP_BZIP2 if case == "bzip2" else zipfile.ZIP_DEFLATED)
        archive.writestr("padding", bytes(1 << 20))
    packed = bytearray(path.read_bytes())
    entry = packed.index(b"PK\x01\x02")
    if case == "cut off":
        packed[100:200] = bytes(100)
    packed[entry + 24 : entry + 28] = (10).to_bytes(4, "little")  # the size that the table of the zip states
    path.write_bytes(packed)
    tracemalloc.start()
    with pytest.raises(StorageError, match="cannot be read as a zip file"):
        list(images_at(str(path)))
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("format_name", ["imagefolder", "webdataset", "parquet"])
def test_image_changed_after_verification_is_refused(dataset: Callable[[str], Path], format_name: str) -> None:
    folder = dataset(format_name)
    manifest, rows = open_dataset(folder)
    file = sorted(path for path in folder.iterdir() if path.name.startswith(("images.zip", "data-")))[0]
    assert len(list(samples_of(folder, manifest, rows))) == 20
    if format_name == "imagefolder":
        with zipfile.ZipFile(file) as archive:
            items = [(name, archive.read(name)) for name in archive.namelist()]
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in items:
                archive.writestr(name, content.replace(b"IDAT", b"IDAX"))
    else:
        file.write_bytes(file.read_bytes().replace(b"IDAT", b"IDAX"))
    with pytest.raises(DataError, match="is not the image that metadata.csv lists"):
        list(samples_of(folder, manifest, rows))


def test_manifest_that_is_pipe_or_endless_is_refused(dataset: Callable[[str], Path]) -> None:
    folder = dataset("parquet")
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    with pytest.raises(DermisError, match=r"manifest\.json"):
        verify(folder)
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to("/dev/zero")
    with pytest.raises(DermisError, match=r"manifest\.json"):
        verify(folder)


# -- archives


def _zip(change: Callable[[zipfile.ZipFile, list[tuple[str, bytes]]], None]) -> Callable[[bytes], bytes]:
    def changed(data: bytes) -> bytes:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            items = [(name, archive.read(name)) for name in archive.namelist()]
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            change(archive, items)
        return out.getvalue()

    return changed


def _bomb(archive: zipfile.ZipFile, items: list[tuple[str, bytes]]) -> None:
    archive.writestr(items[0][0], bytes(64 << 20), zipfile.ZIP_DEFLATED)


def _compressed(archive: zipfile.ZipFile, items: list[tuple[str, bytes]]) -> None:
    for name, data in items:
        archive.writestr(name, data, zipfile.ZIP_DEFLATED)
    archive.comment = bytes(60_000)  # or the zip would be smaller than what it holds


@pytest.mark.filterwarnings("ignore:Duplicate name")
def _twice(archive: zipfile.ZipFile, items: list[tuple[str, bytes]]) -> None:
    for name, data in (items[0], items[0]):
        archive.writestr(name, data)


def _elsewhere(archive: zipfile.ZipFile, items: list[tuple[str, bytes]]) -> None:
    archive.writestr("images/../../\x1b[2Jx.png", items[0][1])


def _tar(member: Callable[[], tarfile.TarInfo], data: bytes = b"") -> Callable[[bytes], bytes]:
    def changed(_: bytes) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as archive:
            archive.addfile(member(), io.BytesIO(data))
        return out.getvalue()

    return changed


def _link() -> tarfile.TarInfo:
    info = tarfile.TarInfo("SYN_00000000.png")
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return info


def _sparse(data: bytes) -> bytes:
    """A member of 1 TiB of which nothing is stored (GNU's old format)."""
    header = bytearray(tarfile.TarInfo("SYN_00000000.png").tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[257:265] = b"ustar  \0"
    header[483:495] = b"\x80" + (1 << 40).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(1024)


def _dictionary(data: bytes) -> bytes:
    """One image of 1 MiB, stored once for all rows."""
    image = pa.array([{"bytes": bytes(1 << 20), "path": "SYN_00000000.png"}])
    table = pa.table({"image": image.take(pa.array([0] * 40))})
    out = io.BytesIO()
    pq.write_table(table, out, use_dictionary=True, compression="none")
    return out.getvalue()


def _path_dictionary(data: bytes) -> bytes:
    """A path of 1 MiB, stored once and compressed for all rows, beside a small image."""
    images = pa.array([{"bytes": b"x", "path": "x" * (1 << 20)}]).take(pa.array([0] * 40))
    out = io.BytesIO()
    pq.write_table(pa.table({"image": images}), out, use_dictionary=["image.path"], compression={"image.path": "zstd"})
    return out.getvalue()


def _shared_prefix(data: bytes) -> bytes:
    """An image of 1 MiB, whose whole content is the prefix of every further one."""
    images = pa.array([{"bytes": bytes(1 << 20), "path": "x.png"}]).take(pa.array([0] * 40))
    out = io.BytesIO()
    encoding = {"image.bytes": "DELTA_BYTE_ARRAY", "image.path": "PLAIN"}
    pq.write_table(pa.table({"image": images}), out, use_dictionary=False, compression="none", column_encoding=encoding)
    return out.getvalue()


ARCHIVES: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "a zip bomb": ("imagefolder", _zip(_bomb), "images.zip: cannot be read"),
    "compressed images": ("imagefolder", _zip(_compressed), "is compressed"),
    "a name twice": ("imagefolder", _zip(_twice), "more than once"),
    "a name out of the folder": ("imagefolder", _zip(_elsewhere), r"images/../../\x1b[2Jx.png"),
    "no zip": ("imagefolder", lambda data: data[:100], "images.zip: cannot be read"),
    "a link in a tar": ("webdataset", _tar(_link), "is not a regular file"),
    "a sparse member": ("webdataset", _sparse, "is not a regular file"),
    "another image": ("webdataset", _tar(lambda: tarfile.TarInfo("../x.png")), "../x.png, which metadata.csv does not"),
    "a dictionary of images": ("parquet", _dictionary, "its images are compressed"),
    "a dictionary of paths": ("parquet", _path_dictionary, "its images are compressed"),
    "images with a shared prefix": ("parquet", _shared_prefix, "its images are compressed"),
    "no Parquet": ("parquet", lambda data: b"PAR1" + bytes(100) + b"PAR1", "cannot be read"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", ARCHIVES)
def test_archive_with_unexpected_content_is_refused(dataset: Callable[[str], Path], case: str) -> None:
    name, change, reason = ARCHIVES[case]
    folder = dataset(name)
    file = sorted(path for path in folder.iterdir() if path.name.startswith(("images.zip", "data-")))[0]
    put(folder, file.name, change(file.read_bytes()))
    assert verify(folder).ok
    assert reason in read(folder)


def _cell(change: Callable[[list[dict[str, str]]], Any]) -> Callable[[bytes], bytes]:
    def changed(data: bytes) -> bytes:
        rows = list(csv.DictReader(io.StringIO(data.decode())))
        change(rows)
        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue().encode()

    return changed


TABLES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "no text": (lambda data: b"\xff" * 100, "is not a table"),
    "an endless cell": (lambda data: data[: data.index(b"\n") + 1] + b"a" * 200_000, "metadata.csv"),
    "no file names": (lambda data: data.replace(b"file_name", b"file", 1), "no column file_name"),
    "too few cells": (lambda data: data + b"SYN\n", "another number of cells"),
    "a name twice": (_cell(lambda rows: rows.append(rows[0])), "more than once"),
    "a seed of letters": (
        _cell(lambda rows: rows[0].update(seed="\x1b[2J")),
        r"seed must be a whole number, not '\x1b[2J'",
    ),
}


@pytest.mark.parametrize("case", TABLES)
def test_malformed_metadata_table_is_refused(dataset: Callable[[str], Path], case: str) -> None:
    change, reason = TABLES[case]
    folder = dataset("webdataset")
    put(folder, "metadata.csv", change((folder / "metadata.csv").read_bytes()))
    with pytest.raises(DataError) as caught:
        list(read_samples(folder))
    assert reason in str(caught.value) and str(caught.value).isprintable()


# -- manifest.json


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_wrong_manifest_value_gives_readable_error(originals: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "d"
    if not folder.exists():
        shutil.copytree(originals / "webdataset", folder)
    document = json.loads((originals / "webdataset" / "manifest.json").read_bytes())
    place: Any = document
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not (isinstance(place[key], dict | list) and place[key]) or data.draw(st.integers(0, 5)) == 0:
            break
        place = place[key]
    odd = [None, True, -1, 0, 10**9, 2**63 - 1, 1e308, "", "\x1b[2J", "../x", "a" * 10_000, [], {}, [[]], {"a": 1}]
    place[key] = data.draw(st.sampled_from(odd))
    (folder / "manifest.json").write_text(json.dumps(document))
    read(folder)
