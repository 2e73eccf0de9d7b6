"""Downloading a dataset's files as flows: resuming, verified, safe against what a service might send."""

from __future__ import annotations

import csv
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx

from dermis_client import _datasets, _names, _requests, _retry
from dermis_client._flow import (
    Api,
    D,
    Flow,
    Request,
    Stream,
    close,
    compute,
    connection_error,
    open_stream,
    read,
    sleep,
)
from dermis_client._foreign import MOST_LIST_BYTES, load_json, one_line
from dermis_client._partfile import PartFile, sha256_of
from dermis_client.errors import APIStatusError, DownloadError, IntegrityError
from dermis_client.models import DatasetFile, Manifest

MANIFEST = "manifest.json"
METADATA = "metadata.csv"
STALL = 60.0  # seconds without a byte before a download counts as cut


@dataclass(frozen=True)
class Download:
    """A downloaded dataset. files: every file's path, in the service's order; bytes_received: over the network, now.

    images: how many images the files hold, by metadata.csv; None if that is missing or cannot be read.
    """

    folder: Path
    files: tuple[Path, ...]
    bytes_received: int
    images: int | None = None


@dataclass(frozen=True)
class DownloadProgress:
    """How far a download is; what lay in the folder already counts as done."""

    files_done: int
    files_total: int
    bytes_done: int
    bytes_total: int


@dataclass
class Tally:
    """Adds up progress from several files at once; threads may share it."""

    report: Callable[[DownloadProgress], None]
    files_total: int = 0
    bytes_total: int = 0
    files_done: int = 0
    bytes_done: int = 0
    received: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, *, files: int = 0, size: int = 0, received: int = 0) -> None:
        with self._lock:
            self.files_done += files
            self.bytes_done += size
            self.received += received
            self.report(DownloadProgress(self.files_done, self.files_total, self.bytes_done, self.bytes_total))


@dataclass(frozen=True)
class Plan:
    """What download() has to do, after a look at the service's list and at the folder."""

    dataset_id: str
    folder: Path
    files: tuple[DatasetFile, ...]
    missing: tuple[DatasetFile, ...]
    tally: Tally

    def result(self) -> Download:
        paths = tuple(self.folder / file.name for file in self.files)
        return Download(self.folder, paths, self.tally.received, _rows(self.folder / METADATA))


def prepare(
    api: Api[D], dataset_id: str, folder: Path, overwrite: bool, report: Callable[[DownloadProgress], None]
) -> Flow[Plan]:
    """List the files, check their names, look what the folder has, fetch the manifest and compare it with the list."""
    files = yield from _datasets.files(api, dataset_id)
    _names.check((file.name for file in files), f"the service's list for {dataset_id}")
    manifest = next((file for file in files if file.name == MANIFEST), None)
    if manifest is not None and manifest.bytes > MOST_LIST_BYTES:
        raise IntegrityError(f"the {MANIFEST} of {dataset_id} has {_amount(manifest.bytes)}: too large", name=MANIFEST)
    if manifest is None:
        raise IntegrityError(f"the service lists no {MANIFEST} for {dataset_id}", name=MANIFEST)
    missing = yield from compute(partial(_survey, folder, files, overwrite))
    tally = Tally(report, files_total=len(files), bytes_total=sum(file.bytes for file in files))
    tally.add(
        files=len(files) - len(missing),
        size=tally.bytes_total - sum(file.bytes for file in missing),
    )
    plan = Plan(dataset_id, folder, tuple(files), tuple(file for file in missing if file != manifest), tally)
    # The manifest comes first: it is checked before the large files are fetched, and marks the folder as its own.
    if manifest in missing:
        yield from fetch(api, plan, manifest)
    yield from compute(partial(_compare, folder / MANIFEST, files))
    return plan


def _survey(folder: Path, files: list[DatasetFile], overwrite: bool) -> list[DatasetFile]:
    """The files that the folder does not hold intact. Refuses to replace files that are not this dataset's."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        differing = [file for file in files if not _holds(folder / file.name, file)]
        ours = any(file.name == MANIFEST for file in files if file not in differing)
        # Looked at again: another download into this folder may have put a file there since.
        there_now = [file for file in differing if (folder / file.name).exists()]
        foreign = [file.name for file in there_now if not _holds(folder / file.name, file)]
        if foreign and not ours and not overwrite:
            raise DownloadError(
                f"{folder} already has another {foreign[0]}: choose another folder, or say that it may be overwritten"
            )
        there = sum(_size(folder / f"{file.name}.part") for file in differing)
        needed = sum(file.bytes for file in differing) - there
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _disk_error(folder, error) from error
    if needed > free:
        raise DownloadError(f"{folder}: {_amount(needed)} are needed, {_amount(free)} are free")
    return differing


def _rows(table: Path) -> int | None:
    """Rows of a CSV file below its header; None if it cannot be read."""
    try:
        with table.open(newline="", encoding="utf-8") as file:
            return max(sum(1 for row in csv.reader(file) if row) - 1, 0)
    except (OSError, ValueError, csv.Error):
        return None


def _holds(path: Path, file: DatasetFile) -> bool:
    return path.is_file() and _size(path) == file.bytes and sha256_of(path) == file.sha256


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _compare(path: Path, files: list[DatasetFile]) -> None:
    """The manifest must name the same files, sizes and hashes as the service's list."""
    try:
        manifest = Manifest.model_validate(load_json(path.read_bytes()))
    except OSError as error:
        raise _disk_error(path, error) from error
    except ValueError as error:
        raise IntegrityError(f"{MANIFEST} cannot be read ({one_line(str(error))})", name=MANIFEST) from error
    named = {file.name: file for file in manifest.files}
    listed = {file.name: file for file in files if file.name != MANIFEST}
    for name in sorted(named.keys() ^ listed.keys()):
        where, lacks = (MANIFEST, "the service's list") if name in named else ("the service's list", MANIFEST)
        raise IntegrityError(f"{one_line(name, 120)} stands in {where} but not in {lacks}", name=name)
    for name, file in listed.items():
        if (named[name].bytes, named[name].sha256) != (file.bytes, file.sha256):
            raise IntegrityError(
                f"{name}: {MANIFEST} and the service's list give different sizes or hashes",
                name=name,
                expected=named[name].sha256,
                actual=file.sha256,
            )


def fetch(api: Api[D], plan: Plan, file: DatasetFile) -> Flow[None]:
    """Go on from NAME.part, verify, put it in place. If this fails, what has arrived stays for the next try."""
    target = plan.folder / file.name
    part: PartFile | None = None
    try:
        part = yield from compute(partial(PartFile, target, file.bytes))
        plan.tally.add(size=part.size)
        yield from _complete(api, plan, file, part)
        if part.hexdigest() != file.sha256 and part.resumed:
            # The beginning was of something else (an older dataset in the same folder): once more, from the start.
            _restart(part, plan.tally)
            yield from _complete(api, plan, file, part)
        if part.hexdigest() != file.sha256:
            actual = part.hexdigest()
            part.discard()
            raise IntegrityError(
                f"{file.name}: the bytes that arrived have SHA-256 {actual[:12]}..., expected {file.sha256[:12]}...",
                name=file.name,
                expected=file.sha256,
                actual=actual,
            )
        part.publish()
    except OSError as error:
        raise _disk_error(target, error) from error
    finally:
        if part is not None:
            part.close()
    plan.tally.add(files=1)


def _complete(api: Api[D], plan: Plan, file: DatasetFile, part: PartFile) -> Flow[None]:
    """Read until the part has all its bytes, going on after every cut; only so many cuts in a row without a byte."""
    fruitless = 0
    while part.size < file.bytes:
        before = part.size
        try:
            stream = yield from _open_rest(api, plan, file, part)
            while piece := (yield from read(stream)):
                if part.size + len(piece) > file.bytes:
                    part.discard()
                    raise IntegrityError(f"{file.name}: more than its {file.bytes} bytes arrived", name=file.name)
                part.write(piece)
                plan.tally.add(size=len(piece), received=len(piece))
            yield from close(stream)
            if part.size == file.bytes:
                return
            reason: Exception | None = None
        except httpx.RequestError as error:
            reason = connection_error(error, f"file {file.name}")
        fruitless = 0 if part.size > before else fruitless + 1
        if fruitless > api.max_retries:
            raise DownloadError(
                f"{file.name}: the connection keeps breaking after {_amount(part.size)} of {_amount(file.bytes)}; "
                "download again to go on from there"
            ) from reason
        yield from sleep(_retry.delay(fruitless) or 0.0)


def _open_rest(api: Api[D], plan: Plan, file: DatasetFile, part: PartFile) -> Flow[Stream]:
    """Open the rest of a file; if the service sends the whole instead, the part starts anew."""
    # "identity": ranges, sizes and hashes are those of the file, not of a compressed form of it.
    headers = {"Accept": "*/*", "Accept-Encoding": "identity"}
    if part.size:
        headers |= {"Range": f"bytes={part.size}-", "If-Range": f'"{file.sha256}"'}
    path = _requests.dataset_path(plan.dataset_id, "files", file.name)
    try:
        stream = yield from open_stream(Request("GET", path, headers=headers, read_timeout=STALL), api.max_retries)
    except APIStatusError as error:
        if error.status_code != 416 or not part.size:
            raise
        _restart(part, plan.tally)
        return (yield from _open_rest(api, plan, file, part))
    response = stream.response
    if response.status_code == 206 and part.size:
        if _range_start(response) != (part.size, file.bytes):
            raise IntegrityError(f"{file.name}: the service sent another range than asked for", name=file.name)
    elif response.status_code == 200:
        _restart(part, plan.tally)
        length = response.headers.get("content-length")
        if length is not None and length != str(file.bytes):
            raise IntegrityError(f"{file.name}: has {length} bytes there, {file.bytes} were listed", name=file.name)
    else:
        raise IntegrityError(f"{file.name}: the service answered {response.status_code} to a download", name=file.name)
    return stream


def _range_start(response: httpx.Response) -> tuple[int, int] | None:
    """(first byte, whole size) of a 206 answer."""
    match = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})", response.headers.get("content-range", ""))
    return (int(match[1]), int(match[2])) if match else None


def _restart(part: PartFile, tally: Tally) -> None:
    tally.add(size=-part.size)
    part.restart()


def _disk_error(path: Path, error: OSError) -> DownloadError:
    return DownloadError(f"{path}: cannot be written ({error.strerror or error})")


def _amount(size: int) -> str:
    """A size for people: bytes below 10 kB, else kB, MB or GB with one decimal."""
    if size < 10_000:
        return f"{size} bytes"
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"
