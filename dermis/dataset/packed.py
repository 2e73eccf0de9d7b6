"""Results of the samples of finished shards in little memory, for the end of a dataset.

A sample needs 33 bytes, 12 more with probabilities, and 32 more with a gate. The embeddings of a gate, which are much larger,
are in a temporary file.
"""

from __future__ import annotations

import base64
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dermis.authenticity.index import Floats
from dermis.dataset.containers import DatasetSample
from dermis.dataset.plan import DatasetPlan
from dermis.dataset.privacy import Checks, GateVerdict
from dermis.dataset.shards import FileEntry, ShardRecord
from dermis.dataset.store import storage_errors

# Embeddings that are computed with at a time. Faiss compares blocks of 1,024, so that a multiple of it gives the same distances
# as all embeddings at once.
PIECE = 16 * 1024
_IN_MEMORY = 16 << 20  # bytes of embeddings that are kept in memory instead of a file

_SAMPLE: list[tuple[str, str]] = [("kept", "?"), ("sha256", "V32")]
_SCORED: list[tuple[str, str]] = [("probability", "<f8")]  # NaN: none
_TRIED: list[tuple[str, str]] = [("tries", "<i4")]
_CHECKED: list[tuple[str, str]] = [
    ("seen", "<i4"),
    ("seen_authentic", "<i4"),
    ("rejected", "<i4"),
    ("copies", "<i4"),
    ("distance", "<f8"),
    ("percentile", "<i2"),  # -1: there is no verdict
    ("authentic", "?"),
    ("passed", "?"),
]


@dataclass(frozen=True)
class PackedShard:
    """A finished shard.

    Attributes:
        shard: Number of the shard, from 0.
        file: The file of the shard.
        rows: A row for each sample, in order.
    """

    shard: int
    file: FileEntry
    rows: NDArray[Any]


def pack(plan: DatasetPlan, record: ShardRecord) -> PackedShard:
    """Pack the record of a shard. Embeddings and scores of the copy detector are left out.

    Raises:
        ValueError: The record has results of other kinds than the plan.
    """
    count = len(record.images)
    fields = _SAMPLE + _SCORED * plan.scored + _TRIED * (plan.scored or plan.gated) + _CHECKED * plan.gated
    rows = np.zeros(count, fields)
    rows["kept"] = [sha256 is not None for sha256 in record.images]
    rows["sha256"] = np.frombuffer(bytes.fromhex("".join(sha256 or "0" * 64 for sha256 in record.images)), "V32")
    if plan.scored:
        rows["probability"] = [np.nan if value is None else value for value in record.probabilities]
    if plan.scored or plan.gated:
        rows["tries"] = record.tries
    if plan.gated:
        if len(record.checks) != count:
            raise ValueError(f"{len(record.checks)} results of the gate for {count} samples")
        for row, checks in zip(rows, record.checks, strict=True):
            row["seen"], row["seen_authentic"] = checks.seen, checks.authentic
            row["rejected"], row["copies"] = checks.rejected, checks.copies
            verdict = checks.verdict
            row["percentile"] = -1 if verdict is None else verdict.percentile
            if verdict is not None:
                row["distance"], row["authentic"], row["passed"] = verdict.distance, verdict.authentic, verdict.passed
    return PackedShard(record.shard, record.file, rows)


def unpack(plan: DatasetPlan, packed: PackedShard) -> Iterator[DatasetSample]:
    """Yield the samples of a shard without their bytes, including those whose candidates were all rejected."""
    rows = packed.rows
    names = rows.dtype.names or ()
    columns = {name: rows[name].tolist() for name in names if name != "sha256"}
    hashes = rows["sha256"].tobytes()
    for position, (index, label) in enumerate(zip(plan.shard(packed.shard), plan.labels(packed.shard), strict=True)):
        probability = columns["probability"][position] if plan.scored else None
        yield DatasetSample(
            index,
            label,
            hashes[32 * position : 32 * position + 32].hex() if columns["kept"][position] else None,
            probability=None if probability is None or np.isnan(probability) else probability,
            tries=columns["tries"][position] if "tries" in columns else 1,
            checks=_checks(columns, position) if plan.gated else None,
        )


def _checks(columns: dict[str, list[Any]], position: int) -> Checks:
    row = {name: values[position] for name, values in columns.items()}
    verdict = None
    if row["percentile"] >= 0:
        verdict = GateVerdict(row["distance"], row["percentile"], row["authentic"], row["passed"])
    return Checks(row["seen"], row["seen_authentic"], row["rejected"], verdict, row["copies"])


class EmbeddingFile:
    """Embeddings of the images of a dataset as float16, in a temporary file if they are many.

    They have 2 bytes for each dimension. The file is removed when the object is closed.
    """

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY, prefix="dermis-embeddings-")  # noqa: SIM115 - see close
        self._row_bytes = 0
        self._indices = array("q")

    def close(self) -> None:
        """Remove the file."""
        self._file.close()

    def add(self, plan: DatasetPlan, record: ShardRecord) -> None:
        """Append the embeddings of the images of a shard. Shards are added in order.

        Raises:
            ValueError: The embeddings have different dimensions.
        """
        with storage_errors(tempfile.gettempdir()):
            for index, checks in zip(plan.shard(record.shard), record.checks, strict=True):
                if checks.verdict is None:
                    continue
                row = base64.b64decode(checks.verdict.embedding)
                if not row or len(row) != (self._row_bytes or len(row)):
                    raise ValueError("embeddings of different dimensions")
                self._row_bytes = len(row)
                self._file.write(row)
                self._indices.append(index)

    def pieces(self, size: int = PIECE) -> Iterator[Floats]:
        """Yield all embeddings in order, at most `size` at a time, float32 [n, dim]."""
        for start in range(0, len(self._indices), size):
            yield self._read(start, min(size, len(self._indices) - start))

    def of(self, indices: Sequence[int]) -> Floats:
        """Return the embeddings of the images of these samples, float32 [n, dim]."""
        positions = np.searchsorted(np.frombuffer(self._indices, np.int64), indices)
        return np.concatenate([self._read(int(position), 1) for position in positions])

    def _read(self, start: int, count: int) -> Floats:
        with storage_errors(tempfile.gettempdir()):
            self._file.seek(start * self._row_bytes)
            data = self._file.read(count * self._row_bytes)
        return np.frombuffer(data, "<f2").reshape(count, -1).astype(np.float32)
