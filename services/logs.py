"""One line for each event: time, level, logger, message and key=value pairs. Never a body, never an image."""

from __future__ import annotations

import logging
import time
from typing import Any

_STANDARD = frozenset(logging.LogRecord("", 0, "", 0, "", None, None).__dict__) | {"message", "asctime", "taskName"}
_HANDLER_NAME = "dermis"


class LineFormatter(logging.Formatter):
    """`2026-11-23T08:00:00.123Z INFO dermis.http request method=GET path=/v1/models status=200 ms=1.2`"""

    converter = time.gmtime  # type: ignore[assignment]

    def format(self, record: logging.LogRecord) -> str:
        stamp = f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d}Z"
        parts = [stamp, record.levelname, record.name, _plain(record.getMessage())]
        extra = {key: value for key, value in record.__dict__.items() if key not in _STANDARD}
        parts += [f"{key}={_value(value)}" for key, value in extra.items() if value is not None]
        if record.exc_info:
            parts.append(f"trace={_value(self.formatException(record.exc_info))}")
        return " ".join(parts)


def configure(level: str) -> None:
    """Send our loggers, and those of the libraries that talk in our name, to stderr as lines. May be called again."""
    handler = logging.StreamHandler()
    handler.set_name(_HANDLER_NAME)
    handler.setFormatter(LineFormatter())
    for name, least in (("dermis", level), ("dbos", "WARNING"), ("httpx", "WARNING"), ("uvicorn.error", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(least)


def _plain(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = _plain(str(value))
    if text and all(character.isprintable() and character not in ' "=' for character in text):
        return text
    return '"' + text.replace('"', '\\"') + '"'
