"""Sources of real images: images with a table, class folders, an official StyleGAN zip, a data set of dermis.

A source lists its images with their classes, patients and lesions. Images are read later, by `Record.read_bytes`.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Literal, TypedDict, get_args

from dermis.errors import DataError, escape, quote
from training.data.attributes import value_of
from training.data.class_names import ClassOrigin, ClassRules, benign_but_malignant, class_of
from training.data.files import (
    ARCHIVE,
    BROKEN_LINK,
    NOT_AN_IMAGE,
    TEXT_LINK,
    ImageFile,
    Listing,
    list_files,
    list_members,
    without_suffix,
)
from training.data.folders import (
    CONTAINERS,
    check_class_folders,
    folders_of,
    is_part,
    unused_tables,
    why_no_class_folders,
    wrapper,
)
from training.data.related_tables import JoinedTable, add_metadata, is_supplement_of, join_related_tables
from training.data.tables import (
    ID_COLUMNS,
    Table,
    find_column,
    has_classes,
    has_images,
    is_table,
    read_grid,
    read_image_names,
    read_table,
)

Layout = Literal["isic", "imagefolder", "stylegan", "table"]
LAYOUTS: tuple[str, ...] = get_args(Layout)[:3]  # choices of --layout
SPLIT = "split.json"  # name of a file that `dermis data split` writes
MANIFEST = "manifest.json"  # name of a file of generated data sets


class ReadOptions(TypedDict, total=False):
    """The options of `read_source`, for functions that pass them on."""

    metadata: Path | None
    class_column: str | None
    image_column: str | None
    binary: bool
    mapping: Mapping[str, str] | None
    layout: str | None


@dataclass(frozen=True)
class Record:
    """One image of a source. class_name, patient_id and lesion_id are "" if not known."""

    id: str
    class_name: str
    patient_id: str
    lesion_id: str
    image: ImageFile | None  # None if the table names an image that does not exist
    row: Mapping[str, str] = field(compare=False, repr=False)  # original metadata

    def read_bytes(self) -> bytes:
        """Read the encoded image.

        Raises:
            DataError: It is missing or cannot be read.
        """
        if self.image is None:
            raise DataError(f"{self.id}: has no image file")
        return self.image.read_bytes()


@dataclass(frozen=True)
class SourceReport:
    """Report to the user on how a source was read: its layout, the origin of classes, files that were left out."""

    recognised: str
    files: int = 0
    origins: tuple[ClassOrigin, ...] = ()
    not_listed: tuple[str, ...] = ()  # images that the table does not name
    unreadable: Mapping[str, str] = field(
        default_factory=dict
    )  # file that may be an image -> reason why it cannot be read
    other_files: tuple[str, ...] = ()  # texts and other files that are not images
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """Images in the order of their ids."""

    path: Path  # folder, zip or CSV
    layout: Layout
    table: Path | None  # the CSV, if one was read
    class_column: str  # column of the table; "" without classes
    class_names: tuple[str, ...]  # the name of label k is class_names[k]; empty without classes
    records: tuple[Record, ...]
    report: SourceReport = SourceReport("")

    def of_class(self, class_name: str) -> tuple[Record, ...]:
        return tuple(record for record in self.records if record.class_name == class_name)

    def select(self, ids: Iterable[str]) -> Source:
        """The source with the records of these ids only, and the same class names.

        Raises:
            DataError: There is no record with one of the ids.
        """
        selection = set(ids)
        records = tuple(record for record in self.records if record.id in selection)
        if len(records) < len(selection):
            absent = sorted(selection.difference(record.id for record in records))
            raise DataError(
                f"{self.path}: {len(absent)} of the selected images do not exist, the first is {escape(absent[0])}"
            )
        return replace(self, records=records)

    def with_classes(self, class_names: Sequence[str]) -> Source:
        """The source with the records of these classes only, labelled in this order.

        Names are compared without regard to case, as another part of the same data can have another spelling.

        Raises:
            DataError: A class has no image.
        """
        spellings = {name.casefold(): name for name in class_names}
        renamed = {name: spellings[name.casefold()] for name in self.class_names if name.casefold() in spellings}
        for name in class_names:
            if not any(renamed.get(record.class_name) == name for record in self.records):
                known = ", ".join(self.class_names) or "none"
                raise DataError(f"{self.path}: has no image of the class {name}; its classes are {known}")
        records = tuple(
            replace(record, class_name=renamed[record.class_name])
            for record in self.records
            if record.class_name in renamed
        )
        return replace(self, class_names=tuple(class_names), records=records)


@dataclass(frozen=True)
class _Options:
    """Options of `read_source`."""

    metadata: Path | None
    class_column: str | None
    image_column: str | None
    binary: bool
    mapping: Mapping[str, str]

    def table(self, file: Path | ImageFile, listing: Listing | None) -> Table:
        return read_table(
            file,
            self.class_column,
            binary=self.binary,
            image_column=self.image_column,
            mapping=self.mapping,
            count_images=None
            if listing is None
            else lambda names: sum(bool(listing.find(name)) for name in names if name),
            complete=lambda grid: add_metadata(grid, file, listing),
        )


def read_source(
    path: Path,
    *,
    metadata: Path | None = None,
    class_column: str | None = None,
    image_column: str | None = None,
    binary: bool = False,
    mapping: Mapping[str, str] | None = None,
    layout: str | None = None,
) -> Source:
    """List the images at `path`.

    Args:
        path: A folder or zip with images and a CSV (see `training.data.tables`), with one folder for each class, or with
            dataset.json (StyleGAN); a data set of `dermis generate`; or a CSV alone, whose images are then missing.
        metadata: The CSV. For a StyleGAN data set, it selects the images that it lists.
        class_column: Column of classes in the CSV.
        image_column: Column of images in the CSV.
        binary: Whether diagnoses become malignant (melanoma) and benign (all others).
        mapping: Classes by value, as `parse_mapping` returns them.
        layout: "isic" (a table), "imagefolder" or "stylegan"; None to recognise it.

    Raises:
        DataError: There are no images, their classes are not understood, or the layout is ambiguous. The message says what
            to do.
    """
    if layout is not None and layout not in LAYOUTS:
        raise DataError(f"--layout: {layout!r} is none of {', '.join(LAYOUTS)}")
    options = _Options(metadata, class_column, image_column, binary, mapping or {})
    if path.is_file() and is_table(path.name):
        table = options.table(path, None)
        source = _of_table(path, "table", table, None, join_related_tables(table, None))
        return source if metadata is None else _selected(source, metadata, image_column)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; images are read from a folder, a zip or a CSV")
    if path.is_file() and not zipfile.is_zipfile(path):
        raise DataError(f"{path}: is not a folder, a zip or a CSV")
    listing = list_files(path)
    if layout in (None, "stylegan") and (layout or "dataset.json" in listing.ignored):
        source = _stylegan(path, listing, options)
        return source if metadata is None else _selected(source, metadata, image_column)
    if layout != "imagefolder":
        file = metadata if metadata is not None else _find_table(path, listing, class_column)
        if file is not None:
            source = _with_table(path, file, listing, options)
            if metadata is None and layout is None and not source.class_column:
                _check_no_classes(source, listing)
            return source
        if layout == "isic":
            raise DataError(f"{path}: no table names its images; name one with --metadata")
    if layout is None and path.is_file() and _is_plain_zip(listing):
        source = _stylegan(path, listing, options)
        return source if metadata is None else _selected(source, metadata, image_column)
    return _image_folder(path, listing, options, chosen=layout == "imagefolder")


def _with_table(path: Path, file: Path | ImageFile, listing: Listing, options: _Options) -> Source:
    generated = MANIFEST in listing.ignored
    if generated or not listing.images:
        # The images of a generated data set, or of HAM10000 in its original form, are in archives next to the table.
        members: dict[str, ImageFile] = {}
        tables: dict[str, ImageFile] = {}
        for archive in listing.archives.values():
            members.update(list_members(archive))
            if not generated:  # ISIC 2024 has a table among the images
                tables.update(list_members(archive, tables=True))
        listing = replace(
            listing,
            images={**listing.images, **members},
            tables={**tables, **listing.tables},
            files=listing.file_count,
            _index={},
        )
    table = options.table(file, listing)
    main = file if isinstance(file, ImageFile) else ImageFile(file.resolve())
    table_folder = _folder_in(path, main)
    joined = join_related_tables(table, main, listing)
    if generated:
        table = replace(table, kind="data set of dermis")
    source = _of_table(path, "isic", table, listing, joined, table_folder)
    missing = sum(record.image is None for record in source.records)
    if missing == len(source.records) and listing.images:
        example = next(iter(listing.images))
        raise DataError(
            f"{table.file}: none of its {missing:,} images is in {path}; {table.id_column} has "
            f"{quote(table.names[0])}, a file there is {quote(example)}; name another column with --image-column, "
            "or another table with --metadata"
        )
    return source


def _folder_in(root: Path, table: ImageFile) -> str:
    """The folder of a table within the source, with a slash; "" if it is at the top or elsewhere."""
    if table.member:
        inside = PurePosixPath(table.member)
    elif table.path.resolve().is_relative_to(root.resolve()):
        inside = PurePosixPath(table.path.resolve().relative_to(root.resolve()).as_posix())
    else:
        return ""
    return "" if inside.parent == PurePosixPath() else f"{inside.parent}/"


def _check_no_classes(source: Source, listing: Listing) -> None:
    """Refuse a table without classes, if its images are in folders that may be their classes."""
    prefix = wrapper(listing)
    folders = folders_of(listing.images, prefix)
    if len(folders) < 2 or any(is_part(name) or CONTAINERS.fullmatch(name) for name in folders):
        return
    raise DataError(
        f"{source.table}: has no column of classes, and its images are in the folders {escape(', '.join(sorted(folders)))}; "
        "use these as classes with --layout imagefolder, name a column with --class-column, or read the images without "
        "classes with --layout isic"
    )


def _of_table(
    path: Path, layout: Layout, table: Table, listing: Listing | None, joined: JoinedTable, table_folder: str = ""
) -> Source:
    """Make a source from the rows of a table. Of images with the same name, that in `table_folder` is used."""
    ids = {} if listing is None else listing.ids()
    plain_ids = table.ids
    if listing is None and len(set(plain_ids)) < len(plain_ids):  # paths if names repeat, as in a listing
        plain_ids = tuple(without_suffix(name.replace("\\", "/")) for name in table.names)
    records, used, elsewhere = [], set(), []
    for name, plain, class_name, row in zip(table.names, plain_ids, table.classes, joined.rows, strict=True):
        paths = [] if listing is None else listing.find(table_folder + name)
        if len(paths) > 1:
            raise DataError(
                f"{path}: {escape(name)} is two images, {escape(paths[0])} and {escape(paths[1])}; "
                "remove one, or name them by path"
            )
        if not paths or listing is None:
            records.append(_record(plain, class_name, None, row))
            continue
        # A name without a folder is the id. Other ids depend on all images, so that they are the same in every part.
        record_id = name if plain == name and "/" not in name else ids[paths[0]]
        used.add(paths[0])
        if _differ_in_folder(path, name, paths[0]):
            elsewhere.append((name, paths[0]))
        records.append(_record(record_id, class_name, listing.images[paths[0]], row))
    repeated = [name for name, count in Counter(record.id for record in records).items() if count > 1]
    if repeated:
        raise DataError(f"{table.file}: {escape(repeated[0])} is in more than one row; keep one of them")
    notes = [*table.notes, *joined.notes]
    if elsewhere:
        name, file = elsewhere[0]
        notes.append(
            f"{len(elsewhere):,} images are in other folders than the table states; for instance, "
            f"{escape(name)} is {escape(file)}"
        )
    report = _report(
        listing,
        table.kind or "images with a table",
        table.origins,
        notes,
        not_listed=() if listing is None else tuple(sorted(set(listing.images) - used)),
    )
    names = _names(table.classes)
    return _source(path, layout, table.file, table.class_column, names, records, report)


def _differ_in_folder(path: Path, name: str, file: str) -> bool:
    """Whether a table names another folder for an image than the one that it is in.

    Raises:
        DataError: The folders are different parts of a data set.
    """
    in_table, actual = (PurePosixPath(each.replace("\\", "/")).parent.name.casefold() for each in (name, file))
    if is_part(in_table) and is_part(actual) and in_table != actual:
        raise DataError(
            f"{path}: {escape(name)} does not exist, and {escape(file)} is in another part of the data set; give the folder "
            "or the table of this part"
        )
    return bool(in_table and actual and in_table != actual)


def _find_table(path: Path, listing: Listing, class_column: str | None) -> ImageFile | None:
    """Find the table of a source.

    It is metadata.csv, if it has the classes; otherwise the only table that names images of the source and their classes, with
    preference for tables in the folder itself.

    Raises:
        DataError: There are several.
    """
    main = listing.tables.get("metadata.csv")
    if main is not None and class_column is not None:
        return main
    if main is not None:
        try:
            if has_classes(read_grid(main, max_rows=1).header):
                return main
        except DataError:
            return main  # reading all of it raises the error
    candidates: dict[str, ImageFile] = {}
    for name, file in listing.tables.items():
        if (PurePosixPath(name).parent / SPLIT).as_posix() in listing.ignored:
            continue  # part of a split, which is read with --metadata
        if PurePosixPath(name).name.casefold().startswith("sample_submission"):
            continue  # an example of a Kaggle competition, whose values are placeholders
        try:
            header = read_grid(file, max_rows=1).header
        except DataError:
            continue
        if has_images(header) and (has_classes(header) or name.endswith("_classes.csv")):  # the latter are Roboflow's
            candidates[name] = file
    at_top = {name: file for name, file in candidates.items() if "/" not in name}
    chosen = at_top or candidates
    if len(chosen) > 1 and listing.images:
        chosen = {name: file for name, file in chosen.items() if _names_images(file, listing)} or chosen
    chosen = {name: file for name, file in chosen.items() if not any(is_supplement_of(name, each) for each in chosen)}
    if len(chosen) > 1:
        raise DataError(f"{path}: {' and '.join(sorted(chosen))} both have classes; choose one with --metadata")
    if not at_top and chosen and listing.images and not _names_images(next(iter(chosen.values())), listing):
        return main  # the other table is below and of other images
    if main is not None:
        return next((file for file in chosen.values() if _names_images(file, listing)), main)
    return next(iter(chosen.values()), None)


def _names_images(file: ImageFile, listing: Listing) -> bool:
    grid = read_grid(file)
    return any(
        listing.find(name) for column in ID_COLUMNS if column in grid.header for name in grid.column(column)[:1000]
    )


def _image_folder(path: Path, listing: Listing, options: _Options, *, chosen: bool) -> Source:
    """Read one sub-folder for each class. The id of an image is its name, or its path if names repeat."""
    listing = replace(listing, archives={}, ignored={**listing.ignored, **dict.fromkeys(listing.archives, ARCHIVE)})
    prefix = wrapper(listing)
    inside = {name.removeprefix(prefix): name for name in listing.images}
    outside = [name for name in inside if "/" not in name]
    if not listing.images or outside:
        raise DataError(why_no_class_folders(path, listing, outside))
    below: dict[str, set[str]] = {}
    for name in inside:
        top, _, rest = name.partition("/")
        below.setdefault(top, set()).add(rest.partition("/")[0] if "/" in rest else "")
    if not chosen:
        check_class_folders(path, listing, below, prefix)
    inside_unreadable = {
        name.removeprefix(prefix): why for name, why in listing.unreadable.items() if name.startswith(prefix)
    }
    # A broken link without a suffix is a link to a folder.
    missing = {
        name
        for name, why in inside_unreadable.items()
        if why in (BROKEN_LINK, TEXT_LINK) and not {"/", "."} & set(name)
    }
    for folder in sorted((folders_of(listing.unreadable, prefix) | missing) - below.keys()):
        first = next(name for name in listing.unreadable if f"{name}/".startswith(f"{prefix}{folder}/"))
        raise DataError(
            f"{path}: the folder {prefix}{folder} has no image that can be read: {escape(first)} is "
            f"{listing.unreadable[first]}; convert its files to PNG, or remove the folder"
        )
    ids = listing.ids()
    paths = sorted(listing.images)
    folders = [name.removeprefix(prefix).partition("/")[0] for name in paths]
    rules = ClassRules(path, "folder", binary=options.binary, has_truth_values=False, mapping=options.mapping)
    classes, origins = class_of([(folder,) for folder in folders], rules)
    records = [
        _record(ids[name], class_name, listing.images[name], {"image": ids[name], "class": class_name})
        for name, class_name in zip(paths, classes, strict=True)
    ]
    without = sorted(
        {name.removeprefix(prefix) for name in listing.empty_folders if name.startswith(prefix)} - below.keys()
    )
    notes = [f"folders without images: {', '.join(without)}"] if without else []
    notes += unused_tables(listing)
    report = _report(listing, f"class folders{f' in {prefix}' if prefix else ''}", origins, notes)
    return _source(path, "imagefolder", None, "class", _names(classes), records, report)


def _is_plain_zip(listing: Listing) -> bool:
    """Whether a zip without dataset.json is of StyleGAN: no folders, or only the numbered ones of its tool."""
    folders = {PurePosixPath(name).parent.as_posix() for name in listing.images}
    return bool(listing.images) and all(re.fullmatch(r"\.|\d{5}", folder) for folder in folders)


def _stylegan(path: Path, listing: Listing, options: _Options) -> Source:
    """Read images with dataset.json. Ids, class names, patients and lesions are from our metadata.csv inside, if it exists."""
    images = listing.images
    if not images:
        raise DataError(f"{path}: contains no images")
    labels = _labels(path, listing)
    unknown = sorted(labels.keys() - set(images))
    if unknown:
        raise DataError(f"{path}: dataset.json has a label for {escape(unknown[0])}, which does not exist")
    rows = _metadata_rows(path, listing)
    names = {labels[file]: row["class"] for file, row in rows.items() if file in labels and row.get("class")}
    if options.binary and labels and not names and not options.mapping:
        numbers = ", ".join(map(str, sorted(set(labels.values()))))
        raise DataError(
            f"{path}: its labels are numbers ({numbers}), which do not say what is melanoma; state the classes with "
            '--map "0=benign" --map "1=malignant"'
        )
    label_names = {file: names.get(label, str(label)) for file, label in labels.items()}
    rules = ClassRules(path, "label", binary=options.binary, has_truth_values=False, mapping=options.mapping)
    files = sorted(images)
    classes, origins = class_of([(label_names.get(file, ""),) for file in files], rules)
    records = []
    for file, class_name in zip(files, classes, strict=True):
        row = rows.get(file, {"image": PurePosixPath(file).with_suffix("").as_posix()})
        name = row[str(find_column(list(filter(row.get, row)), ID_COLUMNS))]
        records.append(_record(name, class_name, images[file], row if rows else {**row, "class": class_name}))
    if options.binary or options.mapping:
        class_names = _names(classes)
    else:
        class_names = tuple(names.get(k, str(k)) for k in range(max(labels.values(), default=-1) + 1))
    report = _report(listing, "StyleGAN data set", origins if labels else (), [])
    return _source(path, "stylegan", None, "class" if labels else "", class_names, records, report)


def _labels(path: Path, listing: Listing) -> dict[str, int]:
    """Read the labels by member: numbers, or lists with a single 1. Empty if there are none, or no dataset.json."""
    if "dataset.json" not in listing.ignored:
        return {}
    try:
        labels = json.loads(_text(path, "dataset.json"))["labels"]
        pairs = {} if labels is None else {str(name).replace("\\", "/"): label for name, label in labels}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f'{path}: dataset.json is not of the form {{"labels": [["name.png", 0], ...]}}; correct it, '
            "or, if this is not a StyleGAN data set, choose --layout isic or --layout imagefolder"
        ) from error
    numbers = {name: _label(label) for name, label in pairs.items()}
    wrong = [name for name, number in numbers.items() if number is None]
    if wrong:
        raise DataError(
            f"{path}: the label of {escape(wrong[0])} in dataset.json is not a class number: {quote(pairs[wrong[0]])}"
        )
    return {name: number for name, number in numbers.items() if number is not None}


def _label(label: object) -> int | None:
    if isinstance(label, list) and len(label) > 1 and all(type(each) in (int, float) for each in label):
        ones = [i for i, each in enumerate(label) if each == 1]
        return ones[0] if len(ones) == 1 and sum(map(abs, label)) == 1 else None
    if type(label) is float and label.is_integer():
        label = int(label)
    return label if type(label) is int and 0 <= label < 100_000 else None


def _metadata_rows(path: Path, listing: Listing) -> dict[str, dict[str, str]]:
    if "metadata.csv" not in listing.tables:
        return {}
    grid = read_grid(listing.tables["metadata.csv"])
    if (
        "file_name" not in grid.header
        or find_column([name for name in grid.header if name != "file_name"], ID_COLUMNS) is None
    ):
        raise DataError(f"{path}: its metadata.csv has no columns file_name and isic_id")
    return {row["file_name"]: row for row in (dict(zip(grid.header, cells, strict=True)) for cells in grid.cells)}


def _text(path: Path, member: str) -> str:
    file = ImageFile(path, member) if path.is_file() else ImageFile(path / member)
    return file.read_bytes().decode("utf-8-sig")


def _selected(source: Source, metadata: Path, image_column: str | None) -> Source:
    """Select the records that a table lists by their ids or by their names in the table."""
    names, plain_ids = read_image_names(metadata, image_column)
    known = {record.id for record in source.records}
    ids = [name if name in known else plain for name, plain in zip(names, plain_ids, strict=True)]
    return replace(source.select(ids), table=metadata)


def _report(
    listing: Listing | None,
    recognised: str,
    origins: tuple[ClassOrigin, ...],
    notes: Sequence[str],
    not_listed: tuple[str, ...] = (),
) -> SourceReport:
    if cancers := benign_but_malignant(origins):
        notes = [*notes, cancers]
    if listing is None:
        return SourceReport(recognised, origins=origins, notes=tuple(notes))
    texts = tuple(name for name, why in listing.ignored.items() if why == NOT_AN_IMAGE)
    return SourceReport(recognised, listing.file_count, origins, not_listed, listing.unreadable, texts, tuple(notes))


def _record(name: str, class_name: str, image: ImageFile | None, row: Mapping[str, str]) -> Record:
    return Record(name, class_name, value_of(row, "patient_id"), value_of(row, "lesion_id"), image, row)


def _source(
    path: Path,
    layout: Layout,
    table: Path | None,
    column: str,
    names: tuple[str, ...],
    records: Iterable[Record],
    report: SourceReport,
) -> Source:
    # By id, so that the order of training does not depend on the order of files.
    ordered = tuple(sorted(records, key=lambda record: record.id))
    return Source(path, layout, table, column, names, ordered, report)


def _names(classes: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(classes) - {""}))
