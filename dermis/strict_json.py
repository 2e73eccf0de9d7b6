"""Parse untrusted JSON: limited depth, no repeated keys, and only finite numbers of 64 bits."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

from dermis.errors import escape

MAX_DEPTH = 64
_MIN_INTEGER, _MAX_INTEGER = -(1 << 63), (1 << 63) - 1
_INTEGER_DIGITS = 20  # the longest 64-bit integer, with its sign


def parse_json(data: bytes) -> Any:
    """Parse a document of UTF-8 bytes.

    Python's parser accepts repeated keys, NaN, numbers of any size and half of a surrogate pair, and raises RecursionError if
    values are nested deeply. The caller limits the number of bytes.

    Raises:
        ValueError: The document cannot be used. The message names the field if there is one.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_constant=lambda _: math.nan,
        )
    except RecursionError:
        raise ValueError(f"values are nested more than {MAX_DEPTH} deep") from None
    except UnicodeDecodeError:
        raise ValueError("the text is not UTF-8") from None
    problem = _problem(value, 0)
    if problem is not None:
        path, reason = problem
        raise ValueError(f"{escape('.'.join(reversed(path))) or 'the document'}: {reason}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        repeated = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {escape(repeated)} occurs more than once")
    return document


def _integer(text: str) -> int | float:
    # Python's error for integers of thousands of digits names no field. As infinity they are refused below.
    return int(text) if len(text) <= _INTEGER_DIGITS else math.inf


def _problem(value: Any, depth: int) -> tuple[list[str], str] | None:
    """Return the keys to the first unusable value, innermost first, and what is wrong with it."""
    if depth > MAX_DEPTH:
        return [], f"values are nested more than {MAX_DEPTH} deep"
    if isinstance(value, str):
        return None if value.isascii() or _is_text(value) else ([], "is not valid Unicode")
    if isinstance(value, float):
        return None if math.isfinite(value) else ([], "must be a finite number within 64 bits")
    if isinstance(value, int):
        return None if _MIN_INTEGER <= value <= _MAX_INTEGER else ([], "must be a number within 64 bits")
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        if isinstance(key, str) and not key.isascii() and not _is_text(key):
            return [], "a key is not valid Unicode"
        problem = _problem(item, depth + 1)
        if problem is not None:
            problem[0].append(str(key))
            return problem
    return None


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
