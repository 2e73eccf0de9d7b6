"""Make a dataset by many independent processes: which shards a process makes, and exit statuses for a cluster's Jobs."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Annotated, Any, ParamSpec, TypeVar

import typer

from commands.console import error_message
from dermis.errors import BundleError, DermisError, MissingShardsError, OtherDatasetError, RequestError, escape

INDEX_VARIABLE = "JOB_COMPLETION_INDEX"
"""Environment variable in which Kubernetes gives the pods of an Indexed Job their number."""
BAD_INPUT = 2
"""Exit status of errors that a repetition cannot correct."""

ShardsOption = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help=f"Make part I (the first is 0) of N equal parts, without finishing. auto/N takes I from {INDEX_VARIABLE}.",
    ),
]

P = ParamSpec("P")
T = TypeVar("T")


def part_of(text: str, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Parse `I/N` or `auto/N`.

    Args:
        text: Value of the option `--shards`.
        environment: Environment variables, from which `auto` takes I.

    Returns:
        I, from 0 to N - 1, and N.

    Raises:
        RequestError: The text has another form, or I is not below N.
    """
    index, _, number = text.partition("/")
    if index == "auto":
        index = environment.get(INDEX_VARIABLE, "")
        if not index:
            raise RequestError("--shards", f"auto needs the environment variable {INDEX_VARIABLE}, which is not set")
    if not (re.fullmatch(r"[0-9]{1,9}", index) and re.fullmatch(r"[0-9]{1,9}", number)):
        raise RequestError("--shards", f"{escape(text)!r} is not of the form I/N or auto/N, such as 0/16")
    if int(index) >= int(number):
        raise RequestError("--shards", f"part {int(index)} of {int(number)} does not exist; the first part is 0")
    return int(index), int(number)


def shards_of(part: tuple[int, int], total: int) -> list[int]:
    """Return the shards of a part: every N-th one, so that parts differ by one shard at most."""
    index, number = part
    return list(range(index, total, number))


def with_status_of_bad_input(command: Callable[P, T]) -> Callable[P, T]:
    """Let `dermis generate` end with status 2 for bad input, where it is run by a Job (`--shards`, `--finalize`).

    A Job repeats other failures, such as storage that cannot be reached, and ends at once with this status.
    """

    @wraps(command)
    def run(*args: P.args, **options: P.kwargs) -> T:
        try:
            return command(*args, **options)
        except DermisError as error:
            if not (_is_part_of_job(options) and _is_bad_input(error)):
                raise
            typer.echo(f"error: {escape(error_message(error), limit=4000)}", err=True)
            raise typer.Exit(BAD_INPUT) from error

    return run


def _is_part_of_job(options: Mapping[str, Any]) -> bool:
    return options.get("shards") is not None or bool(options.get("finalize_only"))


def _is_bad_input(error: DermisError) -> bool:
    """Whether the same command would fail again. A bundle that could not be read has the storage's error as its cause."""
    if isinstance(error, BundleError):
        return error.__cause__ is None
    return isinstance(error, RequestError | MissingShardsError | OtherDatasetError)
