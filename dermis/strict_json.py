"""JSON of files that other people wrote: bounded, without repeated keys, with finite numbers of 64 bits."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

from dermis.errors import escape

MAX_DEPTH = 64
_LEAST, _GREATEST = -(1 << 63), (1 << 63) - 1
_INTEGER_DIGITS = 20  # no 64-bit integer with its sign is longer


def parse_json(data: bytes) -> Any:
    """The document of UTF-8 bytes. ValueError, naming the field where there is one, if it cannot be used.

    Python's parser alone accepts a repeated key, NaN, numbers of any size and half of a surrogate pair, and ends in a
    RecursionError where values are nested deeply. The caller limits the number of bytes.
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
        raise ValueError(f"the key {escape(repeated)} is there more than once")
    return document


def _integer(text: str) -> int | float:
    # Python refuses integers of thousands of digits with a message that names no field; infinity is refused below.
    return int(text) if len(text) <= _INTEGER_DIGITS else math.inf


def _problem(value: Any, depth: int) -> tuple[list[str], str] | None:
    """The keys that lead to the first unusable value, innermost first, and what is wrong with it."""
    if depth > MAX_DEPTH:
        return [], f"values are nested more than {MAX_DEPTH} deep"
    if isinstance(value, str):
        return None if value.isascii() or _is_text(value) else ([], "is not valid Unicode")
    if isinstance(value, float):
        return None if math.isfinite(value) else ([], "must be a finite number within 64 bits")
    if isinstance(value, int):
        return None if _LEAST <= value <= _GREATEST else ([], "must be a number within 64 bits")
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
