"""Tests of verifying and unpacking a downloaded folder, including malicious archives."""

from __future__ import annotations

import json
import stat
import warnings
import zipfile
from pathlib import Path

import pytest
from dermis_client import extract_images, verify
from dermis_client.errors import DownloadError, IntegrityError
from fake_gateway import dataset_files, png


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    root.mkdir()
    for name, data in dataset_files({"classes": {"malignant": 2, "benign": 3}, "seed": 1}).items():
        (root / name).write_bytes(data)
    return root


def test_verify_lists_changed_missing_and_extra(folder: Path) -> None:
    assert verify(folder).ok and verify(folder).checked == 4
    data = bytearray((folder / "images.zip").read_bytes())
    data[100] ^= 1
    (folder / "images.zip").write_bytes(data)
    (folder / "preview.png").unlink()
    (folder / "sub").mkdir()
    (folder / "sub" / "note.txt").write_text("x")
    report = verify(folder)
    assert not report
    assert (report.changed, report.missing, report.extra) == (("images.zip",), ("preview.png",), ("sub/note.txt",))


def test_verify_checks_unpacked_images(folder: Path) -> None:
    images = extract_images(folder)
    assert images == folder / "images" and verify(folder)
    (images / "benign" / "SYN_00000002.png").write_bytes(png(9))
    (images / "malignant" / "SYN_00000000.png").unlink()
    (images / "benign" / "mine.png").write_bytes(b"")
    report = verify(folder)
    assert report.changed == ("images/benign/SYN_00000002.png",)
    assert report.missing == ("images/malignant/SYN_00000000.png",)
    assert report.extra == ("images/benign/mine.png",)


@pytest.mark.parametrize(
    "text", [None, "{", '{"files": 1}', "[]", '{"format_version": 1, "files": [{"name": "../x"}]}']
)
def test_verify_needs_a_readable_manifest(folder: Path, text: str | None) -> None:
    (folder / "manifest.json").unlink()
    if text is not None:
        (folder / "manifest.json").write_text(text)
    with pytest.raises(IntegrityError, match="manifest.json"):
        verify(folder)


def test_verify_refuses_manifest_with_paths_outside_folder(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"].append({"name": "../../secret", "bytes": 0, "sha256": "0" * 64})
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match="not safe"):
        verify(folder)


def test_images_are_unpacked_into_class_folders_once(folder: Path) -> None:
    images = extract_images(folder)
    assert sorted(path.name for path in images.iterdir()) == ["benign", "malignant"]
    assert (images / "benign" / "SYN_00000002.png").read_bytes() == png(3)
    assert not list(folder.glob(".images-*"))
    before = (images / "benign" / "SYN_00000002.png").stat().st_mtime_ns
    assert extract_images(folder) == images  # a second call does nothing
    assert (images / "benign" / "SYN_00000002.png").stat().st_mtime_ns == before
    (images / "benign" / "SYN_00000002.png").write_bytes(b"mine")
    with pytest.raises(DownloadError, match="remove it"):
        extract_images(folder)


def test_torchvision_reads_the_unpacked_folder(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from torchvision.datasets import ImageFolder
        except (ImportError, RuntimeError) as error:
            pytest.skip(f"torchvision does not import here: {error}")
    dataset = ImageFolder(str(extract_images(folder)))
    assert dataset.classes == ["benign", "malignant"] and len(dataset) == 5


def archive(folder: Path, *members: tuple[zipfile.ZipInfo | str, bytes], **options: int) -> None:
    with zipfile.ZipFile(folder / "images.zip", "w", **options) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of the repeated name
        for name, data in members:
            file.writestr(name, data)


@pytest.mark.parametrize(
    "name",
    [
        "../evil.png",
        "images/../../evil.png",
        "images/benign/../../../evil.png",
        "/images/benign/evil.png",
        "images//benign/evil.png",
        "images\\..\\evil.png",
        "C:/images/benign/evil.png",
        "images/benign/NUL",
        "images/.hidden/evil.png",
        "images/benign/x.png\x1b[31m",
        "IMAGES/BENIGN/a.png",
    ],
)
def test_archive_cannot_write_outside_its_folder(folder: Path, name: str) -> None:
    archive(folder, ("images/benign/a.png", png(1)), (name, b"evil"))
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(IntegrityError, match="not safe") as caught:
        extract_images(folder)
    assert str(caught.value).isprintable()
    assert sorted(folder.parent.rglob("*")) == before


def test_archive_with_links_or_zip_bomb_is_refused(folder: Path) -> None:
    link = zipfile.ZipInfo("images/benign/link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive(folder, (link, b"/etc/passwd"))
    with pytest.raises(IntegrityError, match="not safe"):
        extract_images(folder)
    archive(folder, ("images/benign/a.png", bytes(10_000_000)), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(IntegrityError, match="far more"):
        extract_images(folder)
    assert not (folder / "images").exists()


def test_damaged_archive_leaves_no_unpacked_files(folder: Path) -> None:
    archive(folder, ("images/benign/a.png", png(1)), ("images/benign/b.png", b"x" * 999))
    data = (folder / "images.zip").read_bytes()
    (folder / "images.zip").write_bytes(data.replace(b"x" * 999, b"y" * 999))
    with pytest.raises(IntegrityError, match="damaged"):
        extract_images(folder)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == []
    (folder / "images.zip").write_bytes(data[:200])
    with pytest.raises(IntegrityError, match="zip"):
        extract_images(folder)
    (folder / "images.zip").unlink()
    with pytest.raises(DownloadError, match="imagefolder"):
        extract_images(folder)


def test_verify_reports_linked_files_as_changed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "metadata.csv"
    (folder / "metadata.csv").rename(outside)
    (folder / "metadata.csv").symlink_to(outside)
    assert verify(folder).changed == ("metadata.csv",)
    (folder / "metadata.csv").unlink()
    (folder / "metadata.csv").symlink_to("metadata.csv")
    assert verify(folder).changed == ("metadata.csv",)
