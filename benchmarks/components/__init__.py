"""Real servers that benchmarks and tests start on the loopback address and stop again: PostgreSQL, S3, proxies with faults."""

from __future__ import annotations

import shutil
import socket
from contextlib import ExitStack


class MissingComponentError(RuntimeError):
    """A program that is needed is not installed on this machine."""


def free_ports(number: int) -> list[int]:
    """Ports of the loopback address that are free at the moment, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [each.getsockname()[1] for each in sockets]


def free_port() -> int:
    """A port of the loopback address that is free at the moment."""
    return free_ports(1)[0]


def chromium() -> str | None:
    """The program of Chromium or Chrome; None if neither is installed."""
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
