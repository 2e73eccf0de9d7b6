"""Which file names from a service are safe to write into a folder. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable

from dermis_client._foreign import one_line
from dermis_client.errors import IntegrityError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


def is_safe(name: str) -> bool:
    """Whether a name is one plain file name on every system: no folder, no device, nothing hidden, no trailing dot."""
    return bool(_NAME.fullmatch(name)) and not name.endswith(".") and not _DEVICE.fullmatch(name)


def check(names: Iterable[str], source: str) -> None:
    """Raise IntegrityError if a name is not safe to write, looks like our own unfinished files, or comes twice."""
    seen: set[str] = set()
    for name in names:
        if not is_safe(name) or name.endswith(".part"):
            raise IntegrityError(f"{source} names a file {one_line(repr(name), 120)}: not safe to write", name=name)
        if name.casefold() in seen:  # also on file systems that do not tell case apart
            raise IntegrityError(f"{source} names the file {name} twice", name=name)
        seen.add(name.casefold())
