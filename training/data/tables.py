"""Tables of images: the columns that name the image, its class and its patient, and how their values become classes.

The CSVs of these sources are known: the ISIC challenges of 2016 to 2020 and 2024 (SLICE-3D), HAM10000, BCN20000,
PAD-UFES-20, DDI, derm7pt, Fitzpatrick17k, and the download tool of the ISIC Archive.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dermis.errors import DataError, escape, quote
from training.data.attributes import GROUP_COLUMNS, ONE_HOT_COLUMNS, SYNONYMS, TWO_OF_2017, is_one_hot
from training.data.class_names import ClassOrigin, ClassRules, class_of, contradiction
from training.data.diagnoses import binary_class, is_no, is_yes
from training.data.files import TABLE_SUFFIXES, ImageFile, plain_id

# In order of preference. Names are compared in lower case, with one underscore in place of other characters than letters
# and digits.
ID_COLUMNS = (
    "isic_id", "image_name", "image", "image_id", "file_name", "filename", "file", "img_id", "img_name", "img", "image_path",
    "img_path", "file_path", "filepath", "path", "imagename", "imageid", "isic", "ddi_file", "bcn_filename", "md5hash",
    "url_alphanum", "derm", "id", "name",
)  # fmt: skip
CLASS_COLUMNS = (
    "target", "benign_malignant", "malignant", "diagnosis_1", "class", "label", "dx", "diagnosis", "diagnostic", "disease",
    "iddx_1", "melanoma",
)  # fmt: skip

_RIGHTS = ("copyright_license", "attribution", "source")
_KNOWN = {
    *ID_COLUMNS, *CLASS_COLUMNS, *TWO_OF_2017, *_RIGHTS, *(name for names in SYNONYMS.values() for name in names),
}  # fmt: skip
_DETAILED = re.compile(r"(?:diagnosis|iddx)_[1-9]")  # matches columns of the Archive from general (1) to specific
# In these columns 0 and 1, or false and true, mean benign and malignant. In other columns they are names of classes.
_TRUTH_COLUMNS = frozenset(
    {"target", "benign_malignant", "malignant", "is_malignant", "melanoma", "is_melanoma", "mel"}
)
_BINARY_COLUMNS = ("target", "melanoma", "is_melanoma", "dx", "diagnosis", "diagnostic", "disease", "class", "label")
# Columns of diagnoses, which are compared with the classes of another column.
_DIAGNOSIS_COLUMNS = ("iddx_full", "diagnosis_3", "diagnosis", "dx", "diagnostic", "disease")
_ISIC_NAME = re.compile(r"ISIC_\d{3,}(?:_downsampled)?(?:\.\w+)?", re.IGNORECASE)
_EXCEL_TEXT = re.compile(r'^="(.*)"$')  # a form of cells by which Excel keeps the leading zeros of ids
_HEADERLESS = ("image", "target")
_BEGINNING_BYTES = 1 << 16
_MAX_BYTES = 512 << 20  # of a table, decompressed; that of SLICE-3D has less than half
_MAX_COLUMNS = 10_000
MAX_CELLS = 50_000_000  # SLICE-3D has 22 million
_PIECE = 1 << 20


@dataclass(frozen=True)
class Table:
    """Rows of a CSV in the order of the file."""

    file: Path
    id_column: str
    class_column: str  # "" if the table has no classes
    names: tuple[str, ...]  # names of the images, as in the table
    ids: tuple[str, ...]  # names without folders and suffixes
    classes: tuple[str, ...]  # "" for a row without a class
    rows: tuple[dict[str, str], ...]
    own_columns: tuple[str, ...]  # without those that were added from other tables
    kind: str = ""  # name of the known data set, such as "ISIC 2018 task 3"; "" if it is not known
    origins: tuple[ClassOrigin, ...] = ()  # how values became classes
    notes: tuple[str, ...] = ()  # messages to the user


@dataclass(frozen=True)
class Grid:
    """Cells of a CSV."""

    header: tuple[str, ...]  # known columns have the names above
    cells: tuple[tuple[str, ...], ...]  # one tuple for each row, as long as the header
    first_row: int  # line number of the first row in the file: 2 after a header
    has_header: bool = True
    added_columns: int = 0  # the last columns, which are from other tables

    @property
    def own_header(self) -> tuple[str, ...]:
        """The columns of the file itself."""
        return self.header[: len(self.header) - self.added_columns]

    def column(self, name: str) -> list[str]:
        i = self.header.index(name)
        return [row[i] for row in self.cells]


def read_table(
    file: Path | ImageFile,
    class_column: str | None = None,
    *,
    binary: bool = False,
    image_column: str | None = None,
    mapping: Mapping[str, str] | None = None,
    count_images: Callable[[Sequence[str]], int] | None = None,
    complete: Callable[[Grid], tuple[Grid, tuple[str, ...]]] | None = None,
) -> Table:
    """Read a table with one row for each image.

    Cells are separated by commas, semicolons, tabs or vertical bars. The file can be compressed by gzip. It has at most 512 MiB
    (decompressed), 10,000 columns and 50 million cells.

    Args:
        file: The table.
        class_column: Column of the classes; by default, the first of CLASS_COLUMNS or, without one, the one-hot columns of
            a challenge.
        binary: Classes are "malignant" (melanoma) and "benign" (every other diagnosis), as in the ISIC 2020 challenge.
        image_column: Column that names the images; by default, the one of ID_COLUMNS that names most images.
        mapping: Classes by value; takes precedence over all other rules.
        count_images: Counts the names that are images; None if there are no images to compare with.
        complete: Adds the columns of other tables, and returns notes for the user.

    Raises:
        DataError: The table is not valid; the message names the file and the column, row or value.
    """
    where = file.path / file.member if isinstance(file, ImageFile) else file
    grid, notes = read_grid(file), tuple[str, ...]()
    if complete is not None:
        grid, notes = complete(grid)
    id_column, names, ids = _images(where, grid, image_column, count_images)
    column = None if class_column is None else _named(where, grid, class_column, "--class-column")
    used, values = _values(where, grid, column, binary)
    for name in (id_column, used):
        if name in grid.header and f"{name}.2" in grid.header and grid.column(name) != grid.column(f"{name}.2"):
            raise DataError(f"{where}: two columns {escape(name)} have different values; rename or remove one of them")
    has_truth_values = used in _TRUTH_COLUMNS
    rules = ClassRules(where, used, binary=binary, has_truth_values=has_truth_values, mapping=mapping or {})
    classes, origins = class_of(values, rules)
    if binary and used in ("target", "label", "class", "benign_malignant", "malignant"):
        note = _compare(where, grid, names, classes, used, class_column is not None)
        notes = (note, *notes) if note else notes
    rows = tuple(dict(zip(grid.header, row, strict=True)) for row in grid.cells)
    kind = table_kind(grid.header, named=grid.has_header)
    return Table(where, id_column, used, tuple(names), tuple(ids), classes, rows, grid.own_header, kind, origins, notes)


def read_image_names(file: Path, image_column: str | None = None) -> tuple[list[str], list[str]]:
    """Read the names of the images of a table, and their ids (without folders and suffixes), but not the classes."""
    _, names, ids = _images(file, read_grid(file), image_column, None)
    return names, ids


def _images(
    where: Path, grid: Grid, image_column: str | None, count_images: Callable[[Sequence[str]], int] | None
) -> tuple[str, list[str], list[str]]:
    """The column that names the images, their names, and their ids. DataError if a name is missing or repeated."""
    id_column = _id_column(where, grid, image_column, count_images)
    names = grid.column(id_column)
    for number, name in enumerate(names):
        if not name:
            raise DataError(f"{where}: row {grid.first_row + number} has no {id_column}; remove the row or fill it in")
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise DataError(f"{where}: {escape(repeated[0])} is in more than one row; keep one of them")
    if not names:
        raise DataError(f"{where}: has no rows")
    return id_column, names, [name if id_column == "isic_id" else plain_id(name) for name in names]


def find_column(header: Sequence[str], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in header), None)


def has_images(header: Sequence[str]) -> bool:
    return find_column(header, ID_COLUMNS) is not None


def has_classes(header: Sequence[str]) -> bool:
    return find_column(header, CLASS_COLUMNS) is not None or is_one_hot(header)


def table_kind(header: Sequence[str], *, named: bool = True) -> str:
    """Name of the known data set whose table has these columns, or "".

    Args:
        header: The columns.
        named: Whether the file has a header; the ground truth of ISIC 2016 has none.
    """
    columns = set(header)
    if tuple(header) == _HEADERLESS and not named:
        return "ISIC 2016 part 3"
    known: tuple[tuple[str, set[str]], ...] = (
        ("ISIC 2019", {"image", "MEL", "NV", "UNK"}),
        ("ISIC 2018 task 3", {"image", "MEL", "NV", "AKIEC"}),
        ("ISIC 2017 part 3", {"image_id", *TWO_OF_2017}),
        ("ISIC 2020", {"image_name", "target", "benign_malignant"}),
        ("ISIC 2024 (SLICE-3D)", {"isic_id", "target", "iddx_full"}),
        ("ISIC 2024 (SLICE-3D)", {"isic_id", "malignant", "iddx_full"}),
        ("ISIC 2024 (SLICE-3D)", {"isic_id", "tbp_tile_type"}),
        ("HAM10000", {"lesion_id", "image_id", "dx"}),
        ("BCN20000", {"bcn_filename", "diagnosis"}),
        ("PAD-UFES-20", {"img_id", "diagnostic"}),
        ("DDI", {"ddi_file", "disease"}),
        ("derm7pt", {"derm", "clinic", "diagnosis"}),
        ("Fitzpatrick17k", {"md5hash", "label", "three_partition_label"}),
        ("ISIC Archive", {"isic_id", "diagnosis_1"}),
    )
    return next((name for name, needed in known if needed <= columns), "")


def read_grid(file: Path | ImageFile, max_rows: int | None = None) -> Grid:
    """Decode a table and split it into stripped cells, without blank rows.

    Args:
        file: The table.
        max_rows: Read only the beginning of the file, up to this number of rows; None for the whole file.

    Raises:
        DataError: The file is not a readable CSV, or exceeds a limit of size.
    """
    where = file.path / file.member if isinstance(file, ImageFile) else file
    text = _text(file, where, beginning=max_rows is not None)
    declaration = re.match(r"sep=(.)\s*[\r\n]", text, re.IGNORECASE)  # states the delimiter for Excel
    if declaration:
        text = "\n" + text[declaration.end() :]  # the empty line keeps row numbers right
    lines = io.StringIO(text, newline="")
    delimiter = declaration[1] if declaration else _delimiter(text)
    try:
        reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
        rows: list[tuple[int, list[str]]] = []
        count = 0
        for row in reader:
            count += len(row)
            if len(row) > _MAX_COLUMNS:
                raise DataError(
                    f"{where}: line {reader.line_num} has {len(row):,} columns, more than {_MAX_COLUMNS:,}; "
                    "keep the needed ones in a copy"
                )
            if count > MAX_CELLS:
                raise _too_many_cells(where)
            if any(cell.strip() for cell in row):
                rows.append((reader.line_num, [_EXCEL_TEXT.sub(r"\1", cell.strip()) for cell in row]))
            if max_rows is not None and len(rows) > max_rows:
                break
    except csv.Error as error:
        if max_rows is None:
            raise DataError(f"{where}: is not a readable CSV ({error})") from error
    if not rows:
        raise DataError(f"{where}: has no rows")
    _, first = rows[0]
    has_header = not _has_no_header(first)
    header, body = (_header(first), rows[1:]) if has_header else (list(_HEADERLESS), rows)
    if len(header) * len(body) > MAX_CELLS:  # short rows are filled up
        raise _too_many_cells(where)
    cells = []
    for number, row in body:
        if any(row[len(header) :]):
            raise DataError(
                f"{where}: row {number} has {len(row)} cells where the header has {len(header)} columns; "
                "put cells that hold the delimiter in quotes"
            )
        cells.append((*row[: len(header)], *([""] * (len(header) - len(row)))))
    return Grid(tuple(header), tuple(cells), body[0][0] if body else 2, has_header)


def _too_many_cells(where: Path) -> DataError:
    return DataError(f"{where}: has more than {MAX_CELLS:,} cells; keep the needed columns in a copy")


def _read(file: Path | ImageFile, where: Path, *, beginning: bool) -> bytes:
    """The bytes of a table, or its first ones, decompressed. No more than the limit is decompressed."""
    data = bytearray()
    limit = _BEGINNING_BYTES if beginning else _MAX_BYTES + 1
    with contextlib.ExitStack() as opened:
        raw = opened.enter_context(file.open() if isinstance(file, ImageFile) else file.open("rb"))
        stream: IO[bytes] | gzip.GzipFile = raw
        if where.name.lower().endswith(".gz"):
            stream = opened.enter_context(gzip.GzipFile(fileobj=raw))
        while len(data) < limit and (piece := stream.read(min(_PIECE, limit - len(data)))):
            data += piece
    if len(data) > _MAX_BYTES:
        raise DataError(
            f"{where}: has more than {_MAX_BYTES:,} bytes (decompressed); keep the needed columns in a copy"
        )
    return bytes(data)


def _text(file: Path | ImageFile, where: Path, *, beginning: bool) -> str:
    try:
        data = _read(file, where, beginning=beginning)
    except FileNotFoundError:
        raise DataError(
            f"{where}: no such file; an ISIC folder has a CSV of its images, name it with --metadata"
        ) from None
    except (OSError, EOFError, zlib.error, LookupError, zipfile.BadZipFile, RuntimeError) as error:
        raise DataError(f"{where}: is not a readable CSV ({escape(error)})") from error
    if b"\0" in data[:4096] and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{where}: is not a readable CSV; save it as CSV (UTF-8)")
    for encoding in ("utf-16",) if data.startswith((b"\xff\xfe", b"\xfe\xff")) else ("utf-8-sig", "cp1252"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError as error:
            if beginning and error.start > len(data) - 4:  # cut inside a character
                return data[: error.start].decode(encoding)
    raise DataError(f"{where}: is not a readable CSV; save it as CSV (UTF-8)")


def _delimiter(text: str) -> str:
    line = next((line for line in text.splitlines() if line.strip()), "")
    counts = {}
    for delimiter in ",;\t|":
        try:
            counts[delimiter] = len(next(csv.reader([line], delimiter=delimiter)))
        except (csv.Error, StopIteration):
            counts[delimiter] = 0
    return max(counts, key=lambda each: counts[each])  # the first one, a comma, if counts are equal


def _has_no_header(first: Sequence[str]) -> bool:
    """Whether a table begins with its first image, as the ground truth of ISIC 2016 does."""
    return len(first) == 2 and _ISIC_NAME.fullmatch(first[0]) is not None


def _header(cells: Sequence[str]) -> list[str]:
    """Names of columns: known ones in the spelling above, empty and repeated ones made unique."""
    plain = [re.sub(r"[\W_]+", "_", cell.casefold()).strip("_") for cell in cells]
    upper = {"mel", "nv"} <= set(plain)
    header: dict[str, int] = {}  # name -> the number that a further column of this name gets, if it is free
    for cell, name in zip(cells, plain, strict=True):
        known = name.upper() if upper and name.upper() in ONE_HOT_COLUMNS else name
        known = known if known in ONE_HOT_COLUMNS or name in _KNOWN or _DETAILED.fullmatch(name) else cell
        column = known = known or "unnamed"
        while column in header:
            column, header[known] = f"{known}.{header[known]}", header[known] + 1
        header[column] = 2
    return list(header)


def _named(where: Path, grid: Grid, column: str, option: str) -> str:
    plain = re.sub(r"[\W_]+", "_", column.casefold()).strip("_")
    for name in grid.header:
        if name == column.strip() or re.sub(r"[\W_]+", "_", name.casefold()).strip("_") == plain:
            return name
    raise DataError(f"{where}: has no column {escape(column)}; name one of {_columns(grid)} with {option}")


def _columns(grid: Grid) -> str:
    return escape(", ".join(grid.header), 2000)


def _id_column(
    where: Path, grid: Grid, image_column: str | None, count_images: Callable[[Sequence[str]], int] | None
) -> str:
    if image_column is not None:
        return _named(where, grid, image_column, "--image-column")
    known = [name for name in ID_COLUMNS if name in grid.own_header]
    if not known:
        hint = ""
        if count_images is not None and grid.cells:
            counts = {name: count_images(grid.column(name)) for name in grid.header}
            best = max(counts, key=lambda name: counts[name])
            if counts[best]:
                hint = f" ({escape(best)} names {counts[best]:,} of {len(grid.cells):,})"
        raise DataError(
            f"{where}: none of its columns is known to name the images; name one of {_columns(grid)} "
            f"with --image-column{hint}"
        )
    if count_images is None or len(known) == 1:
        return known[0]
    counts = {name: count_images(grid.column(name)) for name in known}
    return max(known, key=lambda name: counts[name])  # the first one if counts are equal


def _values(where: Path, grid: Grid, column: str | None, binary: bool) -> tuple[str, list[Sequence[str]]]:
    """The column of the classes (or a description of several), and the values of each row, from general to specific."""
    header = grid.header
    if column is not None:
        return column, [(value,) for value in grid.column(column)]
    if one_column_a_class := _named_one_hot(grid):
        return "the column that is 1", [(value,) for value in one_column_a_class]
    if binary:
        detailed = sorted(name for name in header if _DETAILED.fullmatch(name) or name == "iddx_full")
        if len(detailed) > 1 and ("iddx_full" in header or not {"target", "dx"} & set(header)):
            paths = zip(*(grid.column(name) for name in detailed), strict=True)
            return f"{detailed[0]} to {detailed[-1]}", list(paths)
        if set(TWO_OF_2017) <= set(header):
            return TWO_OF_2017[0], [(value,) for value in grid.column(TWO_OF_2017[0])]
        if "target" not in header and is_one_hot(header):
            return "MEL, NV, ...", [(code,) for code in _one_hot(where, grid)]
        chosen = find_column(header, _BINARY_COLUMNS) or next(iter(detailed), None)
        if chosen is None:
            raise DataError(
                f"{where}: has no known column with a diagnosis; name one of {_columns(grid)} with --class-column"
            )
        return chosen, [(value,) for value in grid.column(chosen)]
    if set(TWO_OF_2017) <= set(header):
        return ", ".join(TWO_OF_2017), [(name,) for name in _two_of_2017(where, grid)]
    one_hot = is_one_hot(header)
    chosen = find_column(grid.own_header, CLASS_COLUMNS)
    if chosen is None and not one_hot:
        chosen = find_column(header, CLASS_COLUMNS)
    if chosen is None:
        return (
            ("MEL, NV, ...", [(code,) for code in _one_hot(where, grid)])
            if one_hot
            else ("", [("",)] * len(grid.cells))
        )
    return chosen, [(value,) for value in grid.column(chosen)]


def _named_one_hot(grid: Grid) -> list[str]:
    """The class of each row if all columns except ids are named after classes, as in tables of Roboflow; otherwise empty."""
    ids = {*ID_COLUMNS, *(name for group in GROUP_COLUMNS.values() for name in group)}
    names = [name for name in grid.own_header if name not in ids]
    if len(names) < 2 or is_one_hot(names) or set(names) == {*TWO_OF_2017} or not all(map(binary_class, names)):
        return []
    rows = list(zip(*(grid.column(name) for name in names), strict=True))
    if not all(all(is_yes(value) or is_no(value) for value in row) and sum(map(is_yes, row)) == 1 for row in rows):
        return []
    return [next(name for name, value in zip(names, row, strict=True) if is_yes(value)) for row in rows]


def _one_hot(where: Path, grid: Grid) -> list[str]:
    columns = [name for name in ONE_HOT_COLUMNS if name in grid.header]
    codes = []
    for number, row in enumerate(zip(*(grid.column(name) for name in columns), strict=True)):
        try:
            hot = [
                name for name, value in zip(columns, row, strict=True) if value and float(value.replace(",", ".")) > 0.5
            ]
        except ValueError as error:
            raise DataError(f"{where}: {', '.join(columns)} must be numbers, 0 or 1 ({escape(error)})") from error
        if len(hot) > 1:
            raise DataError(f"{where}: row {grid.first_row + number} has more than one of {', '.join(columns)}")
        codes.append(hot[0].lower() if hot else "")
    return codes


def _two_of_2017(where: Path, grid: Grid) -> list[str]:
    names = []
    for number, row in enumerate(zip(*(grid.column(name) for name in TWO_OF_2017), strict=True)):
        hot = [name for name, value in zip(TWO_OF_2017, row, strict=True) if is_yes(value)]
        if len(hot) > 1 or not all(is_yes(value) or is_no(value) for value in row):
            raise DataError(
                f"{where}: row {grid.first_row + number}: {' and '.join(TWO_OF_2017)} must be 0 or 1, one at most 1"
            )
        names.append(hot[0].replace("_", " ") if hot else "nevus")
    return names


def _compare(where: Path, grid: Grid, names: Sequence[str], classes: Sequence[str], column: str, chosen: bool) -> str:
    """Compare classes with the diagnoses of another column.

    Args:
        where: The table, for messages.
        grid: Its cells.
        names: Names of the images.
        classes: Classes of the images.
        column: Column of the classes.
        chosen: Whether the user chose that column.

    Returns:
        A note about contradictions; "" if there are none.

    Raises:
        DataError: There are contradictions, and the user did not choose the column.
    """
    other = find_column([name for name in grid.header if name != column], _DIAGNOSIS_COLUMNS)
    if other is None:
        return ""
    differing = contradiction(classes, [binary_class(value) or "" for value in grid.column(other)])
    if not differing:
        return ""
    i = differing[0]
    text = (
        f"{column} makes {len(differing):,} images another class than {other} does: {escape(names[i])} is {classes[i]}, "
        f"with {other} {quote(grid.column(other)[i])}"
    )
    if chosen:
        return text
    raise DataError(f"{where}: {text}; choose one of them with --class-column {column} or --class-column {other}")


def is_table(name: str) -> bool:
    return name.lower().endswith(TABLE_SUFFIXES)


def csv_text(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> str:
    """A CSV with these columns. Cells that a row lacks are empty, and other cells of a row are left out."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
