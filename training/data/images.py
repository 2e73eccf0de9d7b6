"""Decode the images of a source at one resolution. Decoded images are cached under the content of all files."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dermis.cpus import available_cpus
from dermis.errors import DataError, StorageError
from dermis.files import write_file
from dermis.image_reading import ImageError, read_training_image
from training.data.cache import new_array, read_array
from training.data.sources import Record, Source

# Raised for a file that cannot be read or decoded.
BROKEN_IMAGE = (DataError, ImageError, OSError)
# Part of the keys of caches: images that an earlier decoder read differently (EXIF orientation, 16 bits) are decoded again.
DECODER_VERSION = 2
_AHEAD = 256  # maximum number of results that threads compute ahead

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ImageDataset:
    """Decoded training images."""

    images: NDArray[np.uint8]  # [N, R, R, 3]
    labels: NDArray[np.int64]  # [N], indices into class_names
    class_names: tuple[str, ...]
    ids: tuple[str, ...]
    sha256: str  # SHA-256 of (id, class, file content) of all images: the identity of the training set
    records: tuple[Record, ...] = ()  # records of the images in the source; empty if the images come from no source
    contents: tuple[str, ...] = ()  # SHA-256 of each file; empty if the images come from no source

    @property
    def resolution(self) -> int:
        return int(self.images.shape[1])


def load_images(
    source: Source,
    resolution: int,
    *,
    cache: Path | None = None,
    keep_digests: bool = False,
    progress: bool = True,
) -> ImageDataset:
    """Decode all images of a source as centred squares, resized by Lanczos, in the order of their ids.

    A StyleGAN data set without labels has one class, "unlabelled".

    Args:
        source: The images.
        resolution: Side of the squares in pixels.
        cache: Folder where decoded images are kept between runs.
        keep_digests: Keep the digests of the files in `cache` too, and read again only files that have changed since.
        progress: Whether to show a progress bar.

    Raises:
        DataError: An image is missing, broken or without a class.
    """
    records = source.records
    class_names = source.class_names
    if not class_names and source.layout == "stylegan":
        class_names = ("unlabelled",)
    else:
        _check_classes(source)
    missing = [record.id for record in records if record.image is None]
    if missing:
        raise DataError(
            f"{source.path}: {len(missing)} of {len(records)} images are missing, the first is {missing[0]}"
        )
    labels = np.array([class_names.index(record.class_name or class_names[0]) for record in records], dtype=np.int64)
    contents = _kept_digests(records, cache) if keep_digests and cache is not None else _digests(records)
    digest = content_digest(records, contents)
    images = _cached_images(records, resolution, cache, digest, progress)
    ids = tuple(record.id for record in records)
    return ImageDataset(images, labels, class_names, ids, digest, records, contents)


def content_digest(records: Sequence[Record], contents: Sequence[str]) -> str:
    """Identity of a set: SHA-256 of (id, class, SHA-256 of the file) of its records, which are in the order of their ids."""
    digest = hashlib.sha256()
    for record, content in zip(records, contents, strict=True):
        digest.update(f"{record.id}\t{record.class_name}\t{content}\n".encode())
    return digest.hexdigest()


def in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int | None = None
) -> Iterator[Result]:
    """Call a function in threads and yield its results in the order of the items.

    A limited number of results is computed ahead. After Ctrl-C only calls that have begun are finished.

    Args:
        function: The function, called with one item.
        items: The items.
        workers: Number of threads; by default, one for each processor.
    """
    pool = ThreadPoolExecutor(workers or available_cpus())
    futures: deque[Future[Result]] = deque()
    try:
        for item in items:
            futures.append(pool.submit(function, item))
            if len(futures) > _AHEAD:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _check_classes(source: Source) -> None:
    unlabelled = [record.id for record in source.records if not record.class_name]
    if not unlabelled:
        return
    where = source.table or source.path
    if not source.class_column:
        columns = ", ".join(source.records[0].row)
        raise DataError(f"{where}: has no known column of classes; name one of {columns} with --class-column")
    raise DataError(f"{where}: {len(unlabelled)} rows have no {source.class_column}, the first is {unlabelled[0]}")


def _digests(records: Sequence[Record]) -> tuple[str, ...]:
    return tuple(in_threads(lambda record: hashlib.sha256(record.read_bytes()).hexdigest(), records))


def _kept_digests(records: Sequence[Record], cache: Path) -> tuple[str, ...]:
    """Return the digests of the files. Those of files that have the same place, size and time as before are not computed."""
    # The times before the contents: a file that is changed in between is read again the next time.
    stamps = tuple(in_threads(_stamp, records))
    places = "\n".join(f"{record.image.path}\t{record.image.member}" for record in records if record.image)
    file = cache / f"digests-{hashlib.sha256(places.encode(errors='backslashreplace')).hexdigest()[:16]}.json"
    known = _read_digests(file)
    changed = [i for i, stamp in enumerate(stamps) if stamp not in known]
    found = dict(zip(changed, _digests([records[i] for i in changed]), strict=True))
    contents = tuple(found[i] if i in found else known[stamp] for i, stamp in enumerate(stamps))
    if found:
        with suppress(StorageError):  # the digests are computed again the next time
            write_file(file, json.dumps(dict(zip(stamps, contents, strict=True))).encode())
    return contents


def _stamp(record: Record) -> str:
    try:
        stamp = record.image.stamp() if record.image else ""
    except OSError:
        stamp = ""  # reading the file says what is wrong
    return hashlib.sha256(stamp.encode()).hexdigest()


def _read_digests(file: Path) -> dict[str, str]:
    try:
        digests = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(digests, dict) or not all(isinstance(value, str) for value in digests.values()):
        return {}
    return digests


def _cached_images(
    records: Sequence[Record], resolution: int, cache: Path | None, digest: str, progress: bool
) -> NDArray[np.uint8]:
    shape = (len(records), resolution, resolution, 3)
    if cache is None:
        decoded = np.empty(shape, dtype=np.uint8)
        _decode_all(records, decoded, progress)
        return decoded
    file = cache / f"{digest[:16]}-{resolution}-v{DECODER_VERSION}.npy"
    images: NDArray[np.uint8] | None = read_array(file, shape, mapped=True)
    if images is None:
        with new_array(file, shape, np.uint8) as array:
            _decode_all(records, array, progress)
        images = read_array(file, shape, mapped=True)
    if images is None:
        raise DataError(f"{file}: was written and cannot be read again; choose another --cache")
    return images


def _decode_all(records: Sequence[Record], images: NDArray[np.uint8], progress: bool) -> None:
    """Decode the images of the records into images [N, R, R, 3]."""
    broken: list[str] = []

    def decode(i: int) -> None:
        try:
            images[i] = read_training_image(records[i].read_bytes(), images.shape[1])
        except BROKEN_IMAGE as error:
            image = records[i].image
            broken.append(f"{image.name if image else records[i].id}, which {error}")

    decoded = in_threads(decode, range(len(records)))
    for _ in tqdm(decoded, "decoding", len(records), disable=not progress, unit="img"):
        pass
    if broken:
        raise DataError(
            f"{len(broken)} images cannot be decoded, the first is {sorted(broken)[0]}; remove or replace them"
        )
