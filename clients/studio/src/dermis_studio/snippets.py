"""The request of a page as a command of curl and as a program in Python."""

from __future__ import annotations

import json
import pprint
import shlex
from collections.abc import Mapping
from typing import Any


def curl(base_url: str, path: str, body: Mapping[str, Any], *, with_key: bool) -> str:
    """Return a command that posts a JSON body.

    Args:
        base_url: Address of the service.
        path: Path of the API, such as /v1/images.
        body: The body.
        with_key: Whether the service needs a key, which the command reads from DERMIS_API_KEY.
    """
    lines = [f"curl -sS {shlex.quote(base_url + path)}"]
    if with_key:
        lines.append('-H "Authorization: Bearer $DERMIS_API_KEY"')
    lines.append("-H 'Content-Type: application/json'")
    lines.append(f"-d {shlex.quote(json.dumps(body))}")
    return " \\\n  ".join(lines)


def python(base_url: str, call: str, arguments: Mapping[str, Any], then: str) -> str:
    """Return a program for the client of Python, which reads a key from DERMIS_API_KEY.

    Args:
        base_url: Address of the service.
        call: The method, such as `images.generate`.
        arguments: Its arguments by name.
        then: Lines that use `result`.
    """
    given = "".join(f"        {name}={pprint.pformat(value, width=80)},\n" for name, value in arguments.items())
    indented = "".join(f"    {line}\n" for line in then.splitlines())
    return (
        f"from dermis_client import DermisClient\n\nwith DermisClient({base_url!r}) as client:\n"
        f"    result = client.{call}(\n{given}    )\n{indented}"
    )
