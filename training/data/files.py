"""List the files of a folder or zip: images, tables, archives, and files that are left out, with the reason.

Links are followed, and files that operating systems add are ignored. No image is opened.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import tarfile
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO

from dermis.errors import DataError, escape
from dermis.image_reading import IMAGE_SUFFIXES, is_image_header

TABLE_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tab")
# Files of data sets that are not images, so that no image is lost when they are left out.
_TEXT_SUFFIXES = frozenset({
    ".txt", ".md", ".rst", ".json", ".jsonl", ".yaml", ".yml", ".xml", ".html", ".htm", ".pdf", ".doc", ".docx", ".xls",
    ".xlsx", ".ods", ".py", ".ipynb", ".log", ".bib", ".toml", ".sha256", ".md5", ".js", ".css",
})  # fmt: skip
_ARCHIVE_SUFFIXES = frozenset({".zip", ".tar", ".parquet"})
_SYSTEM_NAMES = frozenset(
    {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "lost+found", "__pycache__"}
)
_HEADER_BYTES = 32
_MAX_PATH_LENGTH = 1024
_MAX_MEMBER_BYTES = 512 << 20  # of a file in a zip, decompressed

# Reasons why a file is not read, as reports show them.
SYSTEM_FILE = "hidden or system file"
NOT_AN_IMAGE = "not an image"
NOT_READABLE = "a format that cannot be read"
BROKEN_LINK = "link to a file that does not exist"
TEXT_LINK = "a link that was saved as text, as on a system without links"
SPECIAL_FILE = "not a regular file"
ARCHIVE = "an archive that is not read; unpack it"


@dataclass(frozen=True)
class ImageFile:
    """Place of an image: a file, or a member of an archive."""

    path: Path
    member: str = ""  # name in the zip or tar file at `path`, or row number in the Parquet file

    @property
    def name(self) -> str:
        return PurePosixPath(self.member).name if self.member else self.path.name

    def read_bytes(self) -> bytes:
        """Read the content.

        Raises:
            DataError: It cannot be read.
        """
        try:
            if not self.member:
                return self.path.read_bytes()
            changed, process = self.path.stat().st_mtime_ns, os.getpid()
            if self.path.suffix == ".parquet":
                return _parquet_images(self.path, changed)[int(self.member)]
            if self.path.suffix == ".tar":
                start, size = _tar_members(self.path, changed)[self.member]
                with self.path.open("rb") as file:
                    file.seek(start)
                    return file.read(size)
            archive = _open_zip(self.path, changed, process)
            if archive.getinfo(self.member).file_size > _MAX_MEMBER_BYTES:  # no more than this size is decompressed
                raise ValueError(f"it has more than {_MAX_MEMBER_BYTES:,} bytes")
            return archive.read(self.member)
        except (
            OSError,
            LookupError,
            EOFError,
            ValueError,
            zipfile.BadZipFile,
            tarfile.TarError,
            RuntimeError,
        ) as error:
            raise DataError(f"{self.path / self.member}: cannot be read ({error})") from error

    def open(self) -> IO[bytes]:
        """Open the content of a file or of a member of a zip or tar for reading in pieces.

        Raises:
            OSError: It cannot be opened.
            LookupError, RuntimeError, zipfile.BadZipFile: The zip or its member cannot be read.
            DataError: The member of another archive cannot be read.
        """
        if not self.member:
            return self.path.open("rb")
        if self.path.suffix in (".parquet", ".tar"):
            return io.BytesIO(self.read_bytes())
        return _open_zip(self.path, self.path.stat().st_mtime_ns, os.getpid()).open(self.member)

    def stamp(self) -> str:
        """Place, size and time of the last change as a text, which changes when the file does."""
        status = self.path.stat()
        place = str(self.path.resolve()).encode(errors="backslashreplace").decode()
        return f"{place}\t{self.member}\t{status.st_size}\t{status.st_mtime_ns}"


@dataclass(frozen=True)
class Listing:
    """The files of a folder or zip by their path in it, with slashes."""

    root: Path
    images: Mapping[str, ImageFile]
    tables: Mapping[str, ImageFile]
    archives: Mapping[str, ImageFile]
    ignored: Mapping[str, str]  # file that is left out -> reason
    empty_folders: tuple[str, ...] = ()
    files: int | None = None  # number of files without images inside archives, if these are listed
    _index: dict[str, list[str]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def file_count(self) -> int:
        """Number of files, without those of the operating system."""
        if self.files is not None:
            return self.files
        return len(self.images) + len(self.tables) + len(self.archives) + len(self.unreadable) + len(self.other_files)

    @property
    def unreadable(self) -> dict[str, str]:
        """Files that may be images and cannot be read, with the reason."""
        return {name: why for name, why in self.ignored.items() if why not in (SYSTEM_FILE, NOT_AN_IMAGE)}

    @property
    def other_files(self) -> list[str]:
        """Files that are not images: texts, documents."""
        return [name for name, why in self.ignored.items() if why == NOT_AN_IMAGE]

    def ids(self) -> dict[str, str]:
        """Id of each image: its name without suffix or, if names repeat, its path without suffix; with suffix if needed."""
        ids = {path: PurePosixPath(path).stem for path in self.images}
        for longer in (without_suffix, str):
            repeated = {name for name, count in Counter(ids.values()).items() if count > 1}
            if not repeated:
                break
            # Paths for all images, so that an id does not depend on whether another image has the same name.
            ids = {
                path: longer(path) if longer is without_suffix or name in repeated else name
                for path, name in ids.items()
            }
        return ids

    def find(self, name: str) -> list[str]:
        """Paths of the images that a name in a table can mean: a path, its end, or a file name, with or without suffix."""
        if not self._index:
            for path in self.images:
                composed = unicodedata.normalize("NFC", path)  # macOS writes an umlaut as two characters
                last = PurePosixPath(composed).name
                for key in {composed, without_suffix(composed), last, without_suffix(last)}:
                    self._index.setdefault(key, []).append(path)
                    self._index.setdefault("\0" + key.casefold(), []).append(path)
        composed = unicodedata.normalize("NFC", name.replace("\\", "/"))
        steps = [part for part in composed.split("/") if part not in ("", ".", "..")]
        for prefix in ("", "\0"):
            for start in range(len(steps)):
                tail = "/".join(steps[start:])
                tail = tail.casefold() if prefix else tail
                for key in dict.fromkeys((tail, without_suffix(tail))):
                    if paths := self._index.get(prefix + key):
                        exact = [path for path in paths if unicodedata.normalize("NFC", path) == tail]
                        return exact or paths
        return []


def has_image_suffix(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def plain_id(value: str) -> str:
    """Name of an image in a table without folders and suffix."""
    name = value.strip().replace("\\", "/").rstrip("/").rpartition("/")[2]
    return PurePosixPath(name).stem if has_image_suffix(name) else name


def list_files(path: Path) -> Listing:
    """List a folder or a zip.

    Raises:
        DataError: It, or a folder in it, cannot be listed.
    """
    images: dict[str, ImageFile] = {}
    tables: dict[str, ImageFile] = {}
    archives: dict[str, ImageFile] = {}
    ignored: dict[str, str] = {}
    empty: list[str] = []
    for name, file, why in _entries(path, empty):
        suffix = PurePosixPath(name).suffix.lower()
        if why:
            ignored[name] = why
        elif suffix in IMAGE_SUFFIXES:
            images[name] = file
        elif name.lower().endswith(TABLE_SUFFIXES):
            tables[name] = file
        elif suffix in _ARCHIVE_SUFFIXES:
            archives[name] = file
        elif suffix in _TEXT_SUFFIXES:
            ignored[name] = NOT_AN_IMAGE
        else:  # no known suffix: the content decides
            header = _header(file)
            if is_image_header(header):
                images[name] = file
            elif not suffix and _is_text_link(file):
                ignored[name] = TEXT_LINK
            elif not suffix and _is_text(header):
                # HAM10000_metadata of Harvard is a CSV without suffix. Other texts, as LICENSE, are excluded later.
                tables[name] = file
            elif not header:
                ignored[name] = NOT_AN_IMAGE if not suffix else NOT_READABLE
            else:
                ignored[name] = NOT_READABLE
    return Listing(path, images, tables, archives, ignored, tuple(empty))


def list_members(archive: ImageFile, *, tables: bool = False) -> dict[str, ImageFile]:
    """List the images inside a zip, tar or Parquet file of a folder by their names in it.

    Args:
        archive: The file.
        tables: List the tables instead, which only a zip can have.

    Raises:
        DataError: It cannot be read.
    """
    path = archive.path
    if archive.member:
        raise DataError(f"{path / archive.member}: an archive inside a zip is not read; unpack it")
    try:
        if tables and path.suffix != ".zip":
            return {}
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            column = pq.ParquetFile(path).read(columns=["image.path"]).column("image").to_pylist()
            return {str(image["path"]): ImageFile(path, str(row)) for row, image in enumerate(column)}
        if path.suffix == ".tar":
            names = list(_tar_members(path, path.stat().st_mtime_ns))
        else:
            with zipfile.ZipFile(path) as opened:
                names = [info.filename for info in opened.infolist() if not info.is_dir()]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise DataError(f"{path}: cannot be read ({error}); remove it or download it again") from error
    members: dict[str, ImageFile] = {}
    for name in names:
        plain = _member_path(name)
        wanted = plain.lower().endswith(TABLE_SUFFIXES) if tables else has_image_suffix(plain)
        if wanted and not _is_system(plain):
            if plain in members:
                raise DataError(f"{path}: has two files {escape(plain)}; pack it again with one of them")
            members[plain] = ImageFile(path, name)
    return members


def _entries(path: Path, empty: list[str]) -> Iterator[tuple[str, ImageFile, str]]:
    """Path and file in the order of the paths, with the reason to leave the file out ("" to read it)."""
    if path.is_dir():
        yield from _walk(path, "", (), empty)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path}: is not a readable zip ({error})") from error
    names = Counter(_member_path(info.filename) for info in infos)
    for info in sorted(infos, key=lambda each: each.filename):
        name = _member_path(info.filename)
        if names[name] > 1 and not _is_system(name):
            raise DataError(f"{path}: has two files {escape(name)}; pack it again with one of them")
        yield name, ImageFile(path, info.filename), SYSTEM_FILE if _is_system(name) else ""


def _walk(folder: Path, prefix: str, above: Sequence[str], empty: list[str]) -> Iterator[tuple[str, ImageFile, str]]:
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that contains it
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); allow reading it or leave it out") from error
    if not entries and prefix:
        empty.append(prefix.rstrip("/"))
    for entry in entries:
        name, file = prefix + _printable(entry.name), ImageFile(folder / entry.name)
        if _is_system(entry.name):
            if not entry.is_dir():
                yield name, file, SYSTEM_FILE
            continue
        try:
            mode = os.stat(file.path).st_mode  # noqa: PTH116 - follows a link
        except OSError:
            yield name, file, BROKEN_LINK
            continue
        if stat.S_ISDIR(mode):
            yield from _walk(file.path, f"{name}/", (*above, real), empty)
        else:
            yield name, file, "" if stat.S_ISREG(mode) else SPECIAL_FILE


def _printable(name: str) -> str:
    """Decode a name that is not UTF-8 as Latin-1, the encoding of older systems, as tables and reports are UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return os.fsencode(name).decode("latin-1")
    return name


def _member_path(name: str) -> str:
    """Path of a member with slashes and without "./". UTF-8 that the zip does not declare (see cp437) is decoded."""
    if not name.isascii():
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode()
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", ".", ".."))


def _is_system(name: str) -> bool:
    return any(part.startswith((".", "~$")) or part.casefold() in _SYSTEM_NAMES for part in name.split("/"))


def _header(file: ImageFile) -> bytes:
    try:
        with file.open() as opened:
            return opened.read(_HEADER_BYTES)
    except (OSError, EOFError, LookupError, RuntimeError, zlib.error, zipfile.BadZipFile):
        return b""


def _is_text_link(file: ImageFile) -> bool:
    """Whether a file contains only a path, as git and some archivers write links on systems without links."""
    if file.member or file.path.stat().st_size > _MAX_PATH_LENGTH:
        return False
    text = file.read_bytes()
    return _is_text(text) and b"/" in text and not set(text.strip()) & set(b"\r\n\t,;|")


def _is_text(header: bytes) -> bool:
    return bool(header) and all(byte >= 32 or byte in b"\t\r\n" for byte in header)


def without_suffix(path: str) -> str:
    return PurePosixPath(path).with_suffix("").as_posix() if has_image_suffix(path) else path


@lru_cache(maxsize=8)
def _open_zip(path: Path, changed: int, process: int) -> zipfile.ZipFile:
    """One handle for each process: threads can share it, but forked processes cannot. `changed` is part of the key only."""
    return zipfile.ZipFile(path)


@lru_cache(maxsize=64)
def _tar_members(path: Path, changed: int) -> dict[str, tuple[int, int]]:
    """Start and size of each file, as threads cannot share a handle of tarfile."""
    with tarfile.open(path, "r:") as tar:
        return {member.name: (member.offset_data, member.size) for member in tar if member.isfile()}


@lru_cache(maxsize=2)
def _parquet_images(path: Path, changed: int) -> list[bytes]:
    import pyarrow.parquet as pq

    column = pq.ParquetFile(path).read(columns=["image.bytes"]).column("image").to_pylist()
    return [image["bytes"] for image in column]
