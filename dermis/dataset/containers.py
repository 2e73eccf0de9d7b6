"""Files that hold the images of a dataset: zip, tar (WebDataset) and Parquet (Hugging Face).

Dates, owners, modes, order and compression are fixed, so that the same samples give the same bytes.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import zipfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dermis.dataset.columns import IMAGE, LABEL, PRIVACY, PROBABILITY, columns, feature_kinds, features_json
from dermis.dataset.plan import DatasetPlan, latent_index, sample_id
from dermis.dataset.privacy import Checks
from dermis.imaging import SUFFIXES

SOURCE = "dermis-synthetic"


@dataclass(frozen=True)
class DatasetSample:
    """An encoded image with its results.

    `sha256` (hex) is that of `data` without its C2PA manifest; None if all candidates were rejected.
    """

    index: int
    label: int
    sha256: str | None
    data: bytes = b""
    probability: float | None = None
    tries: int = 1
    checks: Checks | None = None


# Rows of a Parquet row group, which a reader holds in memory at once. The bytes of the file depend on it.
_ROW_GROUP = 100

_MAX_IMAGE_BYTES = 256 << 20
_PLAIN_ENCODINGS = {"PLAIN", "RLE", "BIT_PACKED"}  # of values, and of their presence

Add = Callable[[Sequence[DatasetSample]], None]


def container_name(plan: DatasetPlan, shard: int) -> str | None:
    """Return the name of the final file of a shard; None if shards are parts of one images.zip."""
    suffix = {"imagefolder": None, "webdataset": "tar", "parquet": "parquet"}[plan.request.format]
    return suffix and f"data-{shard:05d}-of-{plan.shards:05d}.{suffix}"


def folder_name(class_name: str) -> str:
    """Make a class name a folder name that works on every system: other characters are percent-encoded."""
    safe = "".join(c if c.isalnum() or c in " -_()+,.=" else _percent(c) for c in class_name)
    return _percent(safe[0]) + safe[1:] if safe.startswith(".") else safe


def _percent(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode())


def file_name(plan: DatasetPlan, index: int, label: int) -> str:
    """Return the path of an image inside the zip or tar file, or as the Parquet row records it."""
    name = sample_id(index) + SUFFIXES[plan.request.image_format]
    if plan.request.format == "imagefolder":
        return f"images/{folder_name(plan.class_names[label])}/{name}"
    return name


def metadata_row(plan: DatasetPlan, sample: DatasetSample) -> dict[str, str | int | float]:
    """Return the row of a sample in metadata.csv, by column."""
    known: dict[str, str | int | float | None] = {
        "isic_id": sample_id(sample.index),
        "target": plan.class_names[sample.label],
        "source": SOURCE,
        "file_name": file_name(plan, sample.index, sample.label),
        "label": sample.label,
        "seed": plan.request.seed,
        "index": latent_index(sample.index, sample.tries - 1),
        "sha256": sample.sha256,
        PROBABILITY: sample.probability,
    }
    if sample.checks is not None and sample.checks.verdict is not None:
        verdict = sample.checks.verdict
        values = (
            verdict.distance,
            verdict.percentile,
            int(verdict.authentic),
            "passed" if verdict.passed else "flagged",
        )
        known.update(zip(PRIVACY, values, strict=True))
    row = {column: known.get(column) for column in columns(plan)}
    return {column: "" if value is None else value for column, value in row.items()}


def container_writer(plan: DatasetPlan, path: Path) -> AbstractContextManager[Add]:
    """Open a new container at a local path.

    Returns:
        A context manager that gives a function, which appends samples in order.
    """
    return {"imagefolder": _write_zip, "webdataset": _write_tar, "parquet": _write_parquet}[plan.request.format](
        plan, path
    )


def read_container(plan: DatasetPlan, file: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """Read the images of a container in order. One image is in memory at a time (Parquet: one batch).

    Only files as dermis writes them are read: with images that are not compressed again and have different names. So the
    images together are never larger than the file.

    Yields:
        File name and bytes of each image.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not such a file. The libraries of the formats have further errors for damaged files.
    """
    readers = {"imagefolder": _read_zip, "webdataset": _read_tar, "parquet": _read_parquet}
    return readers[plan.request.format](file)


def _check_image_bytes(name: str, size: int) -> None:
    if not 0 <= size <= _MAX_IMAGE_BYTES:
        raise ValueError(f"{name} is larger than {_MAX_IMAGE_BYTES:,} bytes")


def add_to_zip(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """Append a file without compression, with a fixed date and mode."""
    archive.writestr(_zip_member(name), data, compress_type=zipfile.ZIP_STORED)


def _zip_member(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    info.create_system = 3  # Unix, on every system
    info.external_attr = 0o100644 << 16
    return info


def copy_to_zip(archive: zipfile.ZipFile, name: str, file: IO[bytes]) -> None:
    """Append the content of an open file as `add_to_zip` does, without reading it into memory at once."""
    info = _zip_member(name)
    info.file_size = file.seek(0, io.SEEK_END)  # decides the form of the header
    file.seek(0)
    with archive.open(info, "w") as member:
        shutil.copyfileobj(file, member)


@contextmanager
def zip_of_many(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a new zip for any number of members. They need about 50 bytes of memory each, with zipfile alone about 700.

    Members are appended by `add_to_zip` and `copy_to_zip`, each under another name, and cannot be looked up.
    """
    with zipfile.ZipFile(path, "w") as archive:
        archive.filelist = _CompactMembers()
        archive.NameToInfo = _NoNames()
        yield archive


class _CompactMembers(list[zipfile.ZipInfo]):
    """Members of a zip that `zipfile` appends, and reads once at the end to write the directory."""

    def __init__(self) -> None:
        super().__init__()
        self._names = bytearray()
        self._ends, self._sizes, self._offsets = array("q"), array("q"), array("q")
        self._checksums = array("L")

    def append(self, info: zipfile.ZipInfo) -> None:
        self._names += info.filename.encode()
        self._ends.append(len(self._names))
        self._sizes.append(info.file_size)
        self._offsets.append(info.header_offset)
        self._checksums.append(info.CRC)

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[zipfile.ZipInfo]:
        start = 0
        rows = zip(self._ends, self._sizes, self._offsets, self._checksums, strict=True)
        for end, size, offset, checksum in rows:
            info = _zip_member(self._names[start:end].decode())
            info.file_size = info.compress_size = size
            info.header_offset, info.CRC = offset, checksum
            yield info
            start = end


class _NoNames(dict[str, zipfile.ZipInfo]):
    def __setitem__(self, name: str, info: zipfile.ZipInfo) -> None:
        """Keep nothing: no name is looked up while a dataset is written."""


@contextmanager
def _write_zip(plan: DatasetPlan, path: Path) -> Iterator[Add]:
    with zipfile.ZipFile(path, "w") as archive:

        def add(samples: Sequence[DatasetSample]) -> None:
            for sample in samples:
                add_to_zip(archive, file_name(plan, sample.index, sample.label), sample.data)

        yield add


def _read_zip(file: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    size = file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if len({info.filename for info in members}) != len(members):
            raise ValueError("a name occurs more than once")
        for info in members:
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise ValueError(f"{info.filename} is compressed or encrypted")
        if sum(info.file_size for info in members) > size:
            raise ValueError("it would unpack to more than its own size")
        for info in members:
            if info.filename.startswith("images/"):
                _check_image_bytes(info.filename, info.file_size)
                yield info.filename, archive.read(info)


@contextmanager
def _write_tar(plan: DatasetPlan, path: Path) -> Iterator[Add]:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:

        def add(samples: Sequence[DatasetSample]) -> None:
            for sample in samples:
                row = {key: value for key, value in metadata_row(plan, sample).items() if value != ""}
                key = sample_id(sample.index)
                for name, data in (
                    (file_name(plan, sample.index, sample.label), sample.data),
                    (f"{key}.cls", str(sample.label).encode()),
                    (f"{key}.json", json.dumps(row, sort_keys=True).encode()),
                ):
                    info = tarfile.TarInfo(name)  # date 0, owner 0, mode 644
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))

        yield add


def _read_tar(file: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    seen: set[str] = set()
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for info in archive:
            if info.name in seen:  # an offset that points back would repeat members without end
                raise ValueError(f"{info.name} occurs more than once")
            seen.add(info.name)
            if not info.isreg() or info.issparse():
                raise ValueError(f"{info.name} is not a regular file")
            if not info.name.endswith((".cls", ".json")):
                _check_image_bytes(info.name, info.size)
                member = archive.extractfile(info)
                assert member is not None
                yield info.name, member.read()


@contextmanager
def _write_parquet(plan: DatasetPlan, path: Path) -> Iterator[Add]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _parquet_schema(plan)
    # Images do not compress, and a dictionary of bytes that never repeat only costs time.
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=["target", "source"]) as writer:
        rows: list[dict[str, Any]] = []

        def write_group() -> None:
            writer.write_table(pa.Table.from_pylist(rows[:_ROW_GROUP], schema=schema))
            del rows[:_ROW_GROUP]

        def add(samples: Sequence[DatasetSample]) -> None:
            for sample in samples:
                row: dict[str, Any] = metadata_row(plan, sample)
                row["image"] = {"bytes": sample.data, "path": row["file_name"]}
                rows.append({name: row[name] for name in schema.names})
                if len(rows) == _ROW_GROUP:
                    write_group()

        yield add
        if rows:
            write_group()


def _parquet_schema(plan: DatasetPlan) -> Any:
    """Return an Arrow schema whose metadata lets `datasets` decode images and name the labels."""
    import pyarrow as pa

    kinds = {name: str(kind) for name, kind in feature_kinds(plan).items()}  # columns of a Parquet file have no fields
    types = {IMAGE: pa.struct({"bytes": pa.binary(), "path": pa.string()}), LABEL: pa.int64()}
    fields = [(name, types.get(kind) or pa.type_for_alias(kind)) for name, kind in kinds.items()]
    info = {"info": {"features": features_json(kinds, plan.class_names)}}
    return pa.schema(fields, metadata={"huggingface": json.dumps(info)})


def _read_parquet(file: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(file)
    for group in range(table.metadata.num_row_groups):
        row_group = table.metadata.row_group(group)
        for position in range(row_group.num_columns):
            column = row_group.column(position)
            # A dictionary or a shared prefix stores a value once for many rows: reading could need any amount of memory.
            if column.path_in_schema.split(".")[0] == IMAGE and (
                column.compression != "UNCOMPRESSED" or not set(column.encodings) <= _PLAIN_ENCODINGS
            ):
                raise ValueError("its images are compressed")
    # Few rows at a time: the footer lists the encodings, and it can be wrong.
    for batch in table.iter_batches(batch_size=4, columns=[IMAGE]):
        for image in batch.column("image").to_pylist():
            _check_image_bytes(image["path"], len(image["bytes"]))
            yield image["path"], image["bytes"]
