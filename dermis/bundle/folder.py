"""Folders that are verified as a whole: a JSON descriptor lists SHA-256 and size of every other file.

Bundles and classifiers are such folders. Reading goes through fsspec, so a folder may be an `s3://` prefix; writing is
local, and a folder appears whole or not at all.

A folder may be untrusted. Only regular files that its descriptor lists are opened, no more of a file is read than
its record says, and what the descriptor says is checked before it is used.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dermis.errors import BundleError, escape, quote
from dermis.files import names_below, open_regular
from dermis.strict_json import parse_json

_PATH_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
_MAX_DESCRIPTOR_BYTES = 4 << 20
_MAX_FILES = 10_000
_MAX_NAME = 200
_MAX_FILE_BYTES = 1 << 36
_MAX_MEMORY_BYTES = 1 << 34  # of a file that is read as a whole, where the caller knows no smaller limit
_PIECE = 8 << 20

Descriptor = TypeVar("Descriptor", bound="DescriptorModel")


@dataclass(frozen=True)
class FileRecord:
    """SHA-256 (hex) and size of one file."""

    sha256: str
    bytes: int


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0, le=_MAX_FILE_BYTES)


class DescriptorModel(BaseModel):
    """What every descriptor holds; that of a bundle or a classifier adds its own fields."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    format_version: int
    files: dict[str, _File] = Field(max_length=_MAX_FILES)

    @property
    def records(self) -> dict[str, FileRecord]:
        """The listed files, by name."""
        return {name: FileRecord(file.sha256, file.bytes) for name, file in sorted(self.files.items())}


@dataclass(frozen=True)
class Folder:
    """A place to read from. `where` is its name in errors, `kind` what should be there ("bundle")."""

    where: str
    kind: str
    descriptor: str
    fs: Any
    root: str

    def read_descriptor(self) -> bytes:
        """The descriptor's bytes, unparsed. BundleError if it is missing or far too large."""
        with self._open(self.descriptor) as file:
            data = _read_at_most(file, _MAX_DESCRIPTOR_BYTES + 1)
        if len(data) > _MAX_DESCRIPTOR_BYTES:
            raise BundleError(
                f"{self._place(self.descriptor)}: is larger than {_MAX_DESCRIPTOR_BYTES:,} bytes; is this the folder of "
                f"a {self.kind}?"
            )
        return data

    def read(self, name: str, record: FileRecord, *, limit: int = _MAX_MEMORY_BYTES) -> bytes:
        """A listed file. BundleError if it is missing, differs from its record, or is larger than `limit` bytes."""
        if record.bytes > limit:
            raise BundleError(
                f"{self._place(name)}: is larger than it may be ({limit:,} bytes); get the {self.kind} again"
            )
        with self._open(name, record) as file:
            data = file.read(record.bytes + 1) if self.local else _read_at_most(file, record.bytes + 1)
        if len(data) != record.bytes or hashlib.sha256(data).hexdigest() != record.sha256:
            raise self._differs(name)
        return data

    def verify(self, name: str, record: FileRecord) -> None:
        """BundleError if a listed file is missing or differs from its record; it is read piece by piece and not kept."""
        digest, size = hashlib.sha256(), 0
        with self._open(name, record) as file:
            while size <= record.bytes and (piece := file.read(_PIECE)):
                digest.update(piece)
                size += len(piece)
        if (digest.hexdigest(), size) != (record.sha256, record.bytes):
            raise self._differs(name)

    def check_listing(self, files: Mapping[str, FileRecord]) -> None:
        """BundleError if a file is there that is not listed, or listed and not there."""
        try:
            names = names_below(Path(self.root)) if self.local else self._remote_names()
            present = set(itertools.islice(names, 2 * _MAX_FILES)) - {self.descriptor}
        except Exception as error:  # as in _open
            raise BundleError(f"{self.where}: cannot be listed: {_reason(error)}") from error
        present = {name for name in present if not name.endswith("/")}  # empty folders
        if extra := sorted(present - files.keys()):
            names_of_some = ", ".join(escape(name) for name in extra[:5])
            raise BundleError(
                f"{self.where}: {self.descriptor} does not list {names_of_some}; remove what is no part of it"
            )
        if missing := sorted(files.keys() - present):
            raise BundleError(f"{self.where}: {', '.join(missing[:5])} is missing; get the {self.kind} again")

    @property
    def local(self) -> bool:
        """Whether the folder is one of this machine."""
        from fsspec.implementations.local import LocalFileSystem

        return isinstance(self.fs, LocalFileSystem)

    def _remote_names(self) -> Iterator[str]:
        return (path.removeprefix(self.root).lstrip("/") for path in self.fs.find(self.root))

    @contextmanager
    def _open(self, name: str, record: FileRecord | None = None) -> Iterator[BinaryIO]:
        """Open a file for reading; errors, also those inside the block, become a BundleError."""
        try:
            if self.local:
                with open_regular(self.root, name) as file:
                    if record is not None and os.fstat(file.fileno()).st_size != record.bytes:
                        raise self._differs(name)
                    yield file
            else:
                with self.fs.open(f"{self.root}/{name}", "rb") as file:
                    yield file
        except BundleError:
            raise
        except FileNotFoundError:
            hint = f"is this the folder of a {self.kind}?" if name == self.descriptor else f"get the {self.kind} again"
            raise BundleError(f"{self.where}: {name} is missing; {hint}") from None
        except MemoryError:
            raise BundleError(f"{self._place(name)}: does not fit into memory") from None
        except Exception as error:  # every remote file system raises exceptions of its own library
            raise BundleError(f"{self._place(name)}: cannot be read: {_reason(error)}") from error

    def _place(self, name: str) -> str:
        return f"{self.where}/{name}"

    def _differs(self, name: str) -> BundleError:
        return BundleError(
            f"{self._place(name)}: differs from what {self.descriptor} says (SHA-256 or size); get the {self.kind} again"
        )


def _read_at_most(file: BinaryIO, limit: int) -> bytes:
    """Up to `limit` bytes, in pieces: a remote file system may reserve memory for all that it is asked for."""
    pieces, size = [], 0
    while size < limit and (piece := file.read(min(_PIECE, limit - size))):
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)


def open_folder(location: str | Path, kind: str, descriptor: str) -> Folder:
    """The folder at a path or an fsspec URL; nothing is read yet. BundleError if no file system serves the URL."""
    import fsspec

    where = str(location).rstrip("/")
    try:
        fs, root = fsspec.core.url_to_fs(where)
    except (ValueError, ImportError, OSError) as error:
        raise BundleError(f"{where}: {error}") from None
    return Folder(where, kind, descriptor, fs, root.rstrip("/"))


def exists(location: str | Path, descriptor: str) -> bool:
    """Whether there is a descriptor of this name at `location`."""
    folder = open_folder(location, "", descriptor)
    try:
        return bool(folder.fs.exists(f"{folder.root}/{descriptor}"))
    except Exception:  # as in Folder
        return False


def parse_descriptor(text: bytes, where: str, version: int, model: type[Descriptor]) -> Descriptor:
    """A descriptor's JSON as `model`. BundleError, naming `where` and the field, if it is not or is a newer format."""
    try:
        raw = parse_json(text)
    except ValueError as error:
        raise BundleError(f"{where}: is not JSON that can be used ({error}); get it again") from None
    written = raw.get("format_version") if isinstance(raw, dict) else None
    if type(written) is int and written > version:
        raise BundleError(f"{where}: has format {written}, this dermis reads up to {version}; install a newer dermis")
    try:
        descriptor = model.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        field = escape(".".join(str(part) for part in first["loc"])) or "the document"
        raise BundleError(f"{where}: {field}: {first['msg']}") from None
    if descriptor.format_version != version:
        raise BundleError(f"{where}: format_version must be {version}")
    for name in descriptor.files:
        if not _is_inside(name) or name == where.rsplit("/", 1)[-1]:
            raise BundleError(f"{where}: files: {quote(name)} is not a file name inside the folder")
    if len({name.casefold() for name in descriptor.files}) != len(descriptor.files):
        raise BundleError(f"{where}: files: names must differ, also without regard to case")
    return descriptor


def to_json(value: Mapping[str, Any], what: str) -> bytes:
    """JSON whose bytes depend on the content alone. BundleError, naming `what`, if the value cannot be JSON."""
    try:
        return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise BundleError(f"{what}: cannot be written as JSON: {error}") from None


def write_folder(
    out: Path, kind: str, descriptor: str, fields: Mapping[str, Any], files: Mapping[str, bytes], *, replace: bool
) -> None:
    """Write `files` and a descriptor of `fields` and their records. The folder appears whole or not at all.

    Refuses an existing `out` unless `replace`, and then one that has no such descriptor. Raises BundleError.
    """
    for name in files:
        if not _is_inside(name) or name == descriptor:
            raise BundleError(f"{name!r} cannot be the name of a file in a {kind}")
    if out.exists() and not replace:
        raise BundleError(f"{out}: exists already; choose another folder or remove it")
    records = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in sorted(files.items())
    }
    text = to_json({**fields, "files": records}, descriptor)
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.new-"))
    except OSError as error:
        raise BundleError(f"{out.parent}: cannot be written: {error.strerror}") from None
    try:
        fresh.chmod(0o755)
        for name, data in {**files, descriptor: text}.items():
            path = fresh / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _put(fresh, out, kind, descriptor)
    except OSError as error:
        raise BundleError(f"{out}: cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _put(fresh: Path, out: Path, kind: str, descriptor: str) -> None:
    """Rename `fresh` to `out`; what stood there is moved aside first and comes back if the rename fails."""
    if not out.exists():
        fresh.rename(out)
        return
    if not (out / descriptor).is_file():
        raise BundleError(f"{out}: is no {kind}, so it is not replaced; choose another folder")
    old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.old-"))
    try:
        out.rename(old / out.name)
        fresh.rename(out)
    finally:
        if not out.exists():
            (old / out.name).rename(out)
        shutil.rmtree(old, ignore_errors=True)  # not reached if the old folder could not come back


def _is_inside(name: str) -> bool:
    return len(name) <= _MAX_NAME and _PATH_PATTERN.fullmatch(name) is not None and ".." not in name


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {escape(error)}"
