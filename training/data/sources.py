"""What users have, read as one thing: an ISIC folder, an ImageFolder, an official StyleGAN zip, or a table alone.

A source lists its images with their classes, patients and lesions. It opens no image: `Record.read_bytes` does.
"""

from __future__ import annotations

import csv
import io
import json
import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Literal

from dermis.errors import DataError
from training.data.tables import ID_COLUMNS, TABLE_SUFFIXES, find_table, is_melanoma, read_table, value_of

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
Layout = Literal["isic", "imagefolder", "stylegan", "table"]


@dataclass(frozen=True)
class ImageFile:
    """An image's place: a file, or a member of the zip at `path`."""

    path: Path
    member: str = ""

    @property
    def name(self) -> str:
        return PurePosixPath(self.member).name if self.member else self.path.name

    def read_bytes(self) -> bytes:
        """The file's content. DataError if it cannot be read."""
        try:
            if not self.member:
                return self.path.read_bytes()
            return _open_zip(self.path, self.path.stat().st_mtime_ns, os.getpid()).read(self.member)
        except (OSError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            raise DataError(f"{self.path / self.member}: cannot be read ({error})") from error

    def stamp(self) -> str:
        """Changes when the file does: place, size and time of the last change."""
        status = self.path.stat()
        return f"{self.path.resolve()}\t{self.member}\t{status.st_size}\t{status.st_mtime_ns}"


@dataclass(frozen=True)
class Record:
    """One image of a source. class_name, patient_id and lesion_id are '' where unknown; row is the original metadata.

    image is None where the table names an image that is not there.
    """

    id: str
    class_name: str
    patient_id: str
    lesion_id: str
    image: ImageFile | None
    row: Mapping[str, str] = field(compare=False, repr=False)

    def read_bytes(self) -> bytes:
        """The encoded image (JPEG, PNG). DataError if it is missing or cannot be read."""
        if self.image is None:
            raise DataError(f"{self.id}: there is no such image")
        return self.image.read_bytes()


@dataclass(frozen=True)
class Source:
    """Images in the order of their ids. Label k of a record is class_names[k]; both are empty if nothing has a class."""

    path: Path  # the folder, zip or CSV that was given
    layout: Layout
    table: Path | None  # the CSV, if one was read
    class_column: str  # of the table; "" without classes
    class_names: tuple[str, ...]
    records: tuple[Record, ...]

    def of_class(self, class_name: str) -> tuple[Record, ...]:
        return tuple(record for record in self.records if record.class_name == class_name)

    def select(self, ids: Iterable[str]) -> Source:
        """The records with these ids, under the same class names. DataError if one is not there."""
        wanted = set(ids)
        records = tuple(record for record in self.records if record.id in wanted)
        if len(records) < len(wanted):
            absent = sorted(wanted.difference(record.id for record in records))
            raise DataError(
                f"{self.path}: {len(absent)} of the images asked for are not there, the first is {absent[0]}"
            )
        return replace(self, records=records)

    def with_classes(self, class_names: Sequence[str]) -> Source:
        """The records of these classes, labelled in this order. DataError if there is not one image of a class."""
        for name in class_names:
            if not self.of_class(name):
                there = ", ".join(self.class_names) or "none"
                raise DataError(f"{self.path}: has no image of the class {name}; its classes are {there}")
        records = tuple(record for record in self.records if record.class_name in class_names)
        return replace(self, class_names=tuple(class_names), records=records)


def read_source(
    path: Path, *, metadata: Path | None = None, class_column: str | None = None, binary: bool = False
) -> Source:
    """List the images at `path`: a folder with images and a CSV (see `training.data.tables`), a folder with one
    sub-folder a class, a StyleGAN zip or folder with dataset.json, or a CSV alone (whose images are then missing).

    `metadata` names the CSV; of a StyleGAN zip it selects the images that it lists. `class_column` names its column of
    classes. `binary` turns diagnoses into malignant (melanoma) and benign (anything else). Raises DataError.
    """
    if path.is_file():
        if path.name.lower().endswith(TABLE_SUFFIXES):
            return _selected(_table_source(path, path, {}, class_column, binary, "table"), metadata)
        if not zipfile.is_zipfile(path):
            raise DataError(f"{path}: neither a folder, a StyleGAN zip nor a CSV")
        return _selected(_stylegan(path, binary), metadata)
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; --data takes a folder with images and metadata.csv")
    if (path / "dataset.json").is_file():
        return _selected(_stylegan(path, binary), metadata)
    table = metadata or find_table(path)
    if table is not None:
        return _table_source(path, table, _images_below(path), class_column, binary, "isic")
    folders = [entry for entry in sorted(path.iterdir()) if entry.is_dir() and entry.name[0] not in "._"]
    if len(folders) < 2:
        raise DataError(
            f"{path / 'metadata.csv'}: no such file; an ISIC folder has a CSV of its images, name it with --metadata "
            "(or give a folder with one sub-folder a class, or a StyleGAN zip)"
        )
    return _image_folder(path, binary)


def _table_source(
    path: Path,
    file: Path,
    images: Mapping[str, Sequence[Path]],
    class_column: str | None,
    binary: bool,
    layout: Layout,
) -> Source:
    table = read_table(file, class_column, binary=binary)
    records = []
    for name, class_name, row in zip(table.ids, table.classes, table.rows, strict=True):
        files = images.get(name, ())
        if len(files) > 1:
            raise DataError(f"{path}: {name} is two images, {files[0]} and {files[1]}; remove one")
        records.append(_record(name, class_name, ImageFile(files[0]) if files else None, row))
    return _source(path, layout, file, table.class_column, _names(table.classes), records)


def _images_below(folder: Path) -> dict[str, list[Path]]:
    """Image files by their name, and by their path in the folder, both without the suffix."""
    files: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix in IMAGE_SUFFIXES:
            for name in {file.stem, file.relative_to(folder).with_suffix("").as_posix()}:
                files.setdefault(name, []).append(file)
    return files


def _image_folder(path: Path, binary: bool) -> Source:
    """One sub-folder a class; an image's id is its name, or its path where names repeat."""
    files = [file for file in sorted(path.rglob("*")) if file.suffix in IMAGE_SUFFIXES]
    places = [file.relative_to(path) for file in files]
    astray = [place for place in places if len(place.parts) == 1]
    if astray or not files:
        what = (
            f"{len(astray)} images lie outside of them, the first is {astray[0]}" if astray else "there are no images"
        )
        raise DataError(f"{path}: read as one sub-folder a class, but {what}")
    if len({file.stem for file in files}) == len(files):
        ids = [file.stem for file in files]
    else:
        ids = [place.with_suffix("").as_posix() for place in places]
    repeated = [name for name, count in Counter(ids).items() if count > 1]
    if repeated:
        raise DataError(f"{path}: {repeated[0]} is two images; remove one")
    classes = [_class(place.parts[0], binary) for place in places]
    records = [
        _record(name, cls, ImageFile(file), {"image": name, "class": cls})
        for name, cls, file in zip(ids, classes, files, strict=True)
    ]
    return _source(path, "imagefolder", None, "class", _names(classes), records)


def _stylegan(path: Path, binary: bool) -> Source:
    """Images with dataset.json. Our own metadata.csv inside, if there, gives ids, class names, patients and lesions."""
    members = _members(path)
    labels = _labels(path)
    images = [name for name in sorted(members) if PurePosixPath(name).suffix in IMAGE_SUFFIXES]
    if not images:
        raise DataError(f"{path}: holds no images")
    astray = sorted(labels.keys() - set(images))
    if astray:
        raise DataError(f"{path}: dataset.json has a label for {astray[0]}, which is not there")
    rows = _own_rows(path) if "metadata.csv" in members else {}
    names = {labels[file]: row["class"] for file, row in rows.items() if file in labels and row.get("class")}
    if binary and labels and not names:
        raise DataError(f"{path}: its labels are numbers, so nothing tells melanoma from others")
    records = []
    for file in images:
        row = rows.get(file, {"image": PurePosixPath(file).with_suffix("").as_posix()})
        name = next(row[column] for column in ID_COLUMNS if row.get(column))
        cls = _class(names.get(labels[file], str(labels[file])), binary) if file in labels else ""
        image = ImageFile(path, file) if path.is_file() else ImageFile(path / file)
        records.append(_record(name, cls, image, row if rows else {**row, "class": cls}))
    if binary:
        class_names = _names(record.class_name for record in records)
    else:
        class_names = tuple(names.get(k, str(k)) for k in range(max(labels.values(), default=-1) + 1))
    return _source(path, "stylegan", None, "class" if labels else "", class_names, records)


def _members(path: Path) -> set[str]:
    if path.is_dir():
        return {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    try:
        with zipfile.ZipFile(path) as archive:
            return {info.filename for info in archive.infolist() if not info.is_dir()}
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path}: not a readable zip ({error})") from error


def _labels(path: Path) -> dict[str, int]:
    """Labels by member; empty if the data set has none."""
    try:
        labels = json.loads(_text(path, "dataset.json"))["labels"]
        if labels is None:
            return {}
        pairs = {str(name): label for name, label in labels}
    except DataError:
        raise DataError(f"{path}: no dataset.json; a StyleGAN zip has one, with the labels") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f'{path}: dataset.json is not of the form {{"labels": [["name.png", 0], ...]}}') from error
    wrong = [name for name, label in pairs.items() if type(label) is not int or label < 0]
    if wrong:
        raise DataError(f"{path}: the label of {wrong[0]} in dataset.json is no class number")
    return pairs


def _own_rows(path: Path) -> dict[str, dict[str, str]]:
    rows = list(csv.DictReader(io.StringIO(_text(path, "metadata.csv"), newline="")))
    if rows and not (rows[0].get("file_name") and any(rows[0].get(column) for column in ID_COLUMNS)):
        raise DataError(f"{path}: its metadata.csv has no columns file_name and isic_id")
    return {row["file_name"]: {key: value or "" for key, value in row.items() if key} for row in rows}


def _text(path: Path, member: str) -> str:
    file = ImageFile(path, member) if path.is_file() else ImageFile(path / member)
    return file.read_bytes().decode("utf-8-sig")


def _selected(source: Source, metadata: Path | None) -> Source:
    return source if metadata is None else replace(source.select(read_table(metadata).ids), table=metadata)


def _record(name: str, class_name: str, image: ImageFile | None, row: Mapping[str, str]) -> Record:
    return Record(name, class_name, value_of(row, "patient_id"), value_of(row, "lesion_id"), image, row)


def _source(
    path: Path, layout: Layout, table: Path | None, column: str, names: tuple[str, ...], records: Iterable[Record]
) -> Source:
    # By id: the order of files must not decide the order of training.
    return Source(path, layout, table, column, names, tuple(sorted(records, key=lambda record: record.id)))


def _names(classes: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(classes) - {""}))


def _class(name: str, binary: bool) -> str:
    return ("malignant" if is_melanoma(name) else "benign") if binary and name else name


@lru_cache(maxsize=8)
def _open_zip(path: Path, changed: int, process: int) -> zipfile.ZipFile:
    """One handle a file and process: its threads may share it, forked processes may not."""
    return zipfile.ZipFile(path)
