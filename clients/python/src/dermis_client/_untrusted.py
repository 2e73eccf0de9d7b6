"""Text and JSON from a service or a file, made safe to print and to parse. Pure functions."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

MAX_LIST_BYTES = 64 << 20  # the list of a dataset's files and its manifest.json: about 200,000 files
MAX_DEPTH = 64  # nesting levels of JSON; responses of a dermis service have fewer than 10


def without_query(address: object) -> str:
    """Return a URL without user name, password, query and fragment, which may contain a signature, as one printable line."""
    return one_line(re.sub("(?<=//)[^/]*@", "", re.split("[?#]", str(address), maxsplit=1)[0]))


def printable(text: str) -> str:
    """Escape line breaks and every other character that is not printable, such as \\x1b."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str, limit: int = 500) -> str:
    """Return the text as one printable line of at most `limit` characters; line breaks become spaces."""
    flat = printable(" ".join(text[: 4 * limit].split()))
    return flat if len(flat) <= limit and len(text) <= 4 * limit else flat[: limit - 3] + "..."


def printable_json(value: Any) -> str:
    """Return indented JSON in which letters of every script stay and characters that are not printable are escaped."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return "".join(c if c.isprintable() or c == "\n" else _json_escape(c) for c in text)


def _json_escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))


def load_json(text: bytes | str) -> Any:
    """Parse JSON strictly.

    Raises:
        ValueError: The text is not valid JSON, holds NaN or an infinite number, or is nested too deeply.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value]
    for _ in range(MAX_DEPTH):
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


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{one_line(text, 30)} is too large a number")
    return number
