"""Verify a downloaded folder against its manifest and unpack its images, without a service."""

from __future__ import annotations

import csv
import io
import os
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dermis_client._canonical import canonical_sha256
from dermis_client._files import check_names, is_safe_name, sha256_of
from dermis_client._untrusted import MAX_LIST_BYTES, load_json, one_line
from dermis_client.errors import DownloadError, IntegrityError
from dermis_client.models import Manifest

MANIFEST = "manifest.json"
SIGNATURE = "dataset.sig"  # of `dermis sign`
ARCHIVE = "images.zip"
METADATA = "metadata.csv"
IMAGES = "images"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class VerifyReport:
    """The result of verify(), which is true if all files agree. File names are relative to the folder and sorted.

    Attributes:
        folder: The folder, or the archive.
        checked: Number of files in the manifest, or of images in an archive.
        changed: Files with another size or SHA-256.
        missing: Files that do not exist.
        extra: Files that the manifest does not list.
    """

    folder: Path
    checked: int
    changed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether no file is changed, missing or extra."""
        return not (self.changed or self.missing or self.extra)

    def __bool__(self) -> bool:
        return self.ok


def verify(folder: str | os.PathLike[str]) -> VerifyReport:
    """Compare every file of a downloaded dataset with the size and SHA-256 in its manifest.json; needs no service.

    If extract_images() has unpacked images.zip, the unpacked images are compared with it too.

    Args:
        folder: The folder of the dataset, or a single images.zip, whose images are compared with the hashes in its
            metadata.csv.

    Returns:
        The report, which is true if all files agree with the manifest.

    Raises:
        IntegrityError: manifest.json, or the archive, is missing or cannot be read.
    """
    root = Path(folder)
    if root.is_file():
        return _verify_archive(root)
    listed = {file.name: file for file in _read_manifest(root).files}
    check_names(listed, MANIFEST)
    changed: list[str] = []
    missing: list[str] = []
    for name, file in listed.items():
        path = root / name
        if not _is_own_file(root, path):
            (changed if os.path.lexists(path) else missing).append(name)
        elif path.stat().st_size != file.bytes or sha256_of(path) != file.sha256:
            changed.append(name)
    present = {path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir()}
    extra = present - listed.keys() - {MANIFEST, SIGNATURE}
    if ARCHIVE in listed and ARCHIVE not in changed + missing and (root / IMAGES).is_dir():
        with _open_archive(root / ARCHIVE) as archive:
            for member in _image_members(archive):
                extra.discard(member.filename)
                if not _is_own_file(root, root / member.filename):
                    (changed if os.path.lexists(root / member.filename) else missing).append(member.filename)
                elif not _is_same(root / member.filename, member):
                    changed.append(member.filename)
    return VerifyReport(root, len(listed), tuple(sorted(changed)), tuple(sorted(missing)), tuple(sorted(extra)))


def _verify_archive(path: Path) -> VerifyReport:
    try:
        with _open_archive(path) as archive:
            present = {member.filename: member for member in _image_members(archive)}
            if METADATA not in archive.namelist():
                raise ValueError(f"it contains no {METADATA}")
            table = csv.DictReader(io.StringIO(archive.read(METADATA).decode(), newline=""))
            hashes = {row["file_name"]: row["sha256"] for row in table}
            changed = [
                name
                for name in sorted(present.keys() & hashes.keys())
                if canonical_sha256(archive.read(present[name])) != hashes[name]
            ]
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, KeyError, csv.Error) as error:
        raise IntegrityError(
            f"{path} cannot be read as the {ARCHIVE} of a dataset ({one_line(str(error))})", name=path.name
        ) from error
    missing, extra = sorted(hashes.keys() - present.keys()), sorted(present.keys() - hashes.keys())
    return VerifyReport(path, len(hashes), tuple(changed), tuple(missing), tuple(extra))


def _read_manifest(root: Path) -> Manifest:
    path = root / MANIFEST
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a regular file")
        if path.stat().st_size > MAX_LIST_BYTES:
            raise ValueError(f"it is larger than {MAX_LIST_BYTES >> 20} MiB")
        return Manifest.model_validate(load_json(path.read_bytes()))
    except FileNotFoundError as error:
        raise IntegrityError(f"{root} has no {MANIFEST}: it is not a dataset folder", name=MANIFEST) from error
    except OSError as error:
        raise IntegrityError(f"{root / MANIFEST} cannot be read ({error.strerror})", name=MANIFEST) from error
    except ValueError as error:
        raise IntegrityError(f"{root / MANIFEST} is damaged ({one_line(str(error))})", name=MANIFEST) from error


def extract_images(folder: str | os.PathLike[str]) -> Path:
    """Unpack FOLDER/images.zip to FOLDER/images/<class>/, the layout of torchvision's ImageFolder.

    Only images are unpacked, and only into the folder: an archive with an unsafe name, a link, an encrypted member, or
    far more content than its own size is refused. If the images are already unpacked, nothing happens. After a failure
    no unpacked file is left.

    Args:
        folder: The folder of the dataset.

    Returns:
        FOLDER/images.

    Raises:
        DownloadError: There is no images.zip, FOLDER/images has other content, or a file cannot be written.
        IntegrityError: The archive is damaged or not safe.
    """
    root = Path(folder)
    target = root / IMAGES
    if not (root / ARCHIVE).is_file():
        raise DownloadError(f"{root} has no {ARCHIVE}: only datasets of the format imagefolder can be unpacked")
    with _open_archive(root / ARCHIVE) as archive:
        members = list(_image_members(archive))
        if not members:
            raise IntegrityError(f"{root / ARCHIVE} contains no images", name=ARCHIVE)
        if target.exists():
            if _is_unpacked(root, members):
                return target
            raise DownloadError(f"{target} exists and differs from {ARCHIVE}: remove it and unpack again")
        temporary = Path(tempfile.mkdtemp(prefix=".images-", dir=root))
        try:
            for member in members:
                _extract(archive, member, temporary / member.filename)
            (temporary / IMAGES).replace(target)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise IntegrityError(f"{root / ARCHIVE} is damaged ({one_line(str(error))})", name=ARCHIVE) from error
        except OSError as error:
            raise DownloadError(f"{target}: cannot be written ({error.strerror or error})") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _open_archive(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:  # invalid names, unknown versions
        raise IntegrityError(f"{path} cannot be read as a zip file ({one_line(str(error))})", name=path.name) from error


def _image_members(archive: zipfile.ZipFile) -> Iterator[zipfile.ZipInfo]:
    """Yield the members images/<class>/<file>. Raises IntegrityError for any unsafe member of the archive."""
    size = Path(archive.filename or "").stat().st_size
    if sum(member.file_size for member in archive.infolist()) > 10 * size:  # images hardly compress; a zip bomb does
        raise IntegrityError(f"{archive.filename} would unpack to far more than its own size", name=ARCHIVE)
    seen: set[str] = set()
    for member in archive.infolist():
        name = member.filename
        mode = member.external_attr >> 16
        regular = stat.S_IFMT(mode) in {0, stat.S_IFREG} and not member.flag_bits & 0x1
        regular = regular and member.compress_type in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
        parts = PurePosixPath(name).parts
        plain = "/".join(parts) == name.removesuffix("/") and "\\" not in name and all(map(_safe_part, parts))
        if not plain or name.casefold() in seen or not (regular or member.is_dir()):
            raise IntegrityError(
                f"{archive.filename} contains {one_line(repr(name), 120)}: not safe to unpack", name=name
            )
        seen.add(name.casefold())
        if parts[0] == IMAGES and len(parts) == 3 and not member.is_dir():
            yield member


def _safe_part(part: str) -> bool:
    """Return whether a folder or file name is safe. Class names may have spaces and letters of any script."""
    plain = part.isprintable() and not part.startswith(".") and not part.endswith((".", " "))
    return plain and not set(part) & set('/\\:*?"<>|') and (not part.isascii() or is_safe_name(part.replace(" ", "_")))


def _is_own_file(root: Path, path: Path) -> bool:
    """Return whether a path is a regular file inside the folder, after links have been resolved."""
    try:
        return path.is_file() and path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # a link to itself
        return False


def _extract(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    remaining = member.file_size
    with archive.open(member) as source, path.open("xb") as file:
        while block := source.read(_BLOCK):  # checks the CRC at the end
            remaining -= len(block)
            if remaining < 0:
                raise zipfile.BadZipFile(f"{member.filename} is longer than its header says")
            file.write(block)


def _is_unpacked(root: Path, members: list[zipfile.ZipInfo]) -> bool:
    present = {path.relative_to(root).as_posix() for path in (root / IMAGES).rglob("*") if not path.is_dir()}
    expected = {member.filename for member in members}
    return present == expected and all(_is_same(root / member.filename, member) for member in members)


def _is_same(path: Path, member: zipfile.ZipInfo) -> bool:
    if path.stat().st_size != member.file_size:
        return False
    crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return crc == member.CRC
