"""Text and JSON from a service or a file: safe to print, safe to read. Pure functions."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

MOST_LIST_BYTES = 64 << 20  # of the list of a dataset's files, and of its manifest.json: some 200,000 files
MOST_DEPTH = 64  # levels of JSON; an answer of a dermis service has less than 10


def printable(text: str) -> str:
    """The text with every character escaped that a terminal would obey and not show, such as \\x1b, and line breaks."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str, limit: int = 500) -> str:
    """The text as one printable line of at most `limit` characters: line breaks become spaces, the rest is escaped."""
    flat = printable(" ".join(text[: 4 * limit].split()))
    return flat if len(flat) <= limit and len(text) <= 4 * limit else flat[: limit - 3] + "..."


def printable_json(value: Any) -> str:
    """JSON for people and programs: letters of every script as they are, other characters escaped as JSON does."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return "".join(c if c.isprintable() or c == "\n" else _json_escape(c) for c in text)


def _json_escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))


def load_json(text: bytes | str) -> Any:
    """The JSON value in an answer. Raises ValueError, also for what is no JSON (NaN), infinite or nested too deeply."""
    try:
        value = json.loads(text, parse_constant=_no_number, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]
        if not level:
            return value
    raise ValueError("it is nested too deeply")


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{one_line(text, 30)} is too large a number")
    return number
