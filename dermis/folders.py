"""Folders that are verified as a whole: a JSON descriptor lists SHA-256 and size of every other file.

Bundles and classifiers are such folders. Reading goes through fsspec, so a folder may be an `s3://` prefix; writing is
local, and a folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dermis.errors import BundleError

_PATH_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
_MAX_DESCRIPTOR_BYTES = 4 << 20
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
    bytes: int = Field(ge=0)


class DescriptorModel(BaseModel):
    """What every descriptor holds; that of a bundle or a classifier adds its own fields."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    format_version: int
    files: dict[str, _File]

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
        return self._read(self.descriptor, limit=_MAX_DESCRIPTOR_BYTES)

    def read(self, name: str, record: FileRecord) -> bytes:
        """A listed file. BundleError if it is missing or differs from its record."""
        data = self._read(name, limit=record.bytes)
        if len(data) != record.bytes or hashlib.sha256(data).hexdigest() != record.sha256:
            raise BundleError(
                f"{self.where}/{name}: differs from what {self.descriptor} says (SHA-256); get the {self.kind} again"
            )
        return data

    def verify(self, name: str, record: FileRecord) -> None:
        """BundleError if a listed file is missing or differs from its record; it is read piece by piece and not kept."""
        digest, size = hashlib.sha256(), 0
        try:
            with self.fs.open(f"{self.root}/{name}", "rb") as file:
                while piece := file.read(_PIECE):
                    digest.update(piece)
                    size += len(piece)
        except FileNotFoundError:
            raise BundleError(f"{self.where}: {name} is missing; get the {self.kind} again") from None
        except Exception as error:  # as in _read
            raise BundleError(f"{self.where}/{name}: cannot be read: {_reason(error)}") from error
        if (digest.hexdigest(), size) != (record.sha256, record.bytes):
            raise BundleError(
                f"{self.where}/{name}: differs from what {self.descriptor} says (SHA-256); get the {self.kind} again"
            )

    def check_listing(self, files: Mapping[str, FileRecord]) -> None:
        """BundleError if a file is there that is not listed, or listed and not there."""
        try:
            found = {path.removeprefix(self.root).lstrip("/") for path in self.fs.find(self.root)} - {self.descriptor}
        except Exception as error:  # as in _read
            raise BundleError(f"{self.where}: cannot be listed: {_reason(error)}") from error
        if extra := sorted(found - files.keys()):
            names = ", ".join(extra[:5])
            raise BundleError(f"{self.where}: {self.descriptor} does not list {names}; remove what is no part of it")
        if missing := sorted(files.keys() - found):
            raise BundleError(f"{self.where}: {', '.join(missing[:5])} is missing; get the {self.kind} again")

    def _read(self, name: str, limit: int) -> bytes:
        try:
            with self.fs.open(f"{self.root}/{name}", "rb") as file:
                data: bytes = file.read(limit + 1)
        except FileNotFoundError:
            hint = f"is this the folder of a {self.kind}?" if name == self.descriptor else f"get the {self.kind} again"
            raise BundleError(f"{self.where}: {name} is missing; {hint}") from None
        except Exception as error:  # every remote file system raises exceptions of its own library
            raise BundleError(f"{self.where}/{name}: cannot be read: {_reason(error)}") from error
        if len(data) > limit:
            raise BundleError(
                f"{self.where}/{name}: is larger than it may be ({limit:,} bytes); get the {self.kind} again"
            )
        return data


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
        raw = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: is not JSON ({error}); get it again") from None
    found = raw.get("format_version") if isinstance(raw, dict) else None
    if isinstance(found, int) and found > version:
        raise BundleError(f"{where}: has format {found}, this dermis reads up to {version}; install a newer dermis")
    try:
        descriptor = model.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the document"
        raise BundleError(f"{where}: {field}: {first['msg']}") from None
    if descriptor.format_version != version:
        raise BundleError(f"{where}: format_version must be {version}")
    for name in descriptor.files:
        if not _is_inside(name) or name == where.rsplit("/", 1)[-1]:
            raise BundleError(f"{where}: files: {name!r} is not a file name inside the folder")
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
    return _PATH_PATTERN.fullmatch(name) is not None and ".." not in name


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
