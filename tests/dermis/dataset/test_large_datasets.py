"""Tests of what keeps the memory of large datasets small: the results are the same as those of the simple way."""

from __future__ import annotations

import base64
import io
import tracemalloc
import zipfile
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dermis.authenticity.attack import Exposure, NearestGenerated
from dermis.dataset import manifest, packed
from dermis.dataset.containers import add_to_zip, copy_to_zip, zip_of_many
from dermis.dataset.packed import PIECE, EmbeddingFile, pack, unpack
from dermis.dataset.plan import DatasetPlan, plan
from dermis.dataset.privacy import Checks, GateVerdict, report
from dermis.dataset.request import DatasetRequest
from dermis.dataset.shards import FileEntry, ShardRecord


def request_of(count: int, **options: object) -> DatasetRequest:
    return DatasetRequest.model_validate({"model": "tiny", "classes": {"benign": count}, **options})


def gated_plan(count: int, shard_size: int = 250) -> DatasetPlan:
    """A plan with scores and a gate; of classifier and index only their presence matters here."""
    radii = tuple(float(percentile) for percentile in range(101))
    present: Any = SimpleNamespace(digest="0" * 64, radii=radii, duplicates=None, vectors=1000)
    request = request_of(count, shard_size=shard_size, privacy={"gate": "authentic"})
    return plan(request, "0" * 64, ("benign", "malignant"), present, present)


def gated_record(planned: DatasetPlan, shard: int, dim: int = 8) -> ShardRecord:
    """Every seventh sample is missing."""
    random = np.random.default_rng(shard)
    images, probabilities, tries, checks = [], [], [], []
    for index in planned.shard(shard):
        verdict = None
        if index % 7:
            row = base64.b64encode(random.normal(size=dim).astype("<f2").tobytes()).decode()
            verdict = GateVerdict(
                round(float(random.random() * 40), 2), int(random.integers(101)), True, index % 2 > 0, 0.5, row
            )
        images.append(random.bytes(32).hex() if verdict else None)
        probabilities.append(round(float(random.random()), 6) if verdict else None)
        tries.append(int(random.integers(1, 9)))
        checks.append(Checks(3, 2, 1, verdict, 1))
    entry = FileEntry("file", 1, "0" * 64)
    return ShardRecord(shard, entry, tuple(images), tuple(probabilities), tuple(tries), tuple(checks))


def test_packed_results_are_those_of_the_shard() -> None:
    planned = gated_plan(30, shard_size=20)
    for shard in range(planned.shards):
        record = gated_record(planned, shard)
        results = pack(planned, record)
        assert results.rows.dtype.itemsize <= 77
        samples = list(unpack(planned, results))
        assert [sample.index for sample in samples] == list(planned.shard(shard))
        assert tuple(sample.sha256 for sample in samples) == record.images
        assert tuple(sample.probability for sample in samples) == record.probabilities
        assert tuple(sample.tries for sample in samples) == record.tries
        for sample, checks in zip(samples, record.checks, strict=True):
            assert sample.checks is not None
            assert (sample.checks.seen, sample.checks.authentic, sample.checks.rejected, sample.checks.copies) == (
                3,
                2,
                1,
                1,
            )
            one, other = sample.checks.verdict, checks.verdict
            assert (one is None) == (other is None)
            if one and other:
                assert (one.distance, one.percentile, one.authentic, one.passed) == (
                    other.distance, other.percentile, other.authentic, other.passed
                )  # fmt: skip
    with pytest.raises(ValueError, match="results of the gate"):
        pack(planned, ShardRecord(0, FileEntry("file", 1, ""), ("0" * 64,) * 2, (0.5,) * 2, (1,) * 2))


def test_embeddings_are_found_by_sample_and_in_pieces() -> None:
    planned = gated_plan(30, shard_size=20)
    records = [gated_record(planned, shard) for shard in range(planned.shards)]
    rows = {
        index: np.frombuffer(base64.b64decode(checks.verdict.embedding), "<f2").astype(np.float32)
        for record in records
        for index, checks in zip(planned.shard(record.shard), record.checks, strict=True)
        if checks.verdict
    }
    file = EmbeddingFile()
    for record in records:
        file.add(planned, record)
    np.testing.assert_array_equal(np.concatenate(list(file.pieces(4))), np.stack(list(rows.values())))
    np.testing.assert_array_equal(file.of([29, 1, 20]), np.stack([rows[29], rows[1], rows[20]]))
    file.close()


def test_distances_in_pieces_are_those_of_all_at_once() -> None:
    """Bit for bit, so that the size of the pieces makes no difference to the files."""
    pytest.importorskip("faiss", reason="FAISS is not installed")
    assert PIECE % 1024 == 0
    random = np.random.default_rng(0)
    real, generated = (random.normal(size=(count, 96)).astype(np.float32) for count in (700, 5000))
    whole, parts = NearestGenerated(real), NearestGenerated(real)
    whole.add(generated)
    for start in range(0, len(generated), 2048):
        parts.add(generated[start : start + 2048])
    np.testing.assert_array_equal(whole.distances, parts.distances)


@pytest.mark.parametrize("count", [3, pytest.param(70_000, marks=pytest.mark.full)])
def test_zip_of_many_members_has_the_bytes_of_zipfile(tmp_path: Path, count: int) -> None:
    """With more than 65,535 members the directory has another form (zip64)."""
    table = b"a,b\n" * 1000
    with zipfile.ZipFile(tmp_path / "plain", "w") as plain, zip_of_many(tmp_path / "compact") as compact:
        for number in range(count):
            for archive in (plain, compact):
                add_to_zip(archive, f"images/Nævus {number % 3}/SYN_{number:08d}.png", number.to_bytes(4, "big"))
        add_to_zip(plain, "metadata.csv", table)
        copy_to_zip(compact, "metadata.csv", io.BytesIO(table))
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "compact").read_bytes()
    with zipfile.ZipFile(tmp_path / "compact") as archive:
        assert archive.testzip() is None and len(archive.infolist()) == count + 1


def memory_of_results(count: int) -> int:
    """Peak in bytes while a dataset of so many samples is finished, without files of images."""
    planned = gated_plan(count, shard_size=100)
    tracemalloc.start()
    with closing(EmbeddingFile()) as embeddings:
        records = []
        for shard in range(planned.shards):
            record = gated_record(planned, shard)
            records.append(pack(planned, record))
            embeddings.add(planned, record)
        kept = manifest._by_class(planned, records)
        summary = report(planned, manifest._checks(planned, records), Exposure(0.0, None))
        with manifest._metadata(planned, records) as table:
            table.seek(0)
            assert sum(1 for _ in table) == summary.classes["benign"].images + 1 == len(kept["benign"]) + 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_results_of_finished_shards_need_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of the samples alone would need more than 400 bytes for each."""
    monkeypatch.setattr(manifest, "_IN_MEMORY", 1000)
    monkeypatch.setattr(packed, "_IN_MEMORY", 1000)
    memory_of_results(100)  # what is imported and compiled once
    grown = memory_of_results(4_000) - memory_of_results(1_000)
    assert grown / 3_000 < 250, grown
