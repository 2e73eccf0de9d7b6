"""Real servers that benchmarks and tests start on the loopback address and stop again: PostgreSQL, S3, proxies with faults."""

from __future__ import annotations

import random
import shutil
import socket
from contextlib import ExitStack, suppress


class MissingComponentError(RuntimeError):
    """A program that is needed is not installed on this machine."""


def free_ports(number: int) -> list[int]:
    """Ports of the loopback address that are free at the moment, all different.

    They are below those that systems give to connections, so that no client takes one before its server has started.
    """
    ports: list[int] = []
    with ExitStack() as stack:
        for port in random.SystemRandom().sample(range(20_000, 32_000), 1000 + number):
            if len(ports) == number:
                break
            with suppress(OSError):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
                ports.append(port)
    if len(ports) < number:
        raise OSError(f"no {number} free ports between 20,000 and 32,000")
    return ports


def free_port() -> int:
    """A port of the loopback address that is free at the moment."""
    return free_ports(1)[0]


def chromium() -> str | None:
    """The program of Chromium or Chrome; None if neither is installed."""
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
