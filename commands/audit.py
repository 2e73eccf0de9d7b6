"""`dermis audit`: export, verify and shorten the audit trail of a service, in its jobs database."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from commands.console import table_console
from commands.keys import DataDir, Json
from dermis.errors import DermisError

if TYPE_CHECKING:
    from services.audit.trail import AuditTable, Entry, Head
    from services.audit.verification import Verification

audit_app = typer.Typer(
    help="Audit trail of the service: who did what, on which object, with which outcome.", no_args_is_help=True
)

Since = Annotated[
    str | None,
    typer.Option(
        help="Only entries of this time or later ones: a date or time in UTC, such as 2026-11-28T08:00.",
        show_default=False,
    ),
]
UnsignedUntil = Annotated[
    int, typer.Option(min=0, help="Number of the last entry from before DERMIS_AUDIT_KEY_FILE was set.")
]
Until = Annotated[str | None, typer.Option(help="Only entries of earlier times.", show_default=False)]


@contextmanager
def _opened(data_dir: Path | None) -> Iterator[tuple[AuditTable, bytes | None]]:
    """The trail of a service, and the key that signs it. Tables that do not exist are created."""
    from services.audit.trail import AuditTable, read_key
    from services.data_folder import restrict_new_files
    from services.jobs.table import JobTable
    from services.settings import SettingsError, read_settings

    settings = read_settings(**({} if data_dir is None else {"data_dir": data_dir}))
    restrict_new_files()
    table = AuditTable.of(settings)
    try:
        with closing(JobTable(settings.jobs_url)) as jobs:
            jobs.open()
    except Exception as error:  # every database driver has its own
        raise SettingsError(
            f"the jobs database cannot be opened: {str(error.__cause__ or error).splitlines()[0]}"
        ) from None
    with closing(table):
        yield table, read_key(settings.audit_key_file)


def _time(option: str, text: str | None) -> str | None:
    """The time of an option, as entries contain it."""
    from services.audit.trail import time_text

    if text is None:
        return None
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise DermisError(
            f"{option}: {text[:40]!r} is not a date or time such as 2026-11-28 or 2026-11-28T08:00"
        ) from None
    return time_text(moment if moment.tzinfo is not None else moment.replace(tzinfo=datetime.UTC))


@audit_app.command()
def export(
    since: Since = None,
    until: Until = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; default stdout.", show_default=False)
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Print entries as lines of JSON, oldest first. The trail gets an entry about the export before it begins."""
    from services.audit.trail import command_event

    first, last = _time("--since", since), _time("--until", until)
    with _opened(data_dir) as (table, _):
        table.check_key()
        table.append([command_event("audit.export")])
        with table.snapshot(first, last) as snapshot:
            lines = _lines(snapshot.entries, snapshot.previous)
            if output is None:
                for line in lines:
                    typer.echo(line)
            else:
                _write(output, lines)


def _lines(entries: Iterator[Entry], previous: str | None) -> Iterator[str]:
    for entry in entries:
        yield json.dumps(entry.document() | {"previous": previous})
        previous = entry.hash


def _write(path: Path, lines: Iterator[str]) -> None:
    """Write a file that has all lines, or none."""
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("w", encoding="ascii") as file:
            file.writelines(f"{line}\n" for line in lines)
        part.replace(path)
    except OSError as error:
        raise DermisError(f"--output: {path} cannot be written: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)


@audit_app.command()
def verify(
    since: Since = None,
    until: Until = None,
    file: Annotated[
        Path | None, typer.Option(help="Check an export instead of the database.", show_default=False)
    ] = None,
    head: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NUMBER:HASH",
            help="An entry that was kept elsewhere, such as an earlier head; repeatable.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Lines of DERMIS_AUDIT_LOG or of an export, which must agree with the trail.", show_default=False
        ),
    ] = None,
    unsigned_until: UnsignedUntil = 0,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Check that no entry was changed, removed, inserted or moved. Status 1 if one was."""
    from services.audit.verification import verify as verify_trail
    from services.audit.verification import verify_part

    first, last = _time("--since", since), _time("--until", until)
    known = [*(_head("--head", text) for text in head or ()), *_known(against)]
    options: dict[str, Any] = {"unsigned_until": unsigned_until, "known": known}
    if file is not None:
        if first is not None or last is not None:
            raise DermisError("--file: an export is checked as a whole, without --since and --until")
        from services.audit.trail import read_key
        from services.settings import read_settings

        documents = _documents(file, strict=True)
        previous = documents[0].get("previous") if documents else None
        entries = [_entry(file, document) for document in documents]
        result = verify_part(
            entries,
            previous if isinstance(previous, str) else None,
            key=read_key(read_settings().audit_key_file),
            **options,
        )
    else:
        with _opened(data_dir) as (table, key), table.snapshot(first, last) as snapshot:
            if first is None and last is None:
                result = verify_trail(snapshot, key=key, **options)
            else:
                result = verify_part(snapshot.entries, snapshot.previous, key=key, **options)
    _print_result(result, as_json, whole=file is None and first is None and last is None)
    if not result.intact:
        raise typer.Exit(1)


def _print_result(result: Verification, as_json: bool, *, whole: bool) -> None:
    cut = result.cut
    if as_json:
        document = {
            "intact": result.intact,
            "entries": result.entries,
            "first": result.first,
            "head": None if result.last is None else str(result.last),
            "unsigned": result.unsigned,
            "signatures_checked": result.signatures_checked,
            "unchecked": result.unchecked,
            "cut": None if cut is None else cut.document(),
            "problems": result.problems,
            "more_problems": result.more,
        }
        typer.echo(json.dumps(document, indent=2))
        return
    console = table_console()
    if result.last is None:
        console.print("no entries")
    else:
        console.print(f"entries {result.first} to {result.last.number}", highlight=False)
        console.print(f"head {result.last}", highlight=False, soft_wrap=True)
    if cut is not None:
        console.print(
            f"cut: entries {cut.object} were removed at {cut.time} by {cut.subject}", highlight=False, markup=False
        )
    if 0 < result.unsigned < result.entries:
        console.print(f"not signed: {result.unsigned} of {result.entries} entries", highlight=False)
    if result.unsigned < result.entries and not result.signatures_checked:
        console.print("signatures not checked, because DERMIS_AUDIT_KEY_FILE is not set", highlight=False)
    if result.unchecked:
        entries = "1 entry" if result.unchecked == 1 else f"{result.unchecked} entries"
        console.print(f"not checked: {entries}, because the hash of the entry before is not known", highlight=False)
    for problem in result.problems:
        console.print(f"PROBLEM {problem}", highlight=False, markup=False, soft_wrap=True)
    if result.more:
        console.print(f"and {result.more} more problems", highlight=False)
    if result.intact:
        console.print("intact" if whole else "intact, as far as these entries show", highlight=False)


def _head(option: str, text: str) -> Head:
    from services.audit.trail import Head

    number, colon, value = text.strip().partition(":")
    if not colon or not number.isdecimal() or len(value) != 64:
        raise DermisError(f"{option}: {text[:100]!r} is not a number, a colon and a hash of 64 digits")
    return Head(int(number), value)


def _known(path: Path | None) -> list[Entry]:
    """The entries in collected lines."""
    if path is None:
        return []
    entries = [_entry(path, document) for document in _documents(path, strict=False)]
    if not entries:
        raise DermisError(f"--against: {path} has no line of an audit trail")
    return entries


def _documents(path: Path, *, strict: bool) -> list[dict[str, Any]]:
    """The entries in a file: lines of an export, or of DERMIS_AUDIT_LOG among others."""
    documents = []
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    value = None
                document = value.get("audit", value) if isinstance(value, dict) else None
                if isinstance(document, dict) and "hash" in document:
                    documents.append(document)
                elif strict and line.strip():
                    raise DermisError(f"{path}: line {number} is not an entry of an audit trail")
    except OSError as error:
        raise DermisError(f"{path} cannot be read: {error.strerror}") from None
    return documents


def _entry(path: Path, document: dict[str, Any]) -> Entry:
    from services.audit.trail import Entry

    try:
        return Entry.of(document)
    except ValueError as error:
        raise DermisError(f"{path}: an entry cannot be read: {error}") from None


@audit_app.command()
def cut(
    before: Annotated[
        str, typer.Option(help="Remove entries of earlier times: a date or time in UTC.", show_default=False)
    ],
    unsigned_until: UnsignedUntil = 0,
    data_dir: DataDir = None,
) -> None:
    """Remove old entries, and append a mark that says so. Export and verify them first."""
    from services.audit.trail import command_event
    from services.audit.verification import verify as verify_trail

    moment = _time("--before", before)
    assert moment is not None
    with _opened(data_dir) as (table, key):
        table.check_key()
        with table.snapshot() as snapshot:
            if not verify_trail(snapshot, key=key, unsigned_until=unsigned_until).intact:
                raise DermisError(
                    "the audit trail is not intact, so nothing is removed; `dermis audit verify` says why"
                )
        mark = table.cut(moment, command_event("audit.cut"))
    signed = "signed" if key is not None else "not signed, because DERMIS_AUDIT_KEY_FILE is not set"
    typer.echo(f"entries {mark.object} are removed; entry {mark.number} says so ({signed})")
