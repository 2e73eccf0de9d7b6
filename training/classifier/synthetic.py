"""Synthetic images of a classifier's training part: drawn from a bundle as they are needed, or taken from a dataset.

Decoded or drawn once, at the classifier's size, into a file that the next run finds; drawing that was stopped goes on.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
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

from dermis.bundle import DESCRIPTOR, Bundle, open_bundle
from dermis.bundle.folder import exists
from dermis.classifier.preprocess import to_input
from dermis.dataset.manifest import MANIFEST, METADATA
from dermis.dataset.reading import open_dataset, samples_of
from dermis.dataset.store import Store
from dermis.errors import DataError
from dermis.imaging import Images, decode
from dermis.network_config import DEFAULT_NOISE_MODE
from training.classifier.data import CLASS_NAMES
from training.data.diagnoses import is_melanoma
from training.data.sources import read_source

if TYPE_CHECKING:
    from dermis.synthesizer import Synthesizer

_SAVE_EVERY = 512  # images; what is lost at most when drawing is stopped

Count = dict[str, int]


@dataclass(frozen=True)
class SyntheticSource:
    """A bundle or a generated dataset (folder or images.zip). class_name: what all its images are, None to ask it."""

    location: str
    class_name: str | None = None


@dataclass(frozen=True)
class SyntheticImages:
    """Images uint8 [N, S, S, 3] and labels int64 [N]; `origin` says for the card where they come from."""

    images: tuple[NDArray[np.uint8], ...]
    labels: tuple[int, ...]
    origin: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class _Stock:
    """What one source has of one class. `produce(start)` yields uint8 [n, S, S, 3] from image `start` on."""

    key: str
    label: int
    available: int | None  # None: as many as are asked for
    produce: Callable[[int], Generator[Images]]
    origin: Mapping[str, Any] = field(default_factory=dict)


def parse_source(text: str) -> SyntheticSource:
    """A source as it is written on the command line: LOCATION, or benign=LOCATION or malignant=LOCATION."""
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
    """So many images of each class in `counts`, at `size` px.

    Of a bundle, image i of label k has its latent from (seed, 2 i + k), so a larger count begins with the images of a
    smaller one; of a dataset the first images of the class are taken. Several sources of one class give equal shares.
    An unconditional bundle needs its class_name. Raises DataError, StorageError or BundleError.
    """
    if not sources:
        raise DataError("synthetic: name a bundle or a generated dataset to take the images from")
    cache.mkdir(parents=True, exist_ok=True)
    images, labels, origin = [], [], []
    with _Drawing(size, seed, truncation_psi, device) as drawing:
        for label, class_name in enumerate(CLASS_NAMES):
            wanted = counts.get(class_name, 0)
            if not wanted:
                continue
            found = [_stock(source, label, drawing) for source in sources]
            stocks = [stock for stock in found if stock is not None]
            if not stocks:
                raise DataError(
                    f"synthetic: no source has {class_name} images; give one more, or {class_name}=LOCATION"
                )
            for i, stock in enumerate(stocks):
                count = wanted // len(stocks) + (i < wanted % len(stocks))
                if stock.available is not None and stock.available < count:
                    raise DataError(
                        f"{stock.origin['name']}: has {stock.available:,} {class_name} images, {count:,} are asked for; "
                        "give a smaller count or a larger dataset"
                    )
                images.append(_cached(stock, count, size, cache, progress))
                labels += [label] * count
                origin.append({**stock.origin, "class": class_name, "images": count})
    return SyntheticImages(tuple(images), tuple(labels), tuple(origin))


class _Drawing:
    """How images are drawn; each generator is made ready once, when it is first needed, for all its classes."""

    def __init__(self, size: int, seed: int, truncation_psi: float, device: str) -> None:
        self.size, self.seed, self.truncation_psi, self.device = size, seed, truncation_psi, device
        self._ready: dict[str, Synthesizer] = {}
        self._open = ExitStack()

    def synthesizer(self, bundle: Bundle) -> Synthesizer:
        from dermis.synthesizer import Synthesizer

        if bundle.digest not in self._ready:
            self._ready[bundle.digest] = self._open.enter_context(Synthesizer(bundle, device=self.device))
        return self._ready[bundle.digest]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


def _stock(source: SyntheticSource, label: int, drawing: _Drawing) -> _Stock | None:
    if source.class_name not in (None, CLASS_NAMES[label]):
        return None
    if exists(source.location, DESCRIPTOR):
        return _of_bundle(open_bundle(source.location), source, label, drawing)
    return _of_dataset(source, label, drawing.size)


def _of_bundle(bundle: Bundle, source: SyntheticSource, label: int, drawing: _Drawing) -> _Stock | None:
    if source.class_name is None and not bundle.class_names:
        raise DataError(
            f"{bundle.location}: its generator has no classes; say which its images are: benign={bundle.location} or "
            f"malignant={bundle.location}"
        )
    numbers = list(range(max(len(bundle.class_names), 1)))
    if source.class_name is None:
        numbers = [k for k, name in enumerate(bundle.class_names) if is_melanoma(name) == bool(label)]
    if not numbers:
        return None

    def produce(start: int) -> Generator[Images]:
        synthesizer = drawing.synthesizer(bundle)
        batch = synthesizer.preferred_batch
        while True:
            rows = range(start, start + batch)
            drawn = synthesizer.images(
                seeds=[drawing.seed] * batch,
                indices=[2 * i + label for i in rows],
                labels=[numbers[i % len(numbers)] for i in rows],
                truncation_psi=drawing.truncation_psi,
                noise_mode=DEFAULT_NOISE_MODE,
            )
            if drawn.shape[3] == 1:
                drawn = drawn.repeat(3, axis=3)
            yield np.stack([to_input(image, drawing.size) for image in drawn])
            start += batch

    trained_on = bundle.provenance.get("dataset")
    origin = {
        "kind": "bundle",
        "name": bundle.name,
        "digest": bundle.digest,
        "seed": drawing.seed,
        "truncation_psi": drawing.truncation_psi,
        "noise_mode": DEFAULT_NOISE_MODE,
        "licence": bundle.provenance.get("licence", "unknown"),
        "trained_on": trained_on.get("sha256") if isinstance(trained_on, dict) else None,
    }
    facts = [
        bundle.digest,
        drawing.seed,
        drawing.truncation_psi,
        DEFAULT_NOISE_MODE,
        numbers,
        label,
        drawing.size,
        drawing.device,
    ]
    return _Stock(_digest(facts), label, None, produce, origin)


def _of_dataset(source: SyntheticSource, label: int, size: int) -> _Stock | None:
    """A dataset of `dermis generate`, its images.zip alone, or any folder with one sub-folder a class."""
    counts, name, digest, read = _open_dataset(Path(source.location))
    names = [each for each in counts if source.class_name is not None or is_melanoma(each) == bool(label)]
    if not names:
        return None

    def produce(start: int) -> Generator[Images]:
        chosen = 0
        for class_name, data in read():
            if class_name in names:
                if chosen >= start:
                    yield to_input(decode(data()), size)[None]
                chosen += 1

    origin = {"kind": "dataset", "name": name, "digest": digest}
    return _Stock(_digest([digest, names, label, size]), label, sum(counts[each] for each in names), produce, origin)


_Read = Callable[[], Iterator[tuple[str, Callable[[], bytes]]]]
"""Yields the class of each image and a function that gives its bytes."""


def _open_dataset(path: Path) -> tuple[Count, str, str, _Read]:
    """Images of each class, the dataset's name, its identity, and how to go through it. DataError or StorageError."""
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
        raise DataError(f"{path}: its images have no classes; a synthetic source tells benign from malignant")
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
    """Class of each file that a generated dataset's metadata.csv names."""
    rows = csv.DictReader(io.StringIO(table.decode(), newline=""))
    return {row["file_name"]: row["target"] for row in rows}


def _constant(data: bytes) -> Callable[[], bytes]:
    return lambda: data


def _counted(names: Iterable[str]) -> Count:
    return dict(Counter(names))


def _digest(facts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _cached(stock: _Stock, count: int, size: int, cache: Path, progress: bool) -> NDArray[np.uint8]:
    """The first `count` images of a stock, memory-mapped from the cache, drawn or decoded where they are not there."""
    file = cache / f"synthetic-{stock.key[:16]}-{count}.npy"
    if not file.exists():
        partial, done = file.with_suffix(".partial"), file.with_suffix(".done")
        start = int(done.read_text()) if done.exists() and partial.exists() else 0
        images = open_memmap(partial, "r+" if start else "w+", dtype=np.uint8, shape=(count, size, size, 3))
        with (
            closing(stock.produce(start)) as batches,
            tqdm(total=count, initial=start, desc=CLASS_NAMES[stock.label], unit="img", disable=not progress) as bar,
        ):
            saved = start
            while start < count:
                batch = next(batches)[: count - start]
                images[start : start + len(batch)] = batch
                start += len(batch)
                bar.update(len(batch))
                if start - saved >= _SAVE_EVERY:
                    images.flush()
                    done.write_text(str(start))
                    saved = start
        images.flush()
        del images
        partial.replace(file)
        done.unlink(missing_ok=True)
    found: NDArray[np.uint8] = np.load(file, mmap_mode="r")
    return found
