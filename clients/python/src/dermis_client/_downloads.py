"""Flows that download a dataset's files: resumable, verified, and safe against a hostile service."""

from __future__ import annotations

import csv
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from dermis_client import _retry
from dermis_client._files import PartFile, check_names, sha256_of
from dermis_client._flow import (
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
from dermis_client._loading import hf_dataset, torch_dataset
from dermis_client._notebook import table
from dermis_client._requests import job_path, whole
from dermis_client._untrusted import MAX_LIST_BYTES, load_json, one_line
from dermis_client.errors import APIStatusError, DownloadError, IntegrityError
from dermis_client.models import DatasetFile, Manifest

if TYPE_CHECKING:
    from dermis_client.torch import SyntheticDataset

MANIFEST = "manifest.json"
METADATA = "metadata.csv"
STALL_TIMEOUT = 60.0  # seconds without a byte before the connection is considered broken


@dataclass(frozen=True)
class Download:
    """A downloaded dataset.

    Attributes:
        folder: The folder of the files.
        files: Path of every file, in the service's order.
        bytes_received: Bytes that this call received over the network.
        images: Number of images according to metadata.csv; None if that file is missing or cannot be read.
    """

    folder: Path
    files: tuple[Path, ...]
    bytes_received: int
    images: int | None = None

    def to_torch(
        self, *, transform: Callable[[Any], Any] | None = None, class_names: Sequence[str] | None = None
    ) -> SyntheticDataset:
        """Open the images and labels as a `dermis_client.torch.SyntheticDataset`: pip install "dermis-client[torch]".

        Args:
            transform: Makes the item of a PIL image in RGB; by default a float tensor [3, H, W] between 0 and 1.
            class_names: The classes in the order of the labels; by default that of the model.

        Raises:
            DermisError: PyTorch is not installed.
            InvalidRequestError: The dataset does not have the format imagefolder.
            IntegrityError: The archive is damaged.
        """
        return torch_dataset(self.folder, {"transform": transform, "class_names": class_names})

    def to_hf(self, **options: Any) -> Any:
        """Load the images and all columns with `datasets.load_dataset`: pip install "dermis-client[hf]".

        Args:
            options: Options of `load_dataset`, such as cache_dir. `split` is "train" by default.

        Returns:
            A `datasets.Dataset` with the columns `image` and `label` (with its class names) and those of metadata.csv.

        Raises:
            DermisError: The library datasets is not installed.
            IntegrityError: It cannot load the files.
        """
        return hf_dataset(self.folder, options)

    def _repr_html_(self) -> str:
        """The download in a notebook."""
        rows = {
            "folder": self.folder,
            "files": len(self.files),
            "images": "unknown" if self.images is None else self.images,
        }
        return table(rows)


@dataclass(frozen=True)
class DownloadProgress:
    """Progress of a download. Files and bytes that were already in the folder count as done."""

    files_done: int
    files_total: int
    bytes_done: int
    bytes_total: int


@dataclass
class Tally:
    """Sums up the progress of several files. Threads can share it."""

    report: Callable[[DownloadProgress], None]
    files_total: int = 0
    bytes_total: int = 0
    files_done: int = 0
    bytes_done: int = 0
    received: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, *, files: int = 0, size: int = 0, received: int = 0) -> None:
        """Add files, bytes on disk and bytes received, and report the sum."""
        with self._lock:
            self.files_done += files
            self.bytes_done += size
            self.received += received
            self.report(DownloadProgress(self.files_done, self.files_total, self.bytes_done, self.bytes_total))


@dataclass(frozen=True)
class Plan:
    """The work of one download.

    Attributes:
        dataset_id: The dataset.
        folder: The target folder.
        files: All files of the dataset.
        missing: Those that remain to be fetched.
        tally: Sums up the progress.
    """

    dataset_id: str
    folder: Path
    files: tuple[DatasetFile, ...]
    missing: tuple[DatasetFile, ...]
    tally: Tally

    def result(self) -> Download:
        """Return the result of the finished download."""
        paths = tuple(self.folder / file.name for file in self.files)
        return Download(self.folder, paths, self.tally.received, _row_count(self.folder / METADATA))


def worker_count(parallel: int) -> int:
    """Return the number of simultaneous downloads, 1 to 32.

    Raises:
        InvalidRequestError: It is not a whole number.
    """
    return min(max(whole("parallel", parallel), 1), 32)


def prepare(
    dataset_id: str,
    files: list[DatasetFile],
    folder: Path,
    *,
    overwrite: bool,
    max_retries: int,
    report: Callable[[DownloadProgress], None],
) -> Flow[Plan]:
    """Check file names, determine which files the folder lacks, fetch the manifest and compare it with the list.

    Args:
        dataset_id: The dataset.
        files: The service's list of its files.
        folder: The target folder, which is created.
        overwrite: Whether files of another dataset in the folder may be replaced.
        max_retries: Connections in a row without a byte before giving up.
        report: Called with the progress.

    Raises:
        DownloadError: The folder cannot be written, is too small, or has files of another dataset.
        IntegrityError: The list is not safe, or the manifest differs from it.
    """
    check_names((file.name for file in files), f"the service's list for {dataset_id}")
    manifest = next((file for file in files if file.name == MANIFEST), None)
    if manifest is not None and manifest.bytes > MAX_LIST_BYTES:
        raise IntegrityError(f"the {MANIFEST} of {dataset_id} has {_amount(manifest.bytes)}: too large", name=MANIFEST)
    if manifest is None:
        raise IntegrityError(f"the service lists no {MANIFEST} for {dataset_id}", name=MANIFEST)
    missing = yield from compute(partial(_missing_files, folder, files, overwrite))
    tally = Tally(report, files_total=len(files), bytes_total=sum(file.bytes for file in files))
    tally.add(
        files=len(files) - len(missing),
        size=tally.bytes_total - sum(file.bytes for file in missing),
    )
    plan = Plan(dataset_id, folder, tuple(files), tuple(file for file in missing if file != manifest), tally)
    # The manifest is fetched first: it is checked before large files are fetched, and shows which dataset the folder has.
    if manifest in missing:
        yield from fetch(plan, manifest, max_retries)
    yield from compute(partial(_compare_manifest, folder / MANIFEST, files))
    return plan


def _missing_files(folder: Path, files: list[DatasetFile], overwrite: bool) -> list[DatasetFile]:
    """Return the files that the folder lacks or has with other content. Files of another dataset are refused."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        differing = [file for file in files if not _is_intact(folder / file.name, file)]
        same_dataset = any(file.name == MANIFEST for file in files if file not in differing)
        # Checked again: another download into this folder may have completed a file in the meantime.
        existing = [file for file in differing if (folder / file.name).exists()]
        foreign = [file.name for file in existing if not _is_intact(folder / file.name, file)]
        if foreign and not same_dataset and not overwrite:
            raise DownloadError(
                f"{folder} already has another {foreign[0]}: choose another folder, or allow it to be overwritten"
            )
        partial_bytes = sum(_size(folder / f"{file.name}.part") for file in differing)
        needed = sum(file.bytes for file in differing) - partial_bytes
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _disk_error(folder, error) from error
    if needed > free:
        raise DownloadError(f"{folder}: {_amount(needed)} are needed, {_amount(free)} are free")
    return differing


def _row_count(table: Path) -> int | None:
    """Return the number of rows of a CSV file, without its header; None if it cannot be read."""
    try:
        with table.open(newline="", encoding="utf-8") as file:
            return max(sum(1 for row in csv.reader(file) if row) - 1, 0)
    except (OSError, ValueError, csv.Error):
        return None


def _is_intact(path: Path, file: DatasetFile) -> bool:
    return path.is_file() and _size(path) == file.bytes and sha256_of(path) == file.sha256


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _compare_manifest(path: Path, files: list[DatasetFile]) -> None:
    """Raise IntegrityError unless the manifest has the same names, sizes and hashes as the service's list."""
    try:
        manifest = Manifest.model_validate(load_json(path.read_bytes()))
    except OSError as error:
        raise _disk_error(path, error) from error
    except ValueError as error:
        raise IntegrityError(f"{MANIFEST} cannot be read ({one_line(str(error))})", name=MANIFEST) from error
    in_manifest = {file.name: file for file in manifest.files}
    listed = {file.name: file for file in files if file.name != MANIFEST}
    for name in sorted(in_manifest.keys() ^ listed.keys()):
        where, lacks = (MANIFEST, "the service's list") if name in in_manifest else ("the service's list", MANIFEST)
        raise IntegrityError(f"{one_line(name, 120)} is in {where} but not in {lacks}", name=name)
    for name, file in listed.items():
        if (in_manifest[name].bytes, in_manifest[name].sha256) != (file.bytes, file.sha256):
            raise IntegrityError(
                f"{name}: {MANIFEST} and the service's list give different sizes or hashes",
                name=name,
                expected=in_manifest[name].sha256,
                actual=file.sha256,
            )


def fetch(plan: Plan, file: DatasetFile, max_retries: int) -> Flow[None]:
    """Resume from NAME.part, verify the content and publish it. After a failure NAME.part is kept for the next attempt.

    Raises:
        DownloadError: The connection breaks again and again, or the file cannot be written.
        IntegrityError: The content is not what the service listed.
    """
    target = plan.folder / file.name
    part: PartFile | None = None
    try:
        part = yield from compute(partial(PartFile, target, file.bytes))
        plan.tally.add(size=part.size)
        yield from _complete(plan, file, part, max_retries)
        if part.hexdigest() != file.sha256 and part.resumed:
            # NAME.part was the beginning of another file (an older dataset in the same folder): fetch the whole file.
            _restart(part, plan.tally)
            yield from _complete(plan, file, part, max_retries)
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


def _complete(plan: Plan, file: DatasetFile, part: PartFile, max_retries: int) -> Flow[None]:
    """Read until the part is complete, and connect again when the connection breaks."""
    attempts = 0  # number of consecutive attempts without a byte
    while part.size < file.bytes:
        before = part.size
        try:
            stream = yield from _open_rest(plan, file, part, max_retries)
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
        attempts = 0 if part.size > before else attempts + 1
        if attempts > max_retries:
            raise DownloadError(
                f"{file.name}: the connection keeps breaking after {_amount(part.size)} of {_amount(file.bytes)}; "
                "download again to continue from there"
            ) from reason
        yield from sleep(_retry.delay(attempts) or 0.0)


def _open_rest(plan: Plan, file: DatasetFile, part: PartFile, max_retries: int) -> Flow[Stream]:
    """Open the rest of a file; if the service sends the whole file instead, restart the part."""
    # "identity": ranges, sizes and hashes are those of the uncompressed file.
    headers = {"Accept": "*/*", "Accept-Encoding": "identity"}
    if part.size:
        headers |= {"Range": f"bytes={part.size}-", "If-Range": f'"{file.sha256}"'}
    path = job_path("dataset", plan.dataset_id, "files", file.name)
    try:
        stream = yield from open_stream(Request("GET", path, headers=headers, read_timeout=STALL_TIMEOUT), max_retries)
    except APIStatusError as error:
        if error.status_code != 416 or not part.size:
            raise
        _restart(part, plan.tally)
        return (yield from _open_rest(plan, file, part, max_retries))
    response = stream.response
    if response.status_code == 206 and part.size:
        if _content_range(response) != (part.size, file.bytes):
            raise IntegrityError(f"{file.name}: the service sent another range than requested", name=file.name)
    elif response.status_code == 200:
        _restart(part, plan.tally)
        length = response.headers.get("content-length")
        if length is not None and length != str(file.bytes):
            raise IntegrityError(
                f"{file.name}: the service sends {length} bytes, but listed {file.bytes}", name=file.name
            )
    else:
        raise IntegrityError(f"{file.name}: the service answered {response.status_code} to a download", name=file.name)
    return stream


def _content_range(response: httpx.Response) -> tuple[int, int] | None:
    """Return (first byte, size of the whole file) of a 206 response; None if it has no valid Content-Range."""
    match = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})", response.headers.get("content-range", ""))
    return (int(match[1]), int(match[2])) if match else None


def _restart(part: PartFile, tally: Tally) -> None:
    tally.add(size=-part.size)
    part.restart()


def _disk_error(path: Path, error: OSError) -> DownloadError:
    return DownloadError(f"{path}: cannot be written ({error.strerror or error})")


def _amount(size: int) -> str:
    """Format a size: bytes below 10 kB, otherwise kB, MB or GB with one decimal."""
    if size < 10_000:
        return f"{size} bytes"
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"
