"""Synthetic training images for a classifier: generated with a bundle, or read from a dataset.

They are generated or decoded once, at the classifier's size, into a cache file that later runs use. Generation that was
interrupted continues.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from tqdm import tqdm

from dermis.bundle import DESCRIPTOR, Bundle, open_bundle, trained_on
from dermis.bundle.folder import exists
from dermis.classifier.preprocess import to_input
from dermis.dataset.manifest import METADATA
from dermis.dataset.reading import open_dataset, samples_of
from dermis.dataset.store import MANIFEST, Store
from dermis.errors import DataError
from dermis.files import write_file
from dermis.image_reading import ImageError, read_training_image
from dermis.imaging import Images, as_rgb
from dermis.network_config import DEFAULT_NOISE_MODE
from training.classifier.data import CLASS_NAMES
from training.data.cache import reserve_space
from training.data.diagnoses import is_melanoma
from training.data.sources import read_source
from training.locks import one_process

if TYPE_CHECKING:
    from dermis.synthesizer import Synthesizer

_SAVE_EVERY = 512  # number of images; an interruption loses at most this many

Count = dict[str, int]


@dataclass(frozen=True)
class SyntheticSource:
    """A bundle or a generated dataset (folder or images.zip).

    Attributes:
        location: The folder or file.
        class_name: Class of all its images; None if the source has classes.
    """

    location: str
    class_name: str | None = None


@dataclass(frozen=True)
class SyntheticImages:
    """Arrays of images uint8 [n, S, S, 3], the labels of all images, and for the card the source of each array."""

    images: tuple[NDArray[np.uint8], ...]
    labels: tuple[int, ...]
    origin: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class _ClassImages:
    """The images of one class in one source. `produce(start)` yields uint8 [n, S, S, 3], starting with image `start`."""

    key: str  # digest of everything that the images depend on
    label: int
    available: int | None  # number of images; None: unlimited
    produce: Callable[[int], Generator[Images]]
    origin: Mapping[str, Any] = field(default_factory=dict)


def parse_source(text: str) -> SyntheticSource:
    """Parse a source from the command line: LOCATION, benign=LOCATION or malignant=LOCATION."""
    name, equals, location = text.partition("=")
    return SyntheticSource(location, name) if equals and name in CLASS_NAMES else SyntheticSource(text)


def load_synthetic(
    sources: Sequence[SyntheticSource],
    counts: Mapping[str, int],
    size: int,
    *,
    seed: int = 0,
    truncation_psi: float = 1.0,
    cache: Path,
    device: str = "auto",
    progress: bool = True,
) -> SyntheticImages:
    """Generate or read synthetic images.

    Image i of label k of a bundle has its latent from (seed, 2 i + k), so a larger count begins with the images of a smaller
    one. From a dataset, the first images of the class are used. Several sources of one class contribute equal shares.

    Args:
        sources: Bundles and datasets. The source of an unconditional bundle needs its class_name.
        counts: Number of images of each class.
        size: Side of the images in pixels.
        seed: Seed of generated images.
        truncation_psi: Truncation of generated images.
        cache: Folder for the images.
        device: Device of the generators.
        progress: Show progress bars.

    Raises:
        DataError: A source has no classes or too few images.
        BundleError: A bundle cannot be read.
        StorageError: A dataset cannot be read.
    """
    if not sources:
        raise DataError("synthetic: no source of images is given; name a bundle or a generated dataset")
    cache.mkdir(parents=True, exist_ok=True)
    images, labels, origin = [], [], []
    with _Generation(size, seed, truncation_psi, device) as generation:
        for label, class_name in enumerate(CLASS_NAMES):
            total = counts.get(class_name, 0)
            if not total:
                continue
            by_source = [_class_images(source, label, generation) for source in sources]
            parts = [part for part in by_source if part is not None]
            if not parts:
                raise DataError(
                    f"synthetic: no source has {class_name} images; add a source that has some, or state {class_name}=LOCATION"
                )
            for i, part in enumerate(parts):
                count = total // len(parts) + (i < total % len(parts))
                if part.available is not None and part.available < count:
                    raise DataError(
                        f"{part.origin['name']}: has {part.available:,} {class_name} images, {count:,} are requested; "
                        "give a smaller count or a larger dataset"
                    )
                images.append(_cached(part, count, size, cache, progress))
                labels += [label] * count
                origin.append({**part.origin, "class": class_name, "images": count})
    return SyntheticImages(tuple(images), tuple(labels), tuple(origin))


class _Generation:
    """The options of generation, and the synthesizers, each of which is made when it is first needed."""

    def __init__(self, size: int, seed: int, truncation_psi: float, device: str) -> None:
        self.size, self.seed, self.truncation_psi, self.device = size, seed, truncation_psi, device
        self._synthesizers: dict[str, Synthesizer] = {}
        self._open = ExitStack()

    def synthesizer(self, bundle: Bundle) -> Synthesizer:
        from dermis.synthesizer import Synthesizer

        if bundle.digest not in self._synthesizers:
            synthesizer = self._open.enter_context(Synthesizer(bundle, device=self.device))
            self._synthesizers[bundle.digest] = synthesizer
        return self._synthesizers[bundle.digest]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


def _class_images(source: SyntheticSource, label: int, generation: _Generation) -> _ClassImages | None:
    """The images of a class in a source; None if it has none."""
    if source.class_name not in (None, CLASS_NAMES[label]):
        return None
    if exists(source.location, DESCRIPTOR):
        return _bundle_images(open_bundle(source.location), source, label, generation)
    return _dataset_images(source, label, generation.size)


def _bundle_images(bundle: Bundle, source: SyntheticSource, label: int, generation: _Generation) -> _ClassImages | None:
    if source.class_name is None and not bundle.class_names:
        raise DataError(
            f"{bundle.location}: its generator has no classes; state the class of its images: "
            f"benign={bundle.location} or malignant={bundle.location}"
        )
    numbers = list(range(max(len(bundle.class_names), 1)))
    if source.class_name is None:
        numbers = [k for k, name in enumerate(bundle.class_names) if is_melanoma(name) == bool(label)]
    if not numbers:
        return None

    def produce(start: int) -> Generator[Images]:
        synthesizer = generation.synthesizer(bundle)
        batch = synthesizer.preferred_batch
        while True:
            rows = range(start, start + batch)
            images = synthesizer.images(
                seeds=[generation.seed] * batch,
                indices=[2 * i + label for i in rows],
                labels=[numbers[i % len(numbers)] for i in rows],
                truncation_psi=generation.truncation_psi,
                noise_mode=DEFAULT_NOISE_MODE,
            )
            yield np.stack([to_input(image, generation.size) for image in as_rgb(images)])
            start += batch

    origin = {
        "kind": "bundle",
        "name": bundle.name,
        "digest": bundle.digest,
        "seed": generation.seed,
        "truncation_psi": generation.truncation_psi,
        "noise_mode": DEFAULT_NOISE_MODE,
        "licence": bundle.provenance.get("licence", "unknown"),
        "trained_on": trained_on(bundle.provenance),
    }
    content = [
        bundle.digest,
        generation.seed,
        generation.truncation_psi,
        DEFAULT_NOISE_MODE,
        numbers,
        label,
        generation.size,
        generation.device,
    ]
    return _ClassImages(_digest(content), label, None, produce, origin)


def _dataset_images(source: SyntheticSource, label: int, size: int) -> _ClassImages | None:
    """Images of a dataset of `dermis generate`, of its images.zip alone, or of a folder with one sub-folder per class."""
    counts, name, digest, read = _open_dataset(Path(source.location))
    names = [each for each in counts if source.class_name is not None or is_melanoma(each) == bool(label)]
    if not names:
        return None

    def produce(start: int) -> Generator[Images]:
        position = 0
        for class_name, data in read():
            if class_name in names:
                if position >= start:
                    yield to_input(_decoded(data(), name, position), size)[None]
                position += 1

    origin = {"kind": "dataset", "name": name, "digest": digest}
    available = sum(counts[each] for each in names)
    return _ClassImages(_digest([digest, names, label, size]), label, available, produce, origin)


def _decoded(data: bytes, name: str, position: int) -> Images:
    try:
        return read_training_image(data)
    except ImageError as error:
        raise DataError(f"{name}: image {position + 1} {error}; remove or replace it") from None


_Read = Callable[[], Iterator[tuple[str, Callable[[], bytes]]]]
"""Yields the class of each image, and a function that returns its bytes."""


def _open_dataset(path: Path) -> tuple[Count, str, str, _Read]:
    """The number of images of each class, the name of the dataset, its digest, and a function that reads all images.

    Raises:
        DataError: It is not a dataset with classes.
        StorageError: It cannot be read.
    """
    if path.is_dir() and (path / MANIFEST).is_file():
        return _finished_dataset(path)
    if path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            if METADATA in names and "dataset.json" not in names:
                classes = _classes(archive.read(METADATA))
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                return _counted(classes.values()), path.name, digest, lambda: _zip_images(path, classes)
    source = read_source(path, binary=True)
    if not source.class_names:
        raise DataError(
            f"{path}: its images have no classes; a synthetic source needs the classes benign and malignant"
        )
    digest = _digest([record.image.stamp() for record in source.records if record.image])
    records = [record for record in source.records if record.image]
    return (
        _counted(record.class_name for record in records),
        path.name,
        digest,
        lambda: ((record.class_name, record.read_bytes) for record in records),
    )


def _finished_dataset(path: Path) -> tuple[Count, str, str, _Read]:
    manifest, rows = open_dataset(path)

    def read() -> Iterator[tuple[str, Callable[[], bytes]]]:
        for row, data in samples_of(path, manifest, rows):
            yield row["target"], _constant(data)

    digest = hashlib.sha256(Store(path).read(MANIFEST)).hexdigest()
    return _counted(row["target"] for row in rows.values()), path.resolve().name, digest, read


def _zip_images(path: Path, classes: Mapping[str, str]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name in classes:
                yield classes[name], _constant(archive.read(name))


def _classes(table: bytes) -> dict[str, str]:
    """The class of each file in the metadata.csv of a generated dataset."""
    rows = csv.DictReader(io.StringIO(table.decode(), newline=""))
    return {row["file_name"]: row["target"] for row in rows}


def _constant(data: bytes) -> Callable[[], bytes]:
    return lambda: data


def _counted(names: Iterable[str]) -> Count:
    return dict(Counter(names))


def _digest(content: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _cached(part: _ClassImages, count: int, size: int, cache: Path, progress: bool) -> NDArray[np.uint8]:
    """The first `count` images, memory-mapped from the cache. They are generated or decoded if they are not cached.

    If another training is making them, this one waits.
    """
    file = cache / f"synthetic-{part.key[:16]}-{count}.npy"

    def report() -> None:
        tqdm.write(f"{file}: waiting for another training that is making these images", file=sys.stderr)

    if not file.exists():
        with one_process(file, report):
            if not file.exists():
                _fill(part, count, size, file, progress)
    cached: NDArray[np.uint8] = np.load(file, mmap_mode="r")
    return cached


def _fill(part: _ClassImages, count: int, size: int, file: Path, progress: bool) -> None:
    """Generate or decode the first `count` images into a .npy file, or continue where an interrupted run has stopped."""
    partial, done = file.with_suffix(".partial"), file.with_suffix(".done")
    start = int(done.read_text()) if done.exists() and partial.exists() else 0
    try:
        if not start:
            done.unlink(missing_ok=True)  # that of an earlier partial file
        images = open_memmap(partial, "r+" if start else "w+", dtype=np.uint8, shape=(count, size, size, 3))
        reserve_space(partial)
    except OSError as error:
        if not start:
            partial.unlink(missing_ok=True)
        raise DataError(
            f"--cache: {file.parent}: cannot be written ({error.strerror}); choose another folder"
        ) from None
    with (
        closing(part.produce(start)) as batches,
        tqdm(total=count, initial=start, desc=CLASS_NAMES[part.label], unit="img", disable=not progress) as bar,
    ):
        saved = start
        while start < count:
            batch = next(batches)[: count - start]
            images[start : start + len(batch)] = batch
            start += len(batch)
            bar.update(len(batch))
            if start - saved >= _SAVE_EVERY:
                images.flush()
                write_file(done, str(start).encode())
                saved = start
    images.flush()
    del images
    partial.replace(file)
    done.unlink(missing_ok=True)
