"""One shard: generate, encode, hash, write. An idempotent step of a few hundred images, whoever runs it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from dermis.dataset.containers import DatasetSample, container_name, container_writer
from dermis.dataset.plan import BATCH, Plan
from dermis.dataset.privacy import Checks, Examine, Verdict
from dermis.dataset.request import DatasetRequest
from dermis.dataset.scoring import Draw, Score, Synthesize, draw
from dermis.dataset.store import PARTIAL, Store, hash_file, storage_errors
from dermis.errors import StorageError
from dermis.imaging import encode


@dataclass(frozen=True)
class FileEntry:
    """A file of a dataset. `sha256` in hex."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard: its file, and of every sample in order the SHA-256 of its image (None: all were rejected).

    Where images are scored also their probabilities, where there is a gate what it did, and with either the number of
    candidates that it took.
    """

    shard: int
    file: FileEntry
    images: tuple[str | None, ...]
    probabilities: tuple[float | None, ...] = ()
    tries: tuple[int, ...] = ()
    checks: tuple[Checks, ...] = ()


def write_shard(
    plan: Plan,
    shard: int,
    synthesize: Synthesize,
    store: Store,
    *,
    score: Score | None = None,
    examine: Examine | None = None,
    identity: Mapping[str, str] | None = None,
    on_batch: Callable[[int], None] | None = None,
    batch_size: int = BATCH,
) -> ShardRecord:
    """Make shard `shard` (from 0) unless it is there already, whole.

    `score` is needed if `plan.scored`, `examine` if `plan.gated`. `identity` is that of synthesizer, classifier and index: what
    another machine or library version made is made again. `on_batch` gets the number of this shard's samples done so far,
    after each batch (once for a shard that was there); an exception from it, as from `synthesize`, ends the work and leaves
    no file. Raises StorageError.
    """
    found = find_shard(plan, shard, store, identity=identity)
    if found is not None:
        if on_batch is not None:
            on_batch(len(found.images))
        return found
    name = shard_file(plan, shard)
    made: list[DatasetSample] = []
    with storage_errors(store.where(name), only_full=True), store.writing(name) as path:
        with container_writer(plan, path) as add:
            for samples in _encoded_batches(plan, shard, synthesize, score, examine, batch_size):
                with storage_errors(store.where(name)):
                    add([sample for sample in samples if sample.sha256 is not None])
                made.extend(replace(sample, data=b"") for sample in samples)
                if on_batch is not None:
                    on_batch(len(made))
        with path.open("rb") as file:
            entry = FileEntry(name, path.stat().st_size, hash_file(file))
    record = ShardRecord(shard, entry, tuple(sample.sha256 for sample in made))
    if plan.scored or plan.gated:
        record = replace(record, tries=tuple(sample.tries for sample in made))
    if plan.scored:
        record = replace(record, probabilities=tuple(sample.probability for sample in made))
    if plan.gated:
        record = replace(record, checks=tuple(sample.checks for sample in made if sample.checks is not None))
    store.write(_sidecar(shard), _to_sidecar(plan, identity, record))
    return record


def find_shard(
    plan: Plan, shard: int, store: Store, *, identity: Mapping[str, str] | None = None
) -> ShardRecord | None:
    """The record of a finished shard of this very plan and identity whose file is whole (it is hashed), else None."""
    name = _sidecar(shard)
    if store.size(name) is None:
        return None
    try:
        facts = json.loads(store.read(name))
        file, images = FileEntry(**facts["file"]), tuple(facts["images"])
        checks = tuple(_checks(row) for row in facts["checks"])
        record = ShardRecord(shard, file, images, tuple(facts["probabilities"]), tuple(facts["tries"]), checks)
        same = json.loads(_to_sidecar(plan, identity, record)) == facts
    except (ValueError, TypeError, KeyError):
        return None
    whole = file.name == shard_file(plan, shard) and len(images) == len(plan.shard(shard))
    if not (same and whole and store.size(file.name) == file.bytes):
        return None
    return record if store.sha256(file.name) == file.sha256 else None


def shard_file(plan: Plan, shard: int) -> str:
    """Name of the file that holds a shard: a final file, or a fragment of images.zip."""
    return container_name(plan, shard) or f"{PARTIAL}/shard-{shard:05d}.zip"


def _sidecar(shard: int) -> str:
    return f"{PARTIAL}/shard-{shard:05d}.json"


def _checks(row: Mapping[str, Any]) -> Checks:
    verdict = row["verdict"]
    return Checks(**{**row, "verdict": None if verdict is None else Verdict(**verdict)})


def _to_sidecar(plan: Plan, identity: Mapping[str, str] | None, record: ShardRecord) -> bytes:
    facts = {"plan": plan.digest, "identity": dict(identity or {}), **asdict(record)}
    return json.dumps(facts, sort_keys=True).encode()


def _encoded_batches(
    plan: Plan, shard: int, synthesize: Synthesize, score: Score | None, examine: Examine | None, batch_size: int
) -> Iterator[list[DatasetSample]]:
    """Batches in order. While one is generated, threads encode the one before (they release the interpreter's lock)."""
    labels = plan.labels(shard)
    start = plan.shard(shard).start
    pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="dermis-encode")
    try:
        encoding: list[Future[DatasetSample]] = []
        for batch in plan.batches(shard, batch_size):
            batch_labels = [labels[index - start] for index in batch]
            draws = draw(plan, batch, batch_labels, synthesize, score, examine)
            following = [
                pool.submit(_encode, plan.request, index, label, drawn)
                for index, label, drawn in zip(batch, batch_labels, draws, strict=True)
            ]
            if encoding:
                yield [future.result() for future in encoding]
            encoding = following
        yield [future.result() for future in encoding]
    finally:
        pool.shutdown(cancel_futures=True)


def _encode(request: DatasetRequest, index: int, label: int, drawn: Draw) -> DatasetSample:
    if drawn.image is None:
        return DatasetSample(index, label, None, tries=drawn.tries, checks=drawn.checks)
    data = encode(drawn.image, request.image_format, request.image_quality)
    return DatasetSample(
        index, label, hashlib.sha256(data).hexdigest(), data, drawn.probability, drawn.tries, drawn.checks
    )


def check_space(plan: Plan, store: Store, resolution: int) -> None:
    """StorageError if what is not there yet cannot fit. The estimate is a low one: nothing is refused in vain."""
    free = store.free_bytes()
    if free is None:
        return
    missing = sum(len(plan.shard(k)) for k in range(plan.shards) if store.size(_sidecar(k)) is None)
    need = missing * _bytes_per_image(plan.request, resolution)
    if plan.request.format == "imagefolder":
        need += plan.samples * _bytes_per_image(plan.request, resolution)  # fragments and the zip stand side by side
    if need > free:
        message = (
            f"{store.location}: about {need / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free; "
            "free some space, choose another place, or ask for fewer images or for JPEG"
        )
        raise StorageError(message, kind="storage-full")


def _bytes_per_image(request: DatasetRequest, resolution: int) -> int:
    """Bytes that a dermoscopy image takes at least, measured at 64 to 256 px, with room for headers and metadata."""
    per_pixel = {"png": 1.0, "jpeg": 0.15, "webp": 0.1}[request.image_format]
    return int(per_pixel * resolution**2) + 500
