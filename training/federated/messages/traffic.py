"""The number of bytes that a grid sends and receives, without those of the network protocols."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid


class Traffic(NamedTuple):
    """Bytes from the server to all clients (`down`) and from the clients to the server (`up`)."""

    down: int = 0
    up: int = 0


class CountingGrid:
    """A grid that counts the bytes of all records. It has only the methods that the server calls."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._down = self._up = 0

    def get_node_ids(self) -> Iterable[int]:
        return self._grid.get_node_ids()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        sent = list(messages)
        self._down += sum(_bytes(message.content) for message in sent)
        replies = list(self._grid.send_and_receive(sent, timeout=timeout))
        self._up += sum(_bytes(reply.content) for reply in replies if reply.has_content())
        return replies

    def take(self) -> Traffic:
        """Return the traffic since the last call."""
        traffic = Traffic(self._down, self._up)
        self._down = self._up = 0
        return traffic


def _bytes(content: RecordDict) -> int:
    return sum(
        record.count_bytes() if isinstance(record, ArrayRecord) else sum(_size(value) for value in record.values())
        for record in content.values()
    )


def _size(value: object) -> int:
    if isinstance(value, list):
        return sum(_size(each) for each in value)
    return len(value) if isinstance(value, (bytes, str)) else 8
