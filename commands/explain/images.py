"""Image sets of `dermis explain embeddings`, `explain edge-cases` and `augment`: real, generated and other images."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dermis.errors import DataError, escape
from dermis.explain.embeddings import GENERATED, REAL, Embedded, Item

if TYPE_CHECKING:
    from dermis.bundle import Bundle
    from dermis.classifier.onnx_session import Classifier
    from dermis.imaging import Images
    from dermis.synthesizer import Synthesizer

_CHUNK = 64  # images in memory at a time


@dataclass(frozen=True)
class ImageSet:
    """Images that are read or generated on demand.

    Attributes:
        count: Number of images.
        read: Iterates over the images. Its argument is a side in pixels to which it can reduce them as it decodes.
    """

    count: int
    read: Callable[[int], Iterator[tuple[Item, Images]]]


def embed_sets(classifier: Classifier, sets: Sequence[ImageSet], *, thumbnail: int) -> Embedded:
    """Embed all images of all sets by a classifier, with a progress bar."""
    from tqdm import tqdm

    from dermis.explain.embeddings import embed

    size = max(classifier.description.input.size, thumbnail)
    with tqdm(total=sum(each.count for each in sets), desc="features", unit="img", disable=None) as bar:
        pictures = (pair for each in sets for pair in each.read(size))
        return embed(classifier, pictures, thumbnail=thumbnail, done=bar.update)


def binary_class(name: str, class_names: tuple[str, str]) -> str:
    """Map a class to the classifier's: the class itself if it is one, label 1 for melanoma, label 0 for other diagnoses."""
    from training.data.diagnoses import is_melanoma

    if not name or name in class_names:
        return name
    return class_names[int(is_melanoma(name))]


def read_parts(predictions: Path | None, split: Path | None) -> dict[str, str]:
    """Read the part of each image, by id, from the predictions.csv of a training or from the folder of a split."""
    from training.data.splits import read_split

    if split is not None:
        return read_split(split)
    if predictions is None:
        return {}
    try:
        with predictions.open(encoding="utf-8", newline="") as file:
            return {row["isic_id"]: row["part"] for row in csv.DictReader(file)}
    except (OSError, KeyError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{predictions}: is not a predictions.csv of `dermis train classifier` ({type(error).__name__}: {error})"
        ) from None


def real_images(
    data: Path,
    class_names: tuple[str, str],
    *,
    metadata: Path | None = None,
    class_column: str | None = None,
    parts: dict[str, str] | None = None,
    only: Sequence[str] = (),
    kind: str = REAL,
) -> ImageSet:
    """Images of a source that `dermis data` can read.

    Args:
        parts: The part of each image, by id.
        only: Parts to use; all if empty.

    Raises:
        DataError: There are no images.
    """
    from training.data.attributes import value_of
    from training.data.sources import read_source
    from training.data.splits import group_of

    source = read_source(data, metadata=metadata, class_column=class_column)
    part_of = parts or {}
    groups = group_of(source.records)
    chosen = []
    for record, group in zip(source.records, groups, strict=True):
        part = part_of.get(record.id, "")
        if record.image is None or (only and part not in only):
            continue
        item = Item(
            id=record.id if kind == REAL else f"{kind}:{record.id}",
            kind=kind,
            class_name=binary_class(record.class_name, class_names),
            source=value_of(record.row, "source"),
            part=part,
            group=group if record.patient_id or record.lesion_id else "",
        )
        chosen.append((item, record.read_bytes))
    if not chosen:
        where = f" in the parts {', '.join(only)}" if only else ""
        raise DataError(f"{data}: has no images{where}")
    return ImageSet(len(chosen), lambda size: _decoded(chosen, size))


def generated_images(
    bundle: Bundle,
    synthesizer: Synthesizer,
    count: int,
    class_names: tuple[str, str],
    *,
    seed: int,
    truncation_psi: float = 1.0,
    class_name: str | None = None,
) -> ImageSet:
    """The first `count` samples of a seed, of the generator's classes in turn: sample i has label i mod classes.

    Args:
        class_name: Class of the images of an unconditional generator.

    Raises:
        DataError: The class of the images is not known.
    """
    from dermis.imaging import as_rgb

    names = bundle.class_names or ((class_name,) if class_name else ())
    if not names:
        raise DataError(
            f"{bundle.location}: its generator has no classes; give the class of its images: benign={bundle.location} or "
            f"malignant={bundle.location}"
        )
    if count < 1:
        raise DataError(f"--generate: must be at least 1; got {count}")

    def read(size: int) -> Iterator[tuple[Item, Images]]:
        batch = synthesizer.preferred_batch
        for start in range(0, count, batch):
            indices = range(start, min(start + batch, count))
            labels = [i % len(names) for i in indices]
            images = synthesizer.images([seed] * len(indices), indices, labels, truncation_psi=truncation_psi)
            for i, label, image in zip(indices, labels, as_rgb(images), strict=True):
                yield (
                    Item(
                        id=f"GEN_{seed}_{i:08d}",
                        kind=GENERATED,
                        class_name=binary_class(names[label], class_names),
                        source=bundle.name,
                        seed=seed,
                        index=i,
                        label=label,
                    ),
                    image,
                )

    return ImageSet(count, read)


def dataset_images(location: Path, class_names: tuple[str, str]) -> ImageSet:
    """All images of a dataset of `dermis generate`."""
    from dermis.dataset.reading import open_dataset, samples_of

    manifest, rows = open_dataset(location)

    def item(row: dict[str, str]) -> Item:
        return Item(
            id=row["isic_id"],
            kind=GENERATED,
            class_name=binary_class(row["target"], class_names),
            source=manifest.bundle_name,
            seed=int(row["seed"]),
            index=int(row["index"]),
            label=int(row["label"]),
        )

    def read(size: int) -> Iterator[tuple[Item, Images]]:
        from dermis.image_reading import ImageError, read_image

        for row, data in samples_of(location, manifest, rows):
            try:
                image = read_image(data)
            except ImageError as error:
                raise DataError(f"{location}: {escape(row['file_name'])} {error}") from None
            yield item(row), image

    return ImageSet(len(rows), read)


def added_images(text: str, class_names: tuple[str, str]) -> ImageSet:
    """Images of another kind from KIND=FOLDER, such as projected=FOLDER; with classes if the folder names them."""
    kind, equals, folder = text.partition("=")
    if not equals or not kind or not folder:
        raise DataError(f"--add: {text!r} is not of the form KIND=FOLDER, such as projected=projections")
    if kind in (REAL, GENERATED):
        raise DataError(f"--add: {kind} images come from --data, --generator or --dataset; name another kind")
    from training.data.files import list_files

    path = Path(folder)
    try:
        return real_images(path, class_names, kind=kind)
    except DataError:
        if not path.is_dir():
            raise
        listing = list_files(path)
        if not listing.images:
            raise
        ids = listing.ids()
        chosen = [(Item(f"{kind}:{ids[name]}", kind), file.read_bytes) for name, file in listing.images.items()]
        return ImageSet(len(chosen), lambda size: _decoded(chosen, size))


def _decoded(chosen: Sequence[tuple[Item, Callable[[], bytes]]], size: int) -> Iterator[tuple[Item, Images]]:
    from dermis.cpus import available_cpus
    from dermis.image_reading import ImageError, read_training_image

    def decode(pair: tuple[Item, Callable[[], bytes]]) -> Any:
        try:
            return read_training_image(pair[1](), size=size)
        except ImageError as error:
            raise DataError(f"{pair[0].id}: {error}") from None
        except OSError as error:
            raise DataError(f"{pair[0].id}: cannot be read ({error.strerror})") from None

    with ThreadPoolExecutor(available_cpus()) as pool:
        for start in range(0, len(chosen), _CHUNK):
            chunk = chosen[start : start + _CHUNK]
            yield from zip((item for item, _ in chunk), pool.map(decode, chunk), strict=True)
