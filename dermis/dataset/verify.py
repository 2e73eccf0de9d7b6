"""Compare a dataset with its manifest. Every file is read and hashed."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import zipfile
import zlib
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

from dermis.dataset.canonical_hashes import canonical_croissant, listing_sha256
from dermis.dataset.containers import read_container
from dermis.dataset.hashing import HashingReader
from dermis.dataset.manifest import ARCHIVE, CROISSANT, METADATA, PREVIEW, SIGNATURE, Manifest, read_hashed_manifest
from dermis.dataset.plan import plan
from dermis.dataset.shards import FileEntry
from dermis.dataset.store import MANIFEST, Store, hash_file
from dermis.errors import StorageError, escape
from dermis.files import NotRegularError, open_regular
from dermis.provenance.canonical import canonical_sha256

_MAX_SIGNED_BYTES = 256 << 20  # of a signed image, which is read at once
ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    ValueError,
    RuntimeError,
)  # of damaged files, and of unknown versions


@dataclass(frozen=True)
class Report:
    """Result of a verification. Names of files are sorted and relative to the folder of the dataset.

    Attributes:
        checked: Number of files that the manifest lists.
        changed: Files that differ from the manifest, or are not regular files.
        missing: Files that are listed but do not exist.
        extra: Files that exist but are not listed.
        canonical: The digest of the dataset without the signatures of images; empty if they are not signed.
        sha256: SHA-256 (hex) of manifest.json, and of each file as the manifest lists it, by name; empty for an archive alone.
    """

    checked: int
    changed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    canonical: str = ""
    sha256: Mapping[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether no file is changed, missing or extra."""
        return not (self.changed or self.missing or self.extra)


def verify(location: str | Path) -> Report:
    """Compare a dataset with its manifest.json.

    If images.zip was unpacked to `images/` beside it, the unpacked files are compared with it. In a local folder, named
    pipes, devices and links out of the folder are reported as changed.

    Args:
        location: A folder, an fsspec URL, or an images.zip alone, whose images are then compared with the hashes in its
            metadata.csv.

    Raises:
        StorageError: There is no manifest, or it is damaged.
    """
    if Path(location).is_file() and zipfile.is_zipfile(location):
        return _verify_archive(Path(location))
    store = Store(location)
    manifest, manifest_sha256 = read_hashed_manifest(store)
    listed = {file.name: file for file in manifest.files}
    changed = _with_other_digest(manifest)
    missing: list[str] = []
    entries = set(store.entries())
    for name, file in listed.items():
        size = store.size(name)
        if size is None:
            (changed if name in entries else missing).append(name)
        elif size != file.bytes or not _is_as_listed(store, manifest, file):
            changed.append(name)
    extra = entries - listed.keys() - {MANIFEST, SIGNATURE}
    if ARCHIVE in listed and ARCHIVE not in [*changed, *missing] and store.folder:
        unpacked = {name for name in extra if name.startswith("images/")}
        if unpacked:
            known, different = _compare_unpacked(store.folder, unpacked)
            missing += sorted(known - unpacked)
            changed += different
            extra -= known
    digest = "" if manifest.canonical is None else manifest.canonical.digest
    return Report(
        len(listed),
        tuple(sorted(changed)),
        tuple(sorted(missing)),
        tuple(sorted(extra)),
        digest,
        {MANIFEST: manifest_sha256, **{name: file.sha256 for name, file in listed.items()}},
    )


def _with_other_digest(manifest: Manifest) -> list[str]:
    """Return manifest.json if its digest without signatures is not that of its hashes, so that it is changed itself."""
    if manifest.canonical is None or manifest.with_canonical(manifest.canonical.files) == manifest:
        return []
    return [MANIFEST]


def _is_as_listed(store: Store, manifest: Manifest, file: FileEntry) -> bool:
    """Whether a file has the hashes in the manifest. It is read once, also if it has a hash without signatures too."""
    name = file.name
    hashes = {} if manifest.canonical is None else manifest.canonical.files
    try:
        if name not in hashes:
            return store.sha256(name, size=file.bytes) == file.sha256
        if name in (PREVIEW, CROISSANT):
            data = store.read(name, limit=_MAX_SIGNED_BYTES)
            return hashlib.sha256(data).hexdigest() == file.sha256 and _canonical_of(name, data, hashes) == hashes[name]
        with store.errors(name), store.open(name, size=file.bytes) as opened:
            reader = HashingReader(opened)
            canonical = _canonical_of_container(manifest, cast(IO[bytes], reader))
            return reader.sha256() == file.sha256 and canonical == hashes[name]
    except StorageError as error:
        if isinstance(error.__cause__, NotRegularError):
            return False
        raise


def _canonical_of(name: str, data: bytes, hashes: Mapping[str, str]) -> str:
    """Return the canonical SHA-256 of the preview or of croissant.json; empty if the file is damaged."""
    try:
        if name == PREVIEW:
            return canonical_sha256(data)
        return hashlib.sha256(canonical_croissant(data, hashes)).hexdigest()
    except (ValueError, RecursionError):
        return ""


def _canonical_of_container(manifest: Manifest, file: IO[bytes]) -> str:
    """Return the canonical SHA-256 of a container; empty if it is damaged."""
    layout = plan(manifest.request, manifest.bundle_digest, manifest.class_names)
    try:
        return listing_sha256((name, canonical_sha256(data)) for name, data in read_container(layout, file))
    except Exception:  # of zipfile, tarfile and pyarrow, which have many kinds for damaged files
        return ""


def _verify_archive(path: Path) -> Report:
    try:
        with zipfile.ZipFile(path) as archive:
            members = members_of(archive)
            unpacked_bytes = sum(info.file_size for info in members.values())
            if METADATA not in members or unpacked_bytes > 10 * path.stat().st_size:  # images do not shrink
                raise StorageError(
                    f"{path}: is not the {ARCHIVE} of a dataset; give the folder of the dataset, or its {ARCHIVE}"
                )
            unlisted = {name for name in members if name.startswith("images/")}
            changed: list[str] = []
            missing: set[str] = set()
            checked = 0
            with archive.open(METADATA) as table:  # row by row: there can be millions
                for row in csv.DictReader(io.TextIOWrapper(table, encoding="utf-8", newline="")):
                    name = row["file_name"] or ""
                    if name in unlisted:
                        unlisted.remove(name)
                        if not _is_image(archive, members[name], row["sha256"]):
                            changed.append(name)
                    elif name in missing or (name.startswith("images/") and name in members):
                        raise ValueError(f"{METADATA} lists {name} more than once")
                    else:
                        missing.add(name)
                    checked += 1
    except (*ZIP_ERRORS, OSError, KeyError, csv.Error) as error:
        raise StorageError(f"{path}: cannot be read as the {ARCHIVE} of a dataset ({escape(error)})") from error
    return Report(checked, tuple(sorted(changed)), tuple(sorted(missing)), tuple(sorted(unlisted)))


def _compare_unpacked(root: Path, unpacked: Set[str]) -> tuple[set[str], list[str]]:
    """Return the names in images.zip below images/, and those of them whose unpacked file differs."""
    with open_regular(root, ARCHIVE) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = {name: info for name, info in members_of(archive).items() if name.startswith("images/")}
                # By SHA-256, because a file can be changed without a change of its CRC-32 and size.
                different = [
                    name
                    for name in sorted(unpacked & members.keys())
                    if _unpacked_digest(root, name, members[name].file_size) != _digest(archive.open(members[name]))
                ]
        except ZIP_ERRORS as error:
            raise StorageError(f"{root / ARCHIVE}: is not a readable zip file ({escape(error)})") from None
    return set(members), different


def members_of(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the members of a zip by name. Raises ValueError if one could unpack to any size, or is ambiguous."""
    members = archive.NameToInfo  # not a copy: there can be millions
    for info in archive.infolist():
        # zipfile unpacks a whole block of bzip2 or LZMA before it checks the size.
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
            raise ValueError(f"{info.filename} is encrypted, or compressed by another method than deflate")
        if members[info.filename] is not info:
            raise ValueError(f"{info.filename} occurs more than once")
    return members


def content_of(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """Return the content of a member, at most as many bytes as its entry states."""
    with archive.open(member) as file:
        return file.read(member.file_size)  # without a number, zipfile unpacks up to 2 GiB before it looks at the size


def _is_image(archive: zipfile.ZipFile, member: zipfile.ZipInfo, sha256: str) -> bool:
    """Whether a member has this SHA-256, with or without the C2PA manifest in it."""
    if _digest(archive.open(member)) == sha256:
        return True
    return member.file_size <= _MAX_SIGNED_BYTES and canonical_sha256(content_of(archive, member)) == sha256


def _digest(file: IO[bytes]) -> str:
    with file:
        return hash_file(file)


def _unpacked_digest(root: Path, name: str, size: int) -> str | None:
    """Return the SHA-256 of an unpacked file; None if it is not a regular file of `size` bytes."""
    try:
        with open_regular(root, name) as file:
            return _digest(file) if os.fstat(file.fileno()).st_size == size else None
    except NotRegularError:
        return None
    except OSError as error:
        raise StorageError(f"{root}/{escape(name)}: cannot be read: {error.strerror}") from None
