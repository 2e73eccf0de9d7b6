"""Tables that belong to the main table and add patients and lesions.

A split needs these to keep the images of one lesion together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dermis.errors import DataError, escape, quote
from training.data.files import ImageFile, Listing, plain_id
from training.data.tables import (
    GROUP_COLUMNS,
    ID_COLUMNS,
    Grid,
    Table,
    find_column,
    is_table,
    read_grid,
)


@dataclass(frozen=True)
class JoinedTable:
    """Rows of the main table with the columns of other tables."""

    rows: tuple[dict[str, str], ...]
    notes: tuple[str, ...]  # messages to the user about the tables that were used


def join_related_tables(table: Table, main: ImageFile | None, listing: Listing | None = None) -> JoinedTable:
    """Add the patient and lesion columns of other tables with the same images.

    If the main table is X_GroundTruth.csv, all columns of X_Metadata.csv are added, and for X_Part3_GroundTruth.csv (ISIC 2017)
    those of X_Data_metadata.csv. The other tables are those of the listing, and those in the folder of the main table.

    Raises:
        DataError: Two rows of a table give one image different patients or lesions.
    """
    rows = [dict(row) for row in table.rows]
    notes = []
    for name, file in _others(table, main, listing).items():
        try:
            header = read_grid(file, max_rows=1).header
        except DataError:
            continue
        id_column = find_column(header, ID_COLUMNS)
        if id_column is None:
            continue
        all_columns = _is_metadata_of(name, table.file.name)
        columns = _added_columns(header, id_column, table, all_columns)
        if not columns:
            continue
        grid = read_grid(file)
        values, matched = _by_image(file, grid, id_column, columns), 0
        for row, image, plain in zip(rows, table.names, table.ids, strict=True):
            extra = values.get(image) or values.get(plain)
            matched += extra is not None
            for column, value in zip(columns, extra or [""] * len(columns), strict=True):
                before = row.setdefault(column, value)
                if value and before and value != before:
                    raise DataError(
                        f"{name}: gives {escape(image)} the {column} {quote(value)}, and another table {quote(before)}; "
                        "remove one of the tables"
                    )
                row[column] = value or before
        if matched:
            notes.append(f"{name} adds {', '.join(columns)} to {matched:,} of {len(rows):,} images")
    empty = [column for column in rows[0] if not any(row[column] for row in rows)]
    for column in set(empty) - table.rows[0].keys():
        for row in rows:
            del row[column]
    return JoinedTable(tuple(rows), tuple(notes))


def _others(table: Table, main: ImageFile | None, listing: Listing | None) -> Mapping[str, ImageFile]:
    others: dict[str, ImageFile] = {}
    if listing is not None:
        others.update(listing.tables)
    if main is None or not main.member:  # a file, not a member of a zip
        folder = table.file.resolve().parent
        for file in sorted(folder.iterdir()):
            if file.is_file() and is_table(file.name) and not file.name.startswith("."):
                others.setdefault(file.name, ImageFile(file))
    main_path = (main.path if main is not None else table.file).resolve()
    member = main.member if main is not None else ""
    return {name: file for name, file in others.items() if (file.path.resolve(), file.member) != (main_path, member)}


def _is_metadata_of(name: str, main: str) -> bool:
    if "GroundTruth" not in main:
        return False
    of_2017 = re.sub(r"_Part\d_GroundTruth", "_Data_metadata", main)
    return Path(name).name in (main.replace("GroundTruth", "Metadata"), of_2017)


def _added_columns(header: tuple[str, ...], id_column: str, table: Table, all_columns: bool) -> list[str]:
    """Columns to add: all that the main table lacks, or those of patients and lesions if it has none under any name."""
    present = set(table.rows[0])
    if all_columns:
        return [column for column in header if column != id_column and column not in present]
    columns = []
    for names in GROUP_COLUMNS.values():
        column = find_column(header, names)
        if column is not None and column != id_column and not present & set(names):
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
