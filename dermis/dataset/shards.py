"""Make one shard of a dataset: generate, encode, hash and write. The step is idempotent."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from dermis import __version__
from dermis.dataset.containers import DatasetSample, container_name, container_writer
from dermis.dataset.plan import BATCH, DatasetPlan, latent_index
from dermis.dataset.privacy import Checks, Examine, GateVerdict
from dermis.dataset.request import DatasetRequest
from dermis.dataset.scoring import SampleResult, Score, Synthesize, generate_samples
from dermis.dataset.store import MANIFEST, PARTIAL, Store, hash_file, storage_errors
from dermis.errors import SignatureError, StorageError
from dermis.files import NotRegularError
from dermis.image_metadata import ImageOrigin, metadata_bytes
from dermis.imaging import ImageFormat, encode
from dermis.latents import MAX_INDEX

Sign = Callable[[bytes, ImageFormat, ImageOrigin], bytes]
"""Puts a signed manifest into an encoded image (`dermis.provenance.c2pa`)."""
_LONG_SECONDS = (
    1.0  # after an upload that takes longer, it is checked again whether another process has finished the dataset
)
_SIDECAR = re.compile(rf"{re.escape(PARTIAL)}/shard-(\d{{5,}})(-[0-9a-f]{{64}})?\.json")


@dataclass(frozen=True)
class FileEntry:
    """A file of a dataset. `sha256` in hex."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard.

    Attributes:
        shard: Number of the shard, from 0.
        file: The file of the shard.
        images: SHA-256 (hex) of the image of every sample, in order, without its C2PA manifest; None if all its candidates
            were rejected.
        probabilities: Probabilities of the samples, if they are scored.
        tries: Number of candidates of each sample, if there is a filter or a gate.
        checks: Results of the gate, if there is one.
    """

    shard: int
    file: FileEntry
    images: tuple[str | None, ...]
    probabilities: tuple[float | None, ...] = ()
    tries: tuple[int, ...] = ()
    checks: tuple[Checks, ...] = ()


def write_shard(
    plan: DatasetPlan,
    shard: int,
    synthesize: Synthesize,
    store: Store,
    *,
    score: Score | None = None,
    examine: Examine | None = None,
    identity: Mapping[str, str] | None = None,
    sign: Sign | None = None,
    on_batch: Callable[[int], None] | None = None,
    batch_size: int = BATCH,
) -> ShardRecord:
    """Make a shard unless a complete one exists already.

    An exception of a callback ends the work and leaves no file. Nothing is written into a dataset that another process has
    finished meanwhile.

    Args:
        plan: The plan of the dataset.
        shard: Number of the shard, from 0.
        synthesize: Generates images from indices of latents and labels.
        store: Where the dataset is stored.
        score: Scores images; required if `plan.scored`.
        examine: Compares images with the training images; required if `plan.gated`.
        identity: Identity of synthesizer, classifier and index. A shard of another identity is made again.
        sign: Signs images; required if `plan.request.signed`.
        on_batch: Called after each batch with the number of finished samples of this shard.
        batch_size: Images that are generated at a time.

    Raises:
        StorageError: The shard cannot be written.
    """
    existing = find_shard(plan, shard, store, identity=identity)
    if existing is not None:
        if on_batch is not None:
            on_batch(len(existing.images))
        return existing
    name = shard_file(plan, shard)
    done: list[DatasetSample] = []
    record: ShardRecord
    checked = 0.0

    def check() -> None:
        nonlocal checked
        # Signatures differ, so a signed shard of another process must not be replaced.
        there = find_shard(plan, shard, store, identity=identity) if plan.request.signed else None
        if there is not None:
            raise _MadeElsewhereError(there)
        _check_unfinished(store, record)
        checked = time.monotonic()

    # Files of the dataset itself whose bytes depend on the process that makes them.
    staged = plan.request.signed and container_name(plan, shard) is not None
    try:
        with storage_errors(store.where(name), only_full=True), store.writing(name, check, staged=staged) as path:
            with container_writer(plan, path) as add:
                for samples in _encoded_batches(plan, shard, synthesize, score, examine, sign, batch_size):
                    with storage_errors(store.where(name)):
                        add([sample for sample in samples if sample.sha256 is not None])
                    done.extend(replace(sample, data=b"") for sample in samples)
                    if on_batch is not None:
                        on_batch(len(done))
            with storage_errors(store.where(name)), path.open("rb") as file:
                record = _record(plan, shard, FileEntry(name, path.stat().st_size, hash_file(file)), done)
        if time.monotonic() - checked > _LONG_SECONDS:
            _check_unfinished(store, record)
    except _MadeElsewhereError as error:
        return error.record
    store.write(_sidecar(plan, shard, record.file.sha256), _to_sidecar(plan, identity, record))
    return record


def _record(plan: DatasetPlan, shard: int, entry: FileEntry, done: Sequence[DatasetSample]) -> ShardRecord:
    record = ShardRecord(shard, entry, tuple(sample.sha256 for sample in done))
    if plan.scored or plan.gated:
        record = replace(record, tries=tuple(sample.tries for sample in done))
    if plan.scored:
        record = replace(record, probabilities=tuple(sample.probability for sample in done))
    if plan.gated:
        record = replace(record, checks=tuple(sample.checks for sample in done if sample.checks is not None))
    return record


class _MadeElsewhereError(Exception):
    """Another process has made the shard, or has finished the dataset, in the meantime."""

    def __init__(self, record: ShardRecord) -> None:
        self.record = record


def _check_unfinished(store: Store, record: ShardRecord) -> None:
    """Check that no other process, which assumed that this one is dead, has finished the dataset.

    Raises:
        _MadeElsewhereError: It is finished; files that are no longer needed are removed.
    """
    if store.size(MANIFEST) is not None:
        store.remove(PARTIAL)
        raise _MadeElsewhereError(record)


def find_shard(
    plan: DatasetPlan, shard: int, store: Store, *, identity: Mapping[str, str] | None = None
) -> ShardRecord | None:
    """Return the record of a finished shard, or None if it must be made.

    The shard must be of the same plan and identity, and its file must have the recorded SHA-256.
    """
    size = sha256 = None
    if plan.request.signed:
        size = store.size(shard_file(plan, shard))
        if size is None:
            return None
        sha256 = store.sha256(shard_file(plan, shard), size=size)
    try:
        data = store.read_if_exists(_sidecar(plan, shard, sha256))
    except StorageError as error:
        if isinstance(error.__cause__, NotRegularError):  # such as a folder: nothing that this program has written
            return None
        raise
    if data is None:
        return None
    try:
        fields = json.loads(data)
        file, images = FileEntry(**fields["file"]), tuple(fields["images"])
        checks = tuple(_checks(row) for row in fields["checks"])
        record = ShardRecord(shard, file, images, tuple(fields["probabilities"]), tuple(fields["tries"]), checks)
        same = json.loads(_to_sidecar(plan, identity, record)) == fields
    except (ValueError, TypeError, KeyError):
        return None
    whole = file.name == shard_file(plan, shard) and len(images) == len(plan.shard(shard))
    if not (same and whole and (store.size(file.name) if size is None else size) == file.bytes):
        return None
    return record if (sha256 or store.sha256(file.name, size=file.bytes)) == file.sha256 else None


def missing_shards(plan: DatasetPlan, store: Store) -> list[int]:
    """Return the shards that are not finished, by one listing of the storage. No file is read."""
    entries = set(store.entries())
    recorded = {int(match[1]) for match in map(_SIDECAR.fullmatch, entries) if match is not None}
    return [shard for shard in range(plan.shards) if shard not in recorded or shard_file(plan, shard) not in entries]


def shard_file(plan: DatasetPlan, shard: int) -> str:
    """Return the name of the file that holds a shard: a final file, or a part of images.zip."""
    return container_name(plan, shard) or f"{PARTIAL}/shard-{shard:05d}.zip"


def _sidecar(plan: DatasetPlan, shard: int, sha256: str | None) -> str:
    """Return the name of the file that describes a shard.

    If images are signed, processes that make a shard at the same time write different files, and the last one stays. Each of
    them writes a description of its own, whose name has the SHA-256 of the shard's file.
    """
    suffix = f"-{sha256}" if plan.request.signed else ""
    return f"{PARTIAL}/shard-{shard:05d}{suffix}.json"


def _checks(row: Mapping[str, Any]) -> Checks:
    verdict = row["verdict"]
    return Checks(**{**row, "verdict": None if verdict is None else GateVerdict(**verdict)})


def _to_sidecar(plan: DatasetPlan, identity: Mapping[str, str] | None, record: ShardRecord) -> bytes:
    made_by = dict(identity or {})
    if plan.format_version > 1:  # images name the version of dermis, so those of another version have other bytes
        made_by |= {"format_version": str(plan.format_version), "dermis": __version__}
    fields = {"plan": plan.digest, "identity": made_by, **asdict(record)}
    return json.dumps(fields, sort_keys=True).encode()


def _encoded_batches(
    plan: DatasetPlan,
    shard: int,
    synthesize: Synthesize,
    score: Score | None,
    examine: Examine | None,
    sign: Sign | None,
    batch_size: int,
) -> Iterator[list[DatasetSample]]:
    """Yield batches in order. While one is generated, threads encode the previous one, without the interpreter's lock."""
    labels = plan.labels(shard)
    start = plan.shard(shard).start
    pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="dermis-encode")
    try:
        encoding: list[Future[DatasetSample]] = []
        for batch in plan.batches(shard, batch_size):
            batch_labels = [labels[index - start] for index in batch]
            results = generate_samples(plan, batch, batch_labels, synthesize, score, examine)
            following = [
                pool.submit(_encode, plan, index, label, result, sign)
                for index, label, result in zip(batch, batch_labels, results, strict=True)
            ]
            if encoding:
                yield [future.result() for future in encoding]
            encoding = following
        yield [future.result() for future in encoding]
    finally:
        pool.shutdown(cancel_futures=True)


def _encode(plan: DatasetPlan, index: int, label: int, result: SampleResult, sign: Sign | None) -> DatasetSample:
    if result.image is None:
        return DatasetSample(index, label, None, tries=result.tries, checks=result.checks)
    origin, image_format = plan.origin(latent_index(index, result.tries - 1)), plan.request.image_format
    data = encode(result.image, image_format, plan.request.image_quality, origin)
    sha256 = hashlib.sha256(data).hexdigest()
    data = signed_image(plan, data, image_format, origin, sign)
    return DatasetSample(index, label, sha256, data, result.probability, result.tries, result.checks)


def signed_image(
    plan: DatasetPlan, data: bytes, image_format: ImageFormat, origin: ImageOrigin | None, sign: Sign | None
) -> bytes:
    """Sign an image of a dataset if its images are to be signed.

    Raises:
        SignatureError: It has to be signed, and there is no certificate here.
    """
    if not plan.request.signed or origin is None:
        return data
    if sign is None:
        raise SignatureError("the images of this dataset are to be signed (C2PA), and this process has no certificate")
    return sign(data, image_format, origin)


def check_space(plan: DatasetPlan, store: Store, resolution: int) -> None:
    """Check that the missing shards fit into the storage.

    The estimate is a lower bound, so a dataset that fits is never refused.

    Raises:
        StorageError: There is too little free space.
    """
    free = store.free_bytes()
    if free is None:
        return
    missing = sum(len(plan.shard(shard)) for shard in missing_shards(plan, store))
    need = missing * _bytes_per_image(plan.request, resolution)
    if plan.request.format == "imagefolder":
        need += plan.samples * _bytes_per_image(
            plan.request, resolution
        )  # the parts and the zip exist at the same time
    if need > free:
        message = (
            f"{store.location}: about {need / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free; "
            "free some space, choose another place, or ask for fewer images or for JPEG"
        )
        raise StorageError(message, kind="storage-full")


def least_bytes(plan: DatasetPlan, samples: int, resolution: int) -> int:
    """Return a lower estimate of the size of a file with this many samples of a dataset in bytes."""
    return samples * _bytes_per_image(plan.request, resolution)


def _bytes_per_image(request: DatasetRequest, resolution: int) -> int:
    """Return the least size of a dermoscopy image in bytes with headers and metadata, as measured at 64 to 256 px."""
    per_pixel = {"png": 1.0, "jpeg": 0.15, "webp": 0.1}[request.image_format]
    return int(per_pixel * resolution**2) + 500


# Bytes per pixel of images of random pixels, which no encoder can reduce, by the highest quality to which they apply. They
# were measured at 256 px with uniform and with binary noise, and rounded up.
_MAX_BYTES_PER_PIXEL: Mapping[str, Mapping[int, float]] = {
    "png": {100: 3.1},
    "jpeg": {75: 1.8, 95: 3.2, 100: 5.0},
    "webp": {75: 1.6, 95: 2.8, 100: 3.4},
}
_MAX_HEADER_BYTES = 2000  # of an image file; for small images they are most of it
MAX_C2PA_BYTES = 20_000  # of an image file: its signed manifest; 4,100 with a certificate and its authority on P-256
_MAX_RECORD_BYTES = 4000  # of a sample in its container, metadata.csv and manifest.json, without the names of its class
_MAX_EXTRA_BYTES = 8 << 20  # preview, card and report


def max_image_bytes(image_format: ImageFormat, quality: int, resolution: int, origin: ImageOrigin | None = None) -> int:
    """Return an upper estimate of the size of an encoded image in bytes.

    Args:
        image_format: The format.
        quality: Quality of JPEG and WebP, 1 to 100.
        resolution: Side of the image in px.
        origin: What its metadata says.
    """
    per_pixel = next(value for highest, value in _MAX_BYTES_PER_PIXEL[image_format].items() if quality <= highest)
    return int(per_pixel * resolution**2) + _MAX_HEADER_BYTES + (metadata_bytes(origin) if origin else 0)


def max_dataset_bytes(plan: DatasetPlan, resolution: int) -> int:
    """Return an upper estimate of the size of all files of a finished dataset in bytes.

    Dermoscopy images are smaller than the estimate assumes: as PNG about half, as JPEG or WebP about a tenth.
    """
    request = plan.request
    image = max_image_bytes(request.image_format, request.image_quality, resolution, plan.origin(MAX_INDEX))
    image += MAX_C2PA_BYTES if request.signed else 0
    names = 12 * max(len(name) for name in plan.class_names)  # percent-encoded, in several files
    return plan.samples * (image + _MAX_RECORD_BYTES + names) + _MAX_EXTRA_BYTES
