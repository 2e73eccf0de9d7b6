"""Tables that belong to the main table: the metadata of its images, and tables that add patients and lesions.

A split needs these to keep the images of one lesion together.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from dermis.errors import DataError, escape, quote
from training.data.attributes import GROUP_COLUMNS
from training.data.files import ImageFile, Listing, list_members, plain_id
from training.data.tables import ID_COLUMNS, MAX_CELLS, Grid, Table, find_column, is_table, read_grid

_METADATA = "metadata.csv"
# The names of the tables of a challenge: X_GroundTruth.csv, X_Supplement.csv, X_Metadata.csv, and metadata.csv in X_Input. In
# ISIC 2017: X_Part3_GroundTruth.csv and X_Data_metadata.csv.
_ROLE = re.compile(
    r"(?P<challenge>.+?)(?P<part>_Part\d)?_(?P<role>groundtruth|supplement|metadata|data_metadata)\.csv(?:\.gz)?",
    re.IGNORECASE,
)
_GROUPS = tuple(column for names in GROUP_COLUMNS.values() for column in names)
_INPUT = "_Input"
_MAX_LISTED = 12  # columns in a message


@dataclass(frozen=True)
class JoinedTable:
    """Rows of the main table with the columns of other tables."""

    rows: tuple[dict[str, str], ...]
    notes: tuple[str, ...]  # messages to the user about the tables that were used


def is_supplement_of(name: str, main: str) -> bool:
    """Whether a table only supplements the ground truth of the same challenge.

    Args:
        name: Path of the table.
        main: Path of the other table.
    """
    supplement, truth = _ROLE.fullmatch(PurePosixPath(name).name), _ROLE.fullmatch(PurePosixPath(main).name)
    if supplement is None or truth is None or supplement["challenge"] != truth["challenge"]:
        return False
    return supplement["role"].casefold() == "supplement" and truth["role"].casefold() == "groundtruth"


def add_metadata(grid: Grid, file: Path | ImageFile, listing: Listing | None = None) -> tuple[Grid, tuple[str, ...]]:
    """Add all columns of the other tables of the same challenge.

    To the ground truth X_GroundTruth.csv, or another of these tables, belong X_Supplement.csv, X_Metadata.csv, and metadata.csv
    in the folder X_Input or beside it; to X_Part3_GroundTruth.csv (ISIC 2017) X_Data_metadata.csv. They are those of the
    listing, and those in the folder of the main table.

    Args:
        grid: Cells of the main table.
        file: The main table.
        listing: Files of the source.

    Returns:
        The cells with the added columns, and messages to the user.

    Raises:
        DataError: An image has two rows in one of the tables, two tables give it different patients or lesions, or there are
            too many cells.
    """
    main = file if isinstance(file, ImageFile) else ImageFile(file)
    id_column = find_column(grid.header, ID_COLUMNS)
    if id_column is None:
        return grid, ()
    images = [plain_id(name) for name in grid.column(id_column)]
    notes = []
    for name, other in _others(main, listing).items():
        if _is_metadata_of(other, main):
            grid, note = _with_columns_of(other, name, grid, images)
            notes += [note] if note else []
    return grid, tuple(notes)


def _with_columns_of(other: ImageFile, name: str, grid: Grid, images: list[str]) -> tuple[Grid, str]:
    """Add the columns of another table that the grid lacks, and describe them; "" if there are none."""
    try:
        header = read_grid(other, max_rows=1).header
    except DataError:
        return grid, ""
    id_column = find_column(header, ID_COLUMNS)
    columns = [column for column in header if column != id_column and column not in grid.header]
    if id_column is None or not columns:
        return grid, ""
    if len(grid.cells) * (len(grid.header) + len(columns)) > MAX_CELLS:
        raise DataError(
            f"{name}: with it, the table has more than {MAX_CELLS:,} cells; keep the needed columns in a copy"
        )
    compared = [column for column in _GROUPS if column in header and column in grid.header and column != id_column]
    positions = [grid.header.index(column) for column in compared]
    values = _by_image(other, read_grid(other), id_column, [*columns, *compared])
    empty, matched, cells = [""] * len(columns), 0, []
    for image, row in zip(images, grid.cells, strict=True):
        extra = values.get(image)
        if extra is None:
            cells.append((*row, *empty))
            continue
        matched += 1
        for column, position, value in zip(compared, positions, extra[len(columns) :], strict=True):
            _check_same(name, image, column, value, row[position])
        cells.append((*row, *extra[: len(columns)]))
    if not matched:
        return grid, ""
    joined = replace(
        grid, header=(*grid.header, *columns), cells=tuple(cells), added_columns=grid.added_columns + len(columns)
    )
    more = f" and {len(columns) - _MAX_LISTED} further columns" if len(columns) > _MAX_LISTED else ""
    return joined, f"{name} adds {', '.join(columns[:_MAX_LISTED])}{more} to {matched:,} of {len(images):,} images"


def join_related_tables(table: Table, main: ImageFile | None, listing: Listing | None = None) -> JoinedTable:
    """Add the patient and lesion columns of other tables with the same images.

    The other tables are those of the listing, and those in the folder of the main table.

    Raises:
        DataError: Two rows of a table give one image different patients or lesions.
    """
    rows = [dict(row) for row in table.rows]
    notes = []
    file = main if main is not None else ImageFile(table.file)
    for name, other in _others(file, listing).items():
        if _is_metadata_of(other, file):
            continue  # is part of the table
        try:
            header = read_grid(other, max_rows=1).header
        except DataError:
            continue
        id_column = find_column(header, ID_COLUMNS)
        if id_column is None:
            continue
        columns = _group_columns(header, id_column, table)
        if not columns:
            continue
        grid = read_grid(other)
        values, matched = _by_image(other, grid, id_column, columns), 0
        for row, image, plain in zip(rows, table.names, table.ids, strict=True):
            extra = values.get(image) or values.get(plain)
            matched += extra is not None
            for column, value in zip(columns, extra or [""] * len(columns), strict=True):
                before = row.setdefault(column, value)
                _check_same(name, image, column, value, before)
                row[column] = value or before
        if matched:
            notes.append(f"{name} adds {', '.join(columns)} to {matched:,} of {len(rows):,} images")
    empty = [column for column in rows[0] if not any(row[column] for row in rows)]
    for column in set(empty) - table.rows[0].keys():
        for row in rows:
            del row[column]
    return JoinedTable(tuple(rows), tuple(notes))


def _check_same(name: str, image: str, column: str, value: str, before: str) -> None:
    """Raise DataError if two tables give an image different patients or lesions."""
    if value and before and value != before:
        raise DataError(
            f"{name}: gives {escape(image)} the {column} {quote(value)}, and another table {quote(before)}; "
            "remove one of the tables"
        )


def _others(main: ImageFile, listing: Listing | None) -> Mapping[str, ImageFile]:
    """The other tables: those of the listing, those beside the main table, and that among the images of its challenge."""
    others = dict(listing.tables) if listing is not None else {}
    if not main.member:  # a file, not a member of a zip
        folder = main.path.resolve().parent
        beside = sorted(file for file in folder.iterdir() if is_table(file.name) and not file.name.startswith("."))
        if challenge := _challenge(main):
            inside = folder / f"{challenge}{_INPUT}" / _METADATA
            above = (folder.parent / f"{challenge}_{role}.csv" for role in ("GroundTruth", "Supplement"))
            beside += [inside, *(above if folder.name == f"{challenge}{_INPUT}" else ())]
            packed = folder / f"{challenge}{_INPUT}.zip"
            if listing is None and not inside.exists() and zipfile.is_zipfile(packed):
                others |= list_members(ImageFile(packed), tables=True)
        for path in beside:
            if path.is_file():
                others.setdefault(path.name, ImageFile(path))
    unique = {(main.path.resolve(), main.member): ""}
    for name, file in others.items():
        unique.setdefault((file.path.resolve(), file.member), name)
    return {name: others[name] for name in unique.values() if name}


def _is_metadata_of(other: ImageFile, main: ImageFile) -> bool:
    """Whether a table has further columns for the images of the main table, by the names of the files and folders."""
    main_challenge, other_challenge = _challenge(main), _challenge(other)
    if not main_challenge:
        return False
    if other_challenge:
        part = _ROLE.fullmatch(other.name)
        return main_challenge == other_challenge and (part is None or not part["part"])
    return other.name.casefold() == _METADATA and _folder(other) == _folder(main)


def _challenge(file: ImageFile) -> str:
    """The challenge and part of a table, such as "ISIC_2024_Training"; "" if its name has another form."""
    known = _ROLE.fullmatch(file.name)
    if known is not None:
        return known["challenge"]
    folder = PurePosixPath(_folder(file)).name
    is_metadata = file.name.casefold() == _METADATA and folder.endswith(_INPUT)
    return folder.removesuffix(_INPUT) if is_metadata else ""


def _folder(file: ImageFile) -> str:
    """The folder that contains a file, as a path; the archive, if the file is at the top of one."""
    if not file.member:
        return file.path.resolve().parent.as_posix()
    inside = PurePosixPath(file.member.replace("\\", "/")).parent
    return (PurePosixPath(file.path.resolve().with_suffix("").as_posix()) / inside).as_posix()


def _group_columns(header: tuple[str, ...], id_column: str, table: Table) -> list[str]:
    """Columns of patients and lesions that the main table has under no name."""
    columns = []
    for names in GROUP_COLUMNS.values():
        column = find_column(header, names)
        if column is not None and column != id_column and not set(table.own_columns) & set(names):
            columns.append(column)
    return columns


def _by_image(file: ImageFile, grid: Grid, id_column: str, columns: list[str]) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    for image, *row in zip(grid.column(id_column), *(grid.column(column) for column in columns), strict=True):
        key = plain_id(image)
        if values.setdefault(key, row) != row:
            where = file.path / file.member if file.member else file.path
            raise DataError(f"{where}: {key} is in two rows with different {', '.join(columns)}; keep one of them")
    return values
