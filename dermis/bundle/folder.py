"""Verified folders: a JSON descriptor lists the SHA-256 and the size of every other file.

A bundle is such a folder, and so is each of its parts (classifier, index, encoder) when it is used by itself. Folders are read
through fsspec, so a folder can be an `s3://` prefix. They are written locally, and a folder appears completely or not at
all.

A folder can be untrusted. Only regular files that its descriptor lists are opened, no more of a file is read than its
record allows, and the fields of the descriptor are checked before they are used.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Generic, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dermis.errors import BundleError, escape, quote
from dermis.files import names_below, open_regular
from dermis.strict_json import parse_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_PATH_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
_MAX_DESCRIPTOR_BYTES = 4 << 20
_MAX_FILES = 10_000
_MAX_NAME = 200
_MAX_FILE_BYTES = 1 << 36
_MAX_MEMORY_BYTES = 1 << 34  # largest file that is read into memory where the caller sets no smaller limit
_PIECE = 8 << 20

DescriptorT = TypeVar("DescriptorT", bound="DescriptorModel")
DescriptionT = TypeVar("DescriptionT", bound="PartDescription")
DescriptionT_co = TypeVar("DescriptionT_co", bound="PartDescription", covariant=True)


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
    """The fields that every descriptor has. Each kind of folder adds its own."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    format_version: int
    files: dict[str, _File] = Field(max_length=_MAX_FILES)

    @property
    def records(self) -> dict[str, FileRecord]:
        """The records of the listed files, by name."""
        return {name: FileRecord(file.sha256, file.bytes) for name, file in sorted(self.files.items())}


class PartDescription(Protocol):
    """The fields that the description of every part of a bundle has."""

    @property
    def files(self) -> Mapping[str, FileRecord]:
        """Records of the part's files without its descriptor, by name inside the part."""

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the part's descriptor."""


@dataclass(frozen=True)
class PartFormat(Generic[DescriptionT_co]):
    """A kind of folder that can be part of a bundle or be used by itself. It has its own descriptor.

    Attributes:
        name: Name of the folder inside a bundle.
        descriptor: File name of the descriptor.
        parse: Turns the bytes of a descriptor into a description. Its second argument is the name of the file for errors.
        read: Verifies a folder that is not part of a bundle and returns its description and all its files by name.
    """

    name: str
    descriptor: str
    parse: Callable[[bytes, str], DescriptionT_co]
    read: Callable[[str | Path], tuple[DescriptionT_co, dict[str, bytes]]]


@dataclass(frozen=True)
class Folder:
    """A folder to read from.

    Attributes:
        where: Path or URL as errors name it.
        kind: What the folder should hold, for errors: "bundle", "classifier", "index" or "encoder".
        descriptor: File name of its descriptor.
        fs: fsspec file system.
        root: Path of the folder in `fs`.
    """

    where: str
    kind: str
    descriptor: str
    fs: Any
    root: str

    def read_descriptor(self) -> bytes:
        """Read the descriptor without parsing it.

        Raises:
            BundleError: It is missing or far too large.
        """
        with self._open(self.descriptor) as file:
            data = _read_at_most(file, _MAX_DESCRIPTOR_BYTES + 1)
        if len(data) > _MAX_DESCRIPTOR_BYTES:
            raise BundleError(
                f"{self._place(self.descriptor)}: is larger than {_MAX_DESCRIPTOR_BYTES:,} bytes; is this the folder of "
                f"a {self.kind}?"
            )
        return data

    def read(self, name: str, record: FileRecord, *, limit: int = _MAX_MEMORY_BYTES) -> bytes:
        """Read a listed file into memory.

        Raises:
            BundleError: The file is missing, differs from its record, or is larger than `limit` bytes.
        """
        if record.bytes > limit:
            raise BundleError(
                f"{self._place(name)}: is larger than allowed ({limit:,} bytes); get the {self.kind} again"
            )
        with self._open(name, record) as file:
            data = file.read(record.bytes + 1) if self.local else _read_at_most(file, record.bytes + 1)
        if len(data) != record.bytes or hashlib.sha256(data).hexdigest() != record.sha256:
            raise self._differs(name)
        return data

    def verify(self, name: str, record: FileRecord) -> None:
        """Compare a listed file with its record, reading it in pieces.

        Raises:
            BundleError: The file is missing or differs from its record.
        """
        digest, size = hashlib.sha256(), 0
        with self._open(name, record) as file:
            while size <= record.bytes and (piece := file.read(_PIECE)):
                digest.update(piece)
                size += len(piece)
        if (digest.hexdigest(), size) != (record.sha256, record.bytes):
            raise self._differs(name)

    def read_unlisted(self, name: str, *, limit: int) -> bytes | None:
        """Read a file that no descriptor lists, such as a signature. None if there is none.

        Raises:
            BundleError: It cannot be read, or is larger than `limit` bytes.
        """
        if not exists(self.where, name):
            return None
        with self._open(name) as file:
            data = _read_at_most(file, limit + 1)
        if len(data) > limit:
            raise BundleError(f"{self._place(name)}: is larger than allowed ({limit:,} bytes); remove it")
        return data

    def check_listing(self, files: Mapping[str, FileRecord], allowed: Collection[str] = ()) -> None:
        """Compare the files that are present with those that the descriptor lists.

        Args:
            files: The listed files by name.
            allowed: Names of files that may be present and are not listed.

        Raises:
            BundleError: A file is present but not listed, or listed but not present.
        """
        try:
            names = names_below(Path(self.root)) if self.local else self._remote_names()
            present = set(itertools.islice(names, 2 * _MAX_FILES)) - {self.descriptor}
        except Exception as error:  # as in _open
            raise BundleError(f"{self.where}: cannot be listed: {_reason(error)}") from error
        present = {name for name in present if not name.endswith("/")}  # empty folders
        if extra := sorted(present - files.keys() - set(allowed)):
            names_of_some = ", ".join(escape(name) for name in extra[:5])
            raise BundleError(f"{self.where}: {self.descriptor} does not list {names_of_some}; remove these files")
        if missing := sorted(files.keys() - present):
            raise BundleError(f"{self.where}: {', '.join(missing[:5])} is missing; get the {self.kind} again")

    @property
    def local(self) -> bool:
        """Whether the folder is on a local file system."""
        from fsspec.implementations.local import LocalFileSystem

        return isinstance(self.fs, LocalFileSystem)

    def _remote_names(self) -> Iterator[str]:
        return (path.removeprefix(self.root).lstrip("/") for path in self.fs.find(self.root))

    @contextmanager
    def _open(self, name: str, record: FileRecord | None = None) -> Iterator[BinaryIO]:
        """Open a file for reading. Every error, also one inside the `with` block, becomes a BundleError."""
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
        except MemoryError as error:
            raise BundleError(f"{self._place(name)}: does not fit into memory") from error
        except Exception as error:  # every remote file system raises exceptions of its own library
            raise BundleError(f"{self._place(name)}: cannot be read: {_reason(error)}") from error

    def _place(self, name: str) -> str:
        return f"{self.where}/{name}"

    def _differs(self, name: str) -> BundleError:
        return BundleError(
            f"{self._place(name)}: differs from what {self.descriptor} says (SHA-256 or size); get the {self.kind} again"
        )


def _read_at_most(file: BinaryIO, limit: int) -> bytes:
    """Read up to `limit` bytes in pieces, because a remote file system can reserve memory for the size of one read."""
    pieces, size = [], 0
    while size < limit and (piece := file.read(min(_PIECE, limit - size))):
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)


def open_folder(location: str | Path, kind: str, descriptor: str) -> Folder:
    """Make a `Folder` of a path or an fsspec URL. Nothing is read yet.

    Raises:
        BundleError: No file system serves the URL.
    """
    import fsspec

    where = str(location).rstrip("/")
    try:
        fs, root = fsspec.core.url_to_fs(where)
    except (ValueError, ImportError, OSError) as error:
        raise BundleError(f"{where}: {error}") from None
    return Folder(where, kind, descriptor, fs, root.rstrip("/"))


def open_part(
    location: str | Path, kind: str, descriptor: str, parse: Callable[[bytes, str], DescriptionT]
) -> tuple[Folder, DescriptionT, bytes]:
    """Open the folder of a part. The files that the descriptor lists are verified when they are read.

    Args:
        location: A folder or an fsspec URL.
        kind: What the folder holds, for errors.
        descriptor: Name of the file that describes it.
        parse: Makes a description of the descriptor's bytes and of its name for errors.

    Returns:
        The folder, the description, and the bytes of the descriptor.

    Raises:
        BundleError: The descriptor is missing or malformed, or the folder has other files than it lists.
    """
    folder = open_folder(location, kind, descriptor)
    text = folder.read_descriptor()
    description = parse(text, f"{folder.where}/{descriptor}")
    folder.check_listing(description.files)
    return folder, description, text


def read_part(
    location: str | Path, kind: str, descriptor: str, parse: Callable[[bytes, str], DescriptionT]
) -> tuple[DescriptionT, dict[str, bytes]]:
    """Open the folder of a part as `open_part` does, and read and verify all of its files.

    Returns:
        The description, and the content of all files by name with the descriptor among them.

    Raises:
        BundleError: As `open_part`, or a file is missing or changed.
    """
    folder, description, text = open_part(location, kind, descriptor, parse)
    files = {name: folder.read(name, record) for name, record in description.files.items()}
    return description, {descriptor: text, **files}


def exists(location: str | Path, descriptor: str) -> bool:
    """Whether `location` has a descriptor of this file name.

    Raises:
        BundleError: It is not known, because remote storage cannot be read.
    """
    folder = open_folder(location, "", descriptor)
    path = f"{folder.root}/{descriptor}"
    if folder.local:
        return bool(folder.fs.exists(path))
    try:
        folder.fs.info(path)  # `exists` of many remote file systems is False after every error
    except (FileNotFoundError, NotADirectoryError, PermissionError):  # S3 refuses names without a file to some accounts
        return False
    except Exception as error:  # as in Folder
        raise BundleError(f"{folder.where}/{descriptor}: cannot be read: {_reason(error)}") from error
    return True


def parse_descriptor(text: bytes, where: str, version: int, model: type[DescriptorT]) -> DescriptorT:
    """Parse and check the JSON of a descriptor.

    Args:
        text: The bytes of the descriptor.
        where: Name of the file for errors.
        version: The only format version that is accepted.
        model: The fields of the descriptor.

    Raises:
        BundleError: The text is not such a descriptor or has another format version. The message names the field.
    """
    try:
        raw = parse_json(text)
    except ValueError as error:
        raise BundleError(f"{where}: is not JSON that can be used ({error}); get it again") from None
    written = raw.get("format_version") if isinstance(raw, dict) else None
    if type(written) is int and written > version:
        raise BundleError(f"{where}: has format {written}, this dermis reads up to {version}; install a newer dermis")
    if type(written) is int and 0 < written < version:
        raise BundleError(
            f"{where}: has format {written}, this dermis reads {version}; make it again with this version"
        )
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
    """Encode a value as JSON whose bytes depend on the content alone.

    Raises:
        BundleError: The value cannot be JSON. The message begins with `what`.
    """
    try:
        return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise BundleError(f"{what}: cannot be written as JSON: {error}") from None


def write_folder(
    out: Path, kind: str, descriptor: str, fields: Mapping[str, Any], files: Mapping[str, bytes], *, replace: bool
) -> None:
    """Write a folder with a descriptor. The folder appears completely or not at all.

    Args:
        out: Path of the folder.
        kind: What the folder holds, for errors.
        descriptor: File name of the descriptor.
        fields: Fields of the descriptor without `files`, which is added.
        files: Content of the other files, by name.
        replace: Whether an existing folder that has such a descriptor is replaced.

    Raises:
        BundleError: `out` exists and may not be replaced, a name is not allowed, or the folder cannot be written.
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


def write_part(
    out: str | Path,
    kind: str,
    descriptor: str,
    version: int,
    description: DataclassInstance,
    files: Mapping[str, bytes],
    *,
    replace: bool,
) -> None:
    """Write the folder of a part. The folder appears completely or not at all.

    Args:
        out: Path of the folder.
        kind: What the folder holds, for errors.
        descriptor: File name of the descriptor.
        version: Format version of the descriptor.
        description: Its fields. `files` and `digest` are ignored: they follow from the files.
        files: Content of the other files, by name.
        replace: Whether an existing folder that has such a descriptor is replaced.

    Raises:
        BundleError: As `write_folder`.
    """
    fields = asdict(description)
    del fields["files"], fields["digest"]
    write_folder(Path(out), kind, descriptor, {"format_version": version, **fields}, files, replace=replace)


def check_listed(files: Mapping[str, FileRecord], names: Sequence[str], where: str, kind: str) -> None:
    """Check that a descriptor lists these files.

    Raises:
        BundleError: It does not list one of them. The message begins with `where`, the name of the descriptor.
    """
    for name in names:
        if name not in files:
            raise BundleError(f"{where}: files does not list {name}; get the {kind} again")


def _put(fresh: Path, out: Path, kind: str, descriptor: str) -> None:
    """Rename `fresh` to `out`. A folder that exists there is moved aside first and restored if the rename fails."""
    if not out.exists():
        fresh.rename(out)
        return
    if not (out / descriptor).is_file():
        raise BundleError(f"{out}: contains no {descriptor}, so it is not replaced; choose another folder")
    old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.old-"))
    try:
        out.rename(old / out.name)
        fresh.rename(out)
    finally:
        if not out.exists():
            (old / out.name).rename(out)
        shutil.rmtree(old, ignore_errors=True)  # not reached if the old folder could not be restored


def _is_inside(name: str) -> bool:
    return len(name) <= _MAX_NAME and _PATH_PATTERN.fullmatch(name) is not None and ".." not in name


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {escape(error)}"
