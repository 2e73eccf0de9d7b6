"""Output of all commands: tables that keep their width in a pipe, and one-line errors that name options."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

import typer

from dermis.errors import DermisError, RequestError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from dermis.bundle import Bundle

_UNLIMITED = 10_000  # characters; rich assumes 80 without a terminal

# Options whose names differ from the fields of the request.
_OPTIONS = {
    "classifier.keep": "--keep",
    "classifier.score": "--score",
    "classifier.threshold": "--threshold",
    "classifier.min_probability": "--min-probability",
    "classifier.max_probability": "--max-probability",
    "classifier.tries": "--tries",
    "classifier": "the classifier (--keep, --threshold, --min-probability, --max-probability, --tries)",
    "privacy.gate": "--gate",
    "privacy.percentile": "--percentile",
    "privacy.on_reject": "--on-reject",
    "privacy.tries": "--gate-tries",
    "privacy.detect_copies": "--detect-copies",
    "privacy": "--gate",
}
_FIELDS = (
    "min_probability", "max_probability", "on_reject", "truncation_psi", "truncation_cutoff", "noise_mode", "image_format",
    "image_quality", "shard_size", "classifier.tries", "classifier.keep", "privacy.tries",
)  # fmt: skip
_WORD = re.compile(r"(?<![\w.-])(" + "|".join(re.escape(name) for name in _FIELDS) + r")(?!\w)")


def table_console(*, stderr: bool = False) -> Console:
    """Create a console for tables: as wide as the terminal, or of unlimited width in a pipe or a file."""
    from rich.console import Console

    console = Console(stderr=stderr)
    if not console.is_terminal:
        console.width = _UNLIMITED
    return console


def folding_table(*columns: str) -> Table:
    """Create a table whose cells are broken over several lines where the terminal is narrow."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def option_of(field: str) -> str:
    """Return the command-line option of a field of a request, such as --gate-tries for privacy.tries."""
    if field.startswith("-"):
        return field
    if field.startswith("classes."):
        return f"--{field}"
    if field.split(".", maxsplit=1)[0] == "edits":
        return "--edit"
    return _OPTIONS.get(field, f"--{field.replace('_', '-')}")


def warn_of_removed_audit(before: Bundle, part: str) -> None:
    """Say that attaching a part has removed the privacy audit that a bundle had before (`dermis.bundle.amend_bundle`)."""
    if before.privacy_audit is not None:
        typer.echo(f"the privacy audit was removed: it did not attack this {part}; repeat it with --attach", err=True)


def error_message(error: DermisError) -> str:
    """Return the message of an error, with the names of options in place of fields."""
    if not isinstance(error, RequestError):
        return str(error)
    message = _WORD.sub(lambda match: option_of(match[1]), error.message.removeprefix("Value error, "))
    return f"{option_of(error.field)}: {message}" if error.field else message


def usage_message(error: Exception) -> str | None:
    """Return the message of a usage error, "" if help has been printed; None for an error of another kind.

    Typer raises exceptions of click, or of its own copy of click, so they are recognised by their attributes.
    """
    format_message = getattr(error, "format_message", None)
    if not callable(format_message):
        return None
    message = str(format_message())
    if not message or "Usage:" in message:  # called without a command
        print(message, file=sys.stderr)
        return ""
    # Typer and click both suggest names.
    message = re.sub(r"( Did you mean [^?]*\?)(\1| \(Did you mean [^)]*\))", r"\1", " ".join(message.split()))
    program = getattr(getattr(error, "ctx", None), "command_path", None)
    return f"{message.rstrip('.')}; see: {program} --help" if program else message
