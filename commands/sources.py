"""Sources of training images as commands read them from their options, and reports about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from commands.console import table_console
from dermis.errors import escape, quote

if TYPE_CHECKING:
    from training.data.prepare import Prepared
    from training.data.sources import ReadOptions, Source

_MAX_ORIGINS = 40
_MAX_NAMES = 3


def read_options(
    *,
    metadata: Path | None = None,
    class_column: str | None = None,
    image_column: str | None = None,
    binary: bool = False,
    maps: Sequence[str] | None = None,
    layout: str | None = None,
) -> ReadOptions:
    """Return the keyword arguments of `read_source`.

    Raises:
        DataError: A --map is not of the form VALUE=CLASS.
    """
    from training.data.class_names import parse_mapping

    return {
        "metadata": metadata,
        "class_column": class_column,
        "image_column": image_column,
        "binary": binary,
        "mapping": parse_mapping(maps or []),
        "layout": layout,
    }


def check_maps(sources: Sequence[Source], maps: Sequence[str] | None) -> None:
    """Refuse a --map for a value that no image has, since a misspelled value would otherwise be ignored silently."""
    from dermis.errors import DataError
    from training.data.class_names import parse_mapping

    values = {
        part.casefold()
        for source in sources
        for origin in source.report.origins
        for part in (origin.value, *origin.value.split(" / "))
    }
    for value in parse_mapping(maps or []):
        if value not in values:
            raise DataError(f"--map: no image has the value {value!r}")


def read_and_report(
    path: Path,
    metadata: Path | None,
    image_column: str | None,
    class_column: str | None,
    binary: bool,
    maps: list[str] | None,
    layout: str | None,
    *,
    quiet: bool = False,
) -> Source:
    """Read a source and, unless `quiet`, report on stderr how it was read."""
    from training.data.sources import read_source

    options = read_options(
        metadata=metadata,
        image_column=image_column,
        class_column=class_column,
        binary=binary,
        maps=maps,
        layout=layout,
    )
    source = read_source(path, **options)
    check_maps([source], maps)
    if not quiet:
        typer.echo("\n".join(describe_source(source)), err=True)
    return source


def describe_source(source: Source) -> list[str]:
    """Describe how a source was read, in lines: its layout, the origin of its classes, and files left out."""
    report = source.report
    lines = [f"recognised: {report.recognised}" + (f" (table {source.table.name})" if source.table else "")]
    lines += list(report.notes)
    renamed = [
        f"{quote(origin.value)} -> {origin.class_name}"
        for origin in report.origins
        if origin.class_name and origin.value != origin.class_name
    ]
    if renamed:
        lines.append(f"classes of {source.class_column}: {_some(renamed, _MAX_ORIGINS)}")
    if report.not_listed:
        lines.append(f"{len(report.not_listed):,} images that the table does not name: {_some(report.not_listed)}")
    if report.unreadable:
        lines.append(
            f"{len(report.unreadable):,} files cannot be read: {_some([f'{n} ({w})' for n, w in report.unreadable.items()])}"
        )
    return lines


def show_preparation(sources: Sequence[Source], prepared: Prepared) -> None:
    """Print the tables after a preparation: files, images read, images skipped by reason, and classes with their origin."""
    from rich.table import Table

    console = table_console()
    table = Table("files", "", "", title=str(prepared.path))
    for source in sources:
        typer.echo("\n".join([f"{source.path}: recognised: {source.report.recognised}", *source.report.notes]))
    table.add_row("files seen", f"{sum(source.report.files for source in sources):,}", "")
    table.add_row("images read", f"{prepared.images:,}", "")
    reasons = Counter(each.reason for each in prepared.skipped)
    for reason, count in reasons.most_common():
        first = next(each.id for each in prepared.skipped if each.reason == reason)
        table.add_row(f"skipped: {reason}", f"{count:,}", f"first: {escape(first)}")
    for name, values in (
        ("not named by the table", [name for source in sources for name in source.report.not_listed]),
        ("no images", [name for source in sources for name in source.report.other_files]),
    ):
        if values:
            table.add_row(name, f"{len(values):,}", _some(values))
    console.print(table)
    classes = Table("class", "images", "from", title="Classes")
    for name, count in prepared.classes.items():
        origins = [
            f"{origin.column}={quote(origin.value)} ({origin.count:,})"
            for source in sources
            for origin in source.report.origins
            if origin.class_name == name
        ]
        classes.add_row(name, f"{count:,}", _some(origins, _MAX_ORIGINS))
    if prepared.classes:
        console.print(classes)


def _some(names: Sequence[str], limit: int = _MAX_NAMES) -> str:
    return ", ".join(escape(name) for name in names[:limit]) + (
        f" and {len(names) - limit:,} more" if len(names) > limit else ""
    )
